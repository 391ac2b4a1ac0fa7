import pytest

from tests.refusals import refusal
from training.run import check_same_run

EARLIER = {"a.lr": 1.0, "a.steps": 10, "images": 5}


def check(now, fork=False):
    return check_same_run(EARLIER, now, "run/step-3", fork)


def test_the_same_run_goes_on_without_a_word():
    assert check(dict(EARLIER)) == []


def test_all_that_differs_is_listed_and_nothing_else():
    now = {**EARLIER, "a.lr": 2.0, "images": 6, "a.new": True}
    all_ = "a.lr (1.0 there, 2.0 now), a.new (None there, True now), images (5 there, 6 now)"
    assert "a.steps" not in refusal(lambda: check(now), all_, "experiment.output_dir")


@pytest.mark.parametrize(
    "ranks, words",
    [
        (2, ["training.per_gpu_batch_size=6 training.gradient_accumulation_steps=1"]),
        (5, ["divides 12", "not 5"]),
    ],
)
def test_another_number_of_ranks_names_the_batch_that_keeps_the_run_the_same(ranks, words):
    other = {"global batch": 12}, {"global batch": 4 * ranks}
    refusal(lambda: check_same_run(*other, "s", False, ranks), "global batch", *words)
    other = {"global batch": 8, "a": 1}, {"global batch": 8}  # nothing is said of the same batch
    said = refusal(lambda: check_same_run(*other, "s", False, ranks), "a (1 there")
    assert "per_gpu_batch_size" not in said


def test_a_fork_is_told_what_differs():
    (line,) = check({**EARLIER, "a.lr": 2.0}, fork=True)
    assert "run/step-3" in line and "a.lr (1.0 there, 2.0 now)" in line
