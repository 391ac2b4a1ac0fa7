"""Killed at any moment and started again by the same command, a run ends with the same bytes."""

import functools
import json
import random
import re
import signal
import time

import pytest
import torch

from runtime.signals import SAVED_AND_STOPPED
from training import checkpoint

KILLS = 16


# ---------------------------------------------------------------------- the trainers, in miniature
def trainer(workspace, name, ranks=1, workers=0, steps=40):
    """(program, options) with every part that has a state: EMA, discriminator, clustering."""
    if name == "generator":
        return "train_ar.py", [
            f"config={workspace.root}/generator.yaml",
            f"experiment.tokenizer_checkpoint={workspace.tokenizer}",
            f"dataset.params.pretokenization={workspace.cache}", "experiment.generate_every=0",
            f"dataset.params.num_workers_per_gpu={workers}", f"training.max_train_steps={steps}",
            f"training.per_gpu_batch_size={4 // ranks}", "training.use_ema=True",
        ]  # fmt: skip
    before = 10  # then the discriminator trains too: kills have to meet it
    options = [
        f"config={workspace.root}/{name}.yaml", f"dataset.params.train_dir={workspace.root}/train",
        f"dataset.params.num_workers_per_gpu={workers}", "experiment.generate_every=0",
        f"training.per_gpu_batch_size={4 // ranks}",
        f"phases=[{{name: mse, steps: {before}, learning_rate: 1.0e-3}},"
        f"{{name: gan, steps: {steps - before}, gan_weight: 0.005}}]",
    ]  # fmt: skip
    if name == "stage2":
        options += [f"experiment.stage1_checkpoint={workspace.stage1_run}", "training.use_ema=True"]
    return "train_tokenizer", options


def logged(run):
    """Every record but what depends on the clock."""
    clock = ("images/s", "images/s per device", "data wait", "hours left")
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{k: v for k, v in record.items() if k not in clock} for record in whole]


