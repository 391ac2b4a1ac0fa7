import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from modeling.attention import attention
from modeling.generator import (
    NO_CLASS,
    Attention,
    Generator,
    GeneratorConfig,
    RMSNorm,
    SwiGLU,
    next_code_loss,
)
from modeling.rotary import rotary_table, rotate, token_layout
from tests.refusals import refusal
from tests.tiny import tiny_generator

TINY = tiny_generator(image_seq_len=21)
UNDROPPED = dict(dropout=0.0, attn_drop=0.0, tok_dropout=0.0)


def config(**changes):
    return dataclasses.replace(TINY, **changes)


def inputs(batch=2, length=21):
    return torch.randint(16, (batch, length)), torch.arange(batch)


# ---------------------------------------------------------------------- layout and positions
@pytest.mark.parametrize(
    "tokens, grid, prefix",
    [
        (273, 16, 17),
        (272, 16, 16),
        (256, 16, 0),
        (73, 8, 9),
        (72, 8, 8),
        (64, 8, 0),
        (32 * 32 + 33, 32, 33),
        (1056, 32, 32),
        (1024, 32, 0),
    ],
)
def test_layout_of_known_sizes(tokens, grid, prefix):
    assert token_layout(tokens) == (grid, prefix)


def test_layout_is_unambiguous_for_every_grid():
    for grid in range(1, 65):
        for prefix in (grid + 1, grid, 0):
            assert token_layout(grid**2 + prefix) == (grid, prefix)


def pairs_of(table):
    """(positions, 2, h) -> cosine and sine of every pair, which has both twice: (positions, h / 2, 2)."""
    cos, sin = table.unbind(1)
    assert (cos[:, ::2] == cos[:, 1::2]).all() and (sin[:, ::2] == -sin[:, 1::2]).all()
    return torch.stack([cos[:, ::2], sin[:, 1::2]], -1)


def test_class_position_is_all_zeros_cosine_and_sine_alike():
    table = pairs_of(rotary_table(273, 48))
    assert table.shape == (274, 24, 2)
    assert not table[0].any()
    assert table[1:].square().sum(-1).allclose(torch.ones(273, 24))


def test_prefix_tokens_rotate_by_their_place_with_all_frequencies():
    table = pairs_of(rotary_table(21, 16))
    for place in range(5):
        for pair in range(8):
            angle = place * 10000 ** (-pair / 8)
            expected = torch.tensor([math.cos(angle), math.sin(angle)])
            torch.testing.assert_close(table[1 + place, pair], expected)


def test_image_tokens_rotate_by_their_row_and_then_by_their_column():
    table = pairs_of(rotary_table(21, 16))
    for row in range(4):
        for column in range(4):
            for pair in range(4):
                got = table[1 + 5 + 4 * row + column]
                for axis, offset in ((row, 0), (column, 4)):
                    angle = (5 + axis) * 10000 ** (-pair / 4)
                    expected = torch.tensor([math.cos(angle), math.sin(angle)])
                    torch.testing.assert_close(got[offset + pair], expected)


def test_without_prefix_tokens_the_positions_are_the_grid_alone():
    table = pairs_of(rotary_table(16, 16))
    assert table.shape == (17, 8, 2) and not table[0].any()
    for row in range(4):
        for column in range(4):
            for pair in range(4):
                got = table[1 + 4 * row + column]
                for axis, offset in ((row, 0), (column, 4)):
                    angle = axis * 10000 ** (-pair / 4)
                    expected = torch.tensor([math.cos(angle), math.sin(angle)])
                    torch.testing.assert_close(got[offset + pair], expected)


def test_rotation_takes_neighbouring_channels_as_a_pair():
    angle = torch.tensor([0.3, 1.1])
    sine = torch.stack([-angle.sin(), angle.sin()], -1).flatten()
    table = torch.stack([angle.cos().repeat_interleave(2), sine])  # (2, 4)
    x = torch.tensor([[[[2.0, 0.0, 0.0, 1.0], [0.0, 3.0, 4.0, 0.0]]]])
    first = [2 * math.cos(0.3), 2 * math.sin(0.3), -math.sin(1.1), math.cos(1.1)]
    second = [-3 * math.sin(0.3), 3 * math.cos(0.3), 4 * math.cos(1.1), 4 * math.sin(1.1)]
    torch.testing.assert_close(rotate(x, table), torch.tensor([[[first, second]]]))


