"""A run's folder in place of a weights file, read without the trainers."""

import shutil

import pytest
import torch

from modeling.weights.runs import weights_in
from runtime.errors import InputError
from training import checkpoint


@pytest.fixture
def run(tmp_path):
    for step in (3, 6):
        weights = {"generator": {"w": torch.ones(1)}, "ema": {"w": torch.zeros(1)}}
        checkpoint.save(tmp_path / "run", step, weights, {}, keep=2)
    return tmp_path / "run"


def test_a_file_is_itself_and_a_run_is_its_newest_checkpoint(run):
    step6 = run / "checkpoints/step-00000006"
    assert weights_in(run, "ema", "generator") == step6 / "ema.safetensors"
    assert weights_in(str(run), "generator") == step6 / "generator.safetensors"
    step3 = run / "checkpoints/step-00000003"
    assert weights_in(step3, "none", "generator") == step3 / "generator.safetensors"
    assert weights_in(run / "g.bin", "generator") == run / "g.bin"
    assert weights_in(run, "ema", "generator") == checkpoint.weights_file(run, "ema", "generator")


def test_a_checkpoint_whose_save_was_cut_short_does_not_count(run):
    (run / "checkpoints/step-00000006/manifest.json").unlink()
    shutil.copytree(run / "checkpoints/step-00000003", run / "checkpoints/step-00000009.partial")
    file = weights_in(run, "generator")
    assert file.parent.name == "step-00000003"


def test_what_cannot_be_used_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty holds no checkpoints"):
        weights_in(tmp_path / "empty", "generator")
    with pytest.raises(InputError, match="has no weights of a tokenizer"):
        weights_in(run, "tokenizer")
    file = run / "checkpoints/step-00000006/ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=r"ema\.safetensors was altered or cut short"):
        weights_in(run, "ema")
    assert weights_in(run, "generator").is_file()