def equal(a, b):
    """Whether nested dicts and lists hold the same values, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_run(a, b):
    """The same logged values, weights, averages, optimizers and final files."""
    assert logged(a) == logged(b)
    final, other = (sorted((run / "checkpoints").iterdir())[-1] for run in (a, b))
    weights = [file.name for file in final.glob("*.safetensors")]
    assert final.name == other.name and weights
    for name in weights:
        assert (final / name).read_bytes() == (other / name).read_bytes(), name
    states = [checkpoint.load_state(path) for path in (final, other)]
    for state in states:
        assert state["values"].pop("run")  # names the folders
    assert equal(*states)
    for file in [*a.glob("*.bin"), *a.glob("*.pth")]:
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name


def first_steps(output):
    """The steps that runs said they begin with, in order."""
    return [int(step) for step in re.findall(r"steps (\d+) to", output)]


def next_step(run):
    """The step that a start has to begin with."""
    newest, _ = checkpoint.choose(run, True)
    return 1 if newest is None else checkpoint.step_of(newest) + 1


def wait_for(condition, run, seconds=60):
    """Whether the condition came true before the run ended."""
    patience = time.monotonic() + seconds
    while not condition():
        if not run.alive():
            return False
        assert time.monotonic() < patience, run.output()[-3000:]
        time.sleep(0.01)
    return True


@pytest.fixture(scope="module")
def hanging(workspace, warm, tmp_path_factory):
    """A run of two ranks of which one hangs, and the time since when."""
    folder = tmp_path_factory.mktemp("hanging") / "run"
    program, options = trainer(workspace, "generator", ranks=2, steps=100_000)
    options += ["experiment.log_every=1", "training.timeout_minutes=1"]
    run = warm.start(program, *options, f"experiment.output_dir={folder}", ranks=2)
    assert wait_for(lambda: len(logged(folder)) >= 5, run), run.output()
    run.signal(signal.SIGSTOP, rank=1)
    yield run, time.time()
    run.kill()


# ---------------------------------------------------------------------- exactness
# 14 images in batches of 4, records of 3 steps, saved every 7: no two periods agree.
PERIODS = ["experiment.log_every=3", "experiment.save_every=7"]


@pytest.fixture(scope="module")
def in_one_go(workspace, warm, tmp_path_factory):
    """The folder of a run of 60 steps that nothing interrupts, by trainer and number of ranks."""

    @functools.cache
    def run(name, ranks):
        folder = tmp_path_factory.mktemp("whole")
        program, options = trainer(workspace, name, ranks, steps=60)
        warm.ok(program, *options, *PERIODS, f"experiment.output_dir={folder}", ranks=ranks)
        return folder

    return run


@pytest.mark.slow
@pytest.mark.usefixtures("hanging")  # the minute that it hangs passes meanwhile
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["stage1", "stage2", "generator"])
def test_stopped_and_killed_it_ends_as_in_one_go(workspace, warm, in_one_go, tmp_path, name, ranks):
    program, options = trainer(workspace, name, ranks, workers=2, steps=60)
    options += PERIODS
    whole, halves = in_one_go(name, ranks), tmp_path / "halves"

    def start():
        return warm.start(program, *options, f"experiment.output_dir={halves}", ranks=ranks)

    run = start()
    assert wait_for(lambda: len(logged(halves)) >= 2, run), run.output()[-3000:]
    # As torchrun and SLURM send it, to all processes of one rank, data workers included.
    run.signal(signal.SIGTERM, rank=ranks - 1, group=True)
    assert run.end() == SAVED_AND_STOPPED, run.output()[-3000:]
    (stopped,) = {run.statuses[pid] for pid in run.pids}
    assert stopped == SAVED_AND_STOPPED
    run = start()
    assert wait_for(lambda: len(logged(halves)) >= 6, run), run.output()[-3000:]
    assert run.kill()
    expected = next_step(halves)
    output = warm.ok(program, *options, f"experiment.output_dir={halves}", ranks=ranks)
    assert first_steps(output) == [expected] and expected > 12
    same_run(whole, halves)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["stage1", "stage2", "generator"])
def test_survives_many_kills(workspace, warm, tmp_path, name, ranks):
    program, options = trainer(workspace, name, ranks, steps=75)  # the kills reach about 45
    options += ["experiment.log_every=1", "experiment.save_every=3"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    warm.ok(program, *options, f"experiment.output_dir={whole}", ranks=ranks)
    moments, inside = random.Random(name + str(ranks)), 0
    for kill in range(KILLS):
        before, expected = len(logged(killed)), next_step(killed)
        # One in three dies inside a save, or in what surrounds it, by its own hand.
        call = moments.randint(1, 40) if kill % 3 == 0 else 0
        run = warm.start(
            program, *options, f"experiment.output_dir={killed}", ranks=ranks, die_before=call
        )
        if call:
            wait_for(lambda run=run: run.pids[0] in run.statuses, run)
            assert run.statuses.get(run.pids[0]) == -signal.SIGKILL, run.output()[-3000:]
        elif kill % 3 == 1:  # while it starts
            patience = time.monotonic() + moments.uniform(0, 0.5)
            wait_for(
                lambda n=before, t=patience: len(logged(killed)) > n or time.monotonic() > t, run
            )
        else:  # while it trains
            further = before + moments.randint(1, 6)
            assert wait_for(lambda n=further: len(logged(killed)) >= n, run), run.output()[-3000:]
            time.sleep(moments.uniform(0, 0.02))
        killed_by_us = run.kill()
        assert killed_by_us or call
        assert first_steps(run.output()) in ([], [expected])
        inside += any(killed.rglob("*.partial"))
    assert inside >= 2  # kills left a file or a folder half-written
    expected = next_step(killed)
    output = warm.ok(program, *options, f"experiment.output_dir={killed}", ranks=ranks)
    assert first_steps(output) == [expected] and expected > 13
    same_run(whole, killed)
    assert not any(killed.rglob("*.partial"))


# ---------------------------------------------------------------------- a rank that hangs
@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_no_longer_than_configured(hanging):
    run, since = hanging
    wait_for(lambda: run.pids[0] in run.statuses, run, seconds=110)
    assert run.statuses[run.pids[0]] != 0
    assert 50 < run.log.stat().st_mtime - since < 90  # its last words
