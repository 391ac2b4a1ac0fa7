import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from modeling.attention import attention
from modeling.tokenizer import Tokenizer, TokenizerBlock, TokenizerConfig, prefix_target
from tests.refusals import refusal
from tests.tiny import STAGE1, tiny_tokenizer

TINY = tiny_tokenizer(
    image_size=32,
    encoder_layers=2,
    decoder_width=24,
    decoder_layers=2,
    decoder_heads=3,
    num_buffer_tokens=3,
)
GRID, PREFIX, TOKENS = 4, 5, 21  # of TINY


def config(**changes):
    return dataclasses.replace(TINY, **changes)


def patches(images, patch=TINY.patch_size):
    """(B, 3, S, S) -> (B, g², values of a patch), row-major."""
    return F.unfold(images, patch, stride=patch).transpose(1, 2)


# ---------------------------------------------------------------------- configuration
@pytest.mark.parametrize(
    "changes, named",
    [
        ({"image_size": 33}, ["image_size=33", "patch_size=8"]),
        ({"encoder_width": 16, "encoder_heads": 3}, ["encoder_width=16", "encoder_heads=3"]),
        ({"decoder_width": 16, "decoder_heads": 3}, ["decoder_width=16", "decoder_heads=3"]),
        *(
            ({"num_latent_tokens": tokens}, [f"num_latent_tokens={tokens}", "4x4", 21, 20, 16])
            for tokens in (9, 15, 17, 19, 22, 273)
        ),
        *(
            (
                {"num_latent_tokens": 16, "prefix_head": True, "causal": causal},
                ["prefix_head=True", "num_latent_tokens=16", "num_latent_tokens=21"],
            )
            for causal in (False, True)
        ),
        ({"position_init": "own"}, ["position_init=own", "normal", "own_patch"]),
    ],
)
def test_sizes_that_make_no_tokenizer_are_refused(changes, named):
    refusal(lambda: config(**changes), *named)


def test_default_config_is_the_published_model():
    published = TokenizerConfig()
    assert (published.grid, published.num_prefix_tokens, published.num_tokens) == (16, 17, 273)
    assert (published.codebook_size, published.token_size) == (4096, 32)
    assert (published.num_buffer_tokens, published.causal) == (32, False)
    assert published.position_init == "normal"


