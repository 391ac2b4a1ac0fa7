"""Folders of images: listing, loading, the crops of pretokenization and training's augmentation.

Images stay uint8 until they are on the device. Shape suffixes: B images, V views of each, S the side of
a view, L that of the source crop that views are cut from (pixels).
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.classes import describe_classes, first_names, printable
from data.order import EpochDraws
from modeling.pixels import to_float as to_float
from runtime.errors import InputError
from runtime.randomness import Stream, generator_for

# Of the many that Pillow reads; one of them (EPS) would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM")
VIEWS = {"center_flip": 2, "five_crop": 5, "ten_crop": 10}  # views per image, by kind


# ---------------------------------------------------------------------- listing
@dataclass(frozen=True)
class ImageListing:
    """The images of a folder with one folder per class; `scan_images` makes it."""

    root: Path
    samples: list[tuple[str, int]]  # (path, label), by class, then by path
    classes: list[str]  # sorted; a label is an index into them
    left_out: dict[str, int]  # other files, by suffix: how many

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.samples]

    def describe(self, configured: int | None = None) -> str:
        """A program's header: numbers of images and classes, first names, and what is left out."""
        classes = describe_classes(self.classes, configured)
        return f"{len(self.samples)} images, {classes}{self.describe_left_out()}"

    def describe_left_out(self) -> str:
        """`; left out: 2 .gif, …`; empty where nothing is."""
        kinds = [f"{count} {printable(kind)}" for kind, count in sorted(self.left_out.items())]
        return f"; left out: {', '.join(kinds)}" * bool(kinds)


def scan_images(root: str | Path) -> ImageListing:
    """List the images under root/CLASS/, in any depth, and what is left out.

    Classes and paths are in the order of torchvision's ImageFolder. Raises InputError for a folder
    without classes, a class without images, and a "class" that holds folders of images instead of
    images: then `root` is a folder above the one that was meant.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"no image folder {root}: pass a folder that holds one folder per class")
    try:
        return scan_folders(root)
    except OSError as e:
        raise InputError(f"cannot read {e.filename}: {e.strerror}; make the folder readable") from e


def scan_folders(root: Path) -> ImageListing:
    entries = list(os.scandir(root))
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise InputError(
            f"{root} is not an image folder: it holds no folders; put the images into one folder "
            f"per class"
        )
    samples, left_out = [], Counter()
    empty, nested = [], {}  # names of classes; the latter with a folder of images below
    for label, name in enumerate(classes):
        folder, folders = os.path.join(root, name), []  # the latter: those with images
        for parent, _, files in sorted(os.walk(folder, onerror=fail, followlinks=True)):
            images = [file for file in sorted(files) if is_image(file)]
            samples += [(os.path.join(parent, file), label) for file in images]
            folders += [parent] * bool(images)
            left_out.update(kind_of_file(f) for f in files if not (is_image(f) or f[0] == "."))
        if not folders:
            empty.append(name)
        elif folder not in folders:
            nested[name] = folders[0]
    if nested:
        inner, verb = Path(next(iter(nested.values()))), "s" * (len(nested) == 1)
        raise InputError(
            f"{root} is not a folder of classes: {first_names(list(nested))} hold{verb} folders of images "
            f"(such as {inner.relative_to(root)}) instead of images; pass the folder above those, "
            f"such as {inner.parent}"
        )
    if empty:
        raise InputError(
            f"{root} is not an image folder: no images in {first_names(empty)}; put images into the "
            f"folder of every class ({', '.join(IMG_EXTENSIONS)}), or remove it"
        )
    beside = sum(is_image(entry.name) for entry in entries if not entry.is_dir())
    if beside:
        left_out["outside the class folders"] = beside
    return ImageListing(root, samples, classes, dict(left_out))


def is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def kind_of_file(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "without a suffix"


def fail(error: OSError) -> None:
    raise error


def list_images(root: str | Path) -> tuple[list[tuple[str, int]], list[str]]:
    """`scan_images` as (path, label) of every image and the sorted class names."""
    listing = scan_images(root)
    return listing.samples, listing.classes


def list_paths(source: str | Path, root: str | Path | None = None) -> list[str]:
    """Paths of a folder's images (`scan_images`), or those that a text file lists.

    Such a file holds one path per line: absolute, relative to the file's folder or, where it is not
    there, relative to `root`. Empty lines do not count. Raises InputError that names the first line
    without a file.
    """
    source = Path(source)
    if not source.is_file():
        return scan_images(source).paths
    try:
        lines = source.read_text().splitlines()
    except UnicodeDecodeError as e:
        raise InputError(f"{source} is neither an image folder nor a text file of paths") from e
    folders = [source.parent, *([] if root is None else [Path(root)])]
    paths = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            candidates = [folder / line.strip() for folder in folders]  # absolute ones stay so
            path = next((path for path in candidates if path.is_file()), None)
            if path is None:
                places = " or ".join(dict.fromkeys(map(str, candidates)))
                raise InputError(f"{source}, line {number}: there is no file {places}")
            paths.append(str(path))
    if not paths:
        raise InputError(f"{source} lists no images: write one path per line")
    return paths


# ---------------------------------------------------------------------- loading
def load_image(path: str | Path) -> Image.Image:
    """Any image as 8-bit RGB (`to_rgb`); EXIF rotation is ignored. Raises InputError."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise InputError(f"unreadable image {path}: {e}; repair or remove it") from e


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey is scaled, and transparent pixels are composited on white.

    Everything else is Pillow's conversion, as in torchvision's loader. Raises ValueError for pixels
    whose range is unknown: floats, and integers of 32 bits.
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


