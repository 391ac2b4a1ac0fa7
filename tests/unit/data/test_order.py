from itertools import islice

import pytest

from data.order import SampleOrder
from tests.refusals import refusal


def take(order, batches):
    return list(islice(order, batches))


def line(order, samples):
    """The first samples of a rank, batches joined."""
    batches = take(order, -(-samples // order.batch))
    return [key for batch in batches for key in batch][:samples]


def test_every_epoch_is_a_permutation_though_batches_straddle_epochs():
    samples = line(SampleOrder(10, 4, seed=1), 30)
    for epoch in range(3):
        part = samples[10 * epoch : 10 * (epoch + 1)]
        assert {e for e, _ in part} == {epoch}
        assert sorted(index for _, index in part) == list(range(10))


def test_epochs_are_shuffled_differently():
    samples = line(SampleOrder(50, 10, seed=1), 150)
    orders = {tuple(i for e, i in samples if e == epoch) for epoch in range(3)}
    assert len(orders) == 3 and tuple(range(50)) not in orders


def test_seeds_shuffle_differently():
    assert line(SampleOrder(50, 10, seed=1), 50) != line(SampleOrder(50, 10, seed=2), 50)


def test_batches_never_end():
    batches = take(SampleOrder(10, 4, seed=1), 30)
    assert len(batches) == 30 and all(len(batch) == 4 for batch in batches)


@pytest.mark.parametrize("start", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("rank", [0, 1])
def test_resumed_order_is_the_same_continuation(start, rank):
    whole = take(SampleOrder(10, 3, 1, rank, 2), 12)
    resumed = take(SampleOrder(10, 3, 1, rank, 2, start=start), 12 - start)
    assert resumed == whole[start:]


def test_each_iteration_starts_at_the_given_batch():
    order = SampleOrder(10, 3, 1, start=2)
    assert take(order, 5) == take(order, 5)


def test_two_ranks_take_the_global_batch_of_one():
    one = take(SampleOrder(10, 6, seed=1), 10)
    two = [take(SampleOrder(10, 3, 1, rank, 2), 10) for rank in range(2)]
    assert [first + second for first, second in zip(*two)] == one


def test_all_images_may_be_one_global_batch():
    both = [take(SampleOrder(6, 3, 1, rank, 2), 1)[0] for rank in range(2)]
    assert sorted(i for _, i in both[0] + both[1]) == list(range(6))


def test_global_batch_larger_than_the_data_is_refused():
    refusal(lambda: SampleOrder(5, 3, 1, 0, 2), "5 images", 6, "per_gpu_batch_size")
