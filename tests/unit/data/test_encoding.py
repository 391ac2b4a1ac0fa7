"""The encoder as pretokenization runs it: its precisions, and batches on their way to it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data import encoding
from data.cache import fingerprint
from data.encoding import (
    EncodingPlan,
    ReadableCrops,
    encode,
    listing_hash,
    load_encoder,
    part_batches,
)
from data.images import VIEWS, cut_views
from data.loader import on_device
from modeling.tokenizer import Tokenizer, TokenizerConfig
from runtime.errors import InputError
from tests.golden.fill import images


@pytest.fixture
def tokenizer(fill):
    return fill(
        Tokenizer(TokenizerConfig(encoder_layers=2, exact_attention=False), with_decoder=False)
    )


def small():
    sizes = dict(image_size=16, encoder_width=16, encoder_layers=2, encoder_heads=2)
    return Tokenizer(TokenizerConfig(**sizes), with_decoder=False).eval()


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
    assert 5 * hidden < encoding.CPU_ACTIVATION
    expected, sizes = encode(tokenizer, pixels, "fp32"), []
    monkeypatch.setattr(encoding, "CPU_ACTIVATION", at_once * hidden + 1)
    tokenizer.encoder.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    assert torch.equal(encode(tokenizer, pixels, "fp32"), expected)
    assert sizes == parts


def test_another_device_encodes_all_images_at_once():
    images = torch.empty(320, 3, 256, 256, device="meta")
    tokenizer = Tokenizer(TokenizerConfig(encoder_layers=1), with_decoder=False)
    assert encoding.encoded_at_once(tokenizer, images) == 320


def test_published_sizes_are_encoded_three_at_once_on_a_cpu():
    tokenizer = Tokenizer(TokenizerConfig(encoder_layers=1), with_decoder=False)
    assert encoding.encoded_at_once(tokenizer, torch.empty(320, 3, 2, 2)) == 3


def test_bf16_codes_are_mostly_those_of_fp32_and_leave_the_next_fp32_exact(tokenizer, pixels):
    exact = encode(tokenizer, pixels, "fp32")
    fast = encode(tokenizer, pixels, "bf16")
    assert 0.5 < (fast == exact).float().mean() < 1
    assert torch.equal(encode(tokenizer, pixels, "fp32"), exact)


def test_bf16_codes_of_a_fitted_codebook_agree_to_nine_tenths(fill):
    """Of a codebook fitted to the encoder's latents, as a trained one is; not of random vectors.

    Under autocast as in training on images (`dataset.params.encoder_precision=autocast`).
    """
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
    monkeypatch.setattr(tokenizer.quantize, "nearest", note("nearest", tokenizer.quantize.nearest))
    encode(tokenizer, torch.rand(1, 3, 16, 16), dtype)
    assert seen == {"encoder": (inside, inside), "nearest": (False, False)}


@pytest.mark.parametrize(
    "dtype, inside", [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_attention_follows_the_precision_and_the_encoder_stays_as_it_is(
    dtype, inside, monkeypatch, tmp_path
):
    model = small()
    tokenizer = load_encoder(model.config, model.state_dict(), "x", torch.device("cpu"))
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
    encoder = load_encoder(whole.config, whole.state_dict(), "x", torch.device("cpu"))
    assert torch.equal(encode(encoder, pixels, "fp32"), whole.encode(pixels))


@pytest.mark.parametrize("kind", VIEWS)
def test_unreadable_image_keeps_its_place_as_black_views(tmp_path, kind):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    plan = EncodingPlan(20, kind, skip_unreadable=1)
    crop, readable = ReadableCrops([str(bad)], plan)[0]
    Image.new("RGB", (30, 40)).save(tmp_path / "good.png")
    good, good_is_readable = ReadableCrops([str(tmp_path / "good.png")], plan)[0]
    assert crop.shape == good.shape and good_is_readable is True
    views = cut_views(crop[None], 20, kind)[0]
    assert views.shape == (VIEWS[kind], 3, 20, 20) and views.dtype == torch.uint8
    assert not views.any() and readable is False
    with pytest.raises(InputError, match=r"bad\.png"):
        ReadableCrops([str(bad)], EncodingPlan(20, kind))[0]


def test_batches_are_consecutive_and_never_cross_a_part():
    parts = part_batches(3 * 16 * 2 + 5, 3)
    assert [len(part) for part in parts] == [16, 16, 2]
    batches = [batch for part in parts for batch in part]
    assert [i for batch in batches for i in batch] == list(range(101))
    assert {len(batch) for batch in batches[:-1]} == {3} and len(batches[-1]) == 2


def test_hash_of_a_listing_is_that_of_earlier_caches_and_takes_any_name():
    paths = ["cat/a.png", "dög/b.png"]
    assert listing_hash(paths) == fingerprint({"encoder." + "\n".join(paths): torch.zeros(0)})
    assert listing_hash(["cat/\udcff.png"]) != listing_hash(["cat/\udcfe.png"])


def numbered_batches(pinned=False):
    batches = [(torch.full((4, 3), i, dtype=torch.uint8), torch.ones(4)) for i in range(20)]
    return [(views.pin_memory() if pinned else views, ok) for views, ok in batches]


def test_batches_arrive_in_order_on_a_cpu():
    arrived = [
        views[0, 0].item() for views, _ in on_device(numbered_batches(), torch.device("cpu"))
    ]
    assert arrived == list(range(20))


@pytest.mark.gpu
def test_batches_arrive_whole_on_a_gpu():
    device = torch.device("cuda")
    sums = [views.long().sum() for views, _ in on_device(numbered_batches(True), device)]
    assert [s.item() for s in sums] == [12 * i for i in range(20)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, share", [("fp32", 0.999), ("tf32", 0.9), ("bf16", 0.5)])
def test_gpu_codes_agree_with_the_published_ones(golden, tokenizer, pixels, dtype, share):
    codes = encode(tokenizer.cuda(), pixels.cuda(), dtype).cpu().numpy()
    assert np.mean(codes == golden("tokenizer_small.npz")["codes"]) >= share
