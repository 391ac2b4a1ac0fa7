import dataclasses
import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

from modeling.engine import Engine
from modeling.generator import Generator
from modeling.image_decoder import ImageDecoder
from modeling.sampling import (
    NO_CLASS,
    ReferenceEngine,
    Sampling,
    draw_codes,
    image_uniforms,
)
from tests.refusals import refusal
from tests.tiny import sample_codes, tiny_generator

TINY = tiny_generator()
BELOW_ONE = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0))


# ---------------------------------------------------------------------- guidance schedule
def test_guidance_schedule_by_hand():
    # (t/4)² = 0, 1/16, 1/4, 9/16
    cosines = [1, math.cos(math.pi / 16), math.cos(math.pi / 4), math.cos(9 * math.pi / 16)]
    expected = torch.tensor([1 + 2 * 0.5 * (1 - c) for c in cosines])
    torch.testing.assert_close(Sampling(3.0, 2.0).scales(4), expected)


def test_guidance_starts_at_one_and_rises_towards_the_scale():
    scales = Sampling(16.0, 1.8).scales(273)
    assert scales.shape == (273,) and scales.dtype == torch.float32
    assert scales[0] == 1 and (scales.diff() > 0).all()
    assert 15.9 < scales[-1] < 16


def test_guidance_at_half_way_is_the_mean_for_power_one():
    assert Sampling(6.0, 1.0).scales(10)[5].item() == pytest.approx(3.5)


def test_guidance_of_scale_one_is_constant():
    assert torch.equal(Sampling(1.0, 0.7).scales(50), torch.ones(50))


# ---------------------------------------------------------------------- random numbers
@pytest.mark.parametrize(
    "seed, digest",
    [
        (0, "09a1e87a0afba5e7"),
        (42, "da09ec02135ca1fb"),
        (2**32, "cfb4a8a24751a27b"),
        (2**130 + 9, "1f7ac0f67d8eb454"),
    ],
)
def test_uniforms_are_those_of_published_samples(seed, digest):
    """Philox's numbers, hashed: another release of NumPy that draws others would change every image."""
    uniforms = image_uniforms(seed, [0, 7, 49_999, 2**32 + 1], 273)
    assert hashlib.sha256(uniforms.numpy().tobytes()).hexdigest().startswith(digest)


def test_no_images_take_no_numbers():
    assert image_uniforms(0, range(0), 7).shape == (0, 7)


# ---------------------------------------------------------------------- drawing
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_softmax_at_that_temperature(temperature):
    uniforms = torch.rand(10_000, generator=torch.Generator().manual_seed(3))
    logits = torch.linspace(-2, 1, 12)
    codes = draw_codes(logits.expand(10_000, -1), uniforms, temperature)
    weights = [math.exp(value / temperature) for value in logits.tolist()]
    expected = [10_000 * w / sum(weights) for w in weights]
    assert chisquare(torch.bincount(codes, minlength=12).numpy(), expected).pvalue > 0.001


@pytest.mark.parametrize("uniform", [0.0, 0.5, BELOW_ONE])
def test_codes_of_zero_probability_are_never_drawn(uniform):
    logits = torch.full((5, 7), -math.inf)
    logits[range(5), range(1, 6)] = 3.0  # one possible code a row, never the first or last
    assert draw_codes(logits, torch.full((5,), float(uniform)), 1.0).tolist() == [1, 2, 3, 4, 5]


def test_codes_of_zero_probability_between_possible_ones_are_never_drawn():
    logits = torch.tensor([-math.inf, 0.0, -math.inf, -math.inf, 1.0, -math.inf])
    edge = 1 / (1 + math.e)  # where one possible code ends and the other begins
    uniforms = torch.cat([torch.linspace(0, BELOW_ONE, 1001), edge + torch.arange(-9, 10) * 1e-8])
    codes = draw_codes(logits.expand(len(uniforms), -1), uniforms, 1.0)
    assert codes.unique().tolist() == [1, 4]


def test_uniform_just_below_one_stays_in_range():
    logits = torch.randn(200, 4096) * torch.linspace(0, 8, 200)[:, None]
    codes = draw_codes(logits, BELOW_ONE.expand(200), 1.0)
    assert codes.min() >= 0 and codes.max() <= 4095


def test_near_zero_temperature_takes_the_most_likely_code():
    logits = torch.randn(100, 50)
    assert torch.equal(draw_codes(logits, torch.rand(100), 1e-5), logits.argmax(1))


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
        codes = torch.cat([codes, draw_codes(logits, uniforms[:, t], temperature)[:, None]], 1)
    return codes


@pytest.fixture
def model(fill):
    return fill(Generator(TINY))


LABELS = torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize("scale", [0.0, 1.0])
@torch.no_grad()
def test_scale_zero_and_one_sample_the_class_branch_alone(model, monkeypatch, scale):
    batches = []
    step = model.step
    monkeypatch.setattr(
        model, "step", lambda rows, *at: batches.append(len(rows)) or step(rows, *at)
    )
    uniforms = torch.rand(5, 7)
    codes = sample_codes(model, LABELS, uniforms, Sampling(scale, 1.8))
    assert torch.equal(codes, reference(model, LABELS, uniforms))
    assert set(batches) == {5}  # half the work of guidance


