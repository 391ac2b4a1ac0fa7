import json
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image

import runtime.processes
import train_ar
from configs.load import load
from configs.schema import GeneratorRun, OptimizerParams
from configs.sizes import with_weights
from modeling.generator import Generator
from modeling.weights.metadata import GENERATOR, TOKENIZER, about_model
from modeling.weights.opened import Opened, open_file
from modeling.weights.tensors import read_model, read_state_dict, write_state_dict
from runtime import processes
from runtime.errors import InputError
from tests.compilations import count_by_step
from tests.host_syncs import count_in
from tests.refusals import refusal
from tests.tars import flattened
from tests.tiny import tiny_cache, tiny_generator, tiny_tokenizer
from training import checkpoint, optim, run

TINY = """
model:
  vq_model: {codebook_size: 32, image_size: 16, patch_size: 4}
  generator:
    {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, image_seq_len: 21,
     condition_num_classes: 3, dropout: 0, attn_drop: 0, tok_dropout: 0}
dataset: {params: {num_workers_per_gpu: 0}}
optimizer: {params: {learning_rate: 1.0e-2}}
lr_scheduler: {params: {warmup_steps: 5, count_from: 1}}
experiment: {log_every: 1, eval_every: 10, generate_every: 0, save_every: 100}
training:
  {per_gpu_batch_size: 4, gradient_accumulation_steps: 2, max_train_steps: 20,
   mixed_precision: 'no'}
"""
CLASSES = "condition_num_classes: 3,"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Codes that follow class and place, but for noise, so that there is something to learn."""
    folder = tmp_path_factory.mktemp("data") / "cache"
    rng = np.random.Generator(np.random.Philox(7))
    labels = [i % 3 for i in range(24)]
    line = np.array(labels)[:, None, None] * 5 + np.arange(21) * 3
    return tiny_cache(folder, (line + rng.integers(0, 3, (24, 2, 21))) % 32, labels)


@pytest.fixture
def state_classes(monkeypatch):
    """Has the config say this instead of the number of classes."""
    config = TINY
    return lambda text: monkeypatch.setitem(globals(), "TINY", config.replace(CLASSES, text))


def train_in(folder, cache, *options, run="run"):
    (folder / "tiny.yaml").write_text(TINY)
    arguments = [f"config={folder}/tiny.yaml", f"experiment.output_dir={folder / run}"]
    for name in ("pretokenization", "val_pretokenization"):
        arguments.append(f"dataset.params.{name}={cache}")
    train_ar.main([*arguments, *options])
    lines = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def train(cache, tmp_path):
    """Run the program in this process; the records of metrics.jsonl come back."""
    return partial(train_in, tmp_path, cache)


# ---------------------------------------------------------------------- the recipe
def test_decayed_parameters_are_exactly_the_papers():
    model = Generator(tiny_generator())
    groups = optim.adamw(train_ar.parameter_groups(model, 0.03), OptimizerParams()).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in groups)
    matrices = ("attn.qkv", "attn.proj", "mlp.w1", "mlp.w2", "mlp.w3")
    rest = ("norm1.weight", "norm2.weight", "attn.q_norm.weight", "attn.k_norm.weight",
            "attn.qkv.bias", "attn.proj.bias")  # fmt: skip
    assert decayed == {f"blocks.{i}.{m}.weight" for i in (0, 1) for m in matrices} | {
        "output.weight"
    }
    assert others == {f"blocks.{i}.{name}" for i in (0, 1) for name in rest} | {
        "embeddings.weight",
        "norm.weight",
        "output.bias",
    }
    assert [group["weight_decay"] for group in groups] == [0.03, 0.0]
    assert all(group["betas"] == (0.9, 0.96) and group["fused"] for group in groups)


def test_losses_are_the_golden_ones(train, golden):
    records = train()
    figures = golden("generator_training.json")
    for name in ("loss", "val/loss"):
        values = [record[name] for record in records if name in record]
        np.testing.assert_allclose(values, figures[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_is_compiled_after_the_first_step(train, monkeypatch, recompute):
    """The blocks share one program, and the loss is another; evaluation runs eagerly."""
    before_step = count_by_step(train_ar, monkeypatch)
    train(
        "training.compile=True", "training.max_train_steps=4", "experiment.eval_every=2",
        f"model.generator.use_checkpoint={recompute}",
    )  # fmt: skip
    assert before_step == [0, 2, 2, 2]


# ---------------------------------------------------------------------- data
def write_cache(folder, classes, labels=None, seed=7, **about):
    """24 images of 2 views; image i has the label `labels[i]`, without them i mod classes."""
    rng = np.random.Generator(np.random.Philox(seed))
    labels = [i % len(classes) for i in range(24)] if labels is None else labels
    return tiny_cache(folder, rng.integers(0, 32, (24, 2, 21)), labels, classes, **about)


def test_validation_classes_are_the_training_sets_by_name(train, tmp_path):
    """A cache that lacks a class, in another order, scores as one that has them all."""
    whole = write_cache(tmp_path / "whole", ["a", "b", "c"], [2, 1] * 12)
    other = write_cache(tmp_path / "other", ["c", "b"], [0, 1] * 12)
    shifted = write_cache(tmp_path / "shifted", ["a", "b"], [0, 1] * 12)
    losses = [
        train(
            "training.max_train_steps=4", f"dataset.params.val_pretokenization={cache}",
            run=cache.name,
        )[-1]["val/loss"]
        for cache in (whole, other, shifted)
    ]  # fmt: skip
    assert losses[0] == losses[1] != losses[2]


def test_every_weights_file_of_a_run_says_what_it_is(train, tmp_path):
    train("training.max_train_steps=10", "training.use_ema=True")
    run = tmp_path / "run"
    sizes = tiny_generator(codebook_size=32, image_seq_len=21)
    expected = about_model(GENERATOR, sizes, "none", classes=["a", "b", "c"])
    found = sorted(run.rglob("*.safetensors"))
    names = {path.name.removesuffix(".safetensors") for path in found}
    assert names == {"generator", "generator_raw", "generator_best"} and len(found) == 4
    found += run.glob("*.bin")
    assert len(found) == 6 and all(read_model(path, "generator")[1] == expected for path in found)


def test_classes_of_samples_go_by_the_names_of_the_training_set(train, tmp_path, tokenizer):
    given = ["training.max_train_steps=1", "experiment.generate_every=1"]
    train(*given, "experiment.classes=[c,none,0]")
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["experiment"]["classes"] == [2, "none", 0]
    refusal(lambda: train(*given, "experiment.classes=[cc]", run="other"), "cc", "c (class 2)")
    assert not (tmp_path / "other").exists()


class StandIn:
    """A tokenizer that needs no weights: the code of a patch is its brightness."""

    def to(self, device):
        return self

    requires_grad_ = to

    seen = None  # the type that it computed in
    exact = False  # whether it was told to compute in full float32

    def freeze_encoder(self):
        StandIn.exact = True

    def encode(self, images):
        autocast = torch.is_autocast_enabled("cpu")
        StandIn.seen = torch.get_autocast_dtype("cpu") if autocast else torch.float32
        grey = images.mean(1)[:, ::4, ::4].flatten(1)
        codes = torch.cat([grey, grey[:, :5]], 1)
        return (codes.clamp(0, 0.99) * 32).long()


@pytest.fixture
def tokenizer(monkeypatch):
    opened = SimpleNamespace(state={})
    monkeypatch.setattr(train_ar, "open_on_all", lambda *_: opened)
    monkeypatch.setattr(train_ar, "with_weights", lambda options, weights: options)
    monkeypatch.setattr(train_ar, "load_tokenizer", lambda *_: StandIn())
    monkeypatch.setattr(train_ar, "fingerprint", lambda _: "none")
    monkeypatch.setattr(train_ar, "sample_grid", lambda *args: torch.zeros(40, 3, 16, 16))


def test_caches_of_encoders_with_other_heads_are_refused(train, tmp_path, tokenizer):
    cache = write_cache(tmp_path / "val", ["a", "b", "c"], encoder_heads=3)
    option = f"dataset.params.pretokenization={cache}"
    heads = "experiment.generate_every=10", "model.vq_model.encoder_heads=12"
    refusal(lambda: train(option, *heads), "encoder_heads 3 there, 12 here")
    other = write_cache(tmp_path / "other", ["a", "b", "c"], encoder_heads=4)
    val = f"dataset.params.val_pretokenization={other}"  # no tokenizer at hand
    refusal(lambda: train(option, val), "encoder_heads 4 there, 3 here")
    train(option, f"dataset.params.val_pretokenization={cache}", "training.max_train_steps=1")


def test_header_names_the_classes_and_warns_of_missing_ones(
    train, cache, tmp_path, capsys, state_classes
):
    train("training.max_train_steps=1")
    said = capsys.readouterr().out
    assert f"{cache}: 24 images, 3 classes of 3 configured (a, b, c)" in said
    assert said.count("warning") == 1 and "validation data equals the training data" in said
    state_classes("condition_num_classes: 10,")
    train("training.max_train_steps=1", run="ten")
    said = capsys.readouterr().out
    assert "3 classes of 10 configured" in said
    about = read_model(tmp_path / "ten/generator.bin", "generator")[1]
    assert about.without_images(range(10)) == list(range(3, 10))
    assert "warning: 7 of model.generator.condition_num_classes=10 classes have no image" in said
    assert "meaningless; set it to 3 for a model of the data's classes" in said


def test_classes_are_counted_in_the_data(train, tmp_path, state_classes):
    state_classes("")
    name, steps = "model.generator.condition_num_classes", "training.max_train_steps=2"
    five = f"dataset.params.pretokenization={write_cache(tmp_path / 'five', list('abcde'))}"
    whole = train(five, steps, "experiment.save_every=1")
    assert (
        read_model(tmp_path / "run/generator.bin", "generator")[1].config["condition_num_classes"]
        == 5
    )
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["model"]["generator"]["condition_num_classes"] == 5
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000002")
    again = train(five, steps, "experiment.save_every=1", f"{name}=5")
    assert without_clock(again) == without_clock(whole)
    named = f"{name}=4", f"{tmp_path}/five", "5 classes"
    refusal(lambda: train(five, f"{name}=4", run="other"), *named, "the command line")
    state_classes("condition_num_classes: 4,")
    refusal(lambda: train(five, run="other"), *named, "tiny.yaml, line")
    assert not (tmp_path / "other").exists()
    train(five, f"{name}=6", steps, run="six")  # as a file may, with a warning
    assert (
        read_model(tmp_path / "six/generator.bin", "generator")[1].config["condition_num_classes"]
        == 6
    )


def test_a_resumed_run_keeps_its_number_of_classes(train, tmp_path, state_classes, capsys):
    """A preset's may be more than the data has; the command that resumes need not name the preset."""
    state_classes("condition_num_classes: 10,")
    whole = train("training.max_train_steps=2", "experiment.save_every=1")
    assert "; set it to 3" in capsys.readouterr().out
    state_classes("")
    for stated in ([], ["model.generator.condition_num_classes=10"]):
        shutil.rmtree(tmp_path / "run/checkpoints/step-00000002")
        again = train("training.max_train_steps=2", "experiment.save_every=1", *stated)
        assert without_clock(again) == without_clock(whole)
        said = capsys.readouterr().out
        assert "samples of them will be meaningless" in said and "set it to 3" not in said
    assert (
        read_model(tmp_path / "run/generator.bin", "generator")[1].config["condition_num_classes"]
        == 10
    )


