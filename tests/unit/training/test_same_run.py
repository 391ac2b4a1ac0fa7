import pytest

from training.run import batch_remedy


@pytest.mark.parametrize(
    "ranks, words",
    [
        (2, "training.per_gpu_batch_size=6 training.gradient_accumulation_steps=1"),
        (5, "divides 12, not 5"),
    ],
)
def test_another_number_of_ranks_names_the_batch_that_keeps_the_run_the_same(ranks, words):
    assert words in batch_remedy({"global batch": 12}, {"global batch": 4 * ranks}, ranks)


def test_nothing_is_said_of_the_same_batch():
    assert batch_remedy({"global batch": 8, "a": 1}, {"global batch": 8}, 2) == ""
