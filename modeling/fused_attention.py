"""The attention of one decoding step as one Triton kernel. Needs Triton; see `decode_attention`.

One program per row n and head: it normalises and rotates q and k, writes k and v at the current
position, and reads the filled part of the cache once, with an online softmax. The position is read on
the device, so one CUDA graph serves all steps. The keys are not split: N·H is in the thousands and
there are at most a few hundred positions.
"""

# The bodies of the kernels are Triton's language, of which a type checker knows little.
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_attention import Cache, head_parts
from .generator import EPS

# Positions per tile and warps of a program. What bounds the kernel is how many bytes it has in flight
# while it waits for memory. On sm_90, one warp and 16 positions take 80 to 127 registers per thread for
# head sizes 48, 64 and 80, so that 16 to 25 programs share a multiprocessor, with 75 to 84 KB in flight
# and no barrier in the loop; four warps and 64 positions (int8: 32) leave 3 to 5, with 15 to 80 KB.
SHAPE = (16, 1)
WIDE = {False: (64, 4), True: (32, 4)}  # to try on another GPU, by whether the cache is int8


@triton.jit
def rotated(base, norm, turn, d, scale, h: tl.constexpr):
    """Channels `d` of a head: scaled, weighted and rotated with their neighbours in the pair."""
    x = tl.load(base + d).to(tl.float32) * tl.load(norm + d)
    y = tl.load(base + (d ^ 1)).to(tl.float32) * tl.load(norm + (d ^ 1))
    return scale * (x * tl.load(turn + d) + y * tl.load(turn + h + d))


@triton.jit
def inverse_rms(base, a, b, h: tl.constexpr, eps: tl.constexpr):
    xa, xb = tl.load(base + a).to(tl.float32), tl.load(base + b).to(tl.float32)
    return 1.0 / tl.sqrt((tl.sum(xa * xa, 0) + tl.sum(xb * xb, 0)) / h + eps)


@triton.jit
def int8_scale(xa, xb, dtype: tl.constexpr):
    """Scale of one row of one head, rounded to the type that it is stored in."""
    largest = tl.maximum(tl.max(tl.abs(xa), 0), tl.max(tl.abs(xb), 0))
    return tl.maximum(largest / 127.0, 1e-30).to(dtype).to(tl.float32)


@triton.jit
def to_int8(x, scale):
    x = tl.minimum(tl.maximum(x / scale, -127.0), 127.0)
    return tl.where(x >= 0, x + 0.5, x - 0.5).to(tl.int8)  # the conversion truncates


