"""Killed at any moment and started again by the same command, a run ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.integration.conftest import ROOT, command, execute
from training import checkpoint
from training.signals import SAVED_AND_STOPPED

KILLS = 22  # at least 20 before the end


def kill_often(module, arguments, kills, shortest=0.15, longest=0.6):
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
    clock = ("images/s", "images/s per device", "data wait", "hours left")
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
        "experiment.save_every=5", "experiment.generate_every=0", "training.max_train_steps=1300",
        "training.use_ema=True",
    ]  # fmt: skip
    kill_often("train_ar", [*options, f"experiment.output_dir={tmp_path}/whole"], 0)
    killed = kill_often("train_ar", [*options, f"experiment.output_dir={tmp_path}/killed"], KILLS)
    assert killed >= 20
    same_run(tmp_path / "whole", tmp_path / "killed", ["generator.bin", "generator_ema.bin"])


@pytest.mark.slow
def test_stage1_with_gan_and_clustering_survives_kills(workspace, tmp_path):
    options = [
        f"config={workspace.root}/stage1.yaml", f"dataset.params.train_dir={workspace.root}/train",
        "experiment.save_every=3", "training.per_gpu_batch_size=2",
        "phases=[{name: mse, steps: 200},{name: gan, steps: 100, gan_weight: 0.005}]",
    ]  # fmt: skip
    module = "train_tokenizer.__main__"
    kill_often(module, [*options, f"experiment.output_dir={tmp_path}/whole"], 0)
    killed = kill_often(module, [*options, f"experiment.output_dir={tmp_path}/killed"], KILLS)
    assert killed >= 20
    weights = ["tokenizer.pth", "checkpoints/step-00000300/discriminator.safetensors"]
    same_run(tmp_path / "whole", tmp_path / "killed", weights)


class Running:
    """A program in the background that has logged at least `steps` steps."""

    def __init__(self, run, steps, *args, **kwargs):
        self.process = subprocess.Popen(
            command(*args, **kwargs), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        )  # fmt: skip
        metrics, patience = run / "metrics.jsonl", time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
            assert self.process.poll() is None, self.process.communicate()[1][-3000:]
            assert time.monotonic() < patience
            time.sleep(0.05)

    def end(self, within):
        """Exit status and stderr."""
        _, errors = self.process.communicate(timeout=within)
        return self.process.returncode, errors


def endless(workspace, run):
    return [
        "train_ar.py", f"config={workspace.root}/generator.yaml", f"experiment.output_dir={run}",
        f"dataset.params.pretokenization={workspace.cache}", "experiment.generate_every=0",
        "training.max_train_steps=130000", "experiment.save_every=0",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_signal_saves_the_step_and_a_second_run_is_refused_meanwhile(workspace, tmp_path, name):
    running = Running(tmp_path / "run", 5, *endless(workspace, tmp_path / "run"))
    second = execute(*endless(workspace, tmp_path / "run"), check=False)
    assert second.returncode == 2 and "in use by another run" in second.stderr
    running.process.send_signal(getattr(signal, name))
    status, _ = running.end(within=30)
    assert status == SAVED_AND_STOPPED
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert logged(tmp_path / "run")[-1]["step"] == int(saved.name.removeprefix("step-"))


@pytest.mark.slow
def test_signal_to_the_launcher_stops_both_ranks_at_the_same_step(workspace, tmp_path):
    two = dict(ranks=2, launcher="torchrun")
    running = Running(tmp_path / "run", 5, *endless(workspace, tmp_path / "run"), **two)
    running.process.send_signal(signal.SIGTERM)
    running.end(within=60)
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert checkpoint.problem(saved) is None


@pytest.mark.slow
def test_death_of_one_rank_ends_the_job_and_it_resumes(workspace, tmp_path):
    two = dict(ranks=2, launcher="torchrun")
    options = endless(workspace, tmp_path / "run")
    running = Running(tmp_path / "run", 5, *options, "experiment.save_every=2", **two)
    ranks = psutil.Process(running.process.pid).children()
    os.kill(ranks[1].pid, signal.SIGKILL)
    status, _ = running.end(within=60)
    assert status != 0
    last, _ = checkpoint.choose(tmp_path / "run", True)
    step = int(last.name.removeprefix("step-"))
    resumed = Running(tmp_path / "run", step + 3, *options, "experiment.save_every=2", **two)
    resumed.process.terminate()
    resumed.end(within=60)
    newest, _ = checkpoint.choose(tmp_path / "run", True)
    assert int(newest.name.removeprefix("step-")) > step
