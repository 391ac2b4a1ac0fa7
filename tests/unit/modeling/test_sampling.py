import math

import pytest
import torch
from scipy.stats import chisquare

from modeling import sampling
from modeling.errors import InputError
from modeling.generator import Generator, GeneratorConfig
from modeling.sampling import draw, guidance_schedule, sample_codes

TINY = GeneratorConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    codebook_size=16,
    image_seq_len=7,
    condition_num_classes=3,
)
BELOW_ONE = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))


# ---------------------------------------------------------------------- guidance schedule
def test_guidance_schedule_by_hand():
    # (t/4)² = 0, 1/16, 1/4, 9/16
    cosines = [1, math.cos(math.pi / 16), math.cos(math.pi / 4), math.cos(9 * math.pi / 16)]
    expected = torch.tensor([1 + 2 * 0.5 * (1 - c) for c in cosines])
    torch.testing.assert_close(guidance_schedule(3.0, 2.0, 4), expected)


def test_guidance_starts_at_one_and_rises_towards_the_scale():
    scales = guidance_schedule(16.0, 1.8, 273)
    assert scales.shape == (273,) and scales.dtype == torch.float32
    assert scales[0] == 1 and (scales.diff() > 0).all()
    assert 15.9 < scales[-1] < 16


def test_guidance_at_half_way_is_the_mean_for_power_one():
    assert guidance_schedule(6.0, 1.0, 10)[5].item() == pytest.approx(3.5)


def test_guidance_of_scale_one_is_constant():
    assert torch.equal(guidance_schedule(1.0, 0.7, 50), torch.ones(50))


# ---------------------------------------------------------------------- drawing
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax_at_that_temperature(temperature):
    uniforms = torch.rand(10_000, generator=torch.Generator().manual_seed(3))
    logits = torch.linspace(-2, 1, 12)
    codes = draw(logits.expand(10_000, -1), uniforms, temperature)
    weights = [math.exp(value / temperature) for value in logits.tolist()]
    expected = [10_000 * w / sum(weights) for w in weights]
    assert chisquare(torch.bincount(codes, minlength=12).numpy(), expected).pvalue > 0.001


@pytest.mark.parametrize("uniform", [0.0, 0.5, BELOW_ONE])
def test_codes_of_zero_probability_are_never_drawn(uniform):
    logits = torch.full((5, 7), -math.inf)
    logits[range(5), range(1, 6)] = 3.0  # one possible code a row, never the first or last
    assert draw(logits, torch.full((5,), float(uniform)), 1.0).tolist() == [1, 2, 3, 4, 5]


def test_codes_of_zero_probability_between_possible_ones_are_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, -math.inf, 1.0, -math.inf])
    edge = 1 / (1 + math.e)  # where one possible code ends and the other begins
    uniforms = torch.cat([torch.linspace(0, BELOW_ONE, 1001), edge + torch.arange(-9, 10) * 1e-8])
    codes = draw(logits.expand(len(uniforms), -1), uniforms, 1.0)
    assert codes.unique().tolist() == [1, 4]


def test_uniform_just_below_one_stays_in_range():
    logits = torch.randn(200, 4096) * torch.linspace(0, 8, 200)[:, None]
    codes = draw(logits, BELOW_ONE.expand(200), 1.0)
    assert codes.min() >= 0 and codes.max() <= 4095


def test_near_zero_temperature_takes_the_most_likely_code():
    logits = torch.randn(100, 50)
    assert torch.equal(draw(logits, torch.rand(100), 1e-5), logits.argmax(1))


# ---------------------------------------------------------------------- sampling
def reference(model, labels, uniforms, scale=None, power=1.0, temperature=1.0):
    """Uncached, from the published formula: (B, T) codes."""
    steps = uniforms.shape[1]
    codes = torch.empty(len(labels), 0, dtype=torch.int64)
    for t in range(steps):
        logits = model(codes, labels)[:, -1]
        if scale is not None:
            without = model(codes, torch.full_like(labels, 3))[:, -1]
            s = 1 + (scale - 1) * 0.5 * (1 - math.cos(math.pi * (t / steps) ** power))
            logits = without + s * (logits - without)
        codes = torch.cat([codes, draw(logits, uniforms[:, t], temperature)[:, None]], 1)
    return codes


@pytest.fixture
def model(fill):
    return fill(Generator(TINY))


LABELS = torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize("scale", [0.0, 1.0])
@torch.no_grad()
def test_scale_zero_and_one_sample_the_class_branch_alone(model, monkeypatch, scale):
    batches = []
    cache = sampling.KVCache
    monkeypatch.setattr(
        sampling, "KVCache", lambda *given: batches.append(given[1]) or cache(*given)
    )
    uniforms = torch.rand(5, 7)
    codes = sample_codes(model, LABELS, uniforms, scale, 1.8)
    assert torch.equal(codes, reference(model, LABELS, uniforms))
    assert batches == [5]  # half the work of guidance


@pytest.mark.parametrize("scale, power, temperature", [(4.0, 1.5, 1.0), (9.0, 0.7, 0.8)])
@torch.no_grad()
def test_guided_codes_are_those_of_the_formula_without_cache(model, scale, power, temperature):
    uniforms = torch.rand(5, 7)
    codes = sample_codes(model, LABELS, uniforms, scale, power, temperature)
    assert torch.equal(codes, reference(model, LABELS, uniforms, scale, power, temperature))
    assert not torch.equal(codes, reference(model, LABELS, uniforms, None, power, temperature))


@pytest.mark.parametrize("label", [-1, 3, 4])
def test_class_out_of_range_is_refused_with_the_range(model, label):
    with pytest.raises(InputError) as caught:
        sample_codes(model, torch.tensor([0, label]), torch.rand(2, 7), 4.0, 1.0)
    assert str(label) in str(caught.value) and "0…2" in str(caught.value)


@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_codes_of_an_image_do_not_depend_on_the_others_of_its_batch(model, scale):
    uniforms = torch.rand(5, 7)
    together = sample_codes(model, LABELS, uniforms, scale, 1.0)
    for i in range(5):
        alone = sample_codes(model, LABELS[i : i + 1], uniforms[i : i + 1], scale, 1.0)
        assert torch.equal(alone[0], together[i])
    backwards = sample_codes(model, LABELS.flip(0), uniforms.flip(0), scale, 1.0)
    assert torch.equal(backwards.flip(0), together)


def test_same_uniforms_give_the_same_codes_whatever_the_global_seed(model):
    uniforms = torch.rand(5, 7)
    first = sample_codes(model, LABELS, uniforms, 4.0, 1.0)
    torch.manual_seed(99)
    assert torch.equal(sample_codes(model, LABELS, uniforms, 4.0, 1.0), first)
