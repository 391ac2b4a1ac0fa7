import pytest

from configs.schema import Phase, Scheduler, SchedulerParams, TokenizerOptimizerParams
from training.schedule import (
    generator_lr,
    is_critic_step,
    phase_at,
    tokenizer_lr,
    tokenizer_steps,
)

PARAMS = SchedulerParams(learning_rate=4e-4, warmup_steps=62_500, end_lr=1e-5, count_from=1)
PHASES = [
    Phase("warm start", 50, 1e-4),
    Phase("main", 200, 1e-4, 2e-5),
    Phase("adversarial", 100, 2e-5, 2e-6),
]


def exactly(value):
    return pytest.approx(value, rel=1e-9, abs=0)


def warmup(steps, **others):
    return TokenizerOptimizerParams(**{"warmup_steps": steps, "count_from": 1, **others})


# ---------------------------------------------------------------------- generator
@pytest.mark.parametrize(
    "step, lr",
    [(1, 6.4e-9), (31_250, 2e-4), (62_500, 4e-4), (281_250, 2.05e-4), (500_000, 1e-5)],
)
def test_generator_lr_of_the_published_schedule(step, lr):
    assert generator_lr(step, 500_000, Scheduler("cosine", PARAMS)) == exactly(lr)


def test_generator_lr_falls_along_a_half_cosine():
    quarter = generator_lr(62_500 + 437_500 // 4, 500_000, Scheduler("cosine", PARAMS))
    assert quarter == exactly(1e-5 + 3.9e-4 * (0.5 + 0.5 * 0.5**0.5))


@pytest.mark.parametrize("step, lr", [(31_250, 2e-4), (62_500, 4e-4), (500_000, 4e-4)])
def test_constant_generator_lr_warms_up_and_stays(step, lr):
    assert generator_lr(step, 500_000, Scheduler("constant", PARAMS)) == exactly(lr)


def test_generator_lr_without_warm_up_starts_at_the_peak():
    options = Scheduler("cosine", SchedulerParams(4e-4, 0, 1e-5))
    assert generator_lr(1, 1_000_000, options) == pytest.approx(4e-4, rel=1e-6)


def test_generator_lr_of_a_run_that_is_all_warm_up():
    assert (
        generator_lr(10, 10, Scheduler("cosine", SchedulerParams(4e-4, 10, 1e-5, count_from=1)))
        == 4e-4
    )


# ---------------------------------------------------------------------- tokenizer
@pytest.mark.parametrize(
    "step, name, within",
    [
        (1, "warm start", 1),
        (50, "warm start", 50),
        (51, "main", 1),
        (250, "main", 200),
        (251, "adversarial", 1),
        (350, "adversarial", 100),
    ],
)
def test_phase_and_step_within_it(step, name, within):
    phase, number = phase_at(PHASES, step)
    assert (phase.name, number) == (name, within)


@pytest.mark.parametrize("step", [1, 25, 50])
def test_tokenizer_lr_of_a_phase_without_end_is_constant(step):
    assert tokenizer_lr(PHASES, step, warmup(0)) == 1e-4


@pytest.mark.parametrize(
    "step, lr",
    [
        (51, 1e-4 - 8e-5 * 0.5 * (1 - 0.9998766324816606)),  # cos(π / 200)
        (150, 6e-5),
        (250, 2e-5),
    ],
)
def test_tokenizer_lr_falls_along_a_half_cosine(step, lr):
    assert tokenizer_lr(PHASES, step, warmup(0)) == exactly(lr)


@pytest.mark.parametrize("step, share", [(1, 0.1), (5, 0.5), (10, 1.0), (11, 1.0)])
def test_tokenizer_lr_warms_up_from_the_start(step, share):
    assert tokenizer_lr(PHASES, step, warmup(10)) == exactly(share * 1e-4)


def test_warm_up_longer_than_a_phase_goes_on_in_the_next():
    assert tokenizer_lr(PHASES, 250, warmup(1000)) == exactly(0.25 * 2e-5)


def test_a_new_phase_is_not_warmed_up_again():
    assert tokenizer_lr(PHASES, 251, warmup(10)) == tokenizer_lr(PHASES, 251, warmup(0))


def test_a_phase_that_resets_the_optimizer_is_warmed_up_again():
    """As a program that is restarted: its moments are empty and its steps count from the start."""
    phases = [
        Phase("plain", 20, 1e-4),
        Phase("again", 20, 1e-4, reset_optimizer=True),
        Phase("gan", 20, 1e-4, gan_weight=0.1, reset_optimizer=True),
    ]
    shares = {1: 0.1, 10: 1, 20: 1, 21: 0.1, 30: 1, 40: 1, 41: 0.1, 43: 0.2, 45: 0.3, 60: 1}
    for step, share in shares.items():
        assert tokenizer_lr(phases, step, warmup(10)) == exactly(share * 1e-4), step


# ---------------------------------------------------------------------- as published
def test_published_generator_schedule_starts_from_rate_zero_one_step_later():
    ours = SchedulerParams(1e-3, 3, 1e-5, count_from=1)
    published = SchedulerParams(1e-3, 3, 1e-5)
    rates = [generator_lr(step, 7, Scheduler("cosine", published)) for step in range(1, 8)]
    assert rates[0] == 0
    for step in range(1, 7):
        assert rates[step] == generator_lr(step, 7, Scheduler("cosine", ours))


ALTERNATING = [
    Phase("plain", 3, 1e-4),
    Phase("gan", 6, 1e-4, gan_weight=0.1),
    Phase("late", 6, 1e-4, gan_weight=0.1, critic_after=2),
]


def kinds(phases):
    made = sum(phase.steps for phase in phases)
    turns = (is_critic_step(*phase_at(phases, step)) for step in range(1, made + 1))
    return "".join("GD"[turn] for turn in turns)


def test_discriminator_takes_every_other_step_after_the_tokenizers_first():
    assert kinds(ALTERNATING) == "GGG" + "GDGDGD" + "GGDGDG"


def test_tokenizer_steps_are_those_that_the_discriminator_leaves():
    turns = kinds(ALTERNATING)
    for step in range(1, len(turns) + 1):
        assert tokenizer_steps(ALTERNATING, step) == turns[:step].count("G")


def test_warm_up_counts_the_tokenizers_own_steps_from_zero_or_one():
    def rates(**options):
        steps = [4, 6, 8]  # the tokenizer's first, second and third of a phase with both
        phases = [Phase("plain", 3, 1e-4), *ALTERNATING[1:]]
        return [tokenizer_lr(phases, step, warmup(10, **options)) / 1e-4 for step in steps]

    assert rates() == [exactly(0.4), exactly(0.5), exactly(0.6)]
    assert rates(count_from=0) == [exactly(0.3), exactly(0.4), exactly(0.5)]
