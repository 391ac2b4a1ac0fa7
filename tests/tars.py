"""Tars as ImageNet is downloaded, made from folders of a test's images."""

import io
import tarfile
from pathlib import Path


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def packed(folder, format=tarfile.GNU_FORMAT):
    """A tar of a folder's files, in an order that is not theirs, with names from that folder."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as tar:
        for file in sorted(Path(folder).rglob("*"), reverse=True):
            if file.is_file():
                add(tar, str(file.relative_to(folder)), file.read_bytes())
    return stream.getvalue()


def tar_of_tars(root, path):
    """As ILSVRC2012_img_train.tar: one tar per class folder of `root`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as outer:
        for folder in sorted(Path(root).iterdir(), reverse=True):
            add(outer, f"{folder.name}.tar", packed(folder))
    return path


def plain_tar(root, path):
    """As `tar -C ROOT -cf PATH .` packs a folder, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        tar.add(root, ".")
    return path


def flattened(root, folder):
    """The images of the class folders of `root` in one flat folder; the class of each, by name."""
    folder.mkdir(parents=True)
    classes = {}
    for file in sorted(Path(root).rglob("*.*")):
        (folder / file.name).write_bytes(file.read_bytes())
        classes[file.name] = file.parent.name
    assert len(classes) == len(list(folder.iterdir()))
    return dict(sorted(classes.items()))
