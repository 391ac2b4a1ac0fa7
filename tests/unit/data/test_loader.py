"""Data workers, and batches on their way to a device."""

import pytest
import torch

from data.loader import on_device, worker_count


@pytest.mark.parametrize("cores, ranks, workers", [(2, 1, 2), (64, 1, 8), (8, 4, 2), (2, 8, 1)])
def test_workers_are_by_default_at_most_one_per_core(monkeypatch, cores, ranks, workers):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(cores), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert worker_count() == workers
    assert (worker_count(0), worker_count(99)) == (0, 99)


def numbered_batches(pinned=False):
    batches = [(torch.full((4, 3), i, dtype=torch.uint8), torch.ones(4)) for i in range(20)]
    return [(views.pin_memory() if pinned else views, ok) for views, ok in batches]


def test_batches_arrive_in_order_on_a_cpu():
    arrived = [
        views[0, 0].item() for views, _ in on_device(numbered_batches(), torch.device("cpu"))
    ]
    assert arrived == list(range(20))


@pytest.mark.gpu
def test_batches_arrive_whole_on_a_gpu():
    device = torch.device("cuda")
    sums = [views.long().sum() for views, _ in on_device(numbered_batches(True), device)]
    assert [s.item() for s in sums] == [12 * i for i in range(20)]