@pytest.mark.parametrize("scale, power, temperature", [(4.0, 1.5, 1.0), (9.0, 0.7, 0.8)])
@torch.no_grad()
def test_guided_codes_are_those_of_the_formula_without_cache(model, scale, power, temperature):
    uniforms = torch.rand(5, 7)
    codes = sample_codes(
        model, LABELS, uniforms, Sampling(scale, power, randomize_temperature=temperature)
    )
    assert torch.equal(codes, reference(model, LABELS, uniforms, scale, power, temperature))
    assert not torch.equal(codes, reference(model, LABELS, uniforms, None, power, temperature))


@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_codes_of_an_image_do_not_depend_on_the_others_of_its_batch(model, scale):
    uniforms = torch.rand(5, 7)
    together = sample_codes(model, LABELS, uniforms, Sampling(scale))
    for i in range(5):
        alone = sample_codes(model, LABELS[i : i + 1], uniforms[i : i + 1], Sampling(scale))
        assert torch.equal(alone[0], together[i])
    backwards = sample_codes(model, LABELS.flip(0), uniforms.flip(0), Sampling(scale))
    assert torch.equal(backwards.flip(0), together)


def test_same_uniforms_give_the_same_codes_whatever_the_global_seed(model):
    uniforms = torch.rand(5, 7)
    first = sample_codes(model, LABELS, uniforms, Sampling(4.0))
    torch.manual_seed(99)
    assert torch.equal(sample_codes(model, LABELS, uniforms, Sampling(4.0)), first)


# ---------------------------------------------------------------------- top-k and top-p
SKEWED = torch.tensor([0.02, 0.30, 0.05, 0.25, 0.08, 0.20, 0.10])  # probabilities, in no order


def exact(temperature=1.0, top_k=0, top_p=1.0):
    """What the knobs make of SKEWED, in float64 and from their definitions: (7,) probabilities."""
    p = SKEWED.double() ** (1 / temperature)
    order = (p / p.sum()).argsort(descending=True).tolist()
    kept = order[: top_k or None]
    mass, inside = 0.0, []
    for code in kept:
        if mass < top_p:
            inside.append(code)
        mass += (p[code] / p[kept].sum()).item()
    q = torch.zeros(7, dtype=torch.float64)
    q[inside] = p[inside]
    return q / q.sum()


@pytest.mark.parametrize(
    "knobs, kept",
    [
        (dict(temperature=0.7), 7),
        (dict(temperature=1.5), 7),
        (dict(top_k=3), 3),
        (dict(top_k=1), 1),
        (dict(top_k=9), 7),
        (dict(top_p=0.74), 3),
        (dict(top_p=0.76), 4),
        (dict(top_p=0.01), 1),
        (dict(temperature=2.0, top_k=5, top_p=0.6), 3),
    ],
)
def test_draws_follow_the_exact_probabilities(knobs, kept):
    uniforms = torch.rand(10_000, generator=torch.Generator().manual_seed(5))
    logits = SKEWED.log() + 3.0
    knobs = {"temperature": 1.0, **knobs}
    counts = torch.bincount(draw_codes(logits.expand(10_000, -1), uniforms, **knobs), minlength=7)
    expected = exact(**knobs)
    possible = expected > 0
    assert possible.sum() == kept and not counts[~possible].any()
    if kept > 1:
        expected = 10_000 * expected[possible].numpy()
        assert chisquare(counts[possible].numpy(), expected).pvalue > 0.001


@pytest.mark.parametrize("schedule, expected", [("constant", [5] * 4), ("linear", [1, 2, 3, 4])])
def test_other_guidance_schedules_by_hand(schedule, expected):
    assert Sampling(5.0, 1.8, guidance_schedule=schedule).scales(4).tolist() == expected


@pytest.mark.parametrize(
    "name, value",
    [("guidance_schedule", "cosine"), ("randomize_temperature", 0.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1)],
)  # fmt: skip
def test_knobs_that_make_no_sense_are_refused(name, value):
    refusal(lambda: Sampling(**{name: value}), f"{name}={value}")


# ---------------------------------------------------------------------- the engine
def engine_codes(model, labels, uniforms, batch=5, **given):
    knobs = {k: given.pop(k) for k in list(given) if k in Sampling.__dataclass_fields__}
    return Engine(model, batch, Sampling(**knobs), **given).sample(labels, uniforms)


@pytest.mark.parametrize("scale", [0.0, 1.0, 6.0])
@torch.no_grad()
def test_engine_draws_what_the_formula_without_cache_does(model, scale):
    uniforms = torch.rand(5, 7)
    codes = engine_codes(model, LABELS, uniforms, guidance_scale=scale, guidance_scale_pow=1.5)
    expected = reference(model, LABELS, uniforms, None if scale < 2 else scale, 1.5)
    assert torch.equal(codes, expected)


