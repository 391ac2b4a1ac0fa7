"""A run's folder in place of a weights file, read without the trainers."""

import shutil

import pytest
import torch

from modeling.weights import runs
from modeling.weights.runs import find_weights
from tests.refusals import refusal
from training import checkpoint


@pytest.fixture
def run(tmp_path):
    for step in (3, 6):
        weights = {"generator": ({"w": torch.ones(1)}, None), "ema": ({"w": torch.zeros(1)}, None)}
        checkpoint.save(tmp_path / "run", step, weights, {}, keep=2)
    return tmp_path / "run"


def test_a_file_is_itself_and_a_run_is_its_newest_checkpoint(run):
    step6 = run / "checkpoints/step-00000006"
    assert find_weights(run, "ema") == step6 / "ema.safetensors"
    assert find_weights(str(run), "generator") == step6 / "generator.safetensors"
    step3 = run / "checkpoints/step-00000003"
    assert find_weights(step3, "generator") == step3 / "generator.safetensors"
    assert find_weights(run / "g.bin", "generator") == run / "g.bin"


def test_only_the_file_that_is_used_is_read(run, monkeypatch):
    read = []
    entry = runs.file_entry
    monkeypatch.setattr(runs, "file_entry", lambda file: read.append(file.name) or entry(file))
    find_weights(run, "ema")
    assert read == ["ema.safetensors"]


def flip(file):
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize("damage", ["flip", "manifest", "weights", "gone"])
def test_a_damaged_newest_checkpoint_is_left_for_the_one_before(run, caplog, damage):
    step6 = run / "checkpoints/step-00000006"
    if damage == "flip":
        flip(step6 / "ema.safetensors")
    elif damage == "manifest":
        (step6 / "manifest.json").unlink()
    elif damage == "weights":
        (step6 / "ema.safetensors").unlink()
    else:
        shutil.rmtree(step6)
        shutil.copytree(
            run / "checkpoints/step-00000003", run / "checkpoints/step-00000009.partial"
        )
    assert find_weights(run, "ema") == run / "checkpoints/step-00000003/ema.safetensors"
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (damage != "gone") and all("missing or damaged" in line for line in said)


def test_damage_is_refused_where_no_other_is_meant_or_there(run):
    step3, step6 = (run / f"checkpoints/step-0000000{step}" for step in (3, 6))
    flip(step6 / "ema.safetensors")
    for named in (step6, step6 / "ema.safetensors"):
        refusal(lambda named=named: find_weights(named, "ema"), step6, "altered")
    flip(step3 / "ema.safetensors")
    refusal(lambda: find_weights(run, "ema"), run, "altered")
    assert find_weights(run, "generator").parent == step6


def test_what_cannot_be_used_is_refused(run, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    refusal(lambda: find_weights(tmp_path / "empty", "generator"), tmp_path / "empty")
    refusal(lambda: find_weights(run, "tokenizer"), run, "tokenizer")

    def forbid(file):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(runs, "file_entry", forbid)  # root, who runs tests, may read anything
    refusal(lambda: find_weights(run, "ema"), "permission", "ema")
