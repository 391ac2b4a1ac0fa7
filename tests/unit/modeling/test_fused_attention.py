"""The fused attention against the plain form and `generator.Block`.

On CUDA the kernel runs as it is. Without, one test runs this file again in Triton's interpreter.
"""

import dataclasses
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from modeling import decode_attention
from modeling.cpu_layout import linear
from modeling.decode_attention import (
    ROUNDING,
    Cache,
    check_attention,
    choose_attention,
    empty_cache,
    filled,
    head_parts,
    plain_attention,
    quantize,
    write_positions,
)
from modeling.engine import Engine, after_attention, block_weights, norm
from modeling.generator import Generator
from modeling.sampling import Sampling
from tests.refusals import refusal
from tests.tiny import sample_codes, tiny_generator

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if CUDA else "cpu")

pytestmark = pytest.mark.kernel
runs_the_kernel = pytest.mark.skipif(
    not (CUDA or INTERPRETED), reason="runs in the interpreter, started by another test here"
)
HEAD_SIZES = [24, 48, 64, 80]
FLOATS = [torch.float32, torch.bfloat16]
# The interpreter truncates to bfloat16, where hardware rounds: twice the error.
ALLOWED = {torch.float32: ROUNDING[torch.float32], torch.bfloat16: 2**-7 if CUDA else 2**-6}

if INTERPRETED:
    import triton
    import triton.language as tl

    @triton.jit
    def unrotated(base, norm, turn, d, scale, h: tl.constexpr):
        return scale * tl.load(base + d).to(tl.float32) * tl.load(norm + d)


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernel runs in this process")
def test_the_kernel_passes_its_tests_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    # Skipped there: this test, and the one that wants no interpreter.
    assert " 2 skipped" in done.stdout and " passed" in done.stdout


def tiny(size, layers=2):
    return tiny_generator(hidden_size=2 * size, num_hidden_layers=layers, codebook_size=64)


# ---------------------------------------------------------------------- one attention
def in_float32(qkv, qk_norm, turns, p, cache):
    """The plain form, whose products and sums a CPU does not round to bfloat16."""
    q = write_positions(qkv.unsqueeze(1), qk_norm, turns, p, cache).float()  # (N, H, 1, h)
    k, v = filled(cache, p + 1)
    weights = torch.softmax((q * k).sum(-1) * q.shape[-1] ** -0.5, -1)
    return (weights.unsqueeze(-1) * v).sum(2).flatten(1)


@runs_the_kernel
@pytest.mark.parametrize(
    "size, dtype",
    [(s, d) for d in FLOATS for s in HEAD_SIZES if CUDA or d == torch.float32 or s == 48],
)  # the interpreter takes seconds
def test_fused_equals_plain_at_every_edge_of_its_tiles(size, dtype):
    from modeling.fused_attention import SHAPE, WIDE, fused_attention

    heads, rows, positions = 2, 2, 140
    qk_norm, angles = torch.rand(2, 1, size) + 0.5, torch.randn(positions, size)
    turns = torch.stack([angles.cos(), angles.sin()], 1).to(DEVICE)
    fused, plain = (empty_cache((rows, heads, positions, size), dtype, DEVICE) for _ in range(2))
    for tensor in (*fused[:2], *plain[:2]):
        tensor.fill_(torch.nan)
    filled = 0
    for p in (0, 1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 139):
        for ours, theirs in zip(fused[:2], plain[:2]):
            ours[:, :, filled:p] = torch.randn(rows, heads, p - filled, size)
            theirs[:, :, filled:p] = ours[:, :, filled:p]
        filled = p + 1
        qkv = torch.randn(rows, 3 * heads * size).to(DEVICE, dtype)
        at = torch.tensor([p], device=DEVICE)
        shape = SHAPE if p != 128 else WIDE[False]
        y = fused_attention(qkv, qk_norm.to(DEVICE), turns, at, fused, shape)
        z = in_float32(qkv, qk_norm.to(DEVICE), turns, p, plain)
        off = (y.float() - z.float()).abs() / (1 + z.float().abs())
        assert off.max() <= ALLOWED[dtype] and y.dtype == dtype  # NaN is not
        for ours, theirs in zip(fused[:2], plain[:2]):
            assert not ours[:, :, :filled].isnan().any() and ours[:, :, filled:].isnan().all()
            torch.testing.assert_close(
                ours, theirs, atol=ALLOWED[dtype], rtol=ALLOWED[dtype], equal_nan=True
            )


@runs_the_kernel
@pytest.mark.parametrize("size", HEAD_SIZES)
@pytest.mark.parametrize("types", [(d, s) for d in FLOATS for s in (d, torch.int8)])
def test_kernel_passes_its_own_check(size, types):
    assert choose_attention("fused", (2, 73, size), types, DEVICE) is not None


