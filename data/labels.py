"""Files that name the class of each image in a flat folder or tar.

Either one class per line, in the order of the images' names, as ILSVRC's list of the synsets of its
validation images; or lines of file and class, with or without the suffixes of the files and with or without
a header. Commas, semicolons, tabs or spaces separate the two, as in caffe's val.txt. Kaggle's
LOC_val_solution.csv is such a file: its second column is a synset, then boxes.
"""

import csv
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from data.classes import first_names, printable
from data.tree import is_image
from runtime.errors import InputError

HEADERS = ("file", "filename", "file_name", "path", "image", "imageid", "image_id", "name")
KAGGLE = ["ImageId", "PredictionString"]


def read_labels(file: str | Path, names: Sequence[str], source: object) -> dict[str, str]:
    """The class of every image. `names` are the images of `source`, sorted.

    Raises InputError, which names the line, for an image without a label, a label without an image,
    and a class that cannot be the name of a folder.
    """
    file = Path(file)
    try:
        lines = file.read_text("utf-8-sig", "surrogateescape").splitlines()
    except OSError as e:
        raise InputError(f"cannot read the labels in {file}: {e.strerror}") from e
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise InputError(f"{file} is empty: write one class per line, or a CSV of file,class")
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
            f"image, in the order of the images' names, or a CSV of file,class"
        )
    for number, line in enumerate(lines, 1):
        if line.strip().isdecimal():
            raise InputError(
                f"{file}, line {number}: {line.strip()} is a number, not the name of a class, and "
                f"ILSVRC numbers its classes in another order than their names: list their synsets, "
                f"or write a CSV of file,class"
            )
    return {
        name: checked(line.strip(), file, number)
        for number, (name, line) in enumerate(zip(names, lines), 1)
    }


def labels_by_name(
    file: Path, lines: list[str], separator: str | None, known: dict[str, str], source: object
) -> dict[str, str]:
    """`known`: names of the images by what the file may call them.

    `separator` None: spaces; then a file's name may hold some, and its class none.
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
                f"{file}, line {number}: {len(row)} columns, two are expected: file,class"
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
    """A class whose name can be that of a folder: a cache of the published layout makes one of it."""
    if label in ("", ".", "..") or "/" in label or "\0" in label:
        what = f"{printable(label)!r} is no name" if label else "there is no name"
        raise InputError(f"{file}, line {number}: {what} of a class")
    return label
