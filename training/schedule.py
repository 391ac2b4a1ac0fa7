"""Learning rates as pure functions of the step, the same on any number of processes."""

import itertools
import math
from collections.abc import Sequence

from configs.schema import Phase, Scheduler, TokenizerOptimizerParams


def half_cosine(start: float, end: float, progress: float) -> float:
    """From `start` (progress 0) to `end` (progress 1)."""
    return start + (end - start) * 0.5 * (1 - math.cos(math.pi * progress))


def generator_lr(step: int, total: int, options: Scheduler) -> float:
    """Learning rate of step 1…total: a linear warm-up from 0, then a half cosine to `end_lr`.

    The schedule counts steps from `count_from`: with 0, as published, step 1 has rate 0.
    """
    peak, warmup = options.params.learning_rate, options.params.warmup_steps
    step = step - 1 + options.params.count_from
    if step < warmup:
        return peak * step / warmup
    if options.scheduler == "constant":
        return peak
    progress = (step - warmup) / max(total - warmup, 1)
    return half_cosine(peak, options.params.end_lr, progress)


def phase_steps(phases: Sequence[Phase]) -> list[range]:
    """The steps of every phase; the first of the run is 1."""
    ends = itertools.accumulate(phase.steps for phase in phases)
    return [range(end - phase.steps + 1, end + 1) for phase, end in zip(phases, ends)]


def phase_at(phases: Sequence[Phase], step: int) -> tuple[Phase, int]:
    """The phase of step 1…total and the number of the step within it, from 1."""
    found = zip(phases, phase_steps(phases))
    return next((phase, step - steps.start + 1) for phase, steps in found if step in steps)


def is_critic_step(phase: Phase, within: int) -> bool:
    """Whether step `within` (from 1) of a phase trains the discriminator."""
    after = within - phase.critic_after
    return bool(phase.gan_weight) and after > 0 and after % 2 == 1


def tokenizer_steps(phases: list[Phase], step: int) -> int:
    """How many of the steps 1…step train the tokenizer."""
    count = 0
    for phase in phases:
        made = min(step, phase.steps)
        critic = max(made - phase.critic_after + 1, 0) // 2 if phase.gan_weight else 0
        count, step = count + made - critic, step - made
    return count


def phase_lr(phases: list[Phase], step: int) -> float:
    """Learning rate of step 1…total: the phase's own curve."""
    phase, within = phase_at(phases, step)
    if phase.end_lr is None:
        return phase.learning_rate
    return half_cosine(phase.learning_rate, phase.end_lr, within / phase.steps)


def tokenizer_lr(phases: list[Phase], step: int, params: TokenizerOptimizerParams) -> float:
    """Learning rate of step 1…total: that of the phase, scaled by a warm-up at the start of the run and of
    every phase that resets the optimizer, whose empty moments need one as well.

    The warm-up counts steps that train the tokenizer, from `count_from`: with 0, as published, the first
    has rate 0.
    """
    lr = phase_lr(phases, step)
    if not params.warmup_steps:
        return lr
    starts = zip(phases, phase_steps(phases))
    resets = [s.start for phase, s in starts if phase.reset_optimizer and s.start <= step]
    before = tokenizer_steps(phases, max(resets, default=1) - 1)
    done = tokenizer_steps(phases, step) - before - 1 + params.count_from
    return lr * min(1.0, done / params.warmup_steps)
