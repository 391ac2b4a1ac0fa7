"""Work cut into numbered parts, each written once, whole or not at all, by whichever rank."""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from modeling.errors import InputError


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is either absent or complete, even if the machine stops."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """A full disk, or a folder that may not be written, is said in one line (InputError)."""
    try:
        yield
    except OSError as e:
        raise InputError(
            f"cannot write to {e.filename or folder}: {e.strerror or e}; what is finished stays: make "
            f"room, or the folder writable, and give the same command again"
        ) from e


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Make the names in a folder (new files, renames) durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def differing(earlier: dict[str, Any], settings: dict[str, Any]) -> str:
    """The entries in which two settings differ, with both values; empty where they agree."""
    return ", ".join(
        f"{key} ({earlier.get(key)} there, {settings.get(key)} now)"
        for key in sorted(earlier.keys() | settings.keys())
        if earlier.get(key) != settings.get(key)
    )


def check_settings(path: Path, settings: dict[str, Any], remedy: str) -> None:
    """Write `settings` as JSON, or compare with what an earlier run wrote there.

    Raises InputError that names the differing entries and the remedy.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=1).encode())
        return
    try:
        earlier = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as e:
        raise InputError(f"{path} is damaged; {remedy}") from e
    changed = differing(earlier, settings)
    if changed:
        raise InputError(f"{path.parent} holds work of other settings: {changed}; {remedy}")


class Parts:
    """A folder of numbered .npz parts. A part that exists is complete."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.npz"

    def missing(self, rank: int, world: int) -> list[int]:
        """The parts that this rank has still to make; the others' are elsewhere in the line."""
        left = [i for i in range(self.count) if not self.path(i).exists()]
        return left[rank::world]

    def write(self, number: int, **arrays: np.ndarray) -> None:
        partial = self.path(number).with_suffix(".partial")
        with open(partial, "wb") as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path(number))

    def read(self, number: int, name: str) -> np.ndarray:
        try:
            with np.load(self.path(number), allow_pickle=False) as arrays:
                return arrays[name]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as e:
            raise InputError(
                f"{self.path(number)} is damaged ({e}); remove it and give the same command again"
            ) from e
