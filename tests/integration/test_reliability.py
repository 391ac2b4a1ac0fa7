"""Killed at any moment and started again by the same command, a run ends with the same bytes."""

import json
import os
import subprocess
import sys

import pytest

from tests.integration.conftest import ROOT

KILLS = 20


def kill_often(module, arguments, kills, shortest=0.2, longest=1.0):
    done = subprocess.run(
        [sys.executable, "tests/integration/kill_often.py", module, "0", str(kills),
         str(shortest), str(longest), *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
             "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def logged(run):
    """Every record but what depends on the clock."""
    clock = ("images/s", "data wait")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


def same_run(a, b, files):
    assert logged(a) == logged(b)
    for name in files:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.mark.slow
def test_generator_survives_kills(workspace, tmp_path):
    options = [
        f"config={workspace.root}/generator.yaml",
        f"experiment.tokenizer_checkpoint={workspace.tokenizer}",
        f"dataset.params.pretokenization={workspace.cache}",
        "experiment.save_every=5", "experiment.generate_every=0", "training.max_train_steps=600",
        "training.use_ema=True",
    ]  # fmt: skip
    kill_often("train_ar", [*options, f"experiment.output_dir={tmp_path}/whole"], 0)
    killed = kill_often("train_ar", [*options, f"experiment.output_dir={tmp_path}/killed"], KILLS)
    assert killed >= KILLS - 2
    same_run(tmp_path / "whole", tmp_path / "killed", ["generator.bin", "generator_ema.bin"])


@pytest.mark.slow
def test_stage1_with_gan_and_clustering_survives_kills(workspace, tmp_path):
    options = [
        f"config={workspace.root}/stage1.yaml", f"dataset.params.train_dir={workspace.root}/train",
        "experiment.save_every=3", "training.per_gpu_batch_size=2", "losses.pretrained=false",
        "phases=[{name: mse, steps: 100},{name: gan, steps: 60, gan_weight: 0.005}]",
    ]  # fmt: skip
    module = "train_tokenizer.__main__"
    kill_often(module, [*options, f"experiment.output_dir={tmp_path}/whole"], 0)
    killed = kill_often(module, [*options, f"experiment.output_dir={tmp_path}/killed"], KILLS)
    assert killed >= KILLS - 2
    weights = ["tokenizer.pth", "checkpoints/step-00000160/discriminator.safetensors"]
    same_run(tmp_path / "whole", tmp_path / "killed", weights)