# ---------------------------------------------------------------------- blocks
def test_block_without_the_first_tokens_computes_what_the_whole_one_does():
    block = TokenizerBlock(16, 2, causal=False)
    x = torch.randn(3, 9, 16, requires_grad=True)
    whole, part = block(x)[:, 4:], block(x, 4)
    torch.testing.assert_close(part, whole)
    names = [name for name, _ in block.named_parameters()]
    inputs = [x, *block.parameters()]
    ours, expected = (torch.autograd.grad(y.square().sum(), inputs) for y in (part, whole))
    for name, a, b in zip(["x", *names], ours, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_last_block_of_the_encoder_computes_the_latents_alone(monkeypatch):
    sizes, linear = [], torch.nn.Linear.forward

    def watch(self, x):
        sizes.append((self.out_features, x.shape[1]))
        return linear(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", watch)
    Tokenizer(TINY).encode(torch.rand(2, 3, 32, 32))
    tokens = GRID**2 + TOKENS
    mlp, out = 4 * TINY.encoder_width, TINY.encoder_width
    assert [n for width, n in sizes if width == mlp] == [tokens, TOKENS]
    assert [n for width, n in sizes if width == out] == [tokens] * 2 + [TOKENS] * 2


# ---------------------------------------------------------------------- layouts and sizes
@pytest.mark.parametrize(
    "given, prefix, tokens", [(None, 5, 21), (21, 5, 21), (20, 4, 20), (16, 0, 16)]
)
def test_prefix_is_the_grid_side_and_by_default_a_corner_token_or_nothing(given, prefix, tokens):
    layout = config(num_latent_tokens=given)
    assert (layout.num_prefix_tokens, layout.num_tokens) == (prefix, tokens)


def test_prefix_target_is_the_corner_patch_then_the_first_row_of_patches():
    images = torch.rand(2, 3, 32, 32)
    target = prefix_target(images, TINY)
    assert target.shape == (2, 3, 8, 40)
    assert torch.equal(target[..., :8], images[:, :, :8, :8])
    assert torch.equal(target[..., 8:], images[:, :, :8, :])


def test_prefix_target_without_corner_token_is_the_first_row_of_patches():
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(prefix_target(images, config(num_latent_tokens=20)), images[:, :, :8])


@pytest.mark.parametrize("size, patch", [(32, 4), (64, 16), (24, 8)])
@pytest.mark.parametrize("corner", [0, 1])
def test_other_sizes_run_end_to_end(size, patch, corner):
    grid = size // patch
    prefix = grid + corner
    sizes = dict(image_size=size, patch_size=patch, num_latent_tokens=grid**2 + prefix)
    layout = config(**sizes, **STAGE1)
    model = Tokenizer(layout)
    images = torch.rand(2, 3, size, size)
    out = model(images)
    assert out.images.shape == images.shape
    assert out.strip.shape == prefix_target(images, layout).shape == (2, 3, patch, prefix * patch)
    assert out.latents.shape == (2, grid**2 + prefix, 4)
    assert model.decode(model.encode(images)).shape == images.shape


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size, patch", [(32, 4), (64, 16), (24, 8), (8, 8)])
def test_sizes_without_prefix_tokens_run_end_to_end(size, patch, causal):
    grid = size // patch
    sizes = dict(image_size=size, patch_size=patch, num_latent_tokens=grid**2)
    model = Tokenizer(config(**sizes, causal=causal, num_buffer_tokens=1, clustering=True))
    images = torch.rand(2, 3, size, size)
    out = model(images)
    assert out.images.shape == images.shape and out.strip is None
    assert out.latents.shape == (2, grid**2, 4) and out.codes.shape == (2, grid**2)
    assert model.decode(model.encode(images)).shape == images.shape
    (out.images.mean() + out.quantizer_loss).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("tokens, prefix", [(21, 5), (20, 4), (16, 0)])
@pytest.mark.parametrize("t", [0, 6, 15])
def test_causal_decoder_of_every_layout_shows_a_code_from_its_own_patch_on(tokens, prefix, t, fill):
    model = Tokenizer(config(num_latent_tokens=tokens, causal=True, num_buffer_tokens=1))
    fill(model).eval()
    codes = torch.zeros(1, tokens, dtype=torch.int64)
    with torch.no_grad():
        before = patches(model.decode(codes))
        codes[:, prefix + t] = 5
        changed = (patches(model.decode(codes)) != before).any(2)[0]
    assert not changed[:t].any() and changed[t:].all()


@pytest.mark.parametrize("t", [0, 6, 15])
def test_bidirectional_decoder_without_prefix_shows_every_code_in_every_patch(t, fill):
    model = fill(Tokenizer(config(num_latent_tokens=16, num_buffer_tokens=1))).eval()
    codes = torch.zeros(1, 16, dtype=torch.int64)
    with torch.no_grad():
        before = patches(model.decode(codes))
        codes[:, t] = 5
        assert (patches(model.decode(codes)) != before).any(2)[0].all()


def test_training_pass_encodes_and_decodes_as_inference_does(fill):
    model = fill(Tokenizer(TINY))
    images = torch.rand(2, 3, 32, 32)
    out = model(images)
    assert torch.equal(out.codes, model.encode(images))
    torch.testing.assert_close(out.images, model.decode(out.codes))


def test_image_tokens_show_their_own_patch_in_row_major_order(fill):
    model = fill(Tokenizer(config(decoder_layers=1)))
    for parameter in model.decoder.transformer.parameters():
        parameter.data.zero_()  # no block mixes tokens: a code is one patch
    codes = torch.zeros(1, TOKENS, dtype=torch.int64)
    before = patches(model.decode(codes))
    codes[:, PREFIX + 6] = 3
    changed = (patches(model.decode(codes)) != before).any(2)[0]
    assert changed.nonzero().flatten().tolist() == [6]


# ---------------------------------------------------------------------- decoders
def changed_patches(model, t):
    """Which patches of the image change when code t does."""
    codes = torch.zeros(1, TOKENS, dtype=torch.int64)
    with torch.no_grad():
        before = patches(model.decode(codes))
        codes[:, t] = 5
        return (patches(model.decode(codes)) != before).any(2)[0]


@pytest.mark.parametrize("t", [0, PREFIX - 1, PREFIX, PREFIX + 6, TOKENS - 1])
def test_stage1_decoder_shows_a_code_in_its_own_and_later_patches_only(t, fill):
    model = fill(Tokenizer(config(**STAGE1))).eval()
    first = max(t - PREFIX, 0)
    changed = changed_patches(model, t)
    assert not changed[:first].any()
    assert changed[first:].all()


@pytest.mark.parametrize("t", [0, PREFIX + 6, TOKENS - 1])
def test_stage2_decoder_shows_every_code_in_every_patch(t, fill):
    assert changed_patches(fill(Tokenizer(TINY)).eval(), t).all()


def test_strip_depends_on_the_prefix_tokens_alone(fill):
    model = fill(Tokenizer(config(**STAGE1))).eval()
    codes = torch.zeros(1, TOKENS, dtype=torch.int64)
    vectors = model.quantize.embedding(codes).detach().requires_grad_()
    model.decoder(vectors)[1].sum().backward()
    seen = vectors.grad[0].abs().sum(1) > 0
    assert seen[:PREFIX].all() and not seen[PREFIX:].any()


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_first_codes_alone_make_the_first_rows(rows, fill):
    codes = torch.randint(16, (2, TOKENS))
    for changes in ({}, STAGE1):
        tokenizer = fill(Tokenizer(config(**changes)))
        whole = tokenizer.decode(codes)[:, :, : 8 * rows]
        alone = tokenizer.decode(codes[:, : PREFIX + rows * GRID])
        assert alone.shape == (2, 3, 8 * rows, 32)
        # Only a causal decoder makes of them what it makes of all codes.
        same = torch.allclose(alone, whole, atol=1e-5)
        assert same == (tokenizer.config.causal or rows == GRID)


def test_stage2_has_no_strip():
    assert Tokenizer(TINY)(torch.rand(1, 3, 32, 32)).strip is None


def test_every_buffer_token_reaches_the_image(fill):
    model = fill(Tokenizer(TINY))
    model.decode(torch.zeros(1, TOKENS, dtype=torch.int64)).sum().backward()
    assert (model.decoder.class_embedding.grad.abs().sum(1) > 0).tolist() == [True] * 3


# ---------------------------------------------------------------------- training
def gradients(model, images):
    model.zero_grad()
    out = model(images)
    (out.images.square().mean() + out.strip.square().mean() + out.quantizer_loss).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_recomputing_activations_leaves_the_gradients_as_they_are(part, fill):
    model = fill(Tokenizer(config(**STAGE1))).train()
    images = torch.rand(2, 3, 32, 32)
    plain = gradients(model, images)
    getattr(model, part).recompute = True
    for name, gradient in gradients(model, images).items():
        torch.testing.assert_close(gradient, plain[name], msg=name)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("recompute, passes", [(False, 1), (True, 2)])
def test_recompute_runs_each_block_again_in_the_backward_pass(part, recompute, passes):
    model = Tokenizer(config(**STAGE1)).train()
    getattr(model, part).recompute = recompute
    calls = []
    # Its first layer: the second pass stops as soon as it has what the gradient needs.
    first = getattr(model, part).transformer[0].ln_1
    first.register_forward_pre_hook(lambda *_: calls.append(1))
    gradients(model, torch.rand(1, 3, 32, 32))
    assert len(calls) == passes


def test_freezing_the_encoder_leaves_exactly_the_decoder_to_train():
    model = Tokenizer(TINY)
    model.freeze_encoder()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}


def low_precision():
    return torch.autocast("cpu", torch.bfloat16)


def test_frozen_encoder_gives_the_codes_of_float32_under_autocast(fill):
    sizes = dict(codebook_size=512, encoder_width=64, encoder_layers=4)
    model = fill(Tokenizer(config(**sizes)))
    images = torch.rand(8, 3, 32, 32)
    exact = model.encode(images)
    with low_precision():
        assert (model.encode(images) != exact).any()  # there is something to find
    model.freeze_encoder()
    model.train()
    with low_precision():
        out = model(images)
        assert torch.equal(model.encode(images), exact)
    assert torch.equal(out.codes, exact)
    assert out.latents.dtype == torch.float32 and not out.latents.requires_grad
    assert not out.quantizer_loss.requires_grad


def test_frozen_encoder_leaves_the_decoder_its_precision_and_gradients(fill, monkeypatch):
    model = fill(Tokenizer(TINY))
    model.freeze_encoder()
    seen = []

    def spy(q, k, v, causal):
        seen.append((q.dtype, torch.backends.cuda.matmul.fp32_precision))
        return attention(q, k, v, causal)

    monkeypatch.setattr("modeling.tokenizer.attention", spy)
    around = torch.backends.cuda.matmul.fp32_precision
    with low_precision():
        model(torch.rand(1, 3, 32, 32)).images.sum().backward()
    assert seen == [(torch.float32, "ieee")] * 2 + [(torch.bfloat16, around)] * 2
    grads = {name for name, p in model.named_parameters() if p.grad is not None}
    assert grads == {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}


def test_frozen_encoder_keeps_its_precision_in_a_compiled_pass_and_in_copies(fill):
    sizes = dict(codebook_size=512, encoder_width=64, encoder_layers=4)
    model = fill(Tokenizer(config(**sizes)))
    images = torch.rand(4, 3, 32, 32)
    exact = model.encode(images)
    model.freeze_encoder()
    with low_precision():
        assert torch.equal(torch.compile(model, backend="aot_eager")(images).codes, exact)
        assert torch.equal(copy.deepcopy(model)(images).codes, exact)


def test_without_decoder_the_codes_are_the_same(fill):
    model = fill(Tokenizer(TINY))
    encoding = Tokenizer(TINY, with_decoder=False)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("decoder.")}
    encoding.load_state_dict(state)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(encoding.encode(images), model.encode(images))
    assert model.encode(images).unique().numel() > 1


