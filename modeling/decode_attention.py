"""The attention of one decoding step: its contract, its plain form, and the choice of the fused one.

Both forms take qkv (N, 3·H·h), of one position p for N rows, and a `Cache`, and

1. normalise q and k per head and rotate them, in float32, and round them to the cache's type;
2. write k and v at position p of the cache;
3. return softmax(q·kᵀ / √h)·v over positions 0…p, as (N, H·h) in the type of qkv.

Positions after p are never read: the cache needs no initial value. `qk_norm` (2, 1, h) holds the norm
weights of q and k; `turns` (positions, 2, h) is the rotary table.
"""

import os
import warnings
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import InputError, describe
from .generator import EPS
from .rotary import rotate

# The largest |fused - plain| / (1 + |plain|) that rounding explains, by type, for states of size 1.
# float32: order of sums. bfloat16: the last place. int8: opposite rounding with a scale of 8 / 127.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.int8: 2**-4}


class Cache(NamedTuple):
    """Keys and values of one block: (N, H, S, h), two separate allocations, because Inductor would copy
    one tensor with two mutated views as a whole.

    An int8 cache has a scale per row, head and position: (N, H, S), bfloat16.
    """

    k: Tensor
    v: Tensor
    k_scale: Optional[Tensor] = None
    v_scale: Optional[Tensor] = None

    def of(self, rows: slice) -> "Cache":
        """A view of these rows."""
        scales = (x if x is None else x[rows] for x in (self.k_scale, self.v_scale))
        return Cache(self.k[rows], self.v[rows], *scales)


# (qkv, qk_norm, turns, position, cache) -> (N, H·h). The position is (1,) int64 on the device; in the
# plain form it is an int.
AttentionFunction = Callable[..., Tensor]
Shape = tuple[int, int, int]  # heads, positions, head size
Types = tuple[torch.dtype, torch.dtype]  # of qkv, and of the cache


def empty_cache(
    shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
) -> Cache:
    """An uninitialised cache of this shape (N, H, S, h); `dtype` int8 adds the scales."""
    k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype != torch.int8:
        return Cache(k, v)
    scales = (torch.empty(shape[:3], dtype=torch.bfloat16, device=device) for _ in range(2))
    return Cache(k, v, *scales)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (…, h) float32 -> int8 and a scale per row (…), bfloat16: x ≈ int8 · scale."""
    scale = (x.abs().amax(-1) / 127).clamp(min=1e-30).bfloat16()
    x = (x / scale.float().unsqueeze(-1)).clamp(-127, 127)
    return torch.where(x >= 0, x + 0.5, x - 0.5).to(torch.int8), scale


def write_positions(
    qkv: Tensor, qk_norm: Tensor, turns: Tensor, first: int, cache: Cache
) -> Tensor:
    """Steps 1 and 2 of the contract, for n positions from `first` on: qkv (N, n, 3·H·h) -> q (N, H, n, h),
    in the cache's type (int8: float32)."""
    N, n, (H, h) = *qkv.shape[:2], cache.k.shape[1::2]
    x = qkv.view(N, n, 3, H, h)
    qk = F.rms_norm(x[:, :, :2].float(), (h,), None, EPS) * qk_norm  # (N, n, 2, H, h)
    qk = rotate(qk, turns[first : first + n, None, None])
    q, k = qk.permute(2, 0, 3, 1, 4)  # each (N, H, n, h)
    v, at = x[:, :, 2].transpose(1, 2), slice(first, first + n)
    if cache.k_scale is not None and cache.v_scale is not None:
        cache.k[:, :, at], cache.k_scale[:, :, at] = quantize(k)
        cache.v[:, :, at], cache.v_scale[:, :, at] = quantize(v.float())
        return q
    cache.k[:, :, at] = k
    cache.v[:, :, at] = v
    return q.to(cache.k.dtype)


def plain_attention(
    qkv: Tensor, qk_norm: Tensor, turns: Tensor, position: int, cache: Cache
) -> Tensor:
    """The contract in PyTorch operations."""
    q = write_positions(qkv.unsqueeze(1), qk_norm, turns, position, cache)
    K, V = filled(cache, position + 1)
    if torch.compiler.is_compiling() and K.dtype == torch.float32:
        # For one query, Inductor's loops read K and V faster than the library's attention does.
        y = attend_one(q, K, V)
    else:
        y = F.scaled_dot_product_attention(q, K, V)
    return y.reshape(qkv.shape[0], -1).to(qkv.dtype)