def test_int8_keeps_a_row_within_half_a_step_of_its_scale():
    torch.manual_seed(1)
    values = torch.randn(2, 3, 2, 9, 48) * torch.logspace(-6, 6, 9)[:, None]
    codes, scales = quantize(values)
    ours = codes.float() * scales.float().unsqueeze(-1)
    step = values.abs().amax(-1, keepdim=True) / 127
    # Half a step, and the rounding of the scale to bfloat16 where the code is largest.
    assert ((ours - values).abs() <= (0.5 + 127 * 2**-9) * step).all()
    assert ((ours - values).abs() > 0.3 * step).any()


# ---------------------------------------------------------------------- the engine around it
@pytest.mark.parametrize("engine", ["plain", pytest.param("fused", marks=runs_the_kernel)])
@pytest.mark.parametrize("size", HEAD_SIZES)
@torch.inference_mode()
def test_steps_of_a_block_are_the_block(fill, engine, size):
    """`generator.Block` over a sequence at once against the engine's parts, position by position."""
    config = dataclasses.replace(tiny(size), num_hidden_layers=1)
    model = fill(Generator(config)).to(DEVICE)
    x = torch.randn(2, 7, config.hidden_size, device=DEVICE)
    expected = model.blocks[0](x, model.rotary[:7])
    block = block_weights(model.blocks[0], torch.float32, lambda w: w)
    turns = model.rotary
    cache = empty_cache((2, 2, 7, size), torch.float32, DEVICE)
    types = (torch.float32, torch.float32)
    attend = choose_attention(engine, (2, 7, size), types, DEVICE) or plain_attention
    for p in range(7):
        at = torch.tensor([p], device=DEVICE) if engine == "fused" else p
        qkv = linear(norm(x[:, p], block.norm1), block.qkv, block.qkv_bias)
        y = after_attention(x[:, p], attend(qkv, block.qk_norm, turns, at, cache), block)
        torch.testing.assert_close(y, expected[:, p], atol=1e-5, rtol=1e-5)


@runs_the_kernel
@pytest.mark.parametrize("size", HEAD_SIZES if CUDA else [64, 80])  # one power of two, and two
def test_codes_of_the_fused_engine_are_those_of_the_plain_loop(fill, size):
    model = fill(Generator(tiny(size))).to(DEVICE)
    labels, uniforms = torch.arange(2, device=DEVICE), torch.rand(2, 7).to(DEVICE)
    codes = sample_codes(model, labels, uniforms, Sampling(4.0, 1.5))
    for engine in ("fused", "plain"):
        ours = Engine(model, 2, Sampling(4.0, 1.5), engine=engine)
        assert torch.equal(ours.sample(labels, uniforms), codes)


@runs_the_kernel
@pytest.mark.parametrize("cache, allowed", [("auto", 1e-4), ("int8", 0.03)])
def test_the_fused_engine_behind_a_prefix_is_where_its_steps_lead(fill, cache, allowed):
    model = fill(Generator(tiny(48))).to(DEVICE)
    labels, uniforms = torch.arange(2, device=DEVICE), torch.rand(2, 7).to(DEVICE)
    engine = Engine(model, 2, Sampling(4.0, 1.5), engine="fused", cache=cache)
    if cache == "auto":
        prefix = torch.randint(64, (2, 3)).to(DEVICE)
        expected = sample_codes(model, labels, uniforms, Sampling(4.0, 1.5), prefix)
        assert torch.equal(engine.sample(labels, uniforms, prefix), expected)
    logits = []
    engine.graph = None  # a captured step would not call what replaces `choose`
    # The code of every step is given by its number, so that all ways see the same sequence.
    codes = (uniforms * 64).long()
    engine.functions = engine.functions._replace(
        choose=lambda x, given, uniform, *rest: logits.append(x.clone()) or (uniform * 64).long()
    )
    assert torch.equal(engine.sample(labels, uniforms), codes)
    stepped = torch.stack(logits)  # (7, rows, V)
    for n in (1, 5):
        logits.clear()
        assert torch.equal(engine.sample(labels, uniforms, codes[:, :n]), codes)
        behind, expected = torch.stack(logits), stepped[n:]
        assert behind.shape == expected.shape
        error = (behind - expected).std(-1) / expected.std(-1)
        assert error.max() < allowed


# ---------------------------------------------------------------------- the check
def shifted(qkv, qk_norm, turns, position, cache):
    return plain_attention(qkv, qk_norm, turns.roll(1, 0), int(position), cache)


def forgetful(qkv, qk_norm, turns, position, cache):
    """Leaves the first position out."""
    p = int(position)
    if p == 0:
        return plain_attention(qkv, qk_norm, turns, p, cache)
    later = Cache(*(x if x is None else x[:, :, 1:] for x in cache))
    return plain_attention(qkv, qk_norm, turns[1:], p - 1, later)