@pytest.mark.parametrize("layer", [1, 2])
def test_features_are_what_a_block_makes_of_the_latent_tokens(layer, fill):
    tokenizer, images = fill(Tokenizer(config())), torch.rand(2, 3, 32, 32)
    tokens, latents = tokenizer.features(images, layer)
    assert tokens.shape == (2, TOKENS, TINY.encoder_width) and not tokens.requires_grad
    assert torch.equal(latents, tokenizer.latents(images)) and not latents.requires_grad
    # The encoder with the later blocks left out computes the rest from these very tokens.
    encoder = tokenizer.encoder
    encoder.transformer = encoder.transformer[:layer]
    encoder.ln_post, encoder.conv_out = torch.nn.Identity(), torch.nn.Identity()
    torch.testing.assert_close(tokens, tokenizer.latents(images))


def test_features_are_those_of_float32_under_autocast_and_leave_no_hook(fill):
    tokenizer, images = fill(Tokenizer(config())), torch.rand(2, 3, 32, 32)
    exact = tokenizer.features(images, 1)
    with torch.autocast("cpu", torch.bfloat16):
        found = tokenizer.features(images, 1)
    assert all(torch.equal(a, b) for a, b in zip(found, exact))
    assert not any(block._forward_hooks for block in tokenizer.encoder.transformer)


