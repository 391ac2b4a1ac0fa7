"""Files that are whole or absent, their names and hashes made durable, and locked folders."""

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

# Some of them for this module's callers only.
from modeling.weights.files import file_sha256, sync_file, whole_file, write_torch, writing  # noqa: F401
from runtime.errors import InputError


def write_whole(path: str | Path, data: bytes) -> None:
    with whole_file(path) as partial:
        partial.write_bytes(data)


def try_to_write(path: str | Path) -> None:
    """Raise InputError where a file cannot be written there, before the work whose result it takes."""
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
    """Lock a folder, made if need be, for this process; keep the returned file open.

    Raises InputError while another process holds it, or where nothing can be written. A dead
    process holds nothing, whatever it left behind: neither a file nor data workers, which would
    inherit the lock of `flock` and live some seconds longer.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 - its lifetime is the lock's
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as e:  # POSIX leaves the choice
        file.close()
        raise InputError(
            f"{folder} is in use by another run: wait for it, or give another folder"
        ) from e
    except OSError:
        pass  # a file system without locks
    return file
