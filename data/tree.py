"""The files of a folder or tar, as all programs list them."""

import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from data.classes import printable
from data.tars import TarPath, is_tar, open_tar
from data.walk import HIDDEN, is_hidden, walk
from runtime.errors import InputError

ImagePath = str | Path | TarPath  # of an image file, or of an image in a tar
# As in torchvision, whose import takes a third of a second.
IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


class FileTree(NamedTuple):
    """The files of a folder or tar, images and others, without hidden ones."""

    root: Path
    folders: dict[str, list[str]]  # file names by the path of their folder, "" for the root
    path_of: Callable[[str], ImagePath]  # of a file, by its path from the root
    left_out: Counter[str]  # numbers of skipped entries, by kind

    def images(self) -> list[str]:
        """Paths from the root of all images, sorted as text. Raises InputError if there are none."""
        folders = self.folders.items()
        found = sorted(
            os.path.join(f, name) for f, names in folders for name in names if is_image(name)
        )
        if not found:
            raise InputError(
                f"{self.root} holds no images{describe_left_out(self.count_others())}: put images there "
                f"({', '.join(IMG_EXTENSIONS)}), or pass another folder or tar"
            )
        return found

    def count_others(self) -> Counter[str]:
        """Numbers of unlisted files: those that are not images, by suffix, and `left_out`."""
        names = [name for names in self.folders.values() for name in names if not is_image(name)]
        kinds = (os.path.splitext(name)[1].lower() or "without a suffix" for name in names)
        return self.left_out + Counter(kinds)


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """`; left out: 2 .gif, …`; empty if nothing is left out."""
    kinds = [f"{count} {printable(kind)}" for kind, count in sorted(left_out.items())]
    return f"; left out: {', '.join(kinds)}" * bool(kinds)


def read_tree(root: str | Path, index_folder: Path | None = None) -> FileTree:
    """The files below `root`, a folder or a tar, whose index is kept in `index_folder`.

    Raises InputError if `index_folder`, where the program writes, lies in `root`, or if `root` is neither
    folder nor tar or cannot be read. All processes of a job read a tar together.
    """
    root = Path(root)
    if is_tar(root):
        return read_tar(root, index_folder)
    if not root.is_dir():
        raise InputError(
            f"no image folder {root}: pass a folder of images, or of one folder per class"
        )
    if index_folder is not None:
        refuse_inside(index_folder, root)
    try:
        folders, left_out = walk(str(root))
    except OSError as e:
        raise InputError(f"cannot read {e.filename}: {e.strerror}; make the folder readable") from e
    return FileTree(root, folders, lambda name: os.path.join(root, name), left_out)


def refuse_inside(output: Path, folder: str | Path) -> None:
    """Raise InputError if the output lies in an input folder, where the next start would read it."""
    if output.resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(
            f"the output {output.resolve()} would lie inside the input {folder}: choose a place outside it"
        )


def read_tar(root: Path, index_folder: Path | None) -> FileTree:
    tar = open_tar(root, index_folder)
    # The last of equal names counts, as unpacking would leave it.
    numbers = {name: number for number, name in enumerate(tar.names)}
    folders: dict[str, list[str]] = {}
    hidden = set()
    for name in numbers:  # a folder's ends with "/"
        parts = name.split("/")
        first = next((i for i, part in enumerate(parts) if is_hidden(part)), None)
        if first is not None:
            hidden.add("/".join(parts[: first + 1]))
            continue
        files = folders.setdefault("/".join(parts[:-1]), [])
        if parts[-1]:
            files.append(parts[-1])
    left_out = +Counter({HIDDEN: len(hidden)})
    return FileTree(root, folders, lambda name: TarPath(tar, numbers[name]), left_out)
