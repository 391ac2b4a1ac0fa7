"""The attention that trains, in bf16 on a CPU."""

import pytest
import torch
import torch.nn.functional as F

from modeling.attention import attention


def heads(grad: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(2, 3, 9, 8).bfloat16().requires_grad_(grad) for _ in range(3)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_bf16_is_float32_rounded_once_where_a_gradient_is_needed(causal, autocast):
    q, k, v = heads(grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # casts what attention is given
        y = attention(q, k, v, causal)
    exact = [x.detach().float().requires_grad_() for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, is_causal=causal)
    assert y.dtype is torch.bfloat16
    assert torch.equal(y, expected.bfloat16())
    seed = torch.randn(y.shape).bfloat16()
    y.backward(seed)
    expected.backward(seed.float())
    for found, wanted in zip((q, k, v), exact):
        assert torch.equal(found.grad, wanted.grad.bfloat16())


def test_without_gradients_bf16_stays_bf16(monkeypatch):
    types = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, *a, **k: types.append(q.dtype) or plain(q, *a, **k),
    )
    attention(*heads(grad=False), causal=True)
    assert types == [torch.bfloat16]
