"""Clipping, the guard against non-finite steps, AdamW and the average of the weights."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from configs.schema import OptimizerParams, TokenizerOptimizerParams
from runtime.errors import InputError


def adamw(
    parameters: Iterable[Any], params: OptimizerParams | TokenizerOptimizerParams
) -> torch.optim.AdamW:
    """Fused AdamW over parameters or groups, whose own weight decay takes precedence.

    The learning rate is 0 until `set_learning_rate`. Loading a state keeps these settings: a run that
    forks another one may have others.
    """
    optimizer = torch.optim.AdamW(
        parameters,
        lr=0.0,
        betas=(params.beta1, params.beta2),
        weight_decay=params.weight_decay,
        fused=True,
    )
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]

    def keep_settings(loaded: torch.optim.Optimizer) -> None:
        for group, settings in zip(loaded.param_groups, own):
            group.update(settings)

    optimizer.register_load_state_dict_post_hook(keep_settings)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(accelerator: Accelerator, model: nn.Module, max_norm: float | None) -> Tensor:
    """Clip the gradients to a global L2 norm of `max_norm` (0 or None: do not clip).

    Returns the norm before clipping, a scalar on the device, the same on every rank.
    """
    norm: Any
    if max_norm:
        norm = accelerator.clip_grad_norm_(model.parameters(), max_norm)
    else:  # clipping to infinity would multiply every gradient by 1
        accelerator.unscale_gradients()
        norm = get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP: a share per rank


class FiniteGuard:
    """Stops a run at its first non-finite step, before any weight changes, without host syncs.

    The guard latches the first step with a non-finite gradient norm, which is the same on all ranks.
    Until `raise_if_bad` reads the latch, once per log window, fused optimizers skip every step through
    loss scaling's flag `found_inf`, so the weights stay those of the last good step.

    With fp16, loss scaling produces infinite gradients by design, so the guard judges the sum of the terms
    over all ranks. The scaler skips that step, but not the following ones of the window; nothing of them is
    saved.

    `terms` are the sums of the loss's terms since the last log (`log.Window.sums`): one that was not finite
    stays so until they are logged.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.bad_step = torch.zeros((), dtype=torch.int64, device=accelerator.device)  # 0: none

    def watch(
        self, step: int, norm: Tensor, optimizer: torch.optim.Optimizer, terms: dict[str, Tensor]
    ) -> None:
        """Call between backward and `optimizer.step()`; `optimizer` is the fused torch optimizer."""
        if self.accelerator.scaler is not None:
            total = torch.stack(list(terms.values())).sum()
            norm = self.accelerator.reduce(total, "sum")  # type: ignore[assignment] - a tensor stays one
        bad = (self.bad_step == 0) & ~torch.isfinite(norm.detach())
        self.bad_step += step * bad
        optimizer.found_inf = (self.bad_step > 0).float()  # type: ignore[attr-defined] - read by step()

    def raise_if_bad(self, terms: dict[str, Tensor]) -> None:
        """Raise InputError on every rank if a step was non-finite; one host sync."""
        if not int(self.bad_step):
            return
        names = sorted(terms)
        flags: Any = torch.stack([(~torch.isfinite(terms[name])).float() for name in names])
        flags = self.accelerator.reduce(flags, "sum").tolist()  # type: ignore[union-attr]
        culprits = [name for name, flag in zip(names, flags) if flag] or ["the gradient alone"]
        raise InputError(
            f"not finite at step {int(self.bad_step)}: {', '.join(culprits)}; nothing of it is saved. "
            f"Start another run from the last checkpoint (experiment.resume=RUN_DIR and another "
            f"experiment.output_dir) with a lower learning rate"
        )


class EMA:
    """Exponential moving average of a model's weights: avg ← decay · avg + (1 − decay) · weights.

    The average starts as a copy of the model. With `warmup` the decay after n updates is
    (1 + n) / (10 + n), at most `decay`, so that the average soon forgets its start. Buffers are copied.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = False):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.warmup = decay, warmup
        self.updates = 0

    def prepare(self, accelerator: Accelerator) -> None:
        """Move the average to the device; under FSDP, shard it like the model."""
        if accelerator.is_fsdp2:
            self.model = fsdp2_prepare_model(accelerator, self.model)
        else:
            self.model = self.model.to(accelerator.device)

    def state_dict(self) -> dict[str, int]:
        """What a checkpoint keeps besides the averaged weights."""
        return {"updates": self.updates}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.updates = state_dict["updates"]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        n = self.updates
        mix = get_ema_multi_avg_fn(
            min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        )
        mix(list(self.model.parameters()), list(model.parameters()), None)  # type: ignore[arg-type]
        self.updates += 1
        for average, buffer in zip(self.model.buffers(), model.buffers()):
            average.copy_(buffer)