def test_features_of_another_layer_or_other_images_are_refused(fill):
    tokenizer = fill(Tokenizer(config()))
    images, short = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 16, 32)
    for given, layer, *named in (
        (images, 0, "layer=0", "1…2"), (images, -1, "layer=-1", "1…2"), (images, 3, "layer=3", "1…2"),
        (short, 1, "(1, 3, 16, 32)", "(B, 3, 32, 32)"), (images.to(torch.uint8), 1, "uint8", "floats"),
    ):  # fmt: skip
        refusal(lambda given=given, layer=layer: tokenizer.features(given, layer), *named)


def test_attention_runs_in_the_autocast_type(monkeypatch):
    seen = []

    def spy(q, k, v, causal):
        out = attention(q, k, v, causal)
        seen.append({q.dtype, k.dtype, v.dtype, out.dtype})
        return out

    monkeypatch.setattr("modeling.tokenizer.attention", spy)
    model = Tokenizer(config())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.rand(1, 3, 32, 32))
    assert seen == [{torch.bfloat16}] * 4  # two layers each
    assert out.images.dtype == out.latents.dtype == torch.float32


# ---------------------------------------------------------------------- initial values
def test_published_positions_start_as_noise_of_the_width():
    model = Tokenizer(config(encoder_width=256, decoder_width=192, image_size=64))
    positions = {
        name: p for name, p in model.named_parameters()
        if "positional_embedding" in name or name in ("latent_tokens", "decoder.class_embedding")
    }  # fmt: skip
    assert len(positions) == 5
    for name, p in positions.items():
        assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.1), name
        assert abs(p.mean().item()) < 0.1 * p.shape[1] ** -0.5, name
    encoder = model.encoder
    similarity = encoder.latent_token_positional_embedding @ encoder.positional_embedding.T
    assert similarity.abs().max() < 0.5  # 0 ± 0.0625 between independent vectors of length 1


