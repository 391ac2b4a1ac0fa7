"""Transformer block of the tokenizer: pre-norm LayerNorm, one biased in_proj, exact GELU.

Shape suffixes: B images, T tokens, D width, H heads, h head size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attention


class TokenizerAttention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D).

    With `first`, only tokens from that index on attend, and to all tokens: (B, T, D) -> (B, T - first, D).
    """

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj = nn.Linear(width, 3 * width)  # rows ordered q, k, v, each head-major
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        assert not (first and self.causal), "a causal mask needs the queries of all tokens"
        B, T, D = x.shape
        qkv = self.in_proj(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, H, T, h)
        y = attention(q[:, :, first:], k, v, causal=self.causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, T - first, D))


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