def test_more_classes_than_a_resumed_run_has_need_a_run_from_its_weights(
    train, tmp_path, state_classes
):
    state_classes("")
    train("training.max_train_steps=1")
    more = f"dataset.params.pretokenization={write_cache(tmp_path / 'more', list('abcde'))}"
    named = tmp_path / "run/config.yaml", "5 classes", "experiment.init_weights"
    refusal(lambda: train(more, f"experiment.resume={tmp_path}/run", run="fork"), *named)
    refusal(lambda: train(more), *named)
    train(more, f"experiment.init_weights={tmp_path}/run", "training.max_train_steps=1", run="b")


def test_a_run_without_a_tokenizer_says_nothing_of_its_sizes(train, tmp_path):
    """Any decoder of the codes may then sample from the run."""
    train("training.max_train_steps=1")
    run = f"config={tmp_path}/run"
    read = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"]["vq_model"]
    assert read == {"codebook_size": 32, "image_size": 16, "patch_size": 4}
    sizes = tiny_tokenizer(codebook_size=32, patch_size=4, num_buffer_tokens=3)
    opened = Opened(tmp_path / "t.pth", {}, about_model(TOKENIZER, sizes))
    used = with_weights(load(GeneratorRun, [run], "sample_imagenet"), opened)
    assert used.model.vq_model.num_buffer_tokens == 3
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000001")
    train_ar.main([run])


