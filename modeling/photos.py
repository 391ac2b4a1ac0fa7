"""Reads photos for the tokenizer: any image file as upright 8-bit RGB, cut to the middle square.

Needs Pillow, so other modules of this package import it only when a photo is encoded.
"""

import errno
import io
import os
import time
from typing import Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from .errors import InputError

# Pillow reads more; one of them (EPS) starts another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
# Larger ratios are refused: an image of 1 x 40,000 pixels, cropped to 512, would first fill 30 GB.
MOST_ELONGATED = 500
# Errors of a network's file system that may pass, and the seconds before each further try.
PASSING, PAUSES = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT), (1.0, 5.0, 15.0)
persists = False  # whether the last of them did not pass
TURNS = dict(enumerate([
    Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
], 2))  # by EXIF's orientation  # fmt: skip


class Readable(Protocol):
    """An image in an archive, in place of a path."""

    def read(self) -> bytes: ...


Photo = str | os.PathLike[str] | Readable


# ---------------------------------------------------------------------- loading
def load_image(path: Photo) -> Image.Image:
    """Any image as 8-bit RGB (`to_rgb`); EXIF rotation is ignored. Raises InputError."""
    return load_photo(path)[0]


def load_upright(photo: Photo | Image.Image) -> Image.Image:
    """A photo as 8-bit RGB, turned upright by its EXIF. Raises InputError."""
    if not (isinstance(photo, (str, os.PathLike, Image.Image)) or hasattr(photo, "read")):
        raise InputError(
            f"a photo of type {type(photo).__name__}: pass each photo as a separate argument, a path "
            f"or a PIL image"
        )
    if isinstance(photo, Image.Image):
        try:
            image, turn = to_rgb(photo), turn_of(photo)
        except (OSError, SyntaxError, ValueError) as e:  # Pillow may read the file only now
            raise InputError(f"unreadable image: {e}") from e
    else:
        image, turn = load_photo(photo)
    return image if turn is None else image.transpose(turn)


def load_photo(path: Photo) -> tuple[Image.Image, Image.Transpose | None]:
    """`load_image`, and the turn that its EXIF asks for; None: none.

    File-system errors are retried, because most pass. Once one has persisted, none is retried until a photo is
    read again.
    """
    global persists
    pauses = [] if persists else [*PAUSES]
    while True:
        try:
            file = path if isinstance(path, (str, os.PathLike)) else io.BytesIO(path.read())
            with Image.open(file, formats=FORMATS) as image:
                if max(image.size) > MOST_ELONGATED * min(image.size):
                    raise ValueError(
                        f"{image.width}x{image.height} pixels: one side is over {MOST_ELONGATED} times the other"
                    )
                result = to_rgb(image), turn_of(image)
            persists = False
            return result
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
            if getattr(e, "errno", None) in PASSING:
                if pauses:
                    time.sleep(pauses.pop(0))
                    continue
                persists = True
            unknown = isinstance(e, UnidentifiedImageError)  # whose text shows the file object
            reason = f"not in a supported format ({', '.join(FORMATS)})" if unknown else e
            raise InputError(f"unreadable image {path}: {reason}; repair or remove it") from e


def turn_of(image: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata can raise any exception
        return None


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey is scaled, and transparent pixels are composited on white.

    Other images are converted by Pillow, as in torchvision's loader. Raises ValueError for floats and
    32-bit integers, whose range is unknown.
    """
    transparent = image.info.get("transparency")
    sixteen_bits = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    if sixteen_bits:
        grey = np.asarray(image).astype(np.int64)
        scaled = (grey * 255 + 32767) // 65535  # rounded
        if transparent is not None:
            scaled[grey == transparent] = 255
        return Image.fromarray(scaled.astype(np.uint8)).convert("RGB")
    if image.mode in ("F", "I"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise ValueError(f"its pixels are {kind} of unknown range, convert it to 8 or 16 bits")
    if transparent is None and image.mode not in ("LA", "La", "PA", "RGBA", "RGBa"):
        return image.convert("RGB")
    colours = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours).convert("RGB")


def to_uint8(image: Image.Image) -> Tensor:
    """(3, H, W), uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


# ---------------------------------------------------------------------- the crop
def crop_geometry(width: int, height: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The size that `center_crop` resizes an image to, and (left, top) of the crop in it."""
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
    scale = size / min(width, height)
    width, height = round(width * scale), round(height * scale)
    return (width, height), ((width - size) // 2, (height - size) // 2)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to size x size pixels: halve with BOX while twice as large, then BICUBIC."""
    resized, (left, top) = crop_geometry(*image.size, size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    image = image.resize(resized, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def photo_crop(photo: Photo | Image.Image, size: int) -> Tensor:
    """The centre crop (3, size, size), uint8, of an upright photo. Raises InputError for a smaller one."""
    image = load_upright(photo)
    if min(image.size) < size:
        name = "the image" if isinstance(photo, Image.Image) else photo
        raise InputError(
            f"{name} has {image.width}x{image.height} pixels, fewer than the {size}x{size} of this "
            f"tokenizer: use a larger image"
        )
    return to_uint8(center_crop(image, size))
