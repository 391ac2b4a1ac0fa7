"""The encoder as pretokenization runs it: its precisions, and batches on their way to it."""

import numpy as np
import pytest
import torch

from data.images import VIEWS, CroppedImages
from modeling.tokenizer import Tokenizer, TokenizerConfig
from pretokenization import Readable, encode, image_folder, kind_of_crops, on_device, parse
from runtime.errors import InputError
from tests.golden.fill import images

FOLDER = ["--data_path", "x"]


@pytest.fixture
def tokenizer(fill):
    return fill(Tokenizer(TokenizerConfig(encoder_layers=2), with_decoder=False))


def small():
    sizes = dict(image_size=16, encoder_width=16, encoder_layers=2, encoder_heads=2)
    return Tokenizer(TokenizerConfig(**sizes), with_decoder=False).eval()


@pytest.fixture
def pixels():
    return torch.from_numpy(images(2, 256, 1))


def test_fp32_codes_are_the_published_ones(golden, tokenizer, pixels):
    codes = encode(tokenizer, pixels, "fp32")
    assert (codes.numpy() == golden("tokenizer_small.npz")["codes"]).all()


def test_bf16_codes_are_mostly_those_of_fp32_and_leave_the_next_fp32_exact(tokenizer, pixels):
    exact = encode(tokenizer, pixels, "fp32")
    fast = encode(tokenizer, pixels, "bf16")
    assert 0.5 < (fast == exact).float().mean() < 1
    assert torch.equal(encode(tokenizer, pixels, "fp32"), exact)


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


@pytest.mark.parametrize("dtype, exact", [("fp32", True), ("tf32", True), ("bf16", False)])
def test_attention_follows_the_precision(dtype, exact):
    tokenizer = small()
    encode(tokenizer, torch.rand(1, 3, 16, 16), dtype)
    assert {block.attn.exact for block in tokenizer.encoder.transformer} == {exact}


@pytest.mark.parametrize(
    "options, kind",
    [
        ([], "center_flip"),
        (["--flip_flag"], "center_flip"),
        (["--ten_crop"], "ten_crop"),
        (["--ten_crop", "--flip_flag"], "ten_crop"),
        (["--five_crop"], "five_crop"),
        (["--five_crop", "--flip_flag"], "ten_crop"),
    ],
)
def test_kind_of_crops(options, kind):
    assert kind_of_crops(parse([*FOLDER, *options])) == kind


def test_a_class_named_train_is_no_split(tmp_path):
    (tmp_path / "train").mkdir()
    assert image_folder(str(tmp_path), None) == tmp_path
    (tmp_path / "val").mkdir()
    with pytest.raises(InputError, match="--split train or val"):
        image_folder(str(tmp_path), None)
    assert image_folder(str(tmp_path), "val") == tmp_path / "val"


@pytest.mark.parametrize("kind", VIEWS)
def test_unreadable_image_keeps_its_place_as_black_views(tmp_path, kind):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    views, readable = Readable(CroppedImages([str(bad)], 8, kind), skip=True)[0]
    assert views.shape == (VIEWS[kind], 3, 8, 8) and views.dtype == torch.uint8
    assert not views.any() and readable is False
    with pytest.raises(InputError, match=r"bad\.png"):
        Readable(CroppedImages([str(bad)], 8, kind), skip=False)[0]


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