def test_header_warns_of_synsets_in_another_number_than_imagenets(train, tmp_path, capsys):
    cache = write_cache(tmp_path / "synsets", ["n01440764", "n01443537", "n01494475"])
    caches = [
        f"dataset.params.{name}={cache}" for name in ("pretokenization", "val_pretokenization")
    ]
    train(*caches, "training.max_train_steps=1")
    said = capsys.readouterr().out
    assert "warning: " in said and "the 3 classes are synsets, but not ImageNet's 1000" in said
    assert "(class 2 is n01494475, ImageNet's is n01484850)" in said


def test_a_seed_may_be_larger_than_numpys(train):
    train("training.max_train_steps=1", "training.seed=20261130120000")


def test_fewer_examples_are_of_all_classes(train, tmp_path, capsys, monkeypatch):
    cache = write_cache(tmp_path / "sorted", ["a", "b", "c"], [i // 8 for i in range(24)])
    drawn = set()
    original = train_ar.TrainTokens.__getitem__
    monkeypatch.setattr(
        train_ar.TrainTokens, "__getitem__", lambda s, key: (drawn.add(key[1]), original(s, key))[1]
    )
    few = [f"dataset.params.pretokenization={cache}", "experiment.max_train_examples=9"]
    train(*few, "training.max_train_steps=2")
    assert drawn == {1, 4, 6, 9, 12, 14, 17, 20, 22}
    said = capsys.readouterr().out
    assert "sorted: 24 images, 3 classes of 3 configured" in said
    assert "warning: experiment.max_train_examples=9 leaves images out: 15 of 24, evenly" in said
    refusal(lambda: train(few[0], "training.max_train_steps=2"), "images (9 there, 24 now)")


@pytest.fixture
def folder(tmp_path):
    """Twelve images of three classes, two of them unreadable."""
    rng = np.random.default_rng(0)
    for i in range(12):
        path = tmp_path / "images" / "abc"[i % 3] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        if i in (4, 8):
            path.write_bytes(b"no image")
    return tmp_path / "images"


def test_unreadable_training_images_are_replaced_listed_and_counted(
    train, tmp_path, folder, tokenizer, capsys
):
    options = [f"dataset.params.train_dir={folder}", "dataset.params.val_pretokenization=null"]
    for given, named in ([], "N"), (["dataset.params.skip_unreadable=1"], "1"):
        call = partial(train, *options, *given, run=named)
        refusal(call, f"dataset.params.skip_unreadable={named}")
    capsys.readouterr()
    options += ["dataset.params.skip_unreadable=2", "experiment.save_every=4"]
    whole = train(*options, "training.max_train_steps=8")
    listed = (tmp_path / "run/unreadable.txt").read_text().splitlines()
    assert sorted(listed) == [str(folder / "b/04.png"), str(folder / "c/08.png")]
    assert "warning: 2 unreadable images are replaced by others; " in capsys.readouterr().out
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000008")
    again = train(*options, "training.max_train_steps=8", "dataset.params.num_workers_per_gpu=1")
    assert without_clock(again) == without_clock(whole)
    assert (tmp_path / "run/unreadable.txt").read_text().splitlines() == listed


def test_images_in_no_folders_train_as_one_class(
    train, tmp_path, folder, tokenizer, state_classes, capsys
):
    state_classes("")
    flattened(folder, tmp_path / "flat")
    train(
        "training.max_train_steps=1", f"dataset.params.train_dir={tmp_path}/flat",
        "dataset.params.val_pretokenization=null", "dataset.params.skip_unreadable=2",
    )  # fmt: skip
    assert "flat: 12 images, 1 class of 1 configured (images)" in capsys.readouterr().out
    about = read_model(tmp_path / "run/generator.bin", "generator")[1]
    assert about.classes == ["images"] and about.config["condition_num_classes"] == 1


def test_images_are_encoded_in_float32(train, folder, tokenizer):
    """Without autocast and, on a GPU, without TF32: like pretokenization's, codes near a boundary too."""
    AcceleratorState._reset_state(True)  # this process may train in another autocast type
    train(
        "training.mixed_precision=bf16", "training.max_train_steps=1",
        f"dataset.params.train_dir={folder}", "dataset.params.val_pretokenization=null",
        "dataset.params.skip_unreadable=2",
    )  # fmt: skip
    AcceleratorState._reset_state(True)
    assert StandIn.seen == torch.float32 and StandIn.exact


def test_dry_run_counts_unreadable_images_and_leaves_nothing(
    cache, tmp_path, folder, tokenizer, monkeypatch
):
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    train_ar.main([
        f"config={tmp_path}/tiny.yaml", f"experiment.output_dir={tmp_path}/run", "--dry-run",
        f"dataset.params.train_dir={folder}", "dataset.params.skip_unreadable=2",
    ])  # fmt: skip
    assert sorted(tmp_path.rglob("*")) == before


def test_skipping_images_of_a_cache_is_refused(train):
    refusal(
        lambda: train("dataset.params.skip_unreadable=3"), "skip_unreadable=3", "--skip_unreadable"
    )


def unknown_class(folder):
    write_cache(folder, ["a", "b", "z"])


def large_codes(folder):
    """In the published layout, which states no codebook size."""
    for name in "abc":
        (folder / name).mkdir(parents=True)
        codes = np.full((2, 21), 31 if name != "c" else 32)
        np.savez(folder / name / "0.JPEG.npz", codes=codes)


def large_labels(folder):
    write_cache(folder, ["a", "b", "c"])
    (folder / "labels.bin").write_bytes(np.full(24, 3, "<i4").tobytes())


def other_weights(file):
    torch.save({"w": torch.zeros(3)}, file)


@pytest.mark.parametrize(
    "option, make, named",
    [
        ("dataset.params.val_pretokenization", unknown_class, "z"),
        ("dataset.params.pretokenization", large_codes, "beyond 31"),
        ("dataset.params.val_pretokenization", large_codes, "beyond 31"),
        ("dataset.params.pretokenization", large_labels, "3 classes"),
        ("dataset.params.val_pretokenization", large_labels, "3 classes"),
        ("experiment.init_weights", lambda path: None, "no weights"),
        ("experiment.init_weights", Path.mkdir, "no checkpoints"),
        ("experiment.init_weights", other_weights, "a generator"),
    ],
)
def test_input_that_does_not_fit_is_refused_before_the_first_step(
    train, tmp_path, option, make, named
):
    make(tmp_path / "given")
    refusal(lambda: train(f"{option}={tmp_path}/given"), tmp_path / "given", named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", ["collect_samples", "metrics_of"])
def test_scores_that_fail_are_said_and_training_continues(
    train, tmp_path, tokenizer, monkeypatch, capsys, stage
):
    scores = train_ar.in_training
    monkeypatch.setattr(scores, "open_evaluator", lambda *args: object())
    monkeypatch.setattr(scores, "collect_samples", lambda *args: None)
    monkeypatch.setattr(scores, "metrics_of", lambda *args: {"gFID": 1.0})

    def fail(*args):
        raise InputError("no room")

    options = ["experiment.generate_every=1", "training.max_train_steps=1"]
    assert {"step": 1, "val/gFID": 1.0} in train(*options, run="works")
    monkeypatch.setattr(scores, stage, fail)
    assert not any("val/gFID" in record for record in train(*options))
    assert "warning: gFID failed: no room; training continues" in capsys.readouterr().out
    assert (tmp_path / "run/generator.bin").exists()


# ---------------------------------------------------------------------- what a person watches
def test_mfu_is_logged_with_a_known_peak(train, monkeypatch):
    monkeypatch.setattr("training.run.peak_flops", lambda *_: 1e12)
    assert train("training.max_train_steps=1")[0]["mfu"] > 0


def test_records_say_how_fast_and_how_long(train, capsys):
    records = train("training.max_train_steps=3")
    assert {"lr", "images/s", "images/s per device", "data wait", "hours left"} <= records[0].keys()
    assert records[0]["hours left"] > 0 and records[1]["hours left"] > 0
    assert "mfu" not in records[0]  # no peak is known of a CPU
    header = capsys.readouterr().out
    for words in ("24 images; 8 per step = 4 x 1 ranks x 2; steps 1 to 3, 1.0 epochs",
                  "0.5 epochs of all views (2 per image)", "expected time"):  # fmt: skip
        assert words in header


def test_only_reporting_steps_wait_for_the_device(train, monkeypatch):
    syncs = count_in(train_ar, monkeypatch)
    with syncs:
        train("experiment.log_every=4", "training.max_train_steps=8", "training.use_ema=True")
    assert {step: found for step, found in syncs.found.items() if step not in (4, 8)} == {}
    assert set(syncs.found) == {4, 8}


# ---------------------------------------------------------------------- averages and export
def exported(run, name="generator"):
    return read_state_dict(run / f"{name}.bin")


def raw(run, step):
    """The weights that training continues from."""
    return read_state_dict(run / f"checkpoints/step-{step:08d}/generator_raw.safetensors")


def test_the_average_starts_with_the_weights_and_follows_them(train, tmp_path):
    options = ["training.use_ema=True", "training.max_train_steps=1", "training.ema_warmup=False"]
    weights = {}
    for decay in ("0.0", "0.75", "1.0"):
        train(*options, f"training.ema_decay={decay}", run=decay)
        weights[decay] = exported(tmp_path / decay)["output.bias"]
    last = raw(tmp_path / "1.0", step=1)["output.bias"]
    assert torch.equal(weights["0.0"], last) and last.abs().max() > 0
    assert (weights["1.0"] == 0).all()
    torch.testing.assert_close(weights["0.75"], 0.25 * last)


def test_warm_up_of_the_averages_decay_resumes_where_it_was(train, tmp_path):
    options = ["training.use_ema=True", "training.ema_warmup=True", "training.max_train_steps=4"]
    options += ["experiment.save_every=2", "experiment.keep_checkpoints=9"]
    train(*options, run="whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "halves")
    shutil.rmtree(tmp_path / "halves/checkpoints/step-00000004")
    train(*options, run="halves")
    whole, halves = (exported(tmp_path / run) for run in ("whole", "halves"))
    assert all(torch.equal(whole[k], halves[k]) for k in whole)


def test_best_and_average_are_exported_in_both_formats(train, tmp_path):
    train(
        "training.use_ema=True",
        "training.ema_warmup=False",
        "training.ema_decay=0.5",
        "training.max_train_steps=2",
    )
    for name in ("generator", "generator_best"):
        a, b = (read_state_dict(tmp_path / f"run/{name}{s}") for s in (".bin", ".safetensors"))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    # What was evaluated is the average, and so is the best.
    best, average = (exported(tmp_path / "run", name) for name in ("generator_best", "generator"))
    assert all(torch.equal(best[k], average[k]) for k in average)
    assert not torch.equal(best["output.bias"], raw(tmp_path / "run", step=2)["output.bias"])


# ---------------------------------------------------------------------- checkpoints come first
def without_clock(records):
    clock = ("images/s", "images/s per device", "data wait", "hours left")
    return [{k: v for k, v in record.items() if k not in clock} for record in records]


@pytest.mark.parametrize("moment", ["before the report", "after validation", "after the report"])
def test_reports_that_a_kill_prevented_are_made_on_resuming(train, tmp_path, monkeypatch, moment):
    options = ["experiment.save_every=10", "experiment.eval_every=10"]
    whole = train(*options, run="whole")

    def killed(name, at):
        original = getattr(train_ar, name) if at == "after" else None
        module = run if name == "write_whole" else train_ar

        def function(*args):
            if original is not None:
                original(*args)
            if name != "report" or args[1] == 10:
                raise KeyboardInterrupt

        return module, name, function

    with monkeypatch.context() as patch:
        if moment == "before the report":
            patch.setattr(*killed("report", "before"))
        elif moment == "after validation":
            patch.setattr(*killed("report", "after"))
        else:
            patch.setattr(*killed("write_whole", "before"))
        with pytest.raises(KeyboardInterrupt):
            train(*options)
    assert (tmp_path / "run/checkpoints/step-00000010").is_dir()
    assert without_clock(train(*options)) == without_clock(whole)
    names = [f"generator_best.{suffix}" for suffix in ("bin", "safetensors")]
    assert all(
        (tmp_path / f"run/{name}").read_bytes() == (tmp_path / f"whole/{name}").read_bytes()
        for name in names
    )


def test_best_of_a_resumed_run_is_still_the_best(train, tmp_path):
    options = ["experiment.save_every=10", "experiment.eval_every=10"]
    train(*options)
    best = (tmp_path / "run/generator_best.bin").read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000020")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    (number,) = [i for i, line in enumerate(lines) if '"step": 10, "val/loss"' in line]
    lines[number] = json.dumps({"step": 10, "val/loss": 0.0, "val/accuracy": 1.0})
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "run/generator_best.bin").write_bytes(b"the best")
    train(*options)
    assert (tmp_path / "run/generator_best.bin").read_bytes() == b"the best" != best


@pytest.fixture
def out_of_reach(train, tmp_path, monkeypatch):
    """A run of 20 steps, stopped at 10, whose held-out loss no weights will reach."""
    options = ["experiment.save_every=10", "experiment.eval_every=10"]
    with monkeypatch.context() as patch:
        patch.setattr(train_ar.Likelihood, "figures", lambda self: {"nats": 0.0, "top1": 1.0})
        train(*options)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000020")
    (tmp_path / "run/generator_best.bin").write_bytes(b"the best")
    return options


def test_a_process_with_another_cache_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "on_main", lambda work: {**work(), "codes": "other"})
    refusal(train, "another cache", "codes (other on the main process")
    assert not (tmp_path / "run").exists()


def test_a_report_that_a_second_kill_prevents_is_made_though_an_earlier_start_made_it(
    train, tmp_path, monkeypatch
):
    """`.reported` of steps that are made again says nothing of the new ones."""
    options = ["experiment.save_every=10", "experiment.eval_every=20"]
    whole = train(*options)
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000020")
    report = train_ar.report

    def killed(run, step, *rest):
        if step == 20:
            raise KeyboardInterrupt
        report(run, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train_ar, "report", killed)
        with pytest.raises(KeyboardInterrupt):
            train(*options)
    assert without_clock(train(*options)) == without_clock(whole)


def test_a_run_that_names_itself_keeps_its_best(train, tmp_path, out_of_reach):
    train(*out_of_reach, f"experiment.resume={tmp_path}/run")
    assert (tmp_path / "run/generator_best.bin").read_bytes() == b"the best"


def test_a_fork_exports_a_best_of_its_own(train, tmp_path, out_of_reach):
    train(*out_of_reach, f"experiment.resume={tmp_path}/run", run="fork")
    assert exported(tmp_path / "fork", "generator_best")


def test_losses_of_other_held_out_codes_do_not_compare(train, tmp_path, out_of_reach):
    train(*out_of_reach)
    best = tmp_path / "run/generator_best.bin"
    assert best.read_bytes() == b"the best"
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000020")
    other = write_cache(tmp_path / "other", ["a", "b", "c"], seed=8)
    train(*out_of_reach, f"dataset.params.val_pretokenization={other}")
    assert best.read_bytes() != b"the best"


def test_validation_that_fails_is_said_and_training_continues(train, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise InputError("code 99 out of range in cache")

    monkeypatch.setattr(train_ar, "validate", fail)
    records = train("experiment.save_every=10")
    assert [r["step"] for r in records] == list(range(1, 21))
    said = capsys.readouterr().out
    assert said.count("warning: validation failed: code 99 out of range in cache; training ") == 2
    assert (tmp_path / "run/generator.bin").exists()


def test_training_data_that_fails_ends_training(train, monkeypatch):
    def fail(self, key):
        raise InputError("code 99 out of range in cache")

    monkeypatch.setattr(train_ar.TrainTokens, "__getitem__", fail)
    refusal(train, "code 99")


# ---------------------------------------------------------------------- dry run
@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_dry_run_says_what_the_run_needs_and_writes_nothing(cache, tmp_path, capsys, flag):
    (tmp_path / "tiny.yaml").write_text(TINY)
    before = sorted(tmp_path.rglob("*"))
    train_ar.main([
        f"config={tmp_path}/tiny.yaml", f"experiment.output_dir={tmp_path}/run", flag,
        f"dataset.params.pretokenization={cache}", "training.max_train_steps=3600",
    ])  # fmt: skip
    said = capsys.readouterr().out
    assert re.search(r"memory: [\d.]+ GiB of host memory", said)
    seconds = float(re.search(r"images/s, ([\d.e-]+) s per step", said)[1])
    hours = float(re.search(r"expected time: ([\d.e-]+) hours for the 3600 steps left", said)[1])
    assert hours == pytest.approx(seconds, rel=0.02)
    assert "nothing was written" in said and sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------- bad input
def test_non_finite_loss_stops_without_a_report_due(train, tmp_path):
    refusal(lambda: train(
        "optimizer.params.learning_rate=9e18", "lr_scheduler.params.warmup_steps=1",
        "optimizer.params.weight_decay=1000", "experiment.log_every=100", "experiment.save_every=5",
    ), "step 2: loss")  # fmt: skip
    assert not (tmp_path / "run/checkpoints").exists()


def test_resume_with_other_options_lists_what_differs(train):
    same = "training.max_train_steps=2"
    train(same)
    longer, steps = "training.max_train_steps=4", "training.max_train_steps (2 there, 4 now)"
    for options, named in (
        (
            [longer, "optimizer.params.beta2=0.99"],
            (steps, "optimizer.params.beta2 (0.96 there, 0.99 now)"),
        ),
        ([longer, "--dry-run"], (steps,)),
        (
            [same, "training.gradient_accumulation_steps=1"],
            ("global batch (8 there, 4 now); restore those (on 1 GPUs",),
        ),
        ([same, "experiment.max_train_examples=16"], ("images (24 there, 16 now)",)),
    ):
        said = refusal(partial(train, *options), "experiment.resume=", *named)
        assert said.count(" there, ") == len(named)  # and nothing else


def test_resume_on_other_data_of_the_same_size_is_refused_and_a_fork_is_warned(
    train, tmp_path, capsys
):
    caches = [
        ("codes", write_cache(tmp_path / "codes", ["a", "b", "c"], seed=8)),
        ("classes", write_cache(tmp_path / "classes", ["a", "b", "d"])),
    ]
    train("training.max_train_steps=2")
    before = (tmp_path / "run/generator.bin").read_bytes()
    for name, cache in caches:
        other = f"dataset.params.pretokenization={cache}"
        other = [other, "dataset.params.val_pretokenization=null", "training.max_train_steps=2"]
        refusal(partial(train, *other), f"{name} (")
        assert (tmp_path / "run/generator.bin").read_bytes() == before
        capsys.readouterr()
        longer = [*other[:2], "training.max_train_steps=3"]
        train(*longer, f"experiment.resume={tmp_path}/run", run=f"fork_{name}")
        said = capsys.readouterr().out
        assert re.search(rf"warning: resumes from .* or data: .*{name} \(", said)
        assert "equals the training data" not in said


def test_a_moved_run_resumes_where_it_lies(train, tmp_path, monkeypatch):
    whole = train("training.max_train_steps=4", "experiment.save_every=2", run="whole")
    train("training.max_train_steps=4", "experiment.save_every=2")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    (tmp_path / "there").mkdir()
    (tmp_path / "run").rename(tmp_path / "there/moved")
    monkeypatch.chdir(tmp_path / "there")
    train_ar.main(["config=moved"])
    lines = (tmp_path / "there/moved/metrics.jsonl").read_text().splitlines()
    assert without_clock(map(json.loads, lines)) == without_clock(whole)
    assert not (tmp_path / "run").exists()
    # Another place on the command line is another run.
    train_ar.main(["config=moved/config.yaml", "experiment.output_dir=other"])
    lines = (tmp_path / "there/other/metrics.jsonl").read_text().splitlines()
    assert without_clock(map(json.loads, lines)) == without_clock(whole)


def test_resume_goes_on_where_the_weights_are_not_concerned(train):
    records = train("training.max_train_steps=2", "experiment.save_every=1")
    again = train(
        "training.max_train_steps=2", "experiment.log_every=2", "training.per_gpu_batch_size=8",
        "training.gradient_accumulation_steps=1", "model.generator.guidance_scale=3.0",
    )  # fmt: skip
    assert [r["step"] for r in again] == [r["step"] for r in records]


def test_a_checkpoint_named_on_purpose_starts_another_run(train, tmp_path, capsys):
    train("training.max_train_steps=2")
    records = train(
        "training.max_train_steps=3", f"experiment.resume={tmp_path}/run", run="other"
    )  # fmt: skip
    assert [r["step"] for r in records if "loss" in r] == [3]
    assert "training.max_train_steps (2 there, 3 now)" in capsys.readouterr().out


def test_learning_rate_of_a_step_is_the_same_from_one_batch_or_two(train):
    one = train("training.max_train_steps=3")
    two = train(
        "training.max_train_steps=3", "training.per_gpu_batch_size=8",
        "training.gradient_accumulation_steps=1", run="two",
    )  # fmt: skip
    assert [r["lr"] for r in one if "lr" in r] == [r["lr"] for r in two if "lr" in r]
    losses = [[r["loss"] for r in records if "loss" in r] for records in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


# ---------------------------------------------------------------------- weights to start from
@pytest.fixture(scope="module")
def first_run(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    train_in(
        folder, cache, "training.max_train_steps=10", "training.use_ema=True",
        "training.ema_warmup=False", "training.ema_decay=0.8", run="a",
    )  # fmt: skip
    return folder / "a"


@pytest.fixture
def first(first_run, tmp_path):
    """A run of ten steps with an average, to start others from."""
    return Path(shutil.copytree(first_run, tmp_path / "a"))


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_initial_weights_are_the_average_of_the_run(
    train, tmp_path, first, capsys, monkeypatch, kind
):
    """With rate 0 the weights stay: everything of the file arrives, and nothing else."""
    file, opened = first / ("generator.bin" if kind == "file" else ""), []
    monkeypatch.setattr(
        runtime.processes, "open_file", lambda *of: opened.append(of) or open_file(*of)
    )
    records = train(
        f"experiment.init_weights={file}", "optimizer.params.learning_rate=0", "training.use_ema=True",
        "lr_scheduler.params.end_lr=0", "training.max_train_steps=2", run="b",
    )  # fmt: skip
    wanted = exported(first)
    for found in (exported(tmp_path / "b"), raw(tmp_path / "b", step=2)):
        assert all(torch.equal(found[k], wanted[k]) for k in wanted)
    assert [r["step"] for r in records if "lr" in r] == [1, 2]
    source = file if kind == "file" else first / "checkpoints/step-00000010/generator.safetensors"
    assert opened == [(source, "generator")]  # once
    assert f"starts from {source}: a generator (hidden_size=32" in capsys.readouterr().out


def test_initial_weights_for_the_codes_of_another_tokenizer_are_warned_of(
    train, tmp_path, first, cache, capsys
):
    options = [f"experiment.init_weights={first}", "training.max_train_steps=1"]
    train(*options, run="same")
    assert "another tokenizer" not in capsys.readouterr().out
    theirs = shutil.copytree(cache, tmp_path / "theirs")
    about = json.loads((theirs / "manifest.json").read_text())
    (theirs / "manifest.json").write_text(json.dumps({**about, "tokenizer": "f" * 64}))
    data = [
        f"dataset.params.{name}={theirs}" for name in ("pretokenization", "val_pretokenization")
    ]
    train(*options, *data, run="other")
    assert f"warning: {first}/checkpoints" in (said := capsys.readouterr().out)
    assert "was trained on another tokenizer's codes" in said


def test_optimizer_and_average_of_an_initialised_run_are_new(train, tmp_path, first):
    options = [f"experiment.init_weights={first}/generator.bin", "training.use_ema=True"]
    train(
        *options,
        "training.ema_warmup=False",
        "training.ema_decay=0.75",
        "training.max_train_steps=1",
        run="b",
    )
    before, after, average = (
        state["output.bias"].double()
        for state in (exported(first), raw(tmp_path / "b", step=1), exported(tmp_path / "b"))
    )
    torch.testing.assert_close(average, 0.75 * before + 0.25 * after, rtol=0, atol=1e-7)
    state = checkpoint.load_state(tmp_path / "b/checkpoints/step-00000001")
    assert {float(entry["step"]) for entry in state["optimizer"]["state"].values()} == {1.0}
    assert state["generator_average"] == {"updates": 1}


def test_other_classes_start_from_the_same_codes(train, tmp_path, first, capsys, state_classes):
    state_classes("")
    five = write_cache(tmp_path / "five", list("cdabe"))
    rows = exported(first)["embeddings.weight"]
    train(
        f"experiment.init_weights={first}/generator.bin", "optimizer.params.learning_rate=0",
        "lr_scheduler.params.end_lr=0", f"dataset.params.pretokenization={five}",
        "training.max_train_steps=1", run="b",
    )  # fmt: skip
    found = exported(tmp_path / "b")["embeddings.weight"]
    assert torch.equal(found[:33], rows[:33]) and torch.equal(found[-1], rows[-1])
    assert torch.equal(found[[33, 35, 36]], rows[[35, 33, 34]])  # c, a, b
    torch.testing.assert_close(found[[34, 37]], rows[33:36].mean(0).expand(2, -1))
    assert (
        "5 instead of 3 classes; 2 new, at the mean of the old ones: d, e"
        in capsys.readouterr().out
    )


def test_initial_weights_bring_the_sizes_and_may_be_gone_when_the_run_resumes(
    train, tmp_path, first, monkeypatch
):
    sizes = "hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, "
    monkeypatch.setitem(globals(), "TINY", TINY.replace(sizes, "").replace(CLASSES, ""))
    given = [f"experiment.init_weights={first}", "training.max_train_steps=3"]
    given += ["experiment.save_every=1"]
    whole = train(*given, run="b")
    assert read_model(tmp_path / "b/generator.bin", "generator")[1].config["hidden_size"] == 32
    shutil.rmtree(first)
    for again in (given, given[1:]):
        shutil.rmtree(tmp_path / "b/checkpoints/step-00000003")
        assert without_clock(train(*again, run="b")) == without_clock(whole)
    refusal(lambda: train(*given, run="c"), first)


def test_an_initialised_run_resumes_with_the_same_weights_or_none_and_with_no_others(
    train, tmp_path, first
):
    init, keep = f"experiment.init_weights={first}", "experiment.save_every=2"
    steps = "training.max_train_steps=4"
    whole = train(init, keep, steps, run="whole")
    for again in ([init], []):
        shutil.copytree(tmp_path / "whole", tmp_path / "b")
        shutil.rmtree(tmp_path / "b/checkpoints/step-00000004")
        assert without_clock(train(*again, keep, steps, run="b")) == without_clock(whole)
        assert f"init_weights: {first}" in (tmp_path / "b/config.yaml").read_text()
        shutil.rmtree(tmp_path / "b")
    before = sorted(p.stat().st_mtime_ns for p in (tmp_path / "whole").rglob("*"))
    other = f"{init}/checkpoints/step-00000010/generator_raw.safetensors"
    refusal(lambda: train(other, keep, steps, run="whole"), first, "raw.safetensors")
    refusal(lambda: train(
        init, "training.max_train_steps=10", "training.use_ema=True", "training.ema_warmup=False",
        "training.ema_decay=0.8", run="a",
    ), "init_weights=null")  # fmt: skip
    assert sorted(p.stat().st_mtime_ns for p in (tmp_path / "whole").rglob("*")) == before


@pytest.mark.parametrize(
    "options, words",
    [
        (["model.generator.num_hidden_layers=3"], "num_hidden_layers=3"),
        (["model.generator.hidden_size=64"], "hidden_size=64"),
        (["model.vq_model.codebook_size=64"], "codebook_size=64"),
        (["model.generator.image_seq_len=73", "model.vq_model.image_size=32"], "image_seq_len=73"),
    ],
)
def test_initial_weights_of_another_architecture_are_refused(
    train, tmp_path, monkeypatch, options, words
):
    config = tiny_generator(codebook_size=32, image_seq_len=21)
    file = tmp_path / "generator.bin"
    write_state_dict(Generator(config).state_dict(), file, about_model(GENERATOR, config))
    monkeypatch.setattr(train_ar.TokenCache, "check", lambda *args: None)  # it fits the weights
    call = partial(train, f"experiment.init_weights={file}", *options, run="b")
    refusal(call, f"model.generator.{words}", file)
    assert not (tmp_path / "b").exists()