def test_engine_follows_its_knobs(model):
    """10,000 first codes against exact probabilities of the model's own logits."""
    with torch.no_grad():
        empty = torch.empty(1, 0, dtype=torch.int64)
        logits = model(empty, torch.tensor([1]))[0, 0].double()
    p = torch.softmax(logits / 0.8, 0)
    least = p.topk(6).values[-1]
    p = torch.where(p >= least, p, 0.0)
    p /= p.sum()
    labels = torch.full((10_000,), 1)
    uniforms = torch.rand(10_000, 7, generator=torch.Generator().manual_seed(2))
    codes = engine_codes(model, labels, uniforms, batch=10_000, randomize_temperature=0.8, top_k=6)[
        :, 0
    ]
    counts = torch.bincount(codes, minlength=16)
    possible = p > 0
    assert possible.sum() == 6 and not counts[~possible].any()
    assert chisquare(counts[possible], 10_000 * p[possible].numpy()).pvalue > 0.001


def test_codes_do_not_depend_on_the_rest_of_the_batch_nor_on_earlier_batches(model):
    uniforms = torch.rand(5, 7)
    engine = Engine(model, 5, Sampling(4.0, 1.0))
    whole = engine.sample(LABELS, uniforms)
    assert torch.equal(engine.sample(LABELS[3:], uniforms[3:]), whole[3:])
    assert torch.equal(engine.sample(LABELS, uniforms), whole)


def test_engine_runs_one_branch_without_guidance_and_two_with(model):
    sizes = [len(Engine(model, 5, Sampling(scale)).rows) for scale in (0.0, 1.0, 2.0)]
    assert sizes == [5, 5, 10]


def test_engine_leaves_the_model_as_it_was_and_does_not_follow_it(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    uniforms = torch.rand(5, 7)
    engine = Engine(model, 5, Sampling(4.0), dtype=torch.bfloat16)
    codes = engine.sample(LABELS, uniforms)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(engine.sample(LABELS, uniforms), codes)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_label_of_no_class_samples_from_the_row_that_no_class_has(model, scale):
    labels, uniforms = torch.tensor([NO_CLASS, 1, NO_CLASS]), torch.rand(3, 7)
    codes = Engine(model, 4, Sampling(scale)).sample(labels, uniforms)
    assert torch.equal(codes, sample_codes(model, labels, uniforms, Sampling(scale)))
    assert labels.tolist() == [NO_CLASS, 1, NO_CLASS]  # left as they were
    unguided = Engine(model, 3, Sampling()).sample(torch.full((3,), NO_CLASS), uniforms)
    assert torch.equal(codes[::2], unguided[::2])  # guidance changes nothing
    other = Engine(model, 3, Sampling(scale)).sample(torch.ones(3, dtype=torch.int64), uniforms)
    assert not torch.equal(codes[0], other[0])


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_bfloat16_keeps_the_logits_near_float32(fill, compiled):
    """The error of a whole network of bf16 products, not that of logits rounded to bf16."""
    model = fill(Generator(dataclasses.replace(TINY, hidden_size=64, image_seq_len=21)))
    labels, uniforms = torch.arange(3), torch.rand(3, 21)
    seen = {}
    for dtype in (torch.float32, torch.bfloat16):
        engine = Engine(model, 3, Sampling(3.0), dtype, compiled)
        assert engine.compiled == compiled
        functions, steps = engine.functions, []
        engine.functions = functions._replace(
            choose=lambda x, *rest, f=functions.choose, s=steps: s.append(x.clone()) or f(x, *rest)
        )
        engine.sample(labels, uniforms)
        assert engine.caches[0].k.dtype == dtype and steps[0].dtype == torch.float32
        seen[dtype] = steps[0]
    exact, rough = seen.values()
    error = (rough - exact).std() / exact.std()
    assert 0 < error < 0.02


# ---------------------------------------------------------------------- pixels
def test_pixels_are_truncated_not_rounded_and_channels_come_last():
    class Pixels(torch.nn.Module):
        def forward(self, vectors):
            values = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1)
            return values.expand(len(vectors), 3, 2, 2), None

    tokenizer = SimpleNamespace(
        quantize=SimpleNamespace(lookup=torch.nn.Embedding(16, 4)),
        decoder=Pixels(),
        latent_tokens=torch.empty(5, 4),
    )
    images = ImageDecoder(tokenizer, torch.float32)(torch.zeros(70, 5, dtype=torch.int64))
    assert images.shape == (70, 2, 2, 3) and images.dtype == torch.uint8
    assert images[69, 0, 0].tolist() == [0, 127, 255]


def test_the_reference_engine_samples_a_model_that_trains_without_dropout(fill):
    model = fill(Generator(dataclasses.replace(TINY, dropout=0.5, attn_drop=0.5)))
    uniforms = torch.rand(5, TINY.image_seq_len, generator=torch.Generator().manual_seed(0))
    engine = ReferenceEngine(model, 5, Sampling(guidance_scale=2.0))
    expected = engine.sample(LABELS, uniforms)
    model.train()
    assert torch.equal(engine.sample(LABELS, uniforms), expected)
    assert model.training and model.blocks[0].training
