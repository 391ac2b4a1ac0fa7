"""A tokenizer alone, from its weights to the pictures of PIL and back."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from data.images import center_crop
from modeling import Pipeline, Tokenizer
from modeling.generator import Generator
from modeling.image_decoder import ImageDecoder
from modeling.photos import photo_crop
from modeling.sampling import DRAWN
from modeling.weights import hub
from modeling.weights.metadata import TOKENIZER, about_model
from modeling.weights.tensors import write_state_dict
from tests.refusals import refusal
from tests.tiny import tiny_generator, tiny_tokenizer
from training import checkpoint

SMALL = tiny_tokenizer(num_latent_tokens=7)


@pytest.fixture
def tokenizer(fill):
    return fill(Tokenizer(SMALL))


@pytest.fixture
def file(tokenizer, tmp_path):
    path = tmp_path / "saved/tokenizer.safetensors"
    write_state_dict(tokenizer.state_dict(), path, about_model(TOKENIZER, SMALL, stage=2))
    return path


@pytest.fixture
def photo(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((40, 30), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_photo_becomes_codes_and_an_image_of_pil(tokenizer, file, photo):
    ours = Tokenizer.from_pretrained(file, device="cpu")
    codes = ours.encode_photos(photo, Image.open(photo))
    pixels = torch.from_numpy(np.array(center_crop(Image.open(photo), 16))).permute(2, 0, 1) / 255
    with torch.no_grad():
        assert torch.equal(codes, tokenizer.encode(pixels[None]).repeat(2, 1))
    images = ours.decode_photos(codes)
    assert [image.size for image in images] == [(16, 16)] * 2
    expected = ImageDecoder(tokenizer, torch.float32)(codes)
    assert np.array_equal(np.stack(images), expected)
    assert not ours.training


def test_an_image_of_pil_is_turned_as_a_file_is(photo, tmp_path):
    image = Image.open(photo)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    turned = Image.open(tmp_path / "turned.png")
    for same in (tmp_path / "turned.png", turned):
        assert torch.equal(photo_crop(same, 16), photo_crop(photo, 16))


def test_a_tokenizer_comes_from_a_file_a_folder_and_the_hub(tokenizer, file, tmp_path, monkeypatch):
    write_state_dict(tokenizer.state_dict(), tmp_path / "t.pth")
    asked = []
    client = SimpleNamespace(
        snapshot_download=lambda *args, **options: asked.append((*args, options)) or file.parent
    )
    monkeypatch.setattr(hub, "client", lambda: client)
    for name in (file, str(file.parent), "org/name"):
        ours = Tokenizer.from_pretrained(name, device="cpu")
        assert torch.equal(ours.latent_tokens, tokenizer.latent_tokens) and ours.config == SMALL
    Tokenizer.from_pretrained(tmp_path / "t.pth", SMALL, "cpu")
    Tokenizer.from_pretrained("org/name", revision="v1", device="cpu")
    files = ["tokenizer.safetensors", "config.json"]
    assert asked == [("org/name", dict(revision=r, allow_patterns=files)) for r in (None, "v1")]
    Tokenizer.from_pretrained(file, tiny_tokenizer(), "cpu")  # the same sizes
    other = tiny_tokenizer(encoder_heads=4)
    refusal(lambda: Tokenizer.from_pretrained(file, other), file, "encoder_heads")
    refusal(lambda: Tokenizer.from_pretrained("weights/none.pth"), "weights/none.pth")
    refusal(lambda: Tokenizer.from_pretrained(file, revision="v1"), "revision=v1")


def test_of_a_run_the_newest_checkpoint_counts_whatever_was_exported_before(tokenizer, file):
    newer = {**tokenizer.state_dict(), "latent_tokens": tokenizer.latent_tokens + 1}
    weights = {"tokenizer": (newer, about_model(TOKENIZER, SMALL, stage=2))}
    checkpoint.save(file.parent, 4, weights, {}, keep=2)
    for run in (file.parent, file.parent / "checkpoints/step-00000004"):
        ours = Tokenizer.from_pretrained(run, device="cpu")
        assert torch.equal(ours.latent_tokens, newer["latent_tokens"])


def test_what_is_no_photo_and_no_codes_is_refused(tokenizer, photo, tmp_path):
    for photos, named in (
        ([tmp_path / "none.png"], tmp_path / "none.png"),
        ([Image.new("RGB", (15, 30))], "15x30"),
        ([Image.new("F", (20, 20))], "floats"),
        ([], "at least one"),
    ):
        refusal(partial(tokenizer.encode_photos, *photos), named)
    codes = tokenizer.encode_photos(photo)
    for other, named in ((codes[0], "(7,)"), (codes + 16, "0…15")):
        refusal(partial(tokenizer.decode_photos, other), named)


# ---------------------------------------------------------------------- the pipeline's side
@pytest.fixture
def pipeline(fill, file, tmp_path):
    write_state_dict(fill(Generator(tiny_generator())).state_dict(), tmp_path / "g.bin")
    return Pipeline(tmp_path / "g.bin", file, device="cpu")


def test_a_pipeline_encodes_and_decodes_as_its_tokenizer(pipeline, tokenizer, photo):
    codes = pipeline.encode(photo)
    assert torch.equal(codes, tokenizer.encode_photos(photo))
    (image,) = pipeline.decode(codes)
    assert np.array_equal(image, tokenizer.decode_photos(codes)[0])


def test_images_of_pil_and_one_seed_per_image(pipeline):
    images = pipeline([2, 0, 1], seed=5)
    as_pil = pipeline([2, 0, 1], seed=5, output="pil")
    assert np.array_equal(np.stack(as_pil), images)
    each = pipeline([2, 0, 2], seed=[5, 7, 9])
    for i, (label, seed) in enumerate(((2, 5), (0, 7), (2, 9))):
        assert torch.equal(each[i], pipeline([label], seed=seed)[0])
    refusal(lambda: pipeline([2, 0, 1], seed=[5, 7]), "2 seeds", "3 images")
    refusal(lambda: pipeline([2], output="jpg"), "output=jpg", "tensor", "pil")


def test_a_pipeline_completes_and_edits(pipeline, photo):
    codes = pipeline.encode(photo)
    whole = pipeline([0, 1], prefix=codes)
    assert np.array_equal(whole[1], pipeline.decode(codes)[0])
    given = codes.repeat(2, 1)
    given[:, 4:] = DRAWN
    assert torch.equal(pipeline([0, 1], prefix=given), pipeline([0, 1], prefix=codes[:, :4]))
    assert not torch.equal(pipeline([0, 1], prefix=given), whole)
    refusal(lambda: pipeline([0, 1, 2], prefix=given), "(2, 7)", "3 images")


def test_a_pipeline_moves_with_all_that_it_has(pipeline):
    expected = pipeline([0], seed=1)
    assert pipeline.to("meta") is pipeline
    assert pipeline.generator.output.weight.is_meta and pipeline.tokenizer.latent_tokens.is_meta
    assert pipeline.decoder.device.type == "meta" and pipeline.engine is None
    assert expected.shape == (1, 16, 16, 3)
    refusal(lambda: pipeline.to("moon"), "device=moon")
