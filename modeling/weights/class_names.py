"""The names of a generator's classes, and the labels of names that a user writes."""

import difflib
import hashlib
import operator
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Optional

from ..errors import InputError
from ..fields import short
from ..sampling import NO_CLASS
from .metadata import About

NONE = "none"  # the name of images without a class
IMAGENET_CLASSES = 1000
# SHA-256 of the WordNet ids of ILSVRC 2012 in their order, joined by newlines.
IMAGENET_IDS = "385e0240499426c022b773be1ae4da780f057b89c9694c7f47199f62746b6edd"
# Names that WordNet gives to two classes of ImageNet. Lists of names add a word to one of the two, which
# a user may not know.
SHARED = ((134, "crane"), (517, "crane"), (638, "maillot"), (639, "maillot"))


class ClassNames:
    """The names of a generator's `count` classes, by label.

    `folders` are the known names of its training set's class folders. Without them, 1000 classes are
    assumed to be ImageNet's. ImageNet's names are torchvision's; if the folders are its WordNet ids,
    these are names too.
    """

    def __init__(self, count: int, folders: Optional[Mapping[int, str]] = None):
        self.count, self.folders = count, dict(folders or {})
        ids = "\n".join(self.folders[label] for label in sorted(self.folders))
        known = hashlib.sha256(ids.encode(errors="surrogateescape")).hexdigest() == IMAGENET_IDS
        self.imagenet = count == IMAGENET_CLASSES and (known or not self.folders)

    @cached_property
    def shown(self) -> dict[int, str]:
        """{label: name} to show. Raises InputError if ImageNet's names need a missing package."""
        return imagenet_names() if self.imagenet else self.folders

    @cached_property
    def labels_of(self) -> dict[str, set[int]]:
        """{name: labels}; an ambiguous name has several."""
        found: dict[str, set[int]] = {}
        shared = SHARED if self.imagenet else ()
        for label, name in (*self.folders.items(), *self.shown.items(), *shared):
            found.setdefault(name, set()).add(label)
        return found

    def labels(self, classes: Iterable[int | str | None]) -> list[int]:
        """The labels of classes by number or name; `NO_CLASS` for None and `none`.

        Raises InputError for a number out of range, an unknown name (with the nearest one), an ambiguous
        name, and any other object.
        """
        return [self.label(item) for item in classes]

    def label(self, item: int | str | None) -> int:
        if item is None:
            return NO_CLASS
        if isinstance(item, str):
            return NO_CLASS if folded(item) == NONE else self.label_of_name(item)
        try:
            number = operator.index(item)
        except TypeError as e:
            raise InputError(f"class {short(item)} is neither a number nor a name") from e
        if number not in range(self.count):
            raise InputError(
                f"class {number} is unknown: this model has classes 0…{self.count - 1}"
            )
        return number

    def label_of_name(self, name: str) -> int:
        if not (self.folders or self.imagenet):
            raise InputError(
                f"class {short(name)}: the class names of this generator are unknown; pass numbers, "
                f"0…{self.count - 1}"
            )
        alike = [found for each, found in self.labels_of.items() if folded(each) == folded(name)]
        labels = sorted(self.labels_of.get(name) or set[int]().union(*alike))
        if len(labels) == 1:
            return labels[0]
        if labels:
            meant = " or ".join(f"{label} ({short(self.shown[label])})" for label in labels)
            raise InputError(f"class {short(name)} is ambiguous: pass the number, {meant}")
        known = {folded(each): each for each in reversed(self.labels_of)}  # the first of equals
        near = known[difflib.get_close_matches(folded(name), known, 1, 0.0)[0]]
        raise InputError(
            f"no class is called {short(name)}: the nearest name is {short(near)} (class "
            f"{min(self.labels_of[near])})"
        )

    def caption(self, label: int) -> str:
        """The caption of an image with this label: its name or, if unknown, its number."""
        if label == NO_CLASS:
            return "no class"
        try:
            return self.shown.get(label, str(label))
        except InputError:  # the picture matters more than its caption
            return str(label)


def class_names(about: About) -> ClassNames:
    """The class names that a generator's metadata give."""
    return ClassNames(about.config["condition_num_classes"], dict(enumerate(about.classes or ())))


def folded(name: str) -> str:
    """A name without its case and its composition of accents."""
    return unicodedata.normalize("NFC", name).casefold()


def sorted_as_text(folders: Mapping[int, str]) -> Optional[str]:
    """A warning if all names {label: name} are numbers, but not all equal their labels, as when folders
    are sorted as text: 0, 1, 10, 11, …, 2. None otherwise."""
    numbers = all(name.isdecimal() for name in folders.values())
    for label, name in folders.items():
        if numbers and int(name) != label:
            return (
                f"the class names are not labels: class {label} is the one called {name}. A number "
                f"means a label; in quotes, as '{name}', it is a name"
            )
    return None


def imagenet_names() -> dict[int, str]:
    """The names of ImageNet's 1000 classes by label, from torchvision."""
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError as e:
        raise InputError(
            "ImageNet's class names need torchvision: install it (pip install torchvision), or pass "
            "class numbers"
        ) from e
    return dict(enumerate(ResNet18_Weights.IMAGENET1K_V1.meta["categories"]))
