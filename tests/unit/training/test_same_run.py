import pytest

from runtime.errors import InputError
from training.run import check_same_run

EARLIER = {"a.lr": 1.0, "a.steps": 10, "images": 5}


def check(now, fork=False):
    return check_same_run(EARLIER, now, "run/step-3", fork)


def test_the_same_run_goes_on_without_a_word():
    assert check(dict(EARLIER)) == []


def test_all_that_differs_is_listed_and_nothing_else():
    with pytest.raises(InputError) as error:
        check({**EARLIER, "a.lr": 2.0, "images": 6, "a.new": True})
    words = str(error.value)
    assert (
        "a.lr (1.0 there, 2.0 now), a.new (None there, True now), images (5 there, 6 now);" in words
    )
    assert "a.steps" not in words and "experiment.output_dir" in words


@pytest.mark.parametrize(
    "ranks, words",
    [
        (2, "on 2 GPUs, training.per_gpu_batch_size x training.gradient_accumulation_steps = 6, for "
         "example training.per_gpu_batch_size=6 training.gradient_accumulation_steps=1"),
        (5, "on a number of GPUs that divides 12, not 5"),
    ],
)  # fmt: skip
def test_another_number_of_ranks_names_the_batch_that_keeps_the_run_the_same(ranks, words):
    with pytest.raises(InputError, match="global batch") as error:
        check_same_run({"global batch": 12}, {"global batch": 4 * ranks}, "s", False, ranks)
    assert words in str(error.value)
    with pytest.raises(InputError) as error:  # nothing about the batch where it is the same
        check_same_run({"global batch": 8, "a": 1}, {"global batch": 8}, "s", False, ranks)
    assert "per_gpu_batch_size" not in str(error.value)


def test_a_fork_is_told_what_differs():
    (line,) = check({**EARLIER, "a.lr": 2.0}, fork=True)
    assert "run/step-3" in line and "a.lr (1.0 there, 2.0 now)" in line
