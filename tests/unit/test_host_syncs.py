"""The instrument of the tests that count what a training step waits for."""

import pytest
import torch

from tests.host_syncs import HostSyncs

X = torch.arange(4.0, requires_grad=True)


class Reads(torch.autograd.Function):
    """A backward pass that looks at its gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[override]
        return gradient * float(gradient.sum())


WAITS = {
    "item": lambda: X.sum().item(),
    "bool": lambda: bool(X.sum()),
    "if": lambda: 1 if (X > 1).any() else 0,
    "float": lambda: float(X.sum()),
    "int": lambda: int(X.sum()),
    "tolist": lambda: X.tolist(),
    "cpu": lambda: X.cpu(),
    "numpy": lambda: X.detach().numpy(),
    "nonzero": lambda: X.nonzero(),
    "where": lambda: torch.where(X > 1),
    "mask": lambda: X[X > 1],
    "masked_select": lambda: torch.masked_select(X, X > 1),
    "unique": lambda: torch.unique(X),
    "bincount": lambda: torch.bincount(X.detach().long()),
    "equal": lambda: torch.equal(X, X),
    "repeat_interleave": lambda: torch.repeat_interleave(X, torch.ones(4, dtype=torch.long)),
    "tensor": lambda: torch.tensor([1.0]),
    "new_tensor": lambda: X.new_tensor([1.0]),
    "as_tensor": lambda: torch.as_tensor([1.0]),
    "list": lambda: X[[0, 1]],
    "backward": lambda: Reads.apply(X).sum().backward(),
}


@pytest.mark.parametrize("call", WAITS.values(), ids=WAITS.keys())
def test_what_waits_is_found(call):
    syncs = HostSyncs()
    with syncs:
        call()
        syncs.step = 3
        call()
    assert set(syncs.found) == {3}


def test_what_does_not_wait_is_not_found():
    syncs = HostSyncs()
    with syncs:
        syncs.step = 1
        index = torch.arange(2)
        y = torch.where(X > 1, X, 0.5)[index] * 2 + torch.zeros(2) + torch.full((2,), 3.0)
        y.sum().backward()
        y[1:, None], y.to("cpu", torch.float64), torch.as_tensor(y)
    assert syncs.found == {}
