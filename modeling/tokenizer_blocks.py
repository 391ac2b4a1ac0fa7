"""Transformer block of the tokenizer: pre-norm LayerNorm, one biased in_proj, exact GELU.

Shape suffixes: B images, T tokens, D width, H heads, h head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention


class TokenizerAttention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D).

    With `first`, only tokens from that index on attend, and to all tokens: (B, T, D) -> (B, T - first, D).
    The attention runs in the autocast type, as in published training, where PyTorch casts the model's
    float32 q, k and v back.
    """

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj = nn.Linear(width, 3 * width)  # rows ordered q, k, v, each head-major
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        B, T, D = x.shape
        if first:
            assert not self.causal, "a causal mask needs the queries of all tokens"
            q, k, v = self.project_from(x, first)
        else:
            qkv = self.in_proj(x).view(B, T, 3, self.heads, D // self.heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, h)
        with torch.autocast(x.device.type, enabled=False):
            y = attention(q, k, v, causal=self.causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, T - first, D))

    def project_from(self, x: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """q (B, H, T - first, h) of the tokens from `first` on; k and v (B, H, T, h) of all."""
        D, weight, bias = x.shape[2], self.in_proj.weight, self.in_proj.bias
        q = F.linear(x[:, first:], weight[:D], bias[:D])
        k, v = F.linear(x, weight[D:], bias[D:]).chunk(2, -1)
        return tuple(y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # type: ignore[return-value]


class MLP(nn.Module):
    """Linear, exact GELU, Linear; the hidden layer is four times as wide."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class TokenizerBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); (B, T, D) -> (B, T - first, D), without the tokens
    before `first`, to which the others attend."""

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = TokenizerAttention(width, heads, causal)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        x = x[:, first:] + self.attn(self.ln_1(x), first)
        return x + self.mlp(self.ln_2(x))
