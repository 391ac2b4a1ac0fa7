"""Images in folders and tars: listing, loading, the crops of pretokenization, training's augmentation.

Images stay uint8 until they are on the device. Shape suffixes: B images, V views per image, S side of a
view, L side of the source crop that views are cut from (pixels).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.classes import describe_classes, first_names
from data.identity import CHUNK, THREADS, hash_of_names, hash_of_sizes
from data.labels import read_labels
from data.order import EpochDraws
from data.tars import is_tar
from data.tree import IMG_EXTENSIONS, FileTree, ImagePath, describe_left_out, read_tree
from modeling.photos import center_crop, load_image, load_upright, photo_crop, to_uint8  # noqa: F401
from modeling.pixels import to_float  # noqa: F401 - for callers of this module, like some of the above
from runtime.errors import InputError
from runtime.processes import on_main
from runtime.randomness import Stream, generator_for

VIEWS = {"center_flip": 2, "five_crop": 5, "ten_crop": 10}  # views per image, by kind
ONE_CLASS = "images"  # the name of the class of images that lie in no folders


# ---------------------------------------------------------------------- listing
@dataclass(frozen=True)
class ImageListing:
    """The images of a folder or tar, from `scan_images`."""

    root: Path
    paths: list[ImagePath]  # by class, then by path
    labels: np.ndarray  # (N,), int64
    names: list[str]  # CLASS/FILE of every image, its name in a cache
    classes: list[str]  # sorted; a label is an index into them
    left_out: dict[str, int]  # numbers of other files, by suffix, and of hidden ones
    flat: bool = False  # whether the images lie in no folders, which makes them one class

    def describe(self) -> str:
        """For a program's header: numbers of images and classes, first names, files left out."""
        one_class = f"no class folders: one class ({ONE_CLASS})"
        classes = one_class if self.flat else describe_classes(self.classes)
        return f"{len(self.paths)} images, {classes}{describe_left_out(self.left_out)}"


def scan_images(
    root: str | Path, labels: str | Path | None = None, index_folder: Path | None = None
) -> ImageListing:
    """List the images under root/CLASS/, at any depth, and count the other files.

    `root` is a folder or a tar (`data.tars`), whose index is kept in `index_folder`. Classes and paths
    are in the order of torchvision's ImageFolder. Images that all lie at the top of `root` are one class,
    `ONE_CLASS`. `labels` is a file with the class of every image (`data.labels`), which replaces the
    class folders.

    Raises InputError if there are no images, or if the folders are not those of classes
    (`check_class_folders`). All processes of a job list a tar together.
    """
    tree = read_tree(root, index_folder)
    images = tree.images()
    at_top = [image for image in images if not os.path.dirname(image)]
    flat = labels is None and at_top == images
    in_folders = labels is None and not flat
    if labels is not None:
        class_of = read_labels(labels, images, tree.root)
    elif flat:
        class_of = dict.fromkeys(images, ONE_CLASS)
    else:
        check_class_folders(tree, images, at_top)
        class_of = {image: image.split(os.sep)[0] for image in images}
    images.sort(key=lambda image: (class_of[image], *os.path.split(image)))
    classes = sorted(set(class_of.values()))
    ranks = {name: label for label, name in enumerate(classes)}
    labels_of = np.array([ranks[class_of[image]] for image in images])
    names = images if in_folders else [os.path.join(class_of[image], image) for image in images]
    paths, left_out = [*map(tree.path_of, images)], tree.count_others()
    return ImageListing(tree.root, paths, labels_of, names, classes, left_out, flat)


def check_class_folders(tree: FileTree, images: list[str], at_top: list[str]) -> None:
    """Raise InputError if a top-level folder holds no images, or only folders of images (the classes are
    then a level below), or if images lie beside the folders (`at_top`), where they have no class."""
    folders = {folder.split(os.sep)[0] for folder in tree.folders} - {""}
    with_images = {os.path.dirname(image) for image in images} - {""}
    classes = {folder.split(os.sep)[0] for folder in with_images}
    nested, empty = sorted(classes - with_images), sorted(folders - classes)
    if nested:
        inner = min(folder for folder in with_images if folder.startswith(nested[0] + os.sep))
        raise InputError(
            f"{tree.root} is not a folder of classes: {first_names(nested)} hold"
            f"{'s' * (len(nested) == 1)} folders of images (such as {inner}) instead of images; pass "
            f"(or, for a tar, pack only) the folder above those, such as "
            f"{tree.root / os.path.dirname(inner)}"
        )
    if at_top:
        raise InputError(
            f"{tree.root} holds images ({first_names(at_top)}) beside folders of images "
            f"({first_names(sorted(classes))}): move those into the folders of their classes or, without "
            f"classes, all images into one folder"
        )
    if empty:
        raise InputError(
            f"{tree.root} holds no images in {first_names(empty)}: put images into the folder of every "
            f"class ({', '.join(IMG_EXTENSIONS)}), or remove it"
        )


