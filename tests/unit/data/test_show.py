"""The picture of a cache: `python -m data.tokens show`."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from data import show
from data.npz import write_npz_files, write_npz_manifest
from data.pictures import LINE, READABLE
from data.tokens import main, open_tokens
from modeling.image_decoder import ImageDecoder
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import TOKENIZER, about_model
from modeling.weights.tensors import fingerprint, write_state_dict
from tests.refusals import refusal
from tests.tiny import sizes_file, tiny_cache, tiny_tokenizer
from training import checkpoint

SIZES = tiny_tokenizer(encoder_width=8, encoder_heads=1, decoder_width=8, decoder_heads=1)
T, VIEWS = 7, 2
CODES = np.random.default_rng(0).integers(0, 16, (5, VIEWS, T))
LABELS, CLASSES = [0, 0, 1, 1, 1], ["cat", "dög"]
PATHS = [f"{CLASSES[label]}/{i}.png" for i, label in enumerate(LABELS)]


def about(tokenizer):
    mark = fingerprint(tokenizer.state_dict())
    return {"tokenizer": mark, "encoder_heads": 1, "image_size": 16, "crops": "center_flip"}


def packed(folder, tokenizer):
    tiny_cache(folder, CODES, LABELS, CLASSES, 16, PATHS, **about(tokenizer))


def published(folder, tokenizer):
    folder.mkdir()
    write_npz_files(folder, PATHS, CODES)
    sizes = {"images": 5, "views": VIEWS, "tokens": T, "codebook_size": 16}
    write_npz_manifest(folder, {**sizes, **about(tokenizer), "classes": CLASSES})


@pytest.fixture
def tokenizer(fill, tmp_path):
    tokenizer = fill(Tokenizer(SIZES))
    about = about_model(TOKENIZER, SIZES)
    write_state_dict(tokenizer.state_dict(), tmp_path / "tokenizer.pth", about)
    return tokenizer


@pytest.fixture
def shown(tokenizer, tmp_path, monkeypatch):
    """Draw a cache; returns the picture and the captions of its images."""
    captions = []

    def captioned(image, *lines):
        captions.append(lines)
        return original(image, *lines)

    original = show.captioned
    monkeypatch.setattr(show, "captioned", captioned)

    def start(*arguments, write=packed):
        if not (tmp_path / "cache").exists():
            write(tmp_path / "cache", tokenizer)
        main([
            "show", f"{tmp_path}/cache", f"--tokenizer={tmp_path}/tokenizer.pth",
            f"--picture={tmp_path}/out/cache.png", *arguments,
        ])  # fmt: skip
        return np.asarray(Image.open(tmp_path / "out/cache.png")), captions

    return start


@pytest.mark.parametrize("write", [packed, published])
@pytest.mark.parametrize("asked, count", [(3, 3), (16, 5)])
def test_first_views_are_decoded_with_class_and_path(shown, tokenizer, write, asked, count, capsys):
    picture, captions = shown(f"--images={asked}", write=write)
    assert captions == [(CLASSES[label], path) for label, path in zip(LABELS[:count], PATHS)]
    assert f"the first views of {count} of 5 images" in capsys.readouterr().out
    images = ImageDecoder(tokenizer, torch.float32)(torch.from_numpy(CODES[:count, 0])).numpy()
    columns, margin = math.ceil(math.sqrt(count)), show.MARGIN
    height, width = READABLE + 2 * LINE + margin, READABLE + margin
    for i, image in enumerate(images):
        y, x = margin + i // columns * height, margin + i % columns * width
        expected = image.repeat(8, 0).repeat(8, 1)
        np.testing.assert_array_equal(picture[y : y + READABLE, x : x + READABLE], expected)


@pytest.mark.parametrize("write", [packed, published])
def test_a_cache_names_the_first_of_its_images(tokenizer, tmp_path, write):
    write(tmp_path / "cache", tokenizer)
    cache = open_tokens(tmp_path / "cache")
    assert cache.paths(2) == PATHS[:2] and cache.paths(99) == PATHS


def test_the_cache_of_another_tokenizer_is_refused(shown, tokenizer, tmp_path):
    with torch.no_grad():
        tokenizer.latent_tokens[0, 0] += 1
    about = about_model(TOKENIZER, SIZES)
    write_state_dict(tokenizer.state_dict(), tmp_path / "other.pth", about)
    with torch.no_grad():
        tokenizer.latent_tokens[0, 0] -= 1
    refusal(lambda: shown(f"--tokenizer={tmp_path}/other.pth"), tmp_path / "cache", "tokenizer")
    assert not (tmp_path / "out").exists()


def test_a_run_is_a_tokenizer_as_for_all_other_programs(shown, tokenizer, tmp_path):
    weights = {"tokenizer": (tokenizer.state_dict(), about_model(TOKENIZER, SIZES))}
    checkpoint.save(tmp_path / "run", 1, weights, {}, keep=2)
    expected, _ = shown()
    picture, _ = shown(f"--tokenizer={tmp_path}/run")
    assert (picture == expected).all()


def test_a_config_says_what_the_weights_do_not(shown, tokenizer, tmp_path):
    write_state_dict(tokenizer.state_dict(), tmp_path / "bare.pth")
    refusal(lambda: shown(f"--tokenizer={tmp_path}/bare.pth"), "encoder_heads=12")
    sizes_file(tmp_path / "sizes.yaml", vq_model=SIZES)
    picture, _ = shown(f"--tokenizer={tmp_path}/bare.pth", f"--config={tmp_path}/sizes.yaml")
    assert picture.ndim == 3