# ---------------------------------------------------------------------- configuration
@pytest.mark.parametrize(
    "tokens, remedies",
    [(274, (273, 256)), (271, (273, 256)), (257, (273, 256)), (255, (241, 225)), (22, (21, 16))],
)
def test_sequence_length_that_fits_no_grid_is_refused_with_those_that_do(tokens, remedies):
    refusal(lambda: config(image_seq_len=tokens), f"image_seq_len={tokens}", *remedies)


def test_heads_that_do_not_fit_the_hidden_size_are_refused_by_name():
    named = "hidden_size=36", "num_attention_heads=2"
    refusal(lambda: config(hidden_size=36, num_attention_heads=2), *named)


# ---------------------------------------------------------------------- the model
@pytest.mark.parametrize("changed", [0, 7, 19])
def test_output_i_sees_only_the_class_and_the_codes_before_i(fill, changed):
    model = fill(Generator(TINY))
    codes, labels = inputs()
    with torch.no_grad():
        before = model(codes, labels)
        codes[:, changed] = (codes[:, changed] + 1) % 16
        differs = (model(codes, labels) != before).any(2)
    assert not differs[:, : changed + 1].any()
    assert differs[:, changed + 1 :].all()


def test_every_output_sees_the_class(fill):
    model = fill(Generator(TINY))
    codes, labels = inputs()
    with torch.no_grad():
        differs = (model(codes, labels) != model(codes, labels + 1)).any(2)
    assert differs.all()


def test_embedding_rows_are_codes_then_one_unused_then_classes_then_no_class():
    model = Generator(TINY)
    rows = model.embeddings.weight
    assert len(rows) == TINY.rows == 16 + 1 + 3 + 1
    labels = torch.tensor([0, 2, TINY.condition_num_classes, NO_CLASS])
    assert TINY.condition_rows(labels).tolist() == [17, 19, 20, 20]


def test_no_class_of_the_published_models_is_row_5097():
    with torch.device("meta"):
        model = Generator(GeneratorConfig(num_hidden_layers=1))
    assert len(model.embeddings.weight) == 5098
    assert model.config.condition_rows(torch.tensor([NO_CLASS])) == 5097


def test_untrained_model_predicts_every_code_alike():
    model = Generator(TINY).train()
    codes, labels = inputs()
    logits = model(codes, labels)
    assert not logits.any()
    assert next_code_loss(logits[:, :-1], codes)[0].item() == pytest.approx(math.log(16))


def test_other_weights_start_at_a_standard_deviation_of_002():
    model = Generator(config(hidden_size=128))
    for weight in (model.embeddings.weight, model.blocks[0].attn.qkv.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.blocks[0].attn.qkv.bias.any()


def test_rms_norm_casts_back_before_it_scales():
    norm = RMSNorm(4)
    norm.weight.data.fill_(1 + 2**-10)  # lost if the product were cast to bfloat16
    out = norm(torch.tensor([3.0, 3.0, 3.0, 3.0], dtype=torch.bfloat16))
    assert out.dtype == torch.float32
    assert torch.equal(out, norm.weight)


@pytest.mark.parametrize("where", list(UNDROPPED))
def test_every_dropout_acts_while_training_and_only_then(fill, where):
    model = fill(Generator(config(**{**UNDROPPED, where: 0.5})))
    codes, labels = inputs()
    assert torch.equal(model(codes, labels), model(codes, labels))
    model.train()
    assert not torch.equal(model(codes, labels), model(codes, labels))


def test_bfloat16_autocast_stays_near_float32(fill):
    model = fill(Generator(TINY))
    codes, labels = inputs()
    with torch.no_grad():
        exact = model(codes, labels)
        with torch.autocast("cpu", torch.bfloat16):
            rough = model(codes, labels)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, atol=0.1, rtol=0.1)


