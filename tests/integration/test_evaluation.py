"""Scores of the real programs: evaluate.py on two ranks, and the hooks of trainers and sampler."""

import json
import shutil

import numpy as np
import pytest
import torch

import evaluation.evaluator
from evaluation.features import INCEPTION_FILE
from tests.inception import TinyFeatures
from tests.integration.conftest import execute, without_weights
from tests.integration.test_bad_input import refused
from tests.integration.test_pipeline import records


def pictures(count, size=16):
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, size // 4, size // 4, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)  # fmt: skip


def result_of(text):
    return json.loads(text.strip().splitlines()[-1])


# Sums over 2,048 features take as long on every rank, and the roots of their covariances longer.
TINY_EVALUATE = """
import evaluation.evaluator
from tests.inception import TinyFeatures

evaluation.evaluator.NETWORKS["inception"] = TinyFeatures
import evaluate
from runtime.program import run

run(evaluate.main)
"""


def test_two_ranks_give_the_figures_of_one(tmp_path):
    # 7 and 9 images in batches of 3: neither divides evenly, and statistics stand for the images.
    (tmp_path / "evaluate.py").write_text(TINY_EVALUATE)
    np.savez(tmp_path / "samples.npz", pictures(7))
    np.savez(tmp_path / "reference.npz", pictures(9))
    command = [
        tmp_path / "evaluate.py", "--num_samples=7", "--batch_size=3",
        f"--samples={tmp_path}/samples.npz", f"--reference={tmp_path}/reference.npz",
    ]  # fmt: skip
    one = execute(*command, f"--save_stats={tmp_path}/stats.npz")
    two = execute(*command, ranks=2)
    first, second = result_of(one.stdout), result_of(two.stdout)
    assert second["metrics"] == pytest.approx(first["metrics"], rel=1e-9)
    assert second["samples"] == first["samples"] and second["reference"] == first["reference"]
    assert first["metrics"]["gFID"] > 1 and (tmp_path / "stats.npz").exists()


@pytest.mark.slow
@without_weights
def test_the_selfcheck_holds_on_two_ranks(tmp_path):
    done = execute("evaluate.py", "--selfcheck", "--device=cpu", ranks=2)
    assert result_of(done.stdout)["passed"] and done.stdout.count("  passed") == 1