def is_path_list(source: str | Path) -> bool:
    """Whether `list_paths` reads `source` as a text file of paths."""
    return Path(source).is_file() and not is_tar(source)


def list_paths(
    source: str | Path, root: str | Path | None = None, index_folder: Path | None = None
) -> list[ImagePath]:
    """Paths of the images in a folder or tar (`scan_images`), or listed in a text file.

    A text file holds one path per line: absolute, relative to the text file's folder or, if there is no
    such image, relative to `root`. Empty lines are skipped. Raises InputError, naming the line, if
    an image does not exist.
    """
    source = Path(source)
    if not is_path_list(source):
        return scan_images(source, index_folder=index_folder).paths
    try:
        lines = source.read_text("utf-8-sig").split("\n")  # names may hold other line separators
    except UnicodeDecodeError as e:
        raise InputError(
            f"{source} is neither an image folder, a tar nor a text file of paths"
        ) from e
    folders = [source.parent, *([] if root is None else [Path(root)])]

    def find(numbered: tuple[int, str]) -> str:
        number, line = numbered
        candidates = [folder / line for folder in folders]  # absolute paths stay so
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            places = " or ".join(dict.fromkeys(map(str, candidates)))
            raise InputError(f"{source}, line {number}: there is no file {places}")
        return str(path)

    given = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    with ThreadPool(THREADS) as pool:
        paths: list[ImagePath] = [*pool.imap(find, given, CHUNK)]
    if not paths:
        raise InputError(f"{source} lists no images: write one path per line")
    return paths


def identity_for_all(paths: Sequence[ImagePath]) -> dict[str, str]:
    """What identifies a set of images: this process's names, which `training.run.Run` compares with those of
    the main process, and the sizes that the main process reads. All processes call this together."""
    sizes = on_main(lambda: hash_of_sizes(paths))
    return {"image names": hash_of_names(paths), "image sizes": sizes}


# ---------------------------------------------------------------------- crops
def source_size(size: int, kind: str) -> int:
    """L, the side of the centre crop that contains all views of a kind (281 for 256)."""
    return size if kind == "center_flip" else int(size * 1.1)


def views_of(source: Tensor, size: int, kind: str) -> tuple[Tensor, ...]:
    """The views (…, S, S) of source crops (…, L, L), in the order of a token cache.

    center_flip: the centre crop and its mirror image. five_crop: four corners and centre of a centre
    crop to ⌊1.1·size⌋. ten_crop: these, then the same of the mirrored crop.
    """
    from torchvision.transforms.functional import five_crop, ten_crop  # a third of a second

    if kind == "center_flip":
        return source, source.flip(-1)
    return (five_crop if kind == "five_crop" else ten_crop)(source, size)  # type: ignore[arg-type]


def random_crop(
    image: Image.Image, size: int, resize: int, flip: bool, rng: np.random.Generator
) -> Image.Image:
    """Augmentation: resize the shorter side to `resize` (bilinear), crop and mirror at random."""
    shorter = min(image.size)
    if shorter != resize:
        # Truncated, as in torchvision.
        resized = [int(resize * side / shorter) for side in image.size]
        image = image.resize((resized[0], resized[1]), Image.Resampling.BILINEAR)
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    image = image.crop((left, top, left + size, top + size))
    if flip and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


# ---------------------------------------------------------------------- datasets
class TrainImages(Dataset):
    """Augmented images (3, S, S), uint8, a pure function of the key (epoch, index)."""

    def __init__(self, paths: Sequence[ImagePath], size: int, resize: int, flip: bool, seed: int):
        self.paths, self.size, self.resize, self.flip, self.seed = paths, size, resize, flip, seed

    def __getitem__(self, key: tuple[int, int]) -> Tensor:
        epoch, index = key
        rng = generator_for(self.seed, Stream.CROP, epoch, index)
        image = load_image(self.paths[index])
        return to_uint8(random_crop(image, self.size, self.resize, self.flip, rng))


class TrainViews(Dataset):
    """(one of the ten crops (3, S, S), uint8, label) by (epoch, index), without a cache.

    View and dropped label are those of `data.tokens.TrainTokens`, so training on images equals training
    on their ten-crop cache.
    """

    def __init__(self, paths: Sequence[ImagePath], size: int, draws: EpochDraws):
        self.paths, self.size, self.draws = paths, size, draws
        self.sources = CenterImages(paths, source_size(size, "ten_crop"))

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        view, label = self.draws.of(*key)
        return views_of(self.sources[key[1]], self.size, "ten_crop")[view], label


class CenterImages(Dataset):
    """The centre crop (3, S, S), uint8, of image i, for evaluation."""

    def __init__(self, paths: Sequence[ImagePath], size: int):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return to_uint8(center_crop(load_image(self.paths[index]), self.size))
