"""`--dry-run`: a few real steps of every phase, and what the whole run would need."""

import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from runtime.processes import device_name

TIMED_STEPS = 4  # per phase, after one that compiles and chooses kernels


@dataclass
class Stretch:
    """A part of a run whose steps all cost the same: its name, first step and number of steps."""

    name: str
    first: int
    steps: int

    def after(self, first_step: int) -> "Stretch":
        """What is left of the stretch for a run that starts at `first_step`."""
        first = max(self.first, first_step)
        return Stretch(self.name, first, max(self.first + self.steps - first, 0))


def split_dry_run(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether the arguments ask for a dry run, and the other arguments."""
    others = [argument for argument in argv if argument not in ("--dry-run", "--dry_run")]
    return len(others) < len(argv), others


class DryRun:
    """Runs and times the first steps of each stretch; nothing is written."""

    def __init__(self, stretches: list[Stretch], first_step: int, device: torch.device):
        left = [stretch.after(first_step) for stretch in stretches]
        self.stretches = [stretch for stretch in left if stretch.steps]
        self.device = device
        self.seconds: list[float] = []  # per step, of each stretch

    def steps(self) -> Iterator[int]:
        """The numbers of the steps to run; the time between them is measured."""
        for stretch in self.stretches:
            chosen = range(stretch.first, stretch.first + min(stretch.steps, 1 + TIMED_STEPS))
            start = time.perf_counter()
            for step in chosen:
                yield step
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                if step == chosen[0] and len(chosen) > 1:
                    start = time.perf_counter()
            self.seconds.append((time.perf_counter() - start) / max(len(chosen) - 1, 1))

    def report(self, models: dict[str, nn.Module], global_batch: int) -> list[str]:
        """Lines to print: parameters and memory of this process, images/s, expected hours."""
        lines = []
        for name, model in models.items():
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            frozen = sum(p.numel() for p in model.parameters()) - trained
            lines.append(f"parameters of the {name}: {trained:,} trained, {frozen:,} frozen")
        lines.append(f"memory: {memory(self.device)}")
        hours = 0.0
        for stretch, seconds in zip(self.stretches, self.seconds):
            hours += stretch.steps * seconds / 3600
            lines.append(
                f"{stretch.name}: {global_batch / seconds:.4g} images/s, {seconds:.3g} s per step, "
                f"{stretch.steps * seconds / 3600:.3g} hours for {stretch.steps} steps"
            )
        left = sum(stretch.steps for stretch in self.stretches)
        lines.append(f"expected time: {hours:.3g} hours for the {left} steps left")
        return [*lines, "dry run: nothing was written"]


def memory(device: torch.device) -> str:
    """The largest amount that this process has used so far, in GiB."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{used / 2**30:.2f} of {total / 2**30:.1f} GiB on {device_name(device)}"
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return f"{used / 2**30:.2f} GiB of host memory"
