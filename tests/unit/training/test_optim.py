import pytest
import torch
from accelerate import Accelerator

from runtime.errors import InputError
from training.optim import FiniteGuard


def take_step(guard, weight, optimizer, step, gradient, loss):
    weight.grad = torch.tensor([gradient])
    guard.watch(step, weight.grad.norm(), {"mse": torch.tensor(loss)}, optimizer)
    optimizer.step()


def test_weights_stay_those_of_the_last_good_step_and_the_first_bad_one_is_named():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    guard = FiniteGuard(torch.device("cpu"))
    take_step(guard, weight, optimizer, 1, 1.0, 2.0)
    good = weight.item()
    assert good != 1.0
    guard.raise_if_bad(Accelerator(cpu=True))
    take_step(guard, weight, optimizer, 2, float("nan"), float("inf"))
    take_step(guard, weight, optimizer, 3, 1.0, 2.0)
    assert weight.item() == good
    with pytest.raises(InputError, match="step 2: mse"):
        guard.raise_if_bad(Accelerator(cpu=True))


def test_infinite_gradient_of_finite_terms_is_named_so():
    weight = torch.nn.Parameter(torch.ones(1))
    guard = FiniteGuard(torch.device("cpu"))
    optimizer = torch.optim.AdamW([weight], fused=True)
    take_step(guard, weight, optimizer, 5, float("inf"), 2.0)
    with pytest.raises(InputError, match="step 5: the gradient alone"):
        guard.raise_if_bad(Accelerator(cpu=True))
