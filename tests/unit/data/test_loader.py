"""Batches on their way to a device."""

import pytest
import torch

from data.loader import on_device


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