@without_weights
def test_missing_inception_weights_end_in_one_line(tmp_path):
    np.savez(tmp_path / "a.npz", pictures(4))
    done = execute(
        "evaluate.py", f"--samples={tmp_path}/a.npz", f"--reference={tmp_path}/a.npz",
        "--num_samples=4", f"--save_stats={tmp_path}/stats.npz", check=False,
        env={"TORCH_HOME": str(tmp_path)},
    )  # fmt: skip
    refused(done, f"no {INCEPTION_FILE} in weights/", "weights/README.md")
    assert not (tmp_path / "stats.npz").exists()


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Run programs here, on features that cost nothing, with a reference at hand."""
    monkeypatch.setitem(evaluation.evaluator.NETWORKS, "inception", TinyFeatures)
    np.savez(tmp_path / "reference.npz", pictures(15))
    yield tmp_path / "reference.npz"
    torch.set_grad_enabled(True)


def test_sampler_scores_its_samples(workspace, tmp_path, tiny, capsys):
    import sample_imagenet

    argv = [
        f"config={workspace.root}/generator.yaml", f"experiment.output_dir={tmp_path}/samples",
        f"experiment.generator_checkpoint={workspace.generator}", "experiment.num_fid_samples=14",
        f"experiment.tokenizer_checkpoint={workspace.tokenizer}", f"experiment.fid_reference={tiny}",
    ]  # fmt: skip
    sample_imagenet.main(argv)
    first = result_of(capsys.readouterr().out)
    assert first["samples"]["images"] == first["images_asked"] == 14
    assert first["samples"]["path"] == f"{tmp_path}/samples.npz"
    sample_imagenet.main(argv)  # complete by now
    assert result_of(capsys.readouterr().out) == first


def test_sweep_samples_each_cell_as_the_sampler_does_and_loads_weights_once(
    workspace, tmp_path, tiny, monkeypatch
):
    import generation.job
    from evaluation import sweep

    loads = []
    load = generation.job.load_models
    monkeypatch.setattr(
        generation.job, "load_models", lambda *given: loads.append(given) or load(*given)
    )
    sweep.main([
        f"--reference={tiny}", "--scales=1,3", "--powers=0.5", "--num_samples=14",
        f"--output={tmp_path}/sweep", f"config={workspace.root}/generator.yaml",
        f"experiment.generator_checkpoint={workspace.generator}",
        f"experiment.tokenizer_checkpoint={workspace.tokenizer}",
    ])  # fmt: skip
    assert len(loads) == 1  # whatever the number of cells
    workspace.sample(
        tmp_path / "samples", "experiment.num_fid_samples=14", "model.generator.guidance_scale=3",
        "model.generator.guidance_scale_pow=0.5",
    )  # fmt: skip
    codes = tmp_path / "sweep/scale3_power0.5_codes.npz"
    assert codes.read_bytes() == (tmp_path / "samples_codes.npz").read_bytes()
    settings = json.loads((tmp_path / "samples/sampling.json").read_text())
    weights = json.loads((tmp_path / "sweep/scale3_power0.5.json").read_text())["weights"]
    assert weights == {name: settings[name] for name in ("tokenizer", "generator")}


def test_generator_is_scored_in_training_as_its_samples_are(workspace, tmp_path, tiny):
    import train_ar

    run = tmp_path / "run"
    knobs = ["model.generator.top_k=5", "model.generator.guidance_schedule=linear"]
    train_ar.main([
        *knobs,
        f"config={workspace.root}/generator.yaml", f"experiment.output_dir={run}",
        f"experiment.tokenizer_checkpoint={workspace.tokenizer}",
        f"dataset.params.pretokenization={workspace.cache}", f"experiment.fid_reference={tiny}",
        "experiment.num_fid_samples=14", "experiment.generate_every=4",
    ])  # fmt: skip
    scored = [r for r in records(run) if "val/gFID" in r]
    assert [r["step"] for r in scored] == [4, 6]
    assert scored[0].keys() >= {"val/sFID", "val/IS", "val/precision", "val/recall"}
    assert not any("rFID" in key for r in records(run) for key in r)
    workspace.sample(
        tmp_path / "samples", "experiment.num_fid_samples=14", *knobs,
        f"experiment.generator_checkpoint={run}/generator.bin",
    )  # fmt: skip
    import evaluate

    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "print_result", said.append)
        evaluate.main([
            f"--samples={tmp_path}/samples.npz", f"--reference={tiny}", "--num_samples=14",
        ])  # fmt: skip
    assert said[0]["metrics"]["gFID"] == pytest.approx(scored[-1]["val/gFID"], rel=1e-5)


def test_scoring_changes_nothing_of_the_training(workspace, tmp_path, tiny):
    import train_ar

    argv = [
        f"config={workspace.root}/generator.yaml", f"experiment.output_dir={tmp_path}/run",
        f"experiment.tokenizer_checkpoint={workspace.tokenizer}",
        f"dataset.params.pretokenization={workspace.cache}", f"experiment.fid_reference={tiny}",
        "experiment.num_fid_samples=14",
    ]  # fmt: skip
    train_ar.main(argv)
    expected = [r["loss"] for r in records(workspace.generator.parent) if "loss" in r]
    assert [r["loss"] for r in records(tmp_path / "run") if "loss" in r] == expected


def test_tokenizer_is_scored_in_training(workspace, tmp_path, tiny):
    from train_tokenizer import __main__ as trainer

    run, val = tmp_path / "run", tmp_path / "val"
    shutil.copytree(workspace.root / "train", val)  # more images than neighbours
    trainer.main([
        f"config={workspace.root}/stage1.yaml", f"experiment.output_dir={run}",
        f"dataset.params.train_dir={workspace.root}/train", f"dataset.params.val_dir={val}",
        f"experiment.fid_reference={tiny}",
    ])  # fmt: skip
    scored = [r for r in records(run) if "val/rFID" in r]
    assert [r["step"] for r in scored] == [3, 6]
    assert not any("gFID" in key for r in records(run) for key in r)
    losses = [[r["loss"] for r in records(p) if "loss" in r] for p in (run, workspace.stage1_run)]
    assert losses[0] == losses[1]


def test_reference_without_what_it_needs_is_refused(workspace, tmp_path):
    done = workspace.train_ar(
        tmp_path / "a", "experiment.fid_reference=ref.npz", "experiment.generate_every=0",
        check=False,
    )  # fmt: skip
    refused(done, "fid_reference=ref.npz needs experiment.generate_every")
    assert not (tmp_path / "a").exists()