def reaching(qkv, qk_norm, turns, position, cache):
    """Reads one position too many."""
    p = int(position)
    y = plain_attention(qkv, qk_norm, turns, p, cache)
    behind = cache.v[:, :, min(p + 1, cache.v.shape[2] - 1)].reshape(len(y), -1)
    return y + 0 * behind


def unwritten(qkv, qk_norm, turns, position, cache):
    return plain_attention(
        qkv, qk_norm, turns, int(position), Cache(*(x.clone() for x in cache[:2]))
    )


def overwriting(qkv, qk_norm, turns, position, cache):
    y = plain_attention(qkv, qk_norm, turns, int(position), cache)
    cache.k[:, :, -1] = 0
    return y


def uncompiled(*arguments):
    raise RuntimeError("no such instruction\nand more")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "broken, words",
    [
        (shifted, "keys at position|output at position"),
        (forgetful, "output at position 36 differ by"),
        (reaching, "output at position 0 differ by nan"),
        (unwritten, "output at position 0 differ by nan"),
        (overwriting, "keys at position 0 differ by 1 from"),
        (uncompiled, r"does not run \(RuntimeError: no such instruction\)$"),
    ],
)
def test_check_sees_a_broken_kernel_and_says_what_is_wrong(broken, words, dtype):
    right = lambda qkv, n, t, p, cache: plain_attention(qkv, n, t, int(p), cache)  # noqa: E731
    arguments = ((2, 73, 48), (dtype, dtype), torch.device("cpu"))
    assert check_attention(right, *arguments) is None
    fault = check_attention(broken, *arguments)
    assert fault is not None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(fault)


@pytest.mark.skipif(not INTERPRETED, reason="changes the kernel, which only the interpreter sees")
def test_check_sees_a_kernel_whose_rotation_is_wrong(monkeypatch):
    from modeling import fused_attention

    right = fused_attention.rotated
    monkeypatch.setattr(fused_attention, "rotated", unrotated)
    types = (torch.float32, torch.float32)
    choose = partial(choose_attention, "fused", (2, 73, 48), types, DEVICE)
    refusal(choose, "engine=fused", "keys at position 0")
    monkeypatch.setattr(fused_attention, "rotated", right)
    assert choose() is not None


def test_auto_on_cuda_leaves_a_faulty_kernel_with_one_warning(monkeypatch):
    monkeypatch.setattr(decode_attention, "find_fused", lambda *_: (plain_attention, "it is wrong"))
    types = (torch.float32, torch.float32)
    with pytest.warns(UserWarning, match="plain attention, which is slower: it is wrong") as caught:
        assert choose_attention("auto", (2, 21, 48), types, torch.device("cuda")) is None
    assert len(caught) == 1
    fused = partial(choose_attention, "fused", (2, 21, 48), types, torch.device("cuda"))
    refusal(fused, "engine=fused", "it is wrong")


def test_plain_is_chosen_on_a_cpu_and_where_asked_without_a_look_at_the_kernel(
    monkeypatch, recwarn
):
    monkeypatch.setattr(decode_attention, "find_fused", None)
    types = (torch.float32, torch.float32)
    assert choose_attention("auto", (2, 21, 48), types, torch.device("cpu")) is None
    assert choose_attention("plain", (2, 21, 48), types, torch.device("cuda")) is None
    assert not recwarn


@pytest.mark.skipif(CUDA or INTERPRETED, reason="a CPU without the interpreter")
def test_fused_is_refused_on_a_cpu(fill):
    model = fill(Generator(tiny(24)))
    refusal(lambda: Engine(model, 2, Sampling(), engine="fused"), "engine=fused", "CUDA")


def test_head_sizes_that_the_kernel_can_do():
    sizes = range(4, 132, 4)
    assert [size for size in sizes if head_parts(size) is None] == [
        size for size in sizes if bin(size).count("1") > 2
    ]
    assert [head_parts(size) for size in (4, 48, 64, 80)] == [(2, 2), (32, 16), (32, 32), (64, 16)]


@runs_the_kernel
def test_other_head_sizes_take_the_plain_attention():
    fused, fault = decode_attention.find_fused((2, 21, 28), (torch.float32,) * 2, DEVICE)
    assert fused is None and fault == "head size 28 is not a sum of two powers of two"


def test_a_triton_that_does_not_load_is_a_fault_not_an_error(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "modeling.fused_attention", None)  # importing it fails
    fused, fault = decode_attention.find_fused((2, 21, 48), (torch.float32,) * 2, DEVICE)
    assert fused is None and fault.startswith("Triton cannot be used (ModuleNotFoundError")
