"""Where images to evaluate come from: an .npz, a folder, or memory; always uint8 (N, H, W, 3)."""

import shutil
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Protocol

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.images import load_image
from runtime.errors import InputError


class Images(Protocol):
    """A set of images in a fixed order, all of one size."""

    name: str
    shape: tuple[int, int, int, int]  # N, H, W, 3

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start … stop - 1: (n, H, W, 3), uint8. Called from several threads."""


class ArrayImages:
    """Images in memory, or mapped into it."""

    def __init__(self, name: str, array: np.ndarray):
        if array.ndim != 4 or array.shape[3] != 3 or not len(array):
            raise InputError(
                f"{name} is of shape {array.shape}: give images as (N, height, width, 3)"
            )
        if array.dtype != np.uint8:
            raise InputError(f"{name} is {array.dtype}: give uint8 images, 0 … 255")
        self.name, self.array, self.shape = name, array, array.shape

    def read(self, start: int, stop: int) -> np.ndarray:
        return np.array(self.array[start:stop], order="C")


class FolderImages:
    """All images below a folder, sorted by path; they must be of one size."""

    def __init__(self, folder: Path):
        self.name = str(folder)
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
        if not self.paths:
            raise InputError(f"{folder} holds no images")
        first = load_image(self.paths[0])
        self.shape = (len(self.paths), first.height, first.width, 3)

    def read(self, start: int, stop: int) -> np.ndarray:
        images = np.empty((stop - start, *self.shape[1:]), np.uint8)
        for image, path in zip(images, self.paths[start:stop]):
            loaded = np.asarray(load_image(path))
            if loaded.shape != image.shape:
                raise InputError(
                    f"{path} is {loaded.shape[1]}x{loaded.shape[0]} pixels, not "
                    f"{image.shape[1]}x{image.shape[0]} like {self.paths[0].name}: crop all images "
                    f"of {self.name} to one size"
                )
            image[:] = loaded
        return images


def map_npz(path: Path, key: str) -> np.ndarray:
    """An array of an .npz without loading it: mapped from the file.

    A compressed one is unpacked into a temporary file first (TMPDIR says where).
    """
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"{key}.npy")
        with archive.open(entry) as file:
            version = np.lib.format.read_magic(file)
            if version not in ((1, 0), (2, 0)):
                raise zipfile.BadZipFile(f"an array in format {version[0]}.{version[1]}")
            read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
            shape, fortran, dtype = read_header(file)
            start = file.tell()
            if dtype.hasobject:
                raise InputError(f"{path}: {key} holds Python objects; give plain uint8 images")
            needed = start + int(np.prod(shape)) * dtype.itemsize
            if entry.file_size < needed:
                raise zipfile.BadZipFile("an array is shorter than it says")
            if entry.compress_type == zipfile.ZIP_STORED:
                with open(path, "rb") as raw:
                    raw.seek(entry.header_offset)
                    # The lengths of name and extra field end the local header's 30 bytes.
                    start += entry.header_offset + 30 + sum(struct.unpack("<26xHH", raw.read(30)))
                source = path
            else:
                file.seek(0)
                source = tempfile.TemporaryFile()  # noqa: SIM115 (the map keeps it)
                shutil.copyfileobj(file, source)
    return np.memmap(source, dtype, "r", start, shape, "F" if fortran else "C")


def npz_keys(path: Path) -> list[str]:
    """Names of the arrays of an .npz; a damaged file or none is refused."""
    if not path.is_file():
        raise InputError(f"no {path}: give an .npz or a folder of images")
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError) as e:
        raise damaged(path, e) from e


def damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} is no .npz, or was cut short ({str(error).splitlines()[0]}); make or copy it again"
    )


def npz_images(path: Path) -> ArrayImages:
    """The images of an .npz: its `arr_0`, or its only array."""
    keys = npz_keys(path)
    key = "arr_0" if "arr_0" in keys else keys[0] if len(keys) == 1 else None
    if key is None:
        raise InputError(f"{path} holds no arr_0 of images but {', '.join(keys[:5])}")
    try:
        return ArrayImages(str(path), map_npz(path, key))
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError, struct.error) as e:
        raise damaged(path, e) from e


def npz_values(path: Path, keys: list[str]) -> dict[str, np.ndarray]:
    """Those of the named arrays that an .npz holds; never a pickle."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys if key in arrays}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, EOFError) as e:
        raise damaged(path, e) from e


def open_images(path: str | Path) -> Images:
    """Images of an .npz or of a folder."""
    path = Path(path)
    return FolderImages(path) if path.is_dir() else npz_images(path)
