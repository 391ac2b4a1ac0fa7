"""Rotary positions of the generator: a line of prefix tokens, if any, then a grid of image tokens."""

import math

import torch
from torch import Tensor

BASE = 10000.0


def token_layout(seq_len: int) -> tuple[int, int]:
    """Grid g and prefix K of T = K + g² tokens (273 -> 16, 17).

    The grid is the largest that fits into T. Valid layouts have K = g + 1, g or 0, so T has at most one.
    """
    grid = math.isqrt(seq_len)
    return grid, seq_len - grid * grid


def rotary_table(seq_len: int, head_size: int) -> Tensor:
    """The factors of `rotate` at every position: (1 + seq_len, 2, head_size), float32.

    Row 0 (the class) is all zeros, so the class token's q and k vanish, as in the training of the published
    weights. Rows 1…K rotate by 0…K-1 with all frequencies; image token (r, c) uses half of the pairs for
    K + r and half for K + c.
    """
    grid, prefix = token_layout(seq_len)
    pairs = head_size // 2

    def angles(positions: Tensor, count: int) -> Tensor:  # (len(positions), count)
        return positions[:, None] * BASE ** (-torch.arange(count, dtype=torch.float32) / count)

    line = angles(torch.arange(prefix), pairs)  # (K, pairs)
    axis = angles(prefix + torch.arange(grid), pairs // 2)  # (g, pairs / 2)
    rows = axis.repeat_interleave(grid, 0)  # (g², pairs / 2)
    columns = axis.repeat(grid, 1)
    angle = torch.cat([line, torch.cat([rows, columns], 1)])  # (T, pairs)
    cos, sin = angle.cos(), angle.sin()
    factors = torch.stack([cos, cos, -sin, sin], -1).unflatten(-1, (2, 2))  # (T, pairs, 2, 2)
    table = factors.transpose(1, 2).flatten(2)  # (T, 2, h)
    return torch.cat([torch.zeros_like(table[:1]), table])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate interleaved pairs: x (…, h) and table (…, 2, h), which broadcast -> float32.

    A pair (a, b) becomes (a·cos - b·sin, b·cos + a·sin), computed as x·(cos, cos) + swapped x·(-sin, sin),
    which, unlike separate halves, compilers fuse with the preceding norm.
    """
    x = x.float()
    cos, sin = table.unbind(-2)  # (…, h)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # the other element of each pair
    return x * cos + swapped * sin
