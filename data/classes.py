"""Class names. Two sets of images or codes are compared by the names of their classes, not by labels."""

import json
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from runtime.errors import InputError
from runtime.files import write_whole

NAMES_SHOWN = 3
TRAINED = "classes.json"  # in a generator's run folder: the classes that it was trained on


def printable(name: object) -> str:
    """A name for one line of output: bytes that are not UTF-8 and line breaks are escaped."""
    text = str(name).replace("\n", "\\n").replace("\r", "\\r")
    return text.encode("utf-8", "backslashreplace").decode()


def first_names(names: Sequence[str]) -> str:
    """The first names, separated by commas, and an ellipsis where there are more."""
    return ", ".join([*map(printable, names[:NAMES_SHOWN]), *["…"] * (len(names) > NAMES_SHOWN)])


def describe_classes(classes: Sequence[str], configured: int | None = None) -> str:
    """A program's header in words: `10 classes of 1000 configured (n01440764, n01443537, …)`."""
    count = f"{len(classes)} class{'es' * (len(classes) != 1)}"
    of = "" if configured is None else f" of {configured} configured"
    return f"{count}{of} ({first_names(classes)})"


def map_labels(
    labels: np.ndarray, classes: Sequence[str], wanted: Sequence[str], source: object
) -> np.ndarray:
    """Labels (N,), indices into `classes`, as int32 indices of the same names in `wanted`.

    Raises InputError, which names `source`, where `wanted` lacks the class of a label. A class
    without a label may be absent.
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


def write_trained(folder: Path, classes: Sequence[str], labels: Iterable[int]) -> None:
    """Note in a run's folder which of its training set's classes have images: their `labels`."""
    trained = {str(label): classes[label] for label in labels}
    write_whole(folder / TRAINED, json.dumps(trained, indent=1).encode())


def trained_classes(weights: str | Path) -> dict[int, str]:
    """{label: name} of the classes that a generator was trained on; empty where that is unknown.

    `weights` is a run folder, one of its checkpoints or a file in either.
    """
    path = Path(weights).absolute()
    for folder in (path, *path.parents[:3]):
        if (folder / TRAINED).is_file():
            try:
                content = json.loads((folder / TRAINED).read_text())
                return {int(label): str(name) for label, name in content.items()}
            except (OSError, ValueError, TypeError, AttributeError):
                return {}  # it only serves warnings and names
    return {}


def untrained_labels(weights: str | Path, labels: Iterable[int]) -> list[int]:
    """Those of the labels that a generator was not trained on; none where that is unknown."""
    trained = trained_classes(weights)
    return sorted(set(labels) - trained.keys()) if trained else []
