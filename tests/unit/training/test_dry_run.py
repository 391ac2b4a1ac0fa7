import pytest
import torch

from configs.schema import Phase
from training.dry_run import DryRun, split_dry_run


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_the_flag_is_taken_out_of_the_arguments(flag):
    assert split_dry_run(["config=a.yaml", flag, "x=1"]) == (True, ["config=a.yaml", "x=1"])
    assert split_dry_run(["config=a.yaml"]) == (False, ["config=a.yaml"])


def dry_run(first_step=1):
    phases = [Phase("one", 100), Phase("two", 3), Phase("three", 1)]
    return DryRun(phases, first_step, torch.device("cpu"))


@pytest.mark.parametrize(
    "first_step, steps",
    [
        (1, [1, 2, 3, 4, 5, 101, 102, 103, 104]),
        (99, [99, 100, 101, 102, 103, 104]),
        (103, [103, 104]),
        (105, []),
    ],
)
def test_it_runs_the_first_steps_of_every_phase_that_is_left(first_step, steps):
    assert list(dry_run(first_step).steps()) == steps


def test_hours_are_those_of_the_steps_that_are_left():
    run = dry_run(first_step=51)
    run.seconds = [2.0, 36.0, 72.0]
    lines = run.report(global_batch=8)
    assert "one: 4 images/s, 2 s per step, 0.0278 hours for 50 steps" in lines
    assert (
        f"expected time: {(50 * 2 + 3 * 36 + 72) / 3600:.3g} hours for the 54 steps left" in lines
    )
