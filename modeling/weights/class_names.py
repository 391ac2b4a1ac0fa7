"""The names of a generator's classes, and the labels behind what a user calls them."""

import difflib
import operator
import re
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Optional

from ..errors import InputError
from ..fields import short
from ..sampling import NO_CLASS, check_classes
from .metadata import About

NONE = "none"  # what images without a class are asked for by
IMAGENET_CLASSES = 1000
WORDNET_ID = re.compile(r"n\d{8}")  # how ImageNet's folders are called
# Names that WordNet gives to two classes of ImageNet each. Lists of names tell them apart by an
# addition to one of them, which nobody who asks for the bare name need know.
SHARED = {"crane": (134, 517), "maillot": (638, 639)}


class ClassNames:
    """The names of a generator's `count` classes, by label.

    `folders` are the names of its training set's class folders, as far as they are known. Without
    them, a generator of 1000 classes is taken for one of ImageNet. Its names are torchvision's, also
    where the folders are ImageNet's 1000 WordNet ids, which then are names as well.
    """

    def __init__(self, count: int, folders: Optional[Mapping[int, str]] = None):
        self.count, self.folders = count, dict(folders or {})
        whole = len(self.folders) == IMAGENET_CLASSES
        ids = whole and all(WORDNET_ID.fullmatch(name) for name in self.folders.values())
        self.imagenet = count == IMAGENET_CLASSES and (ids or not self.folders)

    @cached_property
    def shown(self) -> dict[int, str]:
        """{label: name} for people. Raises InputError where ImageNet's names cannot be had."""
        return imagenet_names() if self.imagenet else self.folders

    @cached_property
    def labels_of(self) -> dict[str, list[int]]:
        """{name: its labels}, of which an ambiguous name has several."""
        found: dict[str, list[int]] = {}
        shared = [(label, name) for name, labels in SHARED.items() for label in labels]
        names = [*self.folders.items(), *self.shown.items(), *(shared if self.imagenet else [])]
        for label, name in names:
            labels = found.setdefault(name, [])
            if label not in labels:
                labels.append(label)
        return found

    def labels(self, classes: Iterable[int | str | None]) -> list[int]:
        """The labels of classes by number or name; `NO_CLASS` for None and `none`.

        Raises InputError for a number out of range, for a name that is unknown (with the nearest
        one) or that several classes have, and for anything else.
        """
        return [self.label(item) for item in classes]

    def label(self, item: int | str | None) -> int:
        if item is None:
            return NO_CLASS
        if isinstance(item, str):
            return NO_CLASS if same(item, NONE) else self.label_of_name(item)
        try:
            number = operator.index(item)
        except TypeError as e:
            raise InputError(f"class {short(item)} is neither a number nor a name") from e
        check_classes(number, number, self.count)
        return number

    def label_of_name(self, name: str) -> int:
        if not (self.folders or self.imagenet):
            raise InputError(
                f"class {short(name)}: nothing says what the classes of this generator are called; "
                f"pass numbers, 0…{self.count - 1}"
            )
        exact = self.labels_of.get(name)
        labels = exact or sorted(
            {n for known, found in self.labels_of.items() if same(known, name) for n in found}
        )
        if len(labels) == 1:
            return labels[0]
        if labels:
            meant = " or ".join(f"{label} ({short(self.shown[label])})" for label in labels)
            raise InputError(f"class {short(name)} is ambiguous: pass the number, {meant}")
        near = self.nearest(name)
        raise InputError(
            f"no class is called {short(name)}: the nearest name is {short(near)} (class "
            f"{self.labels_of[near][0]})"
        )

    def nearest(self, name: str) -> str:
        known: dict[str, str] = {}
        for each in self.labels_of:
            known.setdefault(folded(each), each)
        (near,) = difflib.get_close_matches(folded(name), known, 1, 0.0)
        return known[near]

    def caption(self, label: int) -> str:
        """What stands under an image of this label: its name, or its number where that is unknown."""
        if label == NO_CLASS:
            return "no class"
        try:
            return self.shown.get(label, str(label))
        except InputError:  # a picture is worth more than its caption
            return str(label)


def class_names(about: About) -> ClassNames:
    """The names of the classes of a generator whose file says this."""
    return ClassNames(about.config["condition_num_classes"], dict(enumerate(about.classes or ())))


def same(name: str, other: str) -> bool:
    """Whether two names differ in case or in how accents are composed only."""
    return folded(name) == folded(other)


def folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def sorted_as_text(folders: Mapping[int, str]) -> Optional[str]:
    """What is wrong, if all names {label: name} are numbers, but not those of their labels.

    Folders are sorted as text: 0, 1, 10, 11, …, 2. Then a class's number is not its name.
    """
    if not folders or not all(name.isdecimal() for name in folders.values()):
        return None
    first = next((label for label, name in folders.items() if int(name) != label), None)
    if first is None:
        return None
    return (
        f"the classes' names are numbers, which are sorted as text: class {first} is the one called "
        f"{folders[first]}; a number asks for a class by its place, or pad the names with zeros"
    )


def imagenet_names() -> dict[int, str]:
    """The names of ImageNet's 1000 classes by label, as torchvision lists them."""
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError as e:
        raise InputError(
            "ImageNet's class names need torchvision: install it (pip install torchvision), or pass "
            "class numbers"
        ) from e
    return dict(enumerate(ResNet18_Weights.IMAGENET1K_V1.meta["categories"]))
