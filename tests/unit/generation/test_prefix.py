"""What an image is completed from; the engine's side is in test_engine."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import ExifTags, Image

from configs.schema import GeneratorExperiment
from data.images import center_crop
from generation.folder import SampleFolder
from generation.images import sample_images
from generation.job import largest_batch
from generation.prefix import masked_below, masked_patches, prefix_codes
from modeling.image_decoder import ImageDecoder
from modeling.sampling import DRAWN, Sampling, image_uniforms
from modeling.tokenizer import Tokenizer
from tests.refusals import refusal
from tests.tiny import sample_codes, tiny_tokenizer

# 4x4 codes of 16 after 5 prefix tokens: T = 21.
SIZES = tiny_tokenizer(image_size=32, encoder_layers=2)


@pytest.fixture
def tokenizer(fill):
    return fill(Tokenizer(SIZES))


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC).save(path)
    return path


def codes_of(tokenizer, **options):
    return prefix_codes(GeneratorExperiment(**options), tokenizer)


def write(path, array):
    np.save(path, array) if path.suffix == ".npy" else np.savez(path, array)
    return str(path)


# ---------------------------------------------------------------------- an image
def crop(photo):
    pixels = np.array(center_crop(Image.open(photo), 32))
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


@pytest.mark.parametrize("rows, count", [(0, 5), (1, 9), (3, 17), (None, 13)])
def test_codes_of_an_image_are_its_prefix_tokens_and_rows(tokenizer, photo, rows, count):
    codes = codes_of(tokenizer, prefix=str(photo), prefix_rows=rows)
    assert codes.shape == (1, count)
    assert torch.equal(codes, tokenizer.encode(crop(photo)[None])[:, :count])


@pytest.mark.parametrize("rows", [1, 2])
def test_masked_codes_know_nothing_of_the_rest_but_its_share_in_the_mean(tokenizer, photo, rows):
    image = crop(photo)
    seen = image.clone()
    seen[:, 8 * rows :] = image.mean((1, 2), keepdim=True)
    with torch.no_grad():  # codes that tell the two apart: latents of both
        latents = tokenizer.latents(torch.stack([image, seen]))[:, :8]
        tokenizer.quantize.embedding.weight.copy_(latents.flatten(0, 1))
    codes = codes_of(tokenizer, prefix=str(photo), prefix_rows=rows, prefix_mask=True)
    count = 5 + 4 * rows
    assert torch.equal(codes, tokenizer.encode(seen[None])[:, :count])
    whole = codes_of(tokenizer, prefix=str(photo), prefix_rows=rows)
    assert not torch.equal(codes, whole)  # the encoder is bidirectional
    other = image.clone()
    other[:, 8 * rows :] = other[:, 8 * rows :].flip(1)  # the same mean
    torch.testing.assert_close(masked_below(other, 8 * rows), masked_below(image, 8 * rows))


# ---------------------------------------------------------------------- a file of codes
CODES = np.arange(2 * 21).reshape(2, 21) % 16


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int64])
def test_codes_of_a_file_are_cut_to_whole_rows(tokenizer, tmp_path, name, dtype):
    path = write(tmp_path / name, CODES.astype(dtype))
    codes = codes_of(tokenizer, prefix=path, prefix_rows=2)
    assert codes.dtype == torch.int64 and codes.tolist() == CODES[:, :13].tolist()


def test_without_rows_all_codes_of_a_file_are_the_prefix(tokenizer, tmp_path):
    path = write(tmp_path / "a.npy", CODES[0, :9])
    assert codes_of(tokenizer, prefix=path).tolist() == [CODES[0, :9].tolist()]


def test_a_file_of_a_cache_in_the_published_layout_serves(tokenizer, tmp_path):
    np.savez(tmp_path / "a.npz", codes=CODES)
    codes = codes_of(tokenizer, prefix=f"{tmp_path}/a.npz", prefix_rows=0)
    assert codes.tolist() == CODES[:, :5].tolist()


@pytest.mark.parametrize(
    "content, options, named",
    [
        (CODES + 1, {}, "1…16"),
        (CODES - 1, {}, "-1…14"),
        (np.zeros((1, 22), int), {}, "(1, 22)"),
        (CODES, {"prefix_rows": None}, "experiment.prefix_rows"),
        (CODES[:, :7], {"prefix_rows": None}, "7 codes"),
        (CODES[:, :4], {"prefix_rows": None}, "4 codes"),
        (CODES[:, :8], {}, "experiment.prefix_rows=1"),
        (CODES, {"prefix_rows": 4}, "experiment.prefix_rows=4"),
        (CODES / 2, {}, "float64 (2, 21)"),
        (CODES[None], {}, "(1, 2, 21)"),
        (CODES[:0], {}, "(0, 21)"),
        (CODES, {"prefix_mask": True}, "experiment.prefix_mask=True"),
        (b"", {}, "not a file of codes"),
        (b"text", {}, "not a file of codes"),
        (b"\x93NUMPY", {}, "not a file of codes"),
        (b"PK\x03\x04 no archive", {}, "not a file of codes"),
        (None, {}, "not a file of codes"),
    ],
)
@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_codes_that_cannot_begin_an_image_are_refused(
    tokenizer, tmp_path, name, content, options, named
):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write(path, content)
    refusal(
        lambda: codes_of(tokenizer, prefix=str(path), **{"prefix_rows": 1, **options}),
        "prefix",
        named,
    )


def test_a_damaged_compressed_archive_is_no_file_of_codes(tokenizer, tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, codes=np.arange(21 * 50).reshape(50, 21) % 16)
    data = bytearray(path.read_bytes())
    data[60:120] = bytes(60)  # within the compressed bytes
    path.write_bytes(data)
    refusal(lambda: codes_of(tokenizer, prefix=str(path), prefix_rows=1), "not a file of codes")


def test_another_archive_is_no_file_of_codes(tokenizer, tmp_path):
    np.savez(tmp_path / "a.npz", pixels=CODES)
    refusal(lambda: codes_of(tokenizer, prefix=f"{tmp_path}/a.npz"), tmp_path / "a.npz")


@pytest.mark.parametrize(
    "name, named", [("small.png", "40x31"), ("text.png", ""), ("none.jpg", "")]
)
def test_an_image_that_cannot_be_completed_is_refused(tokenizer, tmp_path, name, named):
    Image.new("RGB", (40, 31)).save(tmp_path / "small.png")
    (tmp_path / "text.png").write_bytes(b"text")
    refusal(lambda: codes_of(tokenizer, prefix=str(tmp_path / name)), tmp_path / name, named)


def test_no_prefix_is_none(tokenizer):
    assert codes_of(tokenizer) is None


# ---------------------------------------------------------------------- an image that is edited
# The photo's 60x50 pixels are cut to its middle 50x50, which become 32x32: 4x4 patches of 12.5 pixels.
@pytest.mark.parametrize(
    "box, patches",
    [
        ("20,15,28,24", [(1, 1)]),
        ("20,15,32,24", [(1, 1), (1, 2)]),
        ("20,2,28,10", [(0, 1)]),
        ("0,40,60,50", [(3, 0), (3, 1), (3, 2), (3, 3)]),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_codes_are_kept_but_for_the_patches_that_the_mask_touches(
    tokenizer, photo, tmp_path, box, patches, as_file
):
    mask = box
    if as_file:
        mask = str(tmp_path / "mask.png")
        image = Image.new("L", (60, 50))
        image.paste(255, tuple(map(int, box.split(","))))
        image.save(mask)
    codes = codes_of(tokenizer, edit=str(photo), mask=mask)
    drawn = torch.zeros(4, 4, dtype=torch.bool)
    for place in patches:
        drawn[place] = True
    # The prefix tokens describe the first row of patches.
    drawn = torch.cat([torch.full((5,), patches[0][0] == 0), drawn.flatten()])
    assert torch.equal(codes, tokenizer.encode(crop(photo)[None]).where(~drawn, DRAWN))


@pytest.mark.parametrize("as_file", [False, True])
@pytest.mark.parametrize(
    "x, y, patches",
    [
        (700, 300, [(1, 2)]),
        (600, 300, [(1, 2)]),  # the first pixel of patch 2, whose columns are 600 … 799
        (599, 300, [(1, 1)]),
        (999, 799, [(3, 3)]),
        (600, 200, [(1, 2)]),
    ],
)
def test_a_mark_of_one_pixel_of_a_large_photo_counts(tokenizer, tmp_path, as_file, x, y, patches):
    # Of 1200x800 pixels the middle 800x800 are seen: 4x4 patches of 200 pixels.
    Image.effect_noise((1200, 800), 90).save(tmp_path / "large.png")
    mask = f"{x},{y},{x + 1},{y + 1}"
    if as_file:
        mask = str(tmp_path / "mask.png")
        image = Image.new("L", (1200, 800))
        image.putpixel((x, y), 255)
        image.save(mask)
    drawn = masked_patches(f"{tmp_path}/large.png", mask, SIZES)
    assert drawn.nonzero().tolist() == [list(place) for place in patches]


def test_a_pixel_that_two_patches_share_marks_both(tmp_path):
    # Of 50x50 pixels a patch shows 12.5: pixel 12 is half of patch 0 and half of patch 1.
    Image.new("RGB", (50, 50)).save(tmp_path / "a.png")
    drawn = masked_patches(f"{tmp_path}/a.png", "12,12,13,13", SIZES)
    assert drawn.nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_a_photo_is_edited_as_it_is_seen(tokenizer, photo, tmp_path):
    image = Image.open(photo)
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6  # stored lying on its left side
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    given = [
        codes_of(tokenizer, edit=str(p), mask="20,15,28,24")
        for p in (photo, tmp_path / "turned.png")
    ]
    assert torch.equal(*given)


def test_an_empty_mask_keeps_the_image_as_it_is_reconstructed(models, job, tmp_path):
    Image.effect_noise((16, 16), 90).convert("RGB").save(tmp_path / "a.png")
    Image.new("L", (16, 16)).save(tmp_path / "mask.png")
    given = codes_of(models.tokenizer, edit=f"{tmp_path}/a.png", mask=f"{tmp_path}/mask.png")
    job = replace(job, prefix=given)
    (batch,) = sample_images(job.sampler(models.generator, 2), models.tokenizer, job, [range(2)])
    photo = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1) / 255
    codes = models.tokenizer.encode(photo[None])
    assert batch.codes.tolist() == codes.repeat(2, 1).tolist()
    assert np.array_equal(batch.images[0], ImageDecoder(models.tokenizer, torch.float32)(codes)[0])


@pytest.mark.parametrize(
    "mask, named",
    [
        ("0,0,61,50", "60x50"),
        ("5,0,5,50", "60x50"),
        ("0,0,3,50", "centre crop"),
        ("0,0,3", "unreadable"),
        ("none.png", "unreadable"),
        ("small.png", "40x31"),
    ],
)
def test_masks_of_something_else_are_refused(tokenizer, photo, tmp_path, monkeypatch, mask, named):
    monkeypatch.chdir(tmp_path)
    Image.new("L", (40, 31)).save("small.png")
    refusal(lambda: codes_of(tokenizer, edit=str(photo), mask=mask), mask, named)


# ---------------------------------------------------------------------- the job
PREFIX = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_prefixes_are_taken_in_turn_in_every_chunk(models, job):
    job = replace(job, prefix=PREFIX)
    assert job.beginnings(range(3, 6)).tolist() == PREFIX[[1, 0, 1]].tolist()
    batches = [range(0, 3), range(3, 6), range(6, 8)]
    codes = [
        b.codes
        for b in sample_images(job.sampler(models.generator, 3), models.tokenizer, job, batches)
    ]
    labels, whole = torch.arange(8) % 3, PREFIX.repeat(4, 1)
    uniforms = image_uniforms(5, range(8), 7)
    expected = sample_codes(models.generator, labels, uniforms, Sampling(2.0), whole)
    assert np.concatenate(codes).tolist() == expected.tolist()
    assert expected[:, :3].tolist() == whole.tolist()


def folder(tmp_path, job, models):
    PartialState(cpu=True)
    return SampleFolder(tmp_path / "a", job, models)


def test_a_folder_of_another_prefix_is_refused(models, job, tmp_path):
    job = replace(job, chunk=3)
    made = folder(tmp_path, replace(job, prefix=PREFIX), models)
    made.fill()
    recorded = json.loads(made.settings_file.read_text())["prefix"]
    others = (None, PREFIX[:, :2], PREFIX[:1], PREFIX + 1, PREFIX.view(3, 2))
    for other in others:
        refusal(
            folder(tmp_path, replace(job, prefix=other), models).fill, f"prefix ({recorded} there"
        )
    folder(tmp_path, replace(job, prefix=PREFIX.clone()), models).fill()


def test_a_folder_without_prefix_is_refused_to_one_with(models, job, tmp_path):
    job = replace(job, chunk=3)
    folder(tmp_path, job, models).fill()
    refusal(folder(tmp_path, replace(job, prefix=PREFIX), models).fill, "prefix (None there")


@pytest.fixture
def little_memory(monkeypatch):
    memory = SimpleNamespace(available=10**9)
    monkeypatch.setattr("generation.job.psutil.virtual_memory", lambda: memory)


def test_the_reference_engine_caches_in_float32_whatever_the_precision(models, job, little_memory):
    largest = [
        largest_batch(models, replace(job, engine="reference", precision=precision))
        for precision in ("bf16", "fp32")
    ]
    assert largest[0] == largest[1] < largest_batch(models, replace(job, precision="bf16"))


def test_processes_of_one_machine_share_its_memory(models, job, little_memory, monkeypatch):
    alone = largest_batch(models, job)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert 0 < largest_batch(models, job) <= alone / 2


def test_prefilling_counts_as_memory(models, job, little_memory):
    assert 0 < largest_batch(models, replace(job, prefix=PREFIX)) < largest_batch(models, job)