def attend_one(q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """softmax(q·Kᵀ / √h)·V of one query per head: q (N, H, 1, h), K and V (N, H, S, h) -> (N, H, h)."""
    weights = torch.softmax((q * K).sum(-1) * q.shape[-1] ** -0.5, -1)
    return (weights.unsqueeze(-1) * V).sum(2)


def prefill_attention(qkv: Tensor, qk_norm: Tensor, turns: Tensor, cache: Cache) -> Tensor:
    """The contract for positions 0…n-1 at once: qkv (N, n, 3·H·h) -> (N, n, H·h).

    Position p attends to positions 0…p, as they are in the cache: in int8, rounded as steps read
    them.
    """
    q = write_positions(qkv, qk_norm, turns, 0, cache)
    K, V = filled(cache, qkv.shape[1])
    y = F.scaled_dot_product_attention(q, K, V, is_causal=True)
    return y.transpose(1, 2).flatten(2).to(qkv.dtype)


def filled(cache: Cache, count: int) -> list[Tensor]:
    """Keys and values (N, H, count, h) of the first positions; those of an int8 cache as float32."""
    k, v = cache.k[:, :, :count], cache.v[:, :, :count]
    if cache.k_scale is None or cache.v_scale is None:
        return [k, v]
    # Not a comprehension: Dynamo would compile one program per value of `count` in it.
    k_scale, v_scale = cache.k_scale[:, :, :count], cache.v_scale[:, :, :count]
    return [k.float() * k_scale.float().unsqueeze(-1), v.float() * v_scale.float().unsqueeze(-1)]


def head_parts(size: int) -> Optional[tuple[int, int]]:
    """Two powers of two that add up to the head size (48 = 32 + 16, 64 = 32 + 32), or None."""
    larger = 1 << (size - 1).bit_length() >> 1  # the largest below the size
    smaller = size - larger
    return (larger, smaller) if smaller > 1 and smaller & (smaller - 1) == 0 else None


def choose_attention(
    engine: str, shape: Shape, types: Types, device: torch.device
) -> Optional[AttentionFunction]:
    """The fused attention if it is usable and correct on this device; None: the plain one.

    "auto" uses the fused form only on CUDA, and warns if it cannot. "fused" raises InputError instead.
    """
    if engine == "plain" or (engine == "auto" and device.type != "cuda"):
        return None
    fused, fault = find_fused(shape, types, device)
    if fault is None:
        return fused
    if engine == "fused":
        raise InputError(f"engine=fused: {fault}; choose engine=auto or engine=plain")
    warnings.warn(f"sampling uses the plain attention, which is slower: {fault}", stacklevel=3)
    return None


def find_fused(
    shape: Shape, types: Types, device: torch.device
) -> tuple[Optional[AttentionFunction], Optional[str]]:
    """The fused attention, and why it cannot be used on this device, or None.

    Triton's interpreter (TRITON_INTERPRET=1) runs it on a CPU, for tests.
    """
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return None, f"the fused attention runs on CUDA, not on {device.type}"
    if head_parts(shape[2]) is None:
        return None, f"head size {shape[2]} is not a sum of two powers of two"
    try:
        from .fused_attention import fused_attention  # Triton is loaded here and nowhere else
    except Exception as e:  # a broken or old Triton can raise any exception
        return None, f"Triton cannot be used ({describe(e)})"
    return fused_attention, check_attention(fused_attention, shape, types, device)


@torch.inference_mode()
def check_attention(
    attention: AttentionFunction, shape: Shape, types: Types, device: torch.device
) -> Optional[str]:
    """The reason why an attention is wrong on this device, or None.

    Compares steps at the first, middle and last position with the plain form, on random states of three
    rows, with sums in float32. Everything after the position is NaN (in an int8 cache, its scales).
    """
    numbers, rows = torch.Generator().manual_seed(0), 3
    (heads, positions, size), (dtype, stored) = shape, types

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers, device="cpu", dtype=torch.float32).to(device)

    qk_norm, angles = random(2, 1, size).abs(), random(positions, size)
    turns = torch.stack([angles.cos(), angles.sin()], 1)
    for p in sorted({0, positions // 2, positions - 1}):
        qkv = random(rows, 3 * heads * size).to(dtype)
        tested = empty_cache((rows, heads, positions, size), stored, device)
        for x in tested:
            if x is not None and x.is_floating_point():
                x.fill_(torch.nan)
        if p:
            write_positions(random(rows, p, 3 * heads * size).to(dtype), qk_norm, turns, 0, tested)
        expected = Cache(*(None if x is None else x.clone() for x in tested))  # type: ignore[arg-type]
        try:
            y = attention(qkv, qk_norm, turns, torch.tensor([p], device=device), tested)
        except Exception as e:
            return f"the fused kernel does not run ({describe(e)})"
        q = write_positions(qkv.unsqueeze(1), qk_norm, turns, p, expected).float()
        # Read from the tested cache: a difference in the new row shows there, not here.
        y_plain = attend_one(q, *(x.float() for x in filled(tested, p + 1))).reshape(rows, -1)
        # After the position, NaN must still be there.
        (k, v), (k_plain, v_plain) = (
            [x.float().nan_to_num(1e6) for x in filled(cache, positions)]
            for cache in (tested, expected)
        )
        for name, a, b, kind in (
            ("output", y, y_plain, dtype),
            ("keys", k, k_plain, stored),
            ("values", v, v_plain, stored),
        ):
            off = ((a.float() - b).abs() / (1 + b.abs())).max().item()
            if not off <= ROUNDING[kind]:  # so that NaN does not pass
                return (
                    f"the fused kernel's {name} at position {p} differ by {off:.2g} from the plain "
                    f"form, where the rounding of {kind} explains {ROUNDING[kind]:.2g}"
                )
    return None
