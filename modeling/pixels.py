"""Conversion of pixels between uint8 (files), float32 in [0, 1] (models) and PIL images."""

from typing import Any

import torch
from torch import Tensor


def to_float(images: Tensor) -> Tensor:
    """uint8 images of any shape -> float32 in [0, 1]."""
    return images.float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """Images of any shape, clamped to [0, 1] -> uint8, by ×255 and truncation as published."""
    return (images.clamp(0, 1) * 255).to(torch.uint8)


def to_pil(images: Tensor) -> list[Any]:
    """Images (B, S, S, 3), uint8 -> B PIL images."""
    from PIL import Image

    return [Image.fromarray(image) for image in images.cpu().numpy()]
