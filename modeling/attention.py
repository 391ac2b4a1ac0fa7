"""The attention that trains: PyTorch's, by the faster way on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float = 0.0) -> Tensor:
    """softmax(q kᵀ / √h) v: (B, H, N, h) and twice (B, H, M, h) -> (B, H, N, h), in the type of q.

    On a CPU, bf16 is computed in float32 if it needs a gradient: forward and backward in PyTorch 2.14's bf16 take two
    to four times as long there, more than bf16's products save.
    """
    if q.dtype is torch.bfloat16 and q.device.type == "cpu" and q.requires_grad:
        with torch.autocast("cpu", enabled=False):  # which would cast them back
            y = attention(q.float(), k.float(), v.float(), causal, dropout)
        return y.bfloat16()
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