@pytest.mark.parametrize("tokens, own", [(21, [0, 0, 1, 2, 3]), (20, [0, 1, 2, 3]), (16, [])])
def test_own_patch_aligns_every_latent_with_its_patch(tokens, own):
    sizes = dict(num_latent_tokens=tokens, encoder_width=128)
    encoder = Tokenizer(config(**sizes, position_init="own_patch")).encoder
    similarity = encoder.latent_token_positional_embedding @ encoder.positional_embedding.T
    assert similarity.argmax(1).tolist() == own + list(range(GRID**2))


@pytest.mark.parametrize("sizes", [
    dict(image_size=32, patch_size=4, encoder_width=128, encoder_heads=4),  # the quickstart's
    dict(image_size=256, patch_size=16, encoder_width=768, encoder_heads=12),  # the published
    dict(image_size=32, patch_size=4, encoder_width=128, encoder_heads=4, num_latent_tokens=64),
])  # fmt: skip
def test_own_patch_shows_a_patch_in_its_own_latents_from_the_first_step(sizes):
    torch.manual_seed(0)
    model = Tokenizer(TokenizerConfig(**sizes, encoder_layers=3, position_init="own_patch"), False)
    g, p, prefix = model.config.grid, model.config.patch_size, model.config.num_prefix_tokens
    image = torch.rand(1, 3, g * p, g * p)
    row, column = g // 2, g // 3
    changed = image.clone()
    changed[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p] *= 0.2
    with torch.no_grad():
        moved = (model.latents(changed) - model.latents(image)).norm(dim=2).squeeze(0)  # (T,)
    own = prefix + row * g + column
    others = torch.cat([moved[:own], moved[own + 1 :]])
    assert moved[own] > 5 * others.max()


def test_weights_start_small_and_biases_at_zero():
    model = Tokenizer(config(encoder_width=128, token_size=32))
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            assert not module.bias.any(), name
    weight = model.encoder.transformer[0].mlp.c_fc.weight
    assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.quantize.embedding.weight.std().item() == pytest.approx(0.02, rel=0.2)


# ---------------------------------------------------------------------- modes of training
def small(**options):
    torch.manual_seed(1)
    return Tokenizer(tiny_tokenizer(patch_size=4, num_buffer_tokens=1, **options))


def loss_and_gradients(model, call):
    out = call(torch.linspace(0, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16))
    loss = out.images.square().mean() + out.quantizer_loss
    return loss, torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("recompute", [False, True])
def test_training_pass_compiles_and_computes_the_same(recompute):
    model = small(causal=True)
    expected = loss_and_gradients(model, model)
    model.encoder.recompute = model.decoder.recompute = recompute
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        found = loss_and_gradients(model, compiled)
    torch.testing.assert_close(found, expected)
    assert counter.frame_count >= 2  # at least one before the codes are chosen and one after


def test_recomputing_gives_the_same_gradients_from_fewer_kept_tensors():
    model, kept = small(), []
    results = []
    for recompute in (False, True):
        model.encoder.recompute = model.decoder.recompute = recompute
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t
        ):
            results.append(loss_and_gradients(model, model))
        kept.append(sum(sizes))
    torch.testing.assert_close(results[0], results[1])
    assert kept[1] < kept[0]


def test_a_frozen_encoder_is_left_out_of_compiled_code_which_would_keep_its_precision():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    tokenizer, images = Tokenizer(tiny_tokenizer()).eval(), torch.rand(2, 3, 16, 16)
    codes = torch.compile(tokenizer.encode, backend=backend)
    codes(images)
    assert "conv" in "".join(map(str, graphs))
    graphs.clear()
    tokenizer.freeze_encoder()
    torch._dynamo.reset()
    assert torch.equal(codes(images), tokenizer.encode(images))
    assert "conv" not in "".join(map(str, graphs))
    torch._dynamo.reset()
