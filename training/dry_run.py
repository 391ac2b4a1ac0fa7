"""`--dry-run`: a few real steps of every phase, and the memory and time of the whole run."""

import resource
import sys
import time
from collections.abc import Iterator, Sequence

import torch

from configs.schema import Phase
from runtime.processes import device_name
from training.schedule import phase_steps

TIMED_STEPS = 4  # per phase, after one that compiles and chooses kernels


def split_dry_run(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether the arguments ask for a dry run, and the other arguments."""
    others = [argument for argument in argv if argument not in ("--dry-run", "--dry_run")]
    return len(others) < len(argv), others


class DryRun:
    """Runs and times the first steps of each remaining phase; writes nothing."""

    def __init__(self, phases: Sequence[Phase], first_step: int, device: torch.device):
        self.left = [  # names and steps of the phases
            (phase.name, range(max(steps.start, first_step), steps.stop))
            for phase, steps in zip(phases, phase_steps(phases))
            if first_step < steps.stop
        ]
        self.device = device
        self.seconds: list[float] = []  # per step, of each phase

    def steps(self) -> Iterator[int]:
        """The steps to run, which are timed."""
        for _, steps in self.left:
            chosen = steps[: 1 + TIMED_STEPS]
            start = time.perf_counter()
            for step in chosen:
                yield step
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                if step == chosen[0] and len(chosen) > 1:
                    start = time.perf_counter()
            self.seconds.append((time.perf_counter() - start) / max(len(chosen) - 1, 1))

    def report(self, global_batch: int) -> list[str]:
        """Lines to print: memory of this process, images/s, expected hours."""
        lines, hours = [f"memory: {memory(self.device)}"], 0.0
        for (name, steps), seconds in zip(self.left, self.seconds):
            hours += len(steps) * seconds / 3600
            lines.append(
                f"{name}: {global_batch / seconds:.4g} images/s, {seconds:.3g} s per step, "
                f"{len(steps) * seconds / 3600:.3g} hours for {len(steps)} steps"
            )
        left = sum(len(steps) for _, steps in self.left)
        lines.append(f"expected time: {hours:.3g} hours for the {left} steps left")
        return [*lines, "dry run: nothing was written"]


def memory(device: torch.device) -> str:
    """Peak memory of this process, in GiB."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{used / 2**30:.2f} of {total / 2**30:.1f} GiB on {device_name(device)}"
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts in bytes
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{used / 2**30:.2f} GiB of host memory"
