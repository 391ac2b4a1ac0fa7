"""Images to evaluate, uint8 (N, H, W, 3), from an .npz, a folder, a tar or memory."""

import shutil
import struct
import tempfile
import zipfile
from pathlib import Path
from typing import IO, Optional, cast

import numpy as np
from accelerate import PartialState

from data.images import ImagePath, center_crop, load_image
from data.tars import is_tar
from data.tree import describe_left_out, read_tree
from runtime.errors import InputError
from runtime.files import writing

INDEX_FOLDER = Path("output")  # of the indexes of tars


class ArrayImages:
    """Images in memory or mapped into it."""

    def __init__(self, name: str, array: np.ndarray):
        if array.ndim != 4 or array.shape[3] != 3 or not len(array):
            raise InputError(
                f"{name} has shape {array.shape}: pass images as (N, height, width, 3)"
            )
        if array.dtype != np.uint8:
            raise InputError(f"{name} is {array.dtype}: pass uint8 images, 0 … 255")
        self.name, self.array = name, array
        self.shape = cast(tuple[int, int, int, int], array.shape)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images start … stop - 1: (n, H, W, 3), uint8. Thread-safe."""
        return np.array(self.array[start:stop], order="C")


class FolderImages:
    """All images below a folder or in a tar, sorted by path, of one size or with ADM's centre crop to
    `crop` x `crop` pixels."""

    def __init__(self, folder: Path, crop: Optional[int] = None):
        self.name, self.crop = str(folder), crop
        tree = read_tree(folder, INDEX_FOLDER if is_tar(folder) else None)
        if tree.left_out:
            PartialState().print(f"{folder}: images{describe_left_out(tree.left_out)}")
        names = sorted(tree.images(), key=lambda name: name.split("/"))  # folder by folder
        self.paths: list[ImagePath] = [tree.path_of(name) for name in names]
        height, width, colours = self.load(self.paths[0]).shape
        self.shape = (len(self.paths), height, width, colours)

    def load(self, path: ImagePath) -> np.ndarray:
        """One image: (H, W, 3), uint8."""
        image = load_image(path)
        return np.asarray(image if self.crop is None else center_crop(image, self.crop))

    def read(self, start: int, stop: int) -> np.ndarray:
        images = np.empty((stop - start, *self.shape[1:]), np.uint8)
        for i, path in enumerate(self.paths[start:stop]):
            loaded = self.load(path)
            (height, width, _), (_, first_height, first_width, _) = loaded.shape, self.shape
            if (height, width) != (first_height, first_width):
                raise InputError(
                    f"{path} is {width}x{height} pixels, not {first_width}x{first_height} like "
                    f"{Path(str(self.paths[0])).name}: crop all images to one size (for a reference, "
                    f"evaluate.py --reference DIR --crop SIZE --save_stats FILE.npz does so)"
                )
            images[i] = loaded
        return images


Images = ArrayImages | FolderImages  # in a fixed order, all of one size


def map_npz(path: Path, key: str) -> np.ndarray:
    """An array of an .npz, memory-mapped; a compressed one from a temporary file (in TMPDIR)."""
    with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise zipfile.BadZipFile(f"an array in format {version[0]}.{version[1]}")
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise InputError(f"{path}: {key} holds Python objects; save plain uint8 images")
        entry, start = archive.getinfo(f"{key}.npy"), file.tell()  # values begin behind the header
        if entry.file_size < start + int(np.prod(shape)) * dtype.itemsize:
            raise zipfile.BadZipFile("an array is shorter than it says")
        source: Path | IO[bytes] = path
        if entry.compress_type == zipfile.ZIP_STORED:
            with open(path, "rb") as raw:
                raw.seek(entry.header_offset)
                # The lengths of name and extra field end the local header's 30 bytes.
                start += entry.header_offset + 30 + sum(struct.unpack("<26xHH", raw.read(30)))
        else:
            file.seek(0)
            with writing(tempfile.gettempdir()):
                source = tempfile.TemporaryFile()  # noqa: SIM115 (the map keeps it)
                shutil.copyfileobj(file, source)
    return np.memmap(source, dtype, "r", start, shape, "F" if fortran else "C")  # type: ignore[call-overload] (a file is fine)


def npz_keys(path: Path) -> list[str]:
    """The names of the arrays of an .npz. Raises InputError if it is missing or damaged."""
    if not path.is_file():
        raise InputError(f"no {path}: pass an .npz, or a folder or tar of images")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as e:
        raise damaged(path, e) from e
    return [name.removesuffix(".npy") for name in names if name.endswith(".npy")]


def damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not an .npz, or was cut short ({error!r}); make or copy it again")


def open_images(path: str | Path, crop: Optional[int] = None) -> Images:
    """Images of an .npz (its `arr_0`, or its only array), or of a folder or tar, for which `crop` is ADM's centre
    crop in pixels. All processes call this together."""
    path = Path(path)
    if path.is_dir() or is_tar(path):
        return FolderImages(path, crop)
    keys = npz_keys(path)
    key = "arr_0" if "arr_0" in keys else keys[0] if len(keys) == 1 else None
    if key is None:
        raise InputError(
            f"{path} holds no arr_0 of images ({', '.join(keys[:5]) or 'no arrays'}): save the images as arr_0"
        )
    try:
        return ArrayImages(str(path), map_npz(path, key))
    except InputError:
        raise
    except Exception as e:  # a damaged archive raises almost anything
        raise damaged(path, e) from e