# ---------------------------------------------------------------------- crops
def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop to size x size pixels: halve with BOX while twice as large, then BICUBIC."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def photo_crop(path: str | Path, size: int) -> Tensor:
    """The centre crop (3, size, size), uint8, of an image. Raises InputError for a smaller one."""
    image = load_image(path)
    if min(image.size) < size:
        raise InputError(
            f"{path} has {image.width}x{image.height} pixels, fewer than the {size}x{size} of this "
            f"tokenizer: use a larger image"
        )
    return to_uint8(center_crop(image, size))


def source_size(size: int, kind: str) -> int:
    """L, the side of the centre crop that the views of a kind are cut from (281 for 256)."""
    return size if kind == "center_flip" else int(size * 1.1)


def source_crop(path: str | Path, size: int, kind: str) -> Tensor:
    """The one crop of an image that holds all its views: (3, L, L), uint8."""
    return to_uint8(center_crop(load_image(path), source_size(size, kind)))


class ViewBox(NamedTuple):
    """A view: size x size pixels at (left, top) of the source crop, mirrored first if `mirrored`."""

    left: int
    top: int
    mirrored: bool


def view_boxes(size: int, kind: str) -> list[ViewBox]:
    """The views of pretokenization, in the order of a token cache.

    center_flip: the centre crop and its mirror image. five_crop: the four corners and the centre of
    a centre crop to ⌊1.1·size⌋. ten_crop: these, then the same boxes of the mirrored crop, in
    torchvision's order.
    """
    far = source_size(size, kind) - size
    middle = round(far / 2)  # halves to even, as torchvision rounds
    if kind == "center_flip":
        corners = [(0, 0)]
    else:
        corners = [(0, 0), (far, 0), (0, far), (far, far), (middle, middle)]
    mirrors = (False,) if kind == "five_crop" else (False, True)
    return [ViewBox(left, top, mirrored) for mirrored in mirrors for left, top in corners]


def cut_view(source: Tensor, size: int, box: ViewBox) -> Tensor:
    """One view (…, size, size) of source crops (…, L, L), on any device."""
    left = source.shape[-1] - size - box.left if box.mirrored else box.left
    view = source[..., box.top : box.top + size, left : left + size]
    return view.flip(-1) if box.mirrored else view


def cut_views(source: Tensor, size: int, kind: str) -> Tensor:
    """All views (B, V, 3, S, S) of source crops (B, 3, L, L), on any device."""
    return torch.stack([cut_view(source, size, box) for box in view_boxes(size, kind)], 1)


def random_crop(
    image: Image.Image, size: int, resize: int, flip: bool, rng: np.random.Generator
) -> Image.Image:
    """Training's augmentation: shorter side to `resize` (bilinear), random crop, random mirror."""
    shorter = min(image.size)
    if shorter != resize:
        resized = [int(resize * side / shorter) for side in image.size]  # rounded as torchvision's
        image = image.resize((resized[0], resized[1]), Image.Resampling.BILINEAR)
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    image = image.crop((left, top, left + size, top + size))
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


# ---------------------------------------------------------------------- datasets
class TrainImages(Dataset):
    """Augmented images by (epoch, index): (3, size, size), uint8, a pure function of the key."""

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

    View and dropped label are drawn as `data.tokens.TrainTokens` draws them, so that training on
    images is the same as training on their ten-crop cache. Only the drawn view is cut.
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
        self.boxes = view_boxes(size, "ten_crop")
        self.draws = EpochDraws(len(samples), len(self.boxes), seed, class_dropout)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        view, dropped = self.draws.of(*key)
        path, label = self.samples[key[1]]
        source = source_crop(path, self.size, "ten_crop")
        image = cut_view(source, self.size, self.boxes[view])
        return image, self.no_class if dropped else label


class SourceCrops(Dataset):
    """What all views of image i are cut from (`cut_views`): (3, L, L), uint8."""

    def __init__(self, paths: list[str], size: int, kind: str):
        self.paths, self.size, self.kind = paths, size, kind

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return source_crop(self.paths[index], self.size, self.kind)


class CroppedImages(SourceCrops):
    """The views of image i: (V, 3, size, size), uint8."""

    def __getitem__(self, index: int) -> Tensor:
        return cut_views(super().__getitem__(index)[None], self.size, self.kind)[0]


class CenterImages(Dataset):
    """The centre crop of image i, for evaluation: (3, size, size), uint8."""

    def __init__(self, paths: list[str], size: int):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return to_uint8(center_crop(load_image(self.paths[index]), self.size))
