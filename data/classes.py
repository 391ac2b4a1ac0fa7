"""Class names. Sets of images or codes are compared by class names, because labels may differ."""

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
