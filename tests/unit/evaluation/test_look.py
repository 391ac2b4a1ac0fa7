"""The picture of what a tokenizer makes of a photo."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.images import center_crop, load_image
from data.pictures import LINE
from evaluation import look as module
from evaluation.look import (
    EMPTY,
    MARGIN,
    described,
    first_codes,
    list_photos,
    look_at,
    picture_of,
)
from evaluation.reconstruction import ssim
from modeling.tokenizer import Tokenizer
from modeling.weights.tensors import write_state_dict
from tests.refusals import refusal
from tests.tiny import STAGE1, tiny_tokenizer

# 4x4 codes after 5 prefix tokens; a patch has 8 px.
SIZES = dict(image_size=32, decoder_layers=2)


@pytest.fixture(params=["stage 1", "stage 2", "v3"])
def tokenizer(request, fill):
    changes = {"stage 1": STAGE1, "stage 2": {}, "v3": {**STAGE1, "num_latent_tokens": 20}}
    return fill(Tokenizer(tiny_tokenizer(**{**SIZES, **changes[request.param]})))


def write_photo(path, size=(48, 40), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def pixels_of(path):
    return torch.from_numpy(np.array(center_crop(load_image(path), 32))).permute(2, 0, 1)


@pytest.fixture
def look(tokenizer, tmp_path):
    return look_at(tokenizer, pixels_of(write_photo(tmp_path / "a.png")))


# ---------------------------------------------------------------------- what is decoded
@torch.no_grad()
def test_all_codes_make_the_reconstruction(tokenizer, look):
    codes = tokenizer.encode(look.image[None])
    assert torch.equal(look.codes, codes[0])
    torch.testing.assert_close(look.reconstruction, tokenizer.decode(codes)[0])


@torch.no_grad()
def test_first_codes_decode_to_rows_and_no_other_code_is_read(tokenizer, look):
    K = tokenizer.config.num_prefix_tokens
    whole = {n: rows for n, rows in look.rows.items() if n > K}
    assert list(whole) == [K + 4, K + 8, K + 12, K + 16]
    for r, rows in enumerate(whole.values(), 1):
        assert rows.shape == (3, 8 * r, 32)
        same = (rows - look.reconstruction[:, : 8 * r]).abs().max() < 1e-5
        # A causal decoder makes the very rows; a bidirectional one needs all codes for that.
        assert same == (tokenizer.config.causal or r == 4)


def test_the_strip_comes_from_the_prefix_tokens_of_stage_1(tokenizer, look):
    K = tokenizer.config.num_prefix_tokens
    if not tokenizer.config.prefix_head:
        assert look.strip is None and K not in look.rows
        return
    assert look.strip.shape == (3, 8, 8 * K) and min(look.rows) == K
    with torch.no_grad():
        vectors = tokenizer.quantize.embedding(look.codes[None])
        torch.testing.assert_close(look.strip, tokenizer.decoder(vectors)[1][0])


def test_figures_are_those_of_the_pair(look):
    mse = (look.image - look.reconstruction).square().mean().item()
    similarity = ssim(look.image[None], look.reconstruction[None]).item()
    different = len(set(look.codes.tolist()))
    assert described(look) == (
        f"PSNR {-10 * np.log10(mse):.2f} dB, SSIM {similarity:.4f}, "
        f"codes {len(look.codes)} ({different} different)"
    )


# ---------------------------------------------------------------------- the picture
def test_picture_begins_with_original_reconstruction_and_difference(tokenizer, look, monkeypatch):
    monkeypatch.setattr(module, "WIDTH", 32)
    picture = picture_of(look, tokenizer.config, "a.png")
    cells = [picture[MARGIN : MARGIN + 32, x : x + 32] for x in (6, 44, 82)]
    expected = [
        look.image, look.reconstruction,
        (module.MAGNIFICATION * (look.image - look.reconstruction).abs()).clamp(max=1),
    ]  # fmt: skip
    for cell, image in zip(cells, expected):
        np.testing.assert_allclose(cell / 255, image.permute(1, 2, 0), atol=1 / 254)


def test_rows_that_are_not_decoded_stay_empty(tokenizer, look, monkeypatch):
    monkeypatch.setattr(module, "WIDTH", 32)
    for n in look.rows:
        panel = first_codes(look, n)
        assert panel.shape == (32 + 2 * LINE, 32, 3)
        height = 8 * max((n - tokenizer.config.num_prefix_tokens) // 4, 1)
        assert (panel[height:32] == EMPTY).all()
        source = look.rows[n] if n > tokenizer.config.num_prefix_tokens else look.strip[..., -32:]
        rows = (source.permute(1, 2, 0) * 255).to(torch.uint8)
        np.testing.assert_array_equal(panel[:height], rows)


# ---------------------------------------------------------------------- photos
def test_photos_come_from_files_and_from_folders_without_classes(tmp_path):
    for name in ("b.png", "sub/c.jpg", "sub/d.png"):
        write_photo(tmp_path / "folder" / name)
    for name in ("notes.txt", "._b.png"):
        (tmp_path / "folder" / name).write_bytes(b"no photo")
    single = write_photo(tmp_path / "a.webp")
    photos = list_photos([str(single), str(tmp_path / "folder")])
    assert list(photos) == ["a.webp", "b.png", "sub/c.jpg", "sub/d.png"]
    assert photos["sub/c.jpg"] == f"{tmp_path}/folder/sub/c.jpg"


def test_what_holds_no_photo_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in "ab":
        write_photo(tmp_path / folder / "x.png")
    for photos, named in (
        (["empty"], ["empty"]),
        (["none.png"], ["none.png"]),
        (["a/x.png", "b"], ["a/x.png", "b/x.png", "--output"]),
    ):
        paths = [f"{tmp_path}/{photo}" for photo in photos]
        refusal(lambda: list_photos(paths), *named)  # noqa: B023 - called at once


# ---------------------------------------------------------------------- the program
@pytest.fixture
def start(tokenizer, tmp_path):
    write_state_dict(tokenizer.state_dict(), tmp_path / "tokenizer.pth")
    sizes = vars(tokenizer.config)
    lines = [f"    {name}: {'null' if v is None else v}" for name, v in sizes.items()]
    (tmp_path / "config.yaml").write_text("\n".join(["model:", "  vq_model:", *lines]))

    def run(*images):
        module.main([
            *map(str, images), f"--tokenizer={tmp_path}/tokenizer.pth", "--device=cpu",
            f"--config={tmp_path}/config.yaml", f"--output={tmp_path}/out",
        ])  # fmt: skip

    return run


def test_every_photo_becomes_a_picture_without_another_network(start, tmp_path, capsys, nowhere):
    photo = write_photo(tmp_path / "photos/a.png")
    write_photo(tmp_path / "photos/sub/b.png", seed=1)
    start(tmp_path / "photos")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("a.png, PSNR ") and ", SSIM " in said[0] and len(said) == 3
    assert said[2] == f"wrote 2 pictures to {tmp_path}/out"
    found = sorted(p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*.png"))
    assert list(map(str, found)) == ["a.png.png", "sub/b.png.png"]
    picture = np.asarray(Image.open(tmp_path / "out/a.png.png"))
    enlarged = np.asarray(center_crop(load_image(photo), 32)).repeat(6, 0).repeat(6, 1)
    np.testing.assert_array_equal(picture[6 : 6 + 192, 6 : 6 + 192], enlarged)


@pytest.mark.parametrize("bad", ["small", "broken"])
def test_a_photo_that_cannot_be_used_stops_before_any_picture(start, tmp_path, bad):
    write_photo(tmp_path / "photos/a.png")
    if bad == "small":
        write_photo(tmp_path / "photos/b.png", size=(31, 64))
    else:
        (tmp_path / "photos/b.png").write_bytes(b"no photo")
    refusal(lambda: start(tmp_path / "photos"), tmp_path / "photos/b.png")
    assert not (tmp_path / "out").exists()
