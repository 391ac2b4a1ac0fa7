"""Transformer block of the tokenizer: pre-norm LayerNorm, one biased in_proj, exact GELU.

Shape suffixes: B images, T tokens, D width, H heads, h head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenizerAttention(nn.Module):
    """Multi-head self-attention, (B, T, D) -> (B, T, D).

    `exact` computes the attention itself in float32 whatever the autocast type. Otherwise it runs
    in the autocast type, as in published training: the published model casts q, k and v to float32,
    but under autocast PyTorch casts them back. Without autocast both are float32.
    """

    def __init__(self, width: int, heads: int, causal: bool, exact: bool):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.exact = exact
        self.in_proj = nn.Linear(width, 3 * width)  # rows ordered q, k, v, each head-major
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.in_proj(x).view(B, T, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, T, h)
        if self.exact:
            q, k, v = q.float(), k.float(), v.float()
        with torch.autocast(x.device.type, enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, D))


class MLP(nn.Module):
    """Linear, exact GELU, Linear; the hidden layer is four times as wide."""

    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class TokenizerBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int, causal: bool, exact: bool):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = TokenizerAttention(width, heads, causal, exact)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))