def test_cached_step_under_bfloat16_autocast_stays_near_float32(fill):
    model = fill(Generator(TINY))
    codes, labels = inputs()
    cache = {}
    with torch.inference_mode():
        exact = model(codes[:, :2], labels)
        with torch.autocast("cpu", torch.bfloat16):
            for t, rows in enumerate([model.config.condition_rows(labels), codes[:, 0]]):
                logits = model.step(rows, t, cache)
                torch.testing.assert_close(logits, exact[:, t], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("tokens", [16, 20, 21])
def test_cached_steps_equal_one_pass_in_all_layouts(fill, tokens):
    model = fill(Generator(config(image_seq_len=tokens)))
    codes, labels = inputs(length=tokens)
    cache = {}
    with torch.inference_mode():
        whole = model(codes, labels)
        rows = model.config.condition_rows(labels)
        for t in range(tokens):
            torch.testing.assert_close(
                model.step(rows, t, cache), whole[:, t], atol=1e-5, rtol=1e-4
            )
            rows = codes[:, t]


# ---------------------------------------------------------------------- the formulation
def attention_by_parts(self, x, table, cache=None):
    """`Attention.forward` as the specification reads: q and k apart, pairs rotated in halves."""
    B, N, D = x.shape
    qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)

    def turn(y):
        a, b = y.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = table[:, 0, ::2], table[:, 1, 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).type_as(v)

    y = attention(turn(self.q_norm(q)), turn(self.k_norm(k)), v, causal=True)
    return self.proj(y.transpose(1, 2).reshape(B, N, D))


def mlp_by_parts(self, x):
    return self.w2(F.silu(self.w1(x)) * self.w3(x))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_joined_products_leave_the_loss_and_the_gradients(fill, monkeypatch, bf16):
    model = fill(Generator(config(**UNDROPPED))).train()
    codes, labels = inputs()

    def run():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = next_code_loss(model(codes, labels)[:, :-1], codes)
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}

    loss, gradients = run()
    monkeypatch.setattr(Attention, "forward", attention_by_parts)
    monkeypatch.setattr(SwiGLU, "forward", mlp_by_parts)
    expected, of_parts = run()
    # bf16: the gradient of x is a sum of one product rather than of two rounded ones.
    torch.testing.assert_close(loss, expected, rtol=1e-6 if not bf16 else 1e-4, atol=0)
    for name, gradient in gradients.items():
        error = (gradient - of_parts[name]).norm() / of_parts[name].norm()
        assert error < (1e-2 if bf16 else 1e-6), (name, error)


def test_mlp_is_the_same_with_gradients_and_without(fill):
    mlp = fill(SwiGLU(config(**UNDROPPED)))
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        apart = mlp(x)
    torch.testing.assert_close(mlp(x).detach(), apart, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------- gradient checkpointing
def gradients(fill, use_checkpoint):
    model = fill(Generator(config(use_checkpoint=use_checkpoint))).train()
    passes = []
    model.blocks[0].norm1.register_forward_pre_hook(lambda *_: passes.append(1))
    torch.manual_seed(1)  # the same dropout
    codes, labels = inputs()
    next_code_loss(model(codes, labels)[:, :-1], codes)[0].backward()
    return {name: p.grad for name, p in model.named_parameters()}, len(passes)


def test_use_checkpoint_leaves_the_gradients_as_they_are_dropout_included(fill):
    plain, _ = gradients(fill, False)
    for name, gradient in gradients(fill, True)[0].items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


def test_use_checkpoint_runs_each_block_again_in_the_backward_pass(fill):
    assert [gradients(fill, flag)[1] for flag in (False, True)] == [1, 2]


# ---------------------------------------------------------------------- loss
def test_loss_and_accuracy_by_hand():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0]]])
    loss, accuracy = next_code_loss(logits, torch.tensor([[0, 0]]))
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))) / 2
    assert loss.item() == pytest.approx(expected)
    assert accuracy.item() == 0.5
