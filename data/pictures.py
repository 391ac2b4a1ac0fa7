"""Pictures for people: images side by side on a grid, as PNG."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.classes import printable
from modeling.pixels import to_uint8
from runtime.files import writing

WHITE = 255
TEXT, LINE = 13, 17  # pixels: size of captions, distance of their lines
READABLE = 128  # least width in pixels of an image with a caption
CAPTION_WIDTH = 32  # least width in pixels of an image on a grid with a caption


def to_pixels(images: Tensor) -> np.ndarray:
    """Images (N, 3, H, W) in [0, 1] -> (N, H, W, 3), uint8, on the CPU."""
    return np.ascontiguousarray(to_uint8(images).permute(0, 2, 3, 1).cpu().numpy())


def picture_grid(
    images: np.ndarray, columns: int, margin: int = 0, background: int = WHITE
) -> np.ndarray:
    """Images (N, H, W, 3), uint8, row after row, `columns` per row: (height, width, 3), uint8.

    `margin` pixels of the grey value `background` separate and surround the images.
    """
    columns, m = min(columns, len(images)), (margin, 0)
    empty = -len(images) % columns  # cells of the last row
    cells = np.pad(images, ((0, empty), m, m, (0, 0)), constant_values=background)
    grid = rearrange(cells, "(r c) h w rgb -> (r h) (c w) rgb", c=columns)
    return np.pad(grid, (m[::-1], m[::-1], (0, 0)), constant_values=background)


def enlarged(images: np.ndarray, width: int = READABLE) -> np.ndarray:
    """Images (…, H, W, 3) with every pixel repeated, at least `width` pixels wide."""
    factor = max(-(-width // images.shape[-2]), 1)
    return images.repeat(factor, -3).repeat(factor, -2)


def captioned(image: np.ndarray, *lines: str) -> np.ndarray:
    """An image (H, W, 3), uint8, with lines of text below it: (H + 17 per line, W, 3).

    Long lines are shortened in the middle; unprintable characters are escaped.
    """
    band = Image.new("RGB", (image.shape[1], LINE * len(lines)), "white")
    draw, font = ImageDraw.Draw(band), ImageFont.load_default(TEXT)
    for i, line in enumerate(lines):
        draw.text((1, LINE * i), fitted(line, band.width - 2, font), "black", font)
    return np.concatenate([image, np.asarray(band)])


def with_captions(images: np.ndarray, captions: Sequence[str]) -> np.ndarray:
    """Images (N, H, W, 3), uint8, each with a line of text below it, for `picture_grid`.

    Images narrower than `CAPTION_WIDTH` are returned unchanged.
    """
    if images.shape[2] < CAPTION_WIDTH:
        return images
    return np.stack([captioned(image, caption) for image, caption in zip(images, captions)])


def fitted(line: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """A line, shortened in the middle to at most `width` pixels."""
    # Pillow's font has the letters of Western Europe.
    line = printable(line).encode("latin-1", "backslashreplace").decode("latin-1")
    for kept in range(min(len(line), width), 0, -1):  # no letter is narrower than a pixel
        shown = line if kept == len(line) else f"{line[: kept // 2]}…{line[kept // 2 - kept :]}"
        if font.getlength(shown) <= width:
            return shown
    return ""


def stacked(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (H, W, 3) of any width, below each other on white."""
    width = max(picture.shape[1] for picture in pictures)
    rows = [
        np.pad(p, ((0, 0), (0, width - p.shape[1]), (0, 0)), constant_values=WHITE)
        for p in pictures
    ]
    return np.concatenate(rows)


def write_png(image: np.ndarray, path: Path) -> None:
    """Write an image (H, W, 3), uint8, whole or not at all, and create missing folders.

    Raises InputError if it cannot be written. A power cut may lose it, because it is not synced.
    """
    partial = path.with_name(f"{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(partial, format="PNG")
        os.replace(partial, path)
