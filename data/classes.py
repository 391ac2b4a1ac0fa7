"""Class names. Sets of images or codes are compared by class names, because labels may differ."""

import re
import unicodedata
from collections.abc import Sequence

import numpy as np

from runtime.errors import InputError

NAMES_SHOWN = 3


def printable(name: object) -> str:
    """A name for one line of output: bytes that are not UTF-8 and line breaks are escaped."""
    text = str(name).replace("\n", "\\n").replace("\r", "\\r")
    return text.encode("utf-8", "backslashreplace").decode()


def first_names(names: Sequence[str]) -> str:
    """The first names, separated by commas, with an ellipsis if there are more."""
    return ", ".join([*map(printable, names[:NAMES_SHOWN]), *["…"] * (len(names) > NAMES_SHOWN)])


def describe_classes(classes: Sequence[str], configured: int | None = None) -> str:
    """For a program's header: `10 classes of 1000 configured (n01440764, n01443537, …)`."""
    count = f"{len(classes)} class{'es' * (len(classes) != 1)}"
    of = "" if configured is None else f" of {configured} configured"
    return f"{count}{of} ({first_names(classes)})"


def map_labels(
    labels: np.ndarray, classes: Sequence[str], wanted: Sequence[str], source: object
) -> np.ndarray:
    """Labels (N,), indices into `classes`, as int32 indices of the same names in `wanted`.

    Raises InputError, naming `source`, if `wanted` lacks the class of a label. Classes without images
    may be absent.
    """
    # Some systems compose accents in names, others do not.
    places = {unicodedata.normalize("NFC", name): place for place, name in enumerate(wanted)}
    table = np.array([places.get(unicodedata.normalize("NFC", n), -1) for n in classes], np.int32)
    mapped = table[labels]
    if (mapped < 0).any():
        unknown = [str(classes[i]) for i in np.unique(labels[mapped < 0]).tolist()]
        raise InputError(
            f"{source} has classes that the training set lacks: {first_names(unknown)}; the training "
            f"set has {describe_classes(wanted)}. Use sets with the same class names"
        )
    return mapped


def misnumbered(classes: Sequence[str]) -> str | None:
    """A warning if labels differ from the numbers that class names suggest; None if they agree.

    If most classes are synsets, but not ImageNet's 1,000 in order, published weights expect other labels, which
    nothing else would detect.
    """
    from modeling.weights.class_names import sorted_as_text  # loads models: only when needed

    doubt = sorted_as_text(dict(enumerate(classes)))
    synsets = sum(re.fullmatch(r"n\d{8}", name) is not None for name in classes)
    if doubt or 2 * synsets <= len(classes):
        return doubt
    from timm.data.imagenet_info import ImageNetInfo  # loads all of timm, so only when needed

    expected = list(ImageNetInfo().label_names())  # the 1,000 synsets of ILSVRC 2012, sorted
    if list(classes) == expected:
        return None
    unequal = [i for i, (name, wanted) in enumerate(zip(classes, expected)) if name != wanted]
    if unequal:
        i = unequal[0]
        first = f"class {i} is {printable(classes[i])}, ImageNet's is {expected[i]}"
    else:
        first = f"the first {min(len(classes), len(expected))} are the same"
    return (
        f"the {len(classes)} classes are synsets, but not ImageNet's {len(expected)} in their order "
        f"({first}): ImageNet's class numbers, and weights trained on all of it, do not fit them"
    )