@triton.jit
def streamed(at, filled):
    """Elements of the cache, 0 where not filled. A step reads them once: L2 keeps the weights."""
    return tl.load(at, filled, 0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def fused_kernel(
    qkv,  # (N, 3·H·h)
    qk_norm,  # (2, 1, h) float32
    turns,  # (positions, 2, h) float32
    position,  # (1,) int64
    k_cache,  # (N, H, S, h)
    v_cache,  # (N, H, S, h)
    k_scale,  # (N, H, S), read and written with an int8 cache only
    v_scale,
    out,  # (N, H·h)
    S,
    H: tl.constexpr,
    h: tl.constexpr,
    A: tl.constexpr,  # the head in two parts whose sizes are powers of two: no idle lanes
    B: tl.constexpr,
    BLOCK: tl.constexpr,
    EPS: tl.constexpr,
    INT8: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    n, head = program // H, program % H
    p = tl.load(position).to(tl.int32)
    a, b = tl.arange(0, A), A + tl.arange(0, B)
    stored = k_cache.dtype.element_ty

    # Norm and rotation, in float32.
    q_in = qkv + n * (3 * H * h) + head * h
    k_in, v_in = q_in + H * h, q_in + 2 * H * h
    turn = turns + p * (2 * h)
    r = inverse_rms(q_in, a, b, h, EPS)
    qa, qb = rotated(q_in, qk_norm, turn, a, r, h), rotated(q_in, qk_norm, turn, b, r, h)
    r = inverse_rms(k_in, a, b, h, EPS)
    ka = rotated(k_in, qk_norm + h, turn, a, r, h)
    kb = rotated(k_in, qk_norm + h, turn, b, r, h)
    va, vb = tl.load(v_in + a).to(tl.float32), tl.load(v_in + b).to(tl.float32)

    # The cache's new row, as later steps will read it.
    row = program * S
    at = (row + p) * h
    if INT8:
        ks = int8_scale(ka, kb, k_scale.dtype.element_ty)
        vs = int8_scale(va, vb, v_scale.dtype.element_ty)
        ka, kb, va, vb = to_int8(ka, ks), to_int8(kb, ks), to_int8(va, vs), to_int8(vb, vs)
        tl.store(k_scale + row + p, ks.to(k_scale.dtype.element_ty))
        tl.store(v_scale + row + p, vs.to(v_scale.dtype.element_ty))
    else:
        qa, qb = qa.to(stored).to(tl.float32), qb.to(stored).to(tl.float32)
        ka, kb, va, vb = ka.to(stored), kb.to(stored), va.to(stored), vb.to(stored)
    tl.store(k_cache + at + a, ka)
    tl.store(k_cache + at + b, kb)
    tl.store(v_cache + at + a, va)
    tl.store(v_cache + at + b, vb)
    ka, kb, va, vb = ka.to(tl.float32), kb.to(tl.float32), va.to(tl.float32), vb.to(tl.float32)
    if INT8:
        ka, kb, va, vb = ka * ks, kb * ks, va * vs, vb * vs

    # Every line of the tile keeps a softmax of its own; they are joined once, after the loop. The
    # new position, which is not read back, starts the first line. exp2 is the hardware's.
    log2e_over_root: tl.constexpr = 1.4426950408889634 / (h**0.5)
    qa, qb = qa * log2e_over_root, qb * log2e_over_root
    i = tl.arange(0, BLOCK)
    first = i == 0
    top = tl.where(first, tl.sum(qa * ka, 0) + tl.sum(qb * kb, 0), float("-inf"))
    total = tl.where(first, 1.0, 0.0)
    ya = tl.where(first[:, None], va[None, :], 0.0)
    yb = tl.where(first[:, None], vb[None, :], 0.0)
    start = p * 0
    while start < p:  # `range` up to a tensor fails in the interpreter of some releases
        t = start + i
        filled = t < p
        line = (row + t[:, None]) * h
        Ka = streamed(k_cache + line + a[None, :], filled[:, None])
        Kb = streamed(k_cache + line + b[None, :], filled[:, None])
        Va = streamed(v_cache + line + a[None, :], filled[:, None])
        Vb = streamed(v_cache + line + b[None, :], filled[:, None])
        score = tl.sum(qa[None, :] * Ka, 1) + tl.sum(qb[None, :] * Kb, 1)
        if INT8:
            score *= tl.load(k_scale + row + t, filled, 0.0).to(tl.float32)
        score = tl.where(filled, score, float("-inf"))
        higher = tl.maximum(top, score)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        old, weight = tl.exp2(top - finite), tl.exp2(score - finite)
        total = total * old + weight
        if INT8:
            weight *= tl.load(v_scale + row + t, filled, 0.0).to(tl.float32)
        ya = ya * old[:, None] + weight[:, None] * Va
        yb = yb * old[:, None] + weight[:, None] * Vb
        top = higher
        start += BLOCK
    share = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(total * share, 0)
    to = out + n * (H * h) + head * h
    tl.store(to + a, (tl.sum(ya * share[:, None], 0) / total).to(out.dtype.element_ty))
    tl.store(to + b, (tl.sum(yb * share[:, None], 0) / total).to(out.dtype.element_ty))


def fused_attention(
    qkv: Tensor,
    qk_norm: Tensor,
    turns: Tensor,
    position: Tensor,
    cache: Cache,
    shape: tuple[int, int] = SHAPE,
) -> Tensor:
    """`decode_attention.plain_attention`, with the position (1,) as int64 on the device.

    `shape` is (positions per tile, a power of two; warps).
    """
    N, H, S, h = cache.k.shape
    parts, (block, warps) = head_parts(h), shape
    assert parts is not None, f"head size {h} is not a sum of two powers of two"
    out = torch.empty(N, H * h, dtype=qkv.dtype, device=qkv.device)
    int8 = cache.k_scale is not None
    # Without int8 the kernel does not touch the scales: any tensor stands for them.
    scales = (cache.k_scale, cache.v_scale) if int8 else (cache.k, cache.v)
    fused_kernel[(N * H,)](
        qkv, qk_norm, turns, position, cache.k, cache.v, *scales, out, S,
        H=H, h=h, A=parts[0], B=parts[1], BLOCK=block, EPS=EPS, INT8=int8, num_warps=warps,
    )  # fmt: skip
    return out
