"""Stops a run at its first non-finite gradient, before any weight is touched, without host syncs."""

import torch
from accelerate import Accelerator
from torch import Tensor

from runtime.errors import InputError


class FiniteGuard:
    """Latches the first step whose gradient norm is not finite, and keeps the optimizer from it.

    The norm is that of gradients reduced over the ranks, so all ranks latch the same step. Until
    `raise_if_bad` reads the latch, once a log window, the fused optimizers skip every step through
    the flag that loss scaling uses (`found_inf`): the weights stay those of the last good step.
    Not for fp16, whose loss scaling meets infinite gradients by design.
    """

    def __init__(self, device: torch.device):
        self.bad_step = torch.zeros((), dtype=torch.int64, device=device)  # 0: none
        self.bad_terms: dict[str, Tensor] = {}  # whether each term was not finite at that step

    def watch(
        self,
        step: int,
        norm: Tensor,
        terms: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Call between backward and `optimizer.step()`; `optimizer` is the fused torch optimizer."""
        good_so_far = self.bad_step == 0
        for name, value in terms.items():
            bad = good_so_far & ~torch.isfinite(value.detach())
            self.bad_terms[name] = self.bad_terms.get(name, torch.zeros_like(bad)) | bad
        self.bad_step += step * (good_so_far & ~torch.isfinite(norm.detach()))
        optimizer.found_inf = (self.bad_step > 0).float()

    def raise_if_bad(self, accelerator: Accelerator) -> None:
        """Raise InputError on every rank if a step was bad; one host sync."""
        if not int(self.bad_step):
            return
        names = sorted(self.bad_terms)
        flags = torch.stack([self.bad_terms[name].float() for name in names])
        flags = accelerator.reduce(flags, "sum").tolist()
        guilty = [name for name, flag in zip(names, flags) if flag] or ["the gradient alone"]
        raise InputError(
            f"not finite at step {int(self.bad_step)}: {', '.join(guilty)}; no weight was changed "
            f"by it. Go on from the last checkpoint with a lower learning rate"
        )
