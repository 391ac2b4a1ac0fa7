"""Learning rates as pure functions of the step, the same on any number of processes."""

import math

from configs.schema import Phase, Scheduler
from runtime.errors import InputError


def interpolate(start: float, end: float, progress: float, shape: str | None) -> float:
    """From `start` (progress 0) to `end` (progress 1) along a half cosine or a line."""
    if shape == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return start + (end - start) * progress


def generator_lr(step: int, total: int, options: Scheduler) -> float:
    """Learning rate of step 1…total: a linear warm-up from 0, then a half cosine to `end_lr`."""
    peak, warmup = options.params.learning_rate, options.params.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if options.scheduler == "constant":
        return peak
    progress = (step - warmup) / max(total - warmup, 1)
    return interpolate(peak, options.params.end_lr, progress, "cosine")


def phase_at(phases: list[Phase], step: int) -> tuple[Phase, int]:
    """The phase of step 1…total and the step's number within it, from 1."""
    within = step
    for phase in phases:
        if within <= phase.steps:
            return phase, within
        within -= phase.steps
    raise InputError(f"step {step} lies beyond the last phase")


def tokenizer_lr(phases: list[Phase], step: int, warmup_steps: int) -> float:
    """Learning rate of step 1…total: the phase's own curve, scaled by one warm-up at the start."""
    phase, within = phase_at(phases, step)
    lr = phase.learning_rate
    if phase.end_lr is not None:
        lr = interpolate(lr, phase.end_lr, within / phase.steps, phase.shape)
    return lr * min(1.0, step / warmup_steps) if warmup_steps else lr
