"""Files that are whole or absent, their names and hashes made durable, and locked folders."""

import fcntl
import os
import sys
import tempfile
from pathlib import Path
from typing import IO

import numpy as np

# Some are imported for callers of this module.
from modeling.weights.files import (  # noqa: F401
    file_entry,
    file_sha256,
    sync_file,
    whole_file,
    write_torch,
    writing,
)
from runtime.errors import InputError


def read_npz(path: str | Path, remedy: str, *names: str) -> list[np.ndarray]:
    """These arrays of an .npz, without pickles. Raises InputError, with the remedy, if one is missing or damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except Exception as e:  # a damaged archive raises almost anything
        raise InputError(f"{path} is damaged ({e!r}): {remedy}") from e


def write_whole(path: str | Path, data: bytes) -> None:
    with whole_file(path) as partial:
        partial.write_bytes(data)


def try_to_write(path: str | Path) -> None:
    """Raise InputError if `path` cannot be written, before the work whose result it will hold."""
    folder = Path(path).parent
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")


def sync_folder(path: Path) -> None:
    """Make the names in a folder (new files, renames) durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock_folder(folder: Path) -> IO[str]:
    """Create a folder if needed and lock it until the returned file is closed.

    Raises InputError if another process holds the lock or the folder is not writable. The POSIX lock
    ends with its process; a lock of `flock` would live on in the process's data workers.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 - its lifetime is the lock's
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:  # POSIX allows either error
        file.close()
        raise InputError(
            f"{folder} is in use by another run: wait for it, or use another folder"
        ) from e
    except OSError as e:
        print(
            f"warning: {folder} cannot be locked ({e.strerror}): run a single command there at a time",
            file=sys.stderr,
        )
    return file
