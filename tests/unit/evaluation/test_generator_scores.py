import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import train_ar
from evaluation import generator_scores
from evaluation.generator_scores import warnings_of
from modeling.generator import Generator
from modeling.weights.tensors import read_state_dict, write_state_dict
from tests.refusals import refusal
from tests.tiny import tiny_cache, tiny_generator

RUN = """
model:
  vq_model: {codebook_size: 32, image_size: 16, patch_size: 4}
  generator:
    {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, image_seq_len: 21,
     condition_num_classes: 3, dropout: 0.1}
dataset: {params: {num_workers_per_gpu: 0}}
optimizer: {params: {learning_rate: 1.0e-2}}
lr_scheduler: {params: {warmup_steps: 2}}
experiment: {log_every: 3, eval_every: 3, generate_every: 0, save_every: 3}
training: {per_gpu_batch_size: 4, max_train_steps: 6, mixed_precision: 'no'}
"""


def write_cache(folder, codebook=32, classes=3, tokenizer="abc", seed=0, tokens=21, first=0):
    """Nine images, two views each, of the classes `first`, `first` + 1, … in turn."""
    rng = np.random.default_rng(seed)
    codes = (rng.integers(0, 3, (9, 2, tokens)) + np.arange(tokens)) % codebook
    names = [f"class{i}" for i in range(first, first + classes)]
    labels = [i % classes for i in range(9)]
    return tiny_cache(folder, codes, labels, names, codebook, "abcdefghi", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs of six steps, with checkpoints of steps 3 and 6, and the held-out cache."""
    root = tmp_path_factory.mktemp("runs")
    (root / "run.yaml").write_text(RUN)
    write_cache(root / "train")
    write_cache(root / "val", seed=1)
    for name, option in (("a", "training.use_ema=True"), ("b", "training.seed=5")):
        train_ar.main(
            [f"config={root}/run.yaml", f"experiment.output_dir={root}/{name}", option,
             f"dataset.params.pretokenization={root}/train",
             f"dataset.params.val_pretokenization={root}/val"]
        )  # fmt: skip
    return root


@pytest.fixture
def score(runs, tmp_path, monkeypatch, capsys):
    """Run evaluate.py on the CPU; returns the JSON result and all that it said."""
    monkeypatch.chdir(tmp_path)

    def start(*argv):
        evaluate.main([*map(str, argv), "--num_workers=0", "--device=cpu"])
        said = capsys.readouterr().out
        return json.loads(said.strip().splitlines()[-1]), said

    return start


@pytest.mark.parametrize("run", ["a", "b"])  # with an average of the weights and without
def test_loss_is_the_trainers_own_validation_loss(score, runs, run):
    records = [json.loads(line) for line in (runs / run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if "val/loss" in record][-1]
    result, _ = score("--generator", runs / run, "--cache", runs / "val", "--batch_size=5")
    assert result["generator"]["step"] == last["step"] == 6
    assert result["metrics"]["nats_per_code"] == pytest.approx(last["val/loss"], rel=1e-6)
    assert result["metrics"]["top1"] == pytest.approx(last["val/accuracy"], rel=1e-6)


def test_a_weights_file_scores_as_its_run_does(score, runs):
    run, _ = score("--generator", runs / "b", "--cache", runs / "val")
    file, said = score("--generator", runs / "b/generator.bin", "--cache", runs / "val")
    assert file["metrics"] == run["metrics"] and file["generator"]["step"] is None
    for words in ("prefix", "row 4", "nats/code", "bits per image", "18 views"):
        assert words in said


def test_labels_are_those_of_the_classes_names(score, runs, tmp_path):
    fewer = write_cache(tmp_path / "fewer", classes=2, first=1, seed=1)
    # What this one was trained on is not known.
    write_state_dict(read_state_dict(runs / "b/generator.bin"), tmp_path / "unnamed.bin")
    shutil.copy(runs / "b/generator.safetensors", tmp_path / "named.safetensors")
    weights = (runs / "b", runs / "b/generator.bin", "named.safetensors", "unnamed.bin")
    found = [score("--generator", file, "--cache", fewer) for file in weights]
    run, file, named, unnamed = (result["metrics"] for result, _ in found)
    assert run == file == named != unnamed
    assert ["warning: " in said for _, said in found] == [False, False, False, True]
    # The trainer's own loss on this cache is the same.
    train_ar.main(
        [f"config={runs}/run.yaml", f"experiment.output_dir={tmp_path}/c", "training.seed=5",
         f"dataset.params.pretokenization={runs}/train", f"dataset.params.val_pretokenization={fewer}"]
    )  # fmt: skip
    records = [json.loads(line) for line in (tmp_path / "c/metrics.jsonl").read_text().splitlines()]
    assert run["nats_per_code"] == pytest.approx(records[-1]["val/loss"], rel=1e-6)
    other = write_cache(tmp_path / "other", classes=2, first=2)
    refusal(lambda: score("--generator", runs / "b", "--cache", other), other, "class3")


def test_labels_beyond_the_classes_are_refused(score, runs, tmp_path):
    shutil.copytree(runs / "val", tmp_path / "val")
    (file,) = (tmp_path / "val").glob("labels*")
    labels = np.fromfile(file, np.int32)
    labels[4] = -1
    labels.tofile(file)
    call = partial(score, "--generator", runs / "a", "--cache", tmp_path / "val")
    refusal(call, tmp_path / "val", "3 classes")


def test_a_checkpoint_is_scored(score, runs):
    step = runs / "a/checkpoints/step-00000003"
    folder, _ = score("--generator", step, "--cache", runs / "val")
    file, _ = score("--generator", step / "generator.safetensors", "--cache", runs / "val")
    assert folder["metrics"] == file["metrics"] and folder["generator"]["step"] == 3
    (runs / "latest").symlink_to(step)
    assert (
        score("--generator", runs / "latest", "--cache", runs / "val")[0]["generator"]["step"] == 3
    )


def test_a_checkpoint_is_compared_with_runs(score, runs):
    step = runs / "a/checkpoints/step-00000003"
    result, _ = score("--generator", step, "--cache", runs / "val", "--compare", runs / "b")
    steps = [one["generator"]["step"] for one in (result, *result["compared"])]
    assert steps == [3, 3] and result["generator"]["path"] == str(step)


def test_precision_is_the_one_asked_for(score, runs):
    common = ("--generator", runs / "b", "--cache", runs / "val")
    exact, half = (score(*common, f"--precision={name}")[0] for name in ("fp32", "bf16"))
    assert (exact["precision"], half["precision"]) == ("fp32", "bf16")
    assert exact["metrics"] == score(*common)[0]["metrics"]
    nats = exact["metrics"]["nats_per_code"]
    assert 0 < abs(half["metrics"]["nats_per_code"] - nats) < 0.02 * nats


def test_picture_is_drawn(score, runs, tmp_path):
    score("--generator", runs / "b", "--cache", runs / "val", "--picture", tmp_path / "p/a.png")
    picture = np.asarray(Image.open(tmp_path / "p/a.png").convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10


def test_other_runs_are_scored_at_the_same_step(score, runs, tmp_path):
    shutil.copytree(runs / "b", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints/step-00000006")
    result, said = score(
        "--generator", runs / "a", "--cache", runs / "val", "--compare", tmp_path / "b"
    )
    assert result["generator"]["step"] == 3 and result["compared"][0]["generator"]["step"] == 3
    file = runs / "b/checkpoints/step-00000003/generator.safetensors"
    alone, _ = score("--generator", file, "--cache", runs / "val")
    assert result["compared"][0]["metrics"] == alone["metrics"]
    assert said.count("bits per image") == 2


def test_the_picture_has_the_curves_of_other_runs(score, runs, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        generator_scores, "plot_positions", lambda scored, path: drawn.append(scored)
    )
    score("--generator", runs / "a", "--cache", runs / "val", "--compare", runs / "b")
    (scored,) = drawn
    assert list(scored) == [str(runs / "a"), str(runs / "b")]
    first, second = (likelihood.positions[0] for likelihood in scored.values())
    assert not torch.equal(first, second)


# ---------------------------------------------------------------------- bad input
def test_runs_without_a_common_step_are_refused(score, runs, tmp_path):
    shutil.copytree(runs / "b", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints/step-00000006")
    file = runs / "a/checkpoints/step-00000006/generator.safetensors"
    common = ("--cache", runs / "val", "--compare", tmp_path / "b")
    refusal(lambda: score("--generator", file, *common), f"{file}: 6", "b: 3", "keep_every")
    file = runs / "a/generator.bin"
    refusal(lambda: score("--generator", file, *common), file, "--compare")


def test_a_cache_of_other_codes_is_refused(score, runs, tmp_path):
    run, step = runs / "a", "checkpoints/step-00000006/generator.safetensors"
    for file in ("generator.safetensors", step):
        shutil.copy(run / file, tmp_path / file.replace("/", "-"))  # it says whose codes it models
    larger = write_cache(tmp_path / "larger", codebook=64)
    other = write_cache(tmp_path / "other", tokenizer="xyz")
    alone = write_cache(tmp_path / "alone", tokens=16)  # without prefix tokens
    more = write_cache(tmp_path / "more", classes=4)
    copies = tmp_path / "generator.safetensors", tmp_path / step.replace("/", "-")
    for weights, cache, named in (
        (run / "generator.bin", larger, ["codebook size 64 there, 32 here"]),
        *[(file, other, ["tokenizer xyz there, abc here"]) for file in (run, *copies)],
        *[
            (file, alone, ["codes per image 16 there, 21 here"])
            for file in (run, run / "generator.bin", run / step)
        ],
        (run, more, ["4 classes", "3"]),
    ):
        refusal(partial(score, "--generator", weights, "--cache", cache), cache, *named)


def test_a_cache_without_all_classes_is_warned_of(score, runs, tmp_path):
    fewer = write_cache(tmp_path / "fewer", classes=2)
    write_state_dict(read_state_dict(runs / "a/generator.bin"), tmp_path / "a.bin")  # says nothing
    _, said = score("--generator", tmp_path / "a.bin", "--cache", fewer)
    assert "warning: " in said and "2 of the generator's 3 classes" in said


def test_a_cache_of_other_synsets_than_imagenets_is_warned_of():
    def said(classes):
        config = SimpleNamespace(condition_num_classes=2)
        store = SimpleNamespace(folder="cache", classes=classes)
        return warnings_of(store, SimpleNamespace(config=config))

    (warning,) = said(["n01443537", "n01440764"])
    assert warning.startswith("cache: the 2 classes are synsets, but not ImageNet's 1000")
    assert said(["cat", "dog"]) == []


def test_a_cache_that_is_one_view_short_is_refused(score, runs, tmp_path):
    packed = tmp_path / "packed"
    shutil.copytree(runs / "val", packed)
    shard = packed / "codes-00000.bin"
    shard.write_bytes(shard.read_bytes()[: -2 * 21])
    call = partial(score, "--generator", runs / "a", "--cache", packed)
    refusal(call, shard, "714 bytes", "756 bytes")
    for image, views in (("0", 2), ("1", 1)):
        (tmp_path / "files/class0").mkdir(parents=True, exist_ok=True)
        codes = np.zeros((views, 21), np.int64)
        np.savez(tmp_path / f"files/class0/{image}.JPEG.npz", codes=codes)
    call = partial(score, "--generator", runs / "a", "--cache", tmp_path / "files")
    refusal(call, "1.JPEG.npz", "(1, 21)")


def test_a_published_cache_that_joins_its_views_is_refused_with_its_defect(score, runs, tmp_path):
    (tmp_path / "files/class0").mkdir(parents=True)
    np.savez(tmp_path / "files/class0/a.JPEG.npz", codes=np.zeros((1, 2 * 273), np.int64))
    call = partial(score, "--generator", runs / "a/generator.bin", "--cache", tmp_path / "files")
    refusal(call, "two views", "pretokenization.py")


def test_files_that_are_no_generator_are_refused(score, runs, tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "x.bin")
    (tmp_path / "empty").mkdir()
    whole = Generator(tiny_generator(codebook_size=32, image_seq_len=21)).state_dict()
    torch.save({k: v for k, v in whole.items() if k != "norm.weight"}, tmp_path / "part.bin")
    whole["output.weight"].fill_(3e38)  # finite, but what it is multiplied with overflows
    torch.save(whole, tmp_path / "huge.bin")
    for weights, named in (
        ("x.bin", "generator"),
        ("empty", "checkpoints"),
        ("none.bin", "no weights"),
        ("part.bin", "norm.weight"),
        ("huge.bin", runs / "val"),
    ):
        call = partial(score, "--generator", weights, "--cache", runs / "val")
        refusal(call, weights, named)


def test_every_generator_of_a_comparison_meets_the_caches_own_classes(score, runs, monkeypatch):
    """One that numbers them among more classes must not change what the next one is checked against."""
    met, original = [], generator_scores.open_generator

    def renumbering(opened, store):
        met.append(list(store.classes))
        generator = original(opened, store)
        store.use_classes([*store.classes, "one more"])
        return generator

    monkeypatch.setattr(generator_scores, "open_generator", renumbering)
    score("--generator", runs / "a", "--cache", runs / "val", "--compare", runs / "b")
    assert met[0] == met[1] and "one more" not in met[1]


def test_a_damaged_checkpoint_is_not_compared(score, runs, tmp_path):
    shutil.copytree(runs / "b", tmp_path / "b")
    weights = tmp_path / "b/checkpoints/step-00000006/generator.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    common = ("--cache", runs / "val", "--compare", tmp_path / "b")
    refusal(lambda: score("--generator", runs / "a", *common), "step-00000006")
