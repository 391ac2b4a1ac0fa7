"""The encoder as pretokenization runs it, in each of its precisions."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoding import job
from encoding.job import encode
from modeling.tokenizer import Tokenizer, TokenizerConfig
from modeling.weights.metadata import TOKENIZER, about_model
from modeling.weights.opened import Opened, load_tokenizer
from tests.golden.fill import images
from tests.tiny import tiny_tokenizer


@pytest.fixture
def tokenizer(fill):
    return fill(Tokenizer(TokenizerConfig(encoder_layers=2), with_decoder=False))


def small():
    sizes = tiny_tokenizer(patch_size=16, encoder_layers=2)
    return Tokenizer(sizes, with_decoder=False).eval()


def opened(tokenizer):
    about = about_model(TOKENIZER, tokenizer.config)
    return Opened(Path("x"), tokenizer.state_dict(), about)


@pytest.fixture
def pixels():
    return torch.from_numpy(images(2, 256, 1))


def test_fp32_codes_are_the_published_ones(golden, tokenizer, pixels):
    codes = encode(tokenizer, pixels, "fp32")
    assert (codes.numpy() == golden("tokenizer_small.npz")["codes"]).all()


@pytest.mark.parametrize("at_once, parts", [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (0, [1] * 5)])
def test_a_cpu_encodes_a_few_images_at_once_to_the_same_codes(monkeypatch, at_once, parts):
    tokenizer, pixels = small(), torch.rand(5, 3, 16, 16)
    hidden = (1 + 3) * 4 * 16 * 4  # bytes: a patch and three latents, as wide as the MLP, float32
    assert 5 * hidden < job.CPU_ACTIVATION
    expected, sizes = encode(tokenizer, pixels, "fp32"), []
    monkeypatch.setattr(job, "CPU_ACTIVATION", at_once * hidden + 1)
    tokenizer.encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    assert torch.equal(encode(tokenizer, pixels, "fp32"), expected)
    assert sizes == parts


def test_another_device_encodes_all_images_at_once():
    images = torch.empty(320, 3, 256, 256, device="meta")
    tokenizer = Tokenizer(TokenizerConfig(encoder_layers=1), with_decoder=False)
    assert job.encoded_at_once(tokenizer, images) == 320


def test_published_sizes_are_encoded_three_at_once_on_a_cpu():
    tokenizer = Tokenizer(TokenizerConfig(encoder_layers=1), with_decoder=False)
    assert job.encoded_at_once(tokenizer, torch.empty(320, 3, 2, 2)) == 3


def test_bf16_codes_are_mostly_those_of_fp32_and_leave_the_next_fp32_exact(tokenizer, pixels):
    exact = encode(tokenizer, pixels, "fp32")
    fast = encode(tokenizer, pixels, "bf16")
    assert 0.5 < (fast == exact).float().mean() < 1
    assert torch.equal(encode(tokenizer, pixels, "fp32"), exact)


def test_bf16_codes_of_a_fitted_codebook_agree_to_nine_tenths(fill):
    """Of a codebook fitted to the encoder's latents, as a trained one is; not of random vectors."""
    sizes = dict(image_size=64, encoder_width=128, encoder_layers=4, encoder_heads=4)
    tokenizer = fill(Tokenizer(TokenizerConfig(codebook_size=256, **sizes), with_decoder=False))
    with torch.no_grad():
        latents = tokenizer.latents(torch.from_numpy(images(64, 64, 2))).flatten(0, 1)
        chosen = torch.randperm(len(latents), generator=torch.Generator().manual_seed(0))[:256]
        tokenizer.quantize.embedding.weight.copy_(latents[chosen])
    held_out = torch.from_numpy(images(64, 64, 3))
    exact = tokenizer.encode(held_out)
    with torch.autocast("cpu", torch.bfloat16):
        fast = tokenizer.encode(held_out)
    assert torch.equal(tokenizer.encode(held_out), exact)
    assert len(exact.unique()) > 100
    assert 0.9 < (fast == exact).float().mean() < 1


@pytest.mark.parametrize("dtype, inside", [("fp32", False), ("tf32", True), ("bf16", False)])
def test_only_the_encoder_and_only_tf32_may_use_tf32(dtype, inside, monkeypatch):
    tokenizer, seen = small(), {}

    def note(name, call):
        def noting(*args):
            matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn
            seen[name] = (matmul.allow_tf32, conv.allow_tf32)
            return call(*args)

        return noting

    monkeypatch.setattr(tokenizer.encoder, "forward", note("encoder", tokenizer.encoder.forward))
    monkeypatch.setattr(tokenizer.quantize, "encode", note("nearest", tokenizer.quantize.encode))
    encode(tokenizer, torch.rand(1, 3, 16, 16), dtype)
    assert seen == {"encoder": (inside, inside), "nearest": (False, False)}


@pytest.mark.parametrize(
    "dtype, inside", [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_attention_follows_the_precision_and_the_encoder_stays_as_it_is(
    dtype, inside, monkeypatch, tmp_path
):
    model = small()
    tokenizer = load_tokenizer(opened(model), model.config, with_decoder=False)
    attention, seen = F.scaled_dot_product_attention, []

    def noting(q, k, v, **options):
        seen.extend([q.dtype, k.dtype, v.dtype])
        return attention(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    before = [dict(module.__dict__) for module in tokenizer.modules()]
    encode(tokenizer, torch.rand(1, 3, 16, 16), dtype)
    assert set(seen) == {inside} and len(seen) == 6
    assert [dict(module.__dict__) for module in tokenizer.modules()] == before


def test_loaded_encoder_gives_the_codes_of_the_tokenizer_in_fp32(fill, pixels):
    whole = fill(Tokenizer(TokenizerConfig(encoder_layers=2, decoder_layers=1)))
    encoder = load_tokenizer(opened(whole), whole.config, with_decoder=False)
    assert torch.equal(encode(encoder, pixels, "fp32"), whole.encode(pixels))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, share", [("fp32", 0.999), ("tf32", 0.9), ("bf16", 0.5)])
def test_gpu_codes_agree_with_the_published_ones(golden, tokenizer, pixels, dtype, share):
    codes = encode(tokenizer.cuda(), pixels.cuda(), dtype).cpu().numpy()
    assert np.mean(codes == golden("tokenizer_small.npz")["codes"]) >= share
