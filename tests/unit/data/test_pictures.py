import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from data.pictures import (
    LINE,
    TEXT,
    captioned,
    enlarged,
    fitted,
    picture_grid,
    stacked,
    to_pixels,
    with_captions,
    write_png,
)
from tests.refusals import refusal

IMAGES = np.arange(5 * 2 * 3 * 3, dtype=np.uint8).reshape(5, 2, 3, 3)


def test_images_stand_row_after_row_and_the_rest_is_background():
    grid = picture_grid(IMAGES, 3)
    assert grid.shape == (4, 9, 3)
    for i, image in enumerate(IMAGES):
        y, x = i // 3 * 2, i % 3 * 3
        np.testing.assert_array_equal(grid[y : y + 2, x : x + 3], image)
    assert (grid[2:, 6:] == 255).all()


def test_a_margin_surrounds_and_separates_the_images():
    grid = picture_grid(IMAGES, 3, margin=2, background=127)
    assert grid.shape == (2 * 4 + 2, 3 * 5 + 2, 3)
    np.testing.assert_array_equal(grid[6:8, 7:10], IMAGES[4])
    assert (grid[:2] == 127).all() and (grid[4:6] == 127).all() and (grid[:, 5:7] == 127).all()


def test_a_row_is_no_longer_than_there_are_images():
    assert picture_grid(IMAGES[:2], 7).shape == (2, 6, 3)


def test_pixels_are_truncated_and_channels_come_last():
    images = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    pixels = to_pixels(images)
    assert pixels.shape == (1, 2, 2, 3) and pixels[0, 1, 1].tolist() == [0, 127, 255]


def test_small_images_are_enlarged_by_whole_pixels():
    images = enlarged(IMAGES, width=8)  # of 3 pixels: three times
    assert images.shape == (5, 6, 9, 3)
    np.testing.assert_array_equal(images[:, 1::3, 2::3], IMAGES)
    np.testing.assert_array_equal(enlarged(IMAGES, width=3), IMAGES)


def test_captions_stand_below_and_leave_the_image_alone():
    image = np.full((20, 100, 3), 7, np.uint8)
    picture = captioned(image, "dog", "")
    assert picture.shape == (20 + 2 * LINE, 100, 3)
    np.testing.assert_array_equal(picture[:20], image)
    assert picture[20 : 20 + LINE].min() < 128 and (picture[20 + LINE :] == 255).all()
    assert not np.array_equal(picture, captioned(image, "cat", ""))


@pytest.mark.parametrize("text", ["x" * 5000, "a\nb", "犬\udc80", "é", ""])
def test_any_text_becomes_one_line_that_fits(text):
    font = ImageFont.load_default(TEXT)
    line = fitted(text, 120, font)
    assert font.getlength(line) <= 120 and "\n" not in line
    assert line == {"é": "é", "": "", "a\nb": "a\\nb", "犬\udc80": "\\u72ac\\udc80"}.get(text, line)
    captioned(IMAGES[0], text)


def test_a_long_line_keeps_both_ends():
    font = ImageFont.load_default(TEXT)
    line = fitted("n01440764/" + "x" * 100 + ".JPEG", 120, font)
    assert line.startswith("n014") and line.endswith(".JPEG") and "…" in line
    assert 100 < font.getlength(line) <= 120


def test_pictures_of_other_widths_are_stacked_on_white():
    picture = stacked([IMAGES[0], IMAGES[1].repeat(2, 1)])
    assert picture.shape == (4, 6, 3)
    np.testing.assert_array_equal(picture[:2, :3], IMAGES[0])
    np.testing.assert_array_equal(picture[2:], IMAGES[1].repeat(2, 1))
    assert (picture[:2, 3:] == 255).all()


def test_png_holds_the_pixels_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    write_png(IMAGES[0], tmp_path / "new/a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new/a.png")), IMAGES[0])
    (tmp_path / "file").touch()
    refusal(lambda: write_png(IMAGES[0], tmp_path / "file/b.png"), tmp_path / "file")


# ---------------------------------------------------------------------- captions
def test_a_caption_stands_below_its_image_and_leaves_the_pixels_alone():
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 64, 3), dtype=np.uint8)
    made = with_captions(images, ["otter", "", "golden retriever of a long name"])
    assert made.shape[0] == 3 and made.shape[1] > 50 and made.shape[2:] == (64, 3)
    np.testing.assert_array_equal(made[:, :40], images)
    strips = made[:, 40:]
    assert (strips[0] < 128).any() and (strips[1] == 255).all() and (strips[2] < 128).any()
    other = with_captions(images, ["ant", "otter", ""])
    np.testing.assert_array_equal(other[1, 40:], strips[0])  # the text decides, not the image
    assert (other[0, 40:] != strips[0]).any()


def test_images_too_small_for_a_caption_stay_as_they_are():
    assert with_captions(IMAGES, ["otter"] * 5) is IMAGES
