"""Pictures for people: images side by side on a grid, as PNG."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from modeling.pixels import to_uint8
from runtime.files import writing

WHITE = 255
CAPTION_WIDTH = 32  # pixels that an image must have for a caption


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [0, 1] -> (N, H, W, 3), uint8, on the CPU."""
    return np.ascontiguousarray(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())


def picture_grid(
    images: np.ndarray, columns: int, margin: int = 0, background: int = WHITE
) -> np.ndarray:
    """Images (N, H, W, 3), uint8, row after row, `columns` per row: (height, width, 3), uint8.

    `margin` pixels of the grey value `background` separate and surround the images.
    """
    count, height, width, _ = images.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    shape = (rows * (height + margin) + margin, columns * (width + margin) + margin, 3)
    grid = np.full(shape, background, np.uint8)
    for i, image in enumerate(images):
        y = i // columns * (height + margin) + margin
        x = i % columns * (width + margin) + margin
        grid[y : y + height, x : x + width] = image
    return grid


def captioned(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Images (N, H, W, 3), uint8, each with a line of text below it, for `picture_grid`.

    A text that is too long ends in an ellipsis. Images narrower than `CAPTION_WIDTH` stay as they
    are: nothing can be read there.
    """
    _, height, width, _ = images.shape
    if width < CAPTION_WIDTH:
        return images
    size = max(10, min(width // 16, 20))
    font, strip = ImageFont.load_default(size), round(1.6 * size)
    canvas = np.full((len(images), height + strip, width, 3), WHITE, np.uint8)
    canvas[:, :height] = images
    for picture, caption in zip(canvas, captions):
        drawn = Image.new("RGB", (width, strip), "white")
        text = fitting(caption, lambda text: font.getlength(text) <= width - 2)
        ImageDraw.Draw(drawn).text((width / 2, strip / 2), text, "black", font, anchor="mm")
        picture[height:] = np.asarray(drawn)
    return canvas


def fitting(text: str, fits: Callable[[str], bool]) -> str:
    """A text, or its beginning and an ellipsis, that fits; empty where nothing does."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    if fits(text):
        return text
    shortened = (text[:end].rstrip() + "…" for end in range(len(text) - 1, 0, -1))
    return next((candidate for candidate in shortened if fits(candidate)), "")


def write_png(image: np.ndarray, path: Path) -> None:
    """Write an image (H, W, 3), uint8, whole or not at all; missing folders are made.

    Raises InputError where it cannot be written. It is not synced: a power cut may lose it.
    """
    partial = path.with_suffix(".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(partial, format="PNG")
        os.replace(partial, path)
