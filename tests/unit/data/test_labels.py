"""Classes from a file: the flat images of ImageNet's validation set list as their class folders do."""

from pathlib import Path

import pytest
from PIL import Image

from data.images import scan_images
from tests.refusals import refusal
from tests.tars import flattened, packed, plain_tar

CLASSES = {1: "n03", 2: "n01", 3: "n03", 4: "n02", 5: "n01", 6: "n02", 7: "n01"}


def name_of(i):
    return f"ILSVRC2012_val_0000000{i}.JPEG"


@pytest.fixture
def root(tmp_path):
    for i, label in CLASSES.items():
        path = tmp_path / "val" / label / name_of(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(path)
    return tmp_path / "val"


@pytest.fixture
def flat(root, tmp_path):
    flattened(root, tmp_path / "flat")
    return tmp_path / "flat"


FILES = {
    "synsets in order": "".join(f"{label}\n" for label in CLASSES.values()),
    "synsets and empty lines": "".join(f"{label} \r\n" for label in CLASSES.values()) + "\n\n",
    "csv": "".join(f"{name_of(i)},{CLASSES[i]}\n" for i in (7, 1, 3, 2, 4, 6, 5)),
    "csv with a header": "\ufeffFilename, class\n"
    + "".join(f'"{name_of(i)}", {CLASSES[i]}\n' for i in CLASSES),
    "spaces": "".join(f"{name_of(i)} {CLASSES[i]}\n" for i in CLASSES),
    "spaces without suffixes": "".join(f"{name_of(i)[:-5]}  {CLASSES[i]}\n" for i in CLASSES),
    "tabs": "file\tclass\n" + "".join(f"{name_of(i)}\t{CLASSES[i]}\n" for i in CLASSES),
    "semicolons": "".join(f"{name_of(i)};{CLASSES[i]}\n" for i in CLASSES),
    "kaggle": "ImageId,PredictionString\n"
    + "".join(
        f"{name_of(i)[:-5]},{CLASSES[i]} 85 1 499 272 {CLASSES[i]} 3 4 5 6\n" for i in CLASSES
    ),
}


@pytest.fixture
def labels(tmp_path):
    def write(text):
        (tmp_path / "labels.txt").write_bytes(text.encode(errors="surrogateescape"))
        return tmp_path / "labels.txt"

    return write


@pytest.mark.parametrize("kind", ["folder", "tar", "tar with a top folder"])
@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_flat_images_list_as_their_class_folders(root, flat, labels, tmp_path, text, kind):
    expected, source = scan_images(root), flat
    if kind == "tar":
        source = tmp_path / "flat.tar"
        source.write_bytes(packed(flat))
    if kind == "tar with a top folder":
        source = plain_tar(flat, tmp_path / "flat.tar")
    found = scan_images(source, labels(text))
    assert found.names == expected.names and found.classes == expected.classes
    assert found.describe() == expected.describe()
    assert found.labels.tolist() == expected.labels.tolist()
    for path, file in zip(found.paths, expected.paths, strict=True):
        content = Path(path).read_bytes() if isinstance(path, str) else path.read()
        assert content == Path(file).read_bytes()


def refused(flat, labels, *words):
    refusal(lambda: scan_images(flat, labels), labels, *words)


LINES = FILES["csv"].splitlines(keepends=True)


@pytest.mark.parametrize(
    "text, words",
    [
        ("n01\n" * 6, ["6 lines", "7 images"]),
        ("n01\n" * 8, ["8 lines", "7 images"]),
        ("n01\n" * 3 + "\n" + "n01\n" * 3, ["line 4"]),
        ("n01\n" * 6 + "../n02\n", ["line 7", "../n02"]),
        ("n01\n" * 6 + "..\n", ["line 7"]),
        ("n01\n" * 6 + ".n02\n", ["line 7"]),  # which no walk through the published layout finds
        ("n01\n" * 6 + "lost+found\n", ["line 7"]),
        ("n0\u2028\n" * 6, ["6 lines", "7 images"]),
        ("n01\n" * 6 + "490\n", ["line 7", "490", "synsets"]),
        ("", ["is empty"]),
        ("\n \n", ["is empty"]),
        ("\n" + "n01\n" * 6, ["line 1"]),
        ("".join(LINES[1:]), ["1 of the 7", name_of(7)]),
        ("".join(LINES) + "other.JPEG,n01\n", ["line 8", "other.JPEG", name_of(1)]),
        ("".join(LINES) + f"{name_of(7)},n02\n", ["line 8", name_of(7), "second"]),
        ("other.JPEG n01\n" * 7, ["line 1", "other.JPEG"]),
        (f"{name_of(1)} n01\n{name_of(2)}\n", ["line 2", "1 columns"]),
        ("".join(LINES[:-1]) + f"{name_of(5)},\n", ["line 7"]),
        ("".join(LINES[:-1]) + f"{name_of(5)},a/b\n", ["line 7", "a/b"]),
        ("".join(LINES[:-1]) + f"{name_of(5)},a,b\n", ["line 7", "3 columns"]),
        ("".join(LINES[:-1]) + f"{name_of(5)}\n", ["line 7", "1 columns"]),
    ],
)
def test_bad_labels_are_refused_with_the_line(flat, labels, text, words):
    refused(flat, labels(text), *words)


def test_labels_that_are_not_there_or_of_nothing_are_refused(flat, labels, tmp_path):
    refused(flat, tmp_path / "none.txt", "No such file")
    refused(flat, tmp_path)
    (tmp_path / "hollow").mkdir()
    refusal(lambda: scan_images(tmp_path / "hollow", labels("n01\n")), "hollow", "no images")


def test_flat_folder_without_labels_is_one_class(flat):
    assert scan_images(flat).classes == ["images"] and len(scan_images(flat).paths) == 7
