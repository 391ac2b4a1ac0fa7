import pytest
import torch
from accelerate import Accelerator

from configs.schema import OptimizerParams
from tests.refusals import refusal
from training.log import Window
from training.optim import EMA, FiniteGuard, adamw, clip_gradients, set_learning_rate


@pytest.fixture
def guarded():
    """A guard, and the sums that it reads."""
    accelerator = Accelerator(cpu=True)
    return FiniteGuard(accelerator), Window(accelerator)


def take_step(guarded, weight, optimizer, step, gradient, loss):
    guard, window = guarded
    weight.grad = torch.tensor([gradient])
    window.add(mse=torch.tensor(loss), quantizer=torch.tensor(1.0))
    guard.watch(step, weight.grad.norm(), optimizer, window.sums)
    optimizer.step()


def test_weights_stay_those_of_the_last_good_step_and_the_first_bad_one_is_named(guarded):
    guard, window = guarded
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    take_step(guarded, weight, optimizer, 1, 1.0, 2.0)
    good = weight.item()
    assert good != 1.0
    guard.raise_if_bad(window.sums)
    take_step(guarded, weight, optimizer, 2, float("nan"), float("inf"))
    take_step(guarded, weight, optimizer, 3, 1.0, 2.0)
    assert weight.item() == good
    refusal(lambda: guard.raise_if_bad(window.sums), "step 2: mse; ")


def test_infinite_gradient_of_finite_terms_is_named_so(guarded):
    guard, window = guarded
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], fused=True)
    take_step(guarded, weight, optimizer, 5, float("inf"), 2.0)
    refusal(lambda: guard.raise_if_bad(window.sums), "step 5", "gradient")


def scaled_step(guarded, step, gradient, loss):
    """A step under fp16's loss scaling, of which the guard only judges the losses."""
    guard, window = guarded
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], fused=True)
    for value in loss:  # of its micro-batches
        window.add(loss=torch.tensor(value, requires_grad=True))
    guard.watch(step, torch.tensor(gradient), optimizer, window.sums)


@pytest.mark.parametrize("bad", [[float("nan"), 2.0], [float("inf"), -float("inf")]])
def test_loss_scaling_may_meet_infinite_gradients_but_no_micro_batch_of_infinite_loss(guarded, bad):
    guard, window = guarded
    guard.accelerator.scaler = torch.amp.GradScaler("cpu")
    scaled_step(guarded, 1, float("inf"), [2.0, 2.0])
    guard.raise_if_bad(window.sums)
    scaled_step(guarded, 2, 1.0, bad)
    scaled_step(guarded, 3, 1.0, [2.0, 2.0])
    assert not window.sums["loss"].requires_grad
    refusal(lambda: guard.raise_if_bad(window.sums), "step 2: loss")


# ---------------------------------------------------------------------- average of the weights
def test_average_starts_as_a_copy_and_its_first_update_mixes():
    model = torch.nn.BatchNorm1d(1)
    average = EMA(model, decay=0.75)
    assert average.model.weight.item() == 1.0
    with torch.no_grad():
        model.weight.fill_(5.0)
        model.running_mean.fill_(3.0)
    average.update(model)
    assert average.model.weight.item() == 2.0  # 0.75 * 1 + 0.25 * 5
    assert average.model.running_mean.item() == 3.0  # buffers are copied
    average.update(model)
    assert average.model.weight.item() == 2.75
    assert model.weight.item() == 5.0 and not average.model.weight.requires_grad


def test_decay_warms_up_with_the_number_of_updates_and_resumes_from_it():
    def averages(average, values):
        for value in values:
            with torch.no_grad():
                model.weight.fill_(value)
            average.update(model)
        return average.model.weight.item()

    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    warm, resumed = EMA(model, 0.25, warmup=True), EMA(model, 0.25, warmup=True)
    # Decays 1/10, 2/11, then 3/12 = 0.25, where the limit holds
    second = 2 / 11 * (0.9 * 1) + 9 / 11 * 2
    last = 0.25 * (0.25 * second + 0.75 * 3) + 0.75 * 4
    assert averages(warm, [1, 2]) == pytest.approx(second, rel=1e-6)
    resumed.model.load_state_dict(warm.model.state_dict())
    resumed.updates = warm.updates
    assert averages(warm, [3, 4]) == pytest.approx(last, rel=1e-6)
    assert averages(resumed, [3, 4]) == pytest.approx(last, rel=1e-6)
    assert warm.updates == 4


# ---------------------------------------------------------------------- clipping
@pytest.mark.parametrize("limit, length", [(2.0, 2.0), (0, 5.0), (None, 5.0), (9.0, 5.0)])
def test_gradients_are_clipped_to_the_norm_and_without_one_only_measured(limit, length):
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradients(Accelerator(cpu=True), model, limit).item() == 5.0
    assert model.weight.grad.norm().item() == pytest.approx(length, rel=1e-5)
    assert bool(limit) == bool(model.weight.grad._version)  # not even multiplied by 1


def test_a_loaded_state_keeps_the_optimizers_own_settings():
    """A run that forks another one takes its moments and steps, but not its betas and weight decay."""
    weight = torch.nn.Parameter(torch.ones(1))
    earlier, forked = (
        adamw([weight], OptimizerParams(beta1=b, beta2=b, weight_decay=d))
        for b, d in ((0.5, 0.1), (0.9, 0.2))
    )
    weight.grad = torch.ones(1)
    set_learning_rate(earlier, 1e-3)
    earlier.step()
    forked.load_state_dict(earlier.state_dict())
    (group,) = forked.param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.9), 0.2)
    assert forked.state[weight]["step"] == 1 and forked.state[weight]["exp_avg"].item() == 0.5
