"""Folders of images: listing, loading, the crops of pretokenization and training's augmentation."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as TF

from data.order import EpochDraws
from modeling.pixels import to_float as to_float
from runtime.errors import InputError
from runtime.randomness import Stream, generator_for

# Of the many that Pillow knows; one of them (EPS) would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
VIEWS = {"center_flip": 2, "five_crop": 5, "ten_crop": 10}  # crops an image, by kind


def list_images(root: str | Path) -> tuple[list[tuple[str, int]], list[str]]:
    """(path, class) of every image under root/CLASS/, sorted, and the sorted class names."""
    try:
        folder = ImageFolder(str(root))
    except (FileNotFoundError, NotADirectoryError) as e:
        if not Path(root).is_dir():
            raise InputError(f"no image folder {root}; give one with a folder a class") from e
        reason = str(e).split(". Supported")[0].rstrip(".").split("\n")[0]
        raise InputError(
            f"{root} is no image folder: {reason}; put images into one folder a class"
        ) from e
    return folder.samples, folder.classes


def list_paths(source: str | Path) -> list[str]:
    """Paths of a folder's images (`list_images`), or those that a text file lists.

    Such a file holds one path a line, absolute or relative to the file's folder; empty lines do not
    count. Raises InputError that names the first line without a file.
    """
    source = Path(source)
    if not source.is_file():
        return [path for path, _ in list_images(source)[0]]
    try:
        lines = source.read_text().splitlines()
    except UnicodeDecodeError as e:
        raise InputError(f"{source} is no image folder and no text file of paths") from e
    paths = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            path = source.parent / line.strip()  # an absolute path stays what it is
            if not path.is_file():
                raise InputError(f"{source}, line {number}: there is no file {path}")
            paths.append(str(path))
    if not paths:
        raise InputError(f"{source} lists no images: write one path a line")
    return paths


def load_image(path: str | Path) -> Image.Image:
    """Any image as 8-bit RGB, as torchvision's own loader converts it (EXIF rotation is ignored)."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise InputError(f"unreadable image {path}: {e}; repair or remove it") from e


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to size x size pixels: halve with BOX while twice as large, then BICUBIC."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crops(image: Image.Image, size: int, kind: str) -> list[Image.Image]:
    """The views of pretokenization, each size x size pixels.

    center_flip: the centre crop and its mirror image. five_crop: four corners and the centre of a
    centre crop to ⌊1.1·size⌋. ten_crop: these and their mirror images, in torchvision's order.
    """
    if kind == "center_flip":
        view = center_crop(image, size)
        return [view, TF.hflip(view)]
    larger = center_crop(image, int(size * 1.1))
    cut = TF.five_crop if kind == "five_crop" else TF.ten_crop
    return list(cut(larger, size))


def random_crop(
    image: Image.Image, size: int, resize: int, flip: bool, rng: np.random.Generator
) -> Image.Image:
    """Training's augmentation: shorter side to `resize` (bilinear), random crop, random mirror."""
    image = TF.resize(image, resize, TF.InterpolationMode.BILINEAR)
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    image = image.crop((left, top, left + size, top + size))
    if flip and rng.random() < 0.5:
        image = TF.hflip(image)
    return image


def to_uint8(image: Image.Image) -> Tensor:
    """(3, H, W), uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class TrainImages(Dataset):
    """Augmented images by (epoch, index): (3, size, size), uint8, a pure function of its key."""

    def __init__(self, paths: list[str], size: int, resize: int, flip: bool, seed: int):
        self.paths, self.size, self.resize, self.flip, self.seed = paths, size, resize, flip, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        epoch, index = key
        rng = generator_for(self.seed, Stream.CROP, epoch, index)
        image = load_image(self.paths[index])
        return to_uint8(random_crop(image, self.size, self.resize, self.flip, rng))


class TrainViews(Dataset):
    """(one of the ten crops (3, size, size), uint8, label) by (epoch, index), without a cache.

    View and dropped label are drawn as `data.tokens.TrainTokens` draws them, so that a run on
    images sees what a run on their ten-crop cache sees.
    """

    def __init__(
        self,
        samples: list[tuple[str, int]],
        size: int,
        seed: int,
        class_dropout: float,
        no_class: int,
    ):
        self.samples, self.size, self.no_class = samples, size, no_class
        self.draws = EpochDraws(len(samples), VIEWS["ten_crop"], seed, class_dropout)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        view, dropped = self.draws.of(*key)
        path, label = self.samples[key[1]]
        image = crops(load_image(path), self.size, "ten_crop")[view]
        return to_uint8(image), self.no_class if dropped else label


class CroppedImages(Dataset):
    """The fixed views of image i: (views, 3, size, size), uint8."""

    def __init__(self, paths: list[str], size: int, kind: str):
        self.paths, self.size, self.kind = paths, size, kind

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        views = crops(load_image(self.paths[index]), self.size, self.kind)
        return torch.stack([to_uint8(view) for view in views])


class CenterImages(Dataset):
    """The centre crop of image i, for evaluation: (3, size, size), uint8."""

    def __init__(self, paths: list[str], size: int):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return to_uint8(center_crop(load_image(self.paths[index]), self.size))
