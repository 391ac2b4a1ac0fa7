"""Pictures for people: images side by side on a grid, as PNG."""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from modeling.pixels import to_uint8
from runtime.files import writing

WHITE = 255


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


def write_png(image: np.ndarray, path: Path) -> None:
    """Write an image (H, W, 3), uint8, whole or not at all; missing folders are made.

    Raises InputError where it cannot be written. It is not synced: a power cut may lose it.
    """
    partial = path.with_suffix(".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(partial, format="PNG")
        os.replace(partial, path)
