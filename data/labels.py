"""Files that name the class of each image in a flat folder or tar.

Either one class per line, in the order of the image names, like ILSVRC's list of validation synsets; or a
file and its class per line, with or without suffix and header, separated by commas, semicolons, tabs or
spaces, like caffe's val.txt. Kaggle's LOC_val_solution.csv, with boxes after each synset, works too.
"""

import csv
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from data.classes import first_names, printable
from data.tree import is_image
from data.walk import is_hidden
from runtime.errors import InputError

HEADERS = ("file", "filename", "file_name", "path", "image", "imageid", "image_id", "name")
KAGGLE = ["ImageId", "PredictionString"]


def read_labels(file: str | Path, names: Sequence[str], source: object) -> dict[str, str]:
    """The class of every image. `names` are the sorted images of `source`.

    Raises InputError, naming the line, for an image without a label, a label without an image, or a
    class that cannot be a folder name.
    """
    file = Path(file)
    try:
        text = file.read_text("utf-8-sig", "surrogateescape").rstrip()
    except OSError as e:
        raise InputError(f"cannot read the labels in {file}: {e.strerror}") from e
    if not text:
        raise InputError(f"{file} is empty: write one class per line, or a CSV of file,class")
    lines = text.split("\n")  # not at U+2028 in names
    known = {os.path.splitext(name)[0]: name for name in names} | {name: name for name in names}
    known = {unicodedata.normalize("NFC", shown): name for shown, name in known.items()}
    separator = next((s for s in ",;\t" if s in lines[0]), None)
    first = lines[0].split()[:-1]
    in_pairs = first and (first[0] in known or first[0].lower() in HEADERS)
    if separator is None and not (in_pairs or any(map(is_image, first))):
        return labels_in_order(file, lines, names, source)
    return labels_by_name(file, lines, separator, known, source)


def labels_in_order(
    file: Path, lines: list[str], names: Sequence[str], source: object
) -> dict[str, str]:
    if len(lines) != len(names):
        raise InputError(
            f"{file} has {len(lines)} lines, {source} holds {len(names)} images: write one class per "
            f"image, in the order of their names, or a CSV of file,class"
        )
    labels = [checked(line.strip(), file, number) for number, line in enumerate(lines, 1)]
    for number, label in enumerate(labels, 1):
        if label.isdecimal():
            raise InputError(
                f"{file}, line {number}: {label} is a number, not a class name, and ILSVRC's "
                f"numbers are not in the order of names: list synsets, or write a CSV of file,class"
            )
    return dict(zip(names, labels))


def labels_by_name(
    file: Path, lines: list[str], separator: str | None, known: dict[str, str], source: object
) -> dict[str, str]:
    """`known` maps the names that the file may use to those of the images.

    A `separator` of None stands for spaces, which a file name may then contain, but not its class.
    """
    names = list(dict.fromkeys(known.values()))
    labels: dict[str, str] = {}
    try:
        split = [line.rsplit(None, 1) for line in lines]
        rows = split if separator is None else list(csv.reader(lines, delimiter=separator))
    except csv.Error as e:
        raise InputError(f"{file} is not a CSV of file,class: {e}") from e
    kaggle = rows[0] == KAGGLE
    for number, row in enumerate(rows, 1):
        header = number == 1 and row[0].strip().lower() in HEADERS and row[0] not in known
        if header or not row:
            continue
        if len(row) != 2:
            raise InputError(
                f"{file}, line {number}: {len(row)} columns instead of two: file,class"
            )
        given, label = row[0].strip(), row[1].strip()
        name = known.get(unicodedata.normalize("NFC", given))
        if name is None:
            raise InputError(
                f"{file}, line {number}: there is no image {printable(given)} in {source}, which "
                f"holds {first_names(names)}"
            )
        label = checked(label.split(" ")[0] if kaggle else label, file, number)
        if labels.setdefault(name, label) != label:
            raise InputError(f"{file}, line {number}: {printable(given)} has a second class")
    missing = [name for name in names if name not in labels]
    if missing:
        raise InputError(
            f"{file} has no line for {len(missing)} of the {len(names)} images of {source}: "
            f"{first_names(missing)}"
        )
    return labels


def checked(label: str, file: Path, number: int) -> str:
    """The label. Raises InputError if it cannot name a folder, as the published cache layout needs."""
    if not label or is_hidden(label) or "/" in label or "\0" in label:
        raise InputError(f"{file}, line {number}: {printable(label)!r} cannot be a class name")
    return label
