"""Files that are whole or absent, and write errors in one line."""

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError


@contextmanager
def writing(path: str | Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn OSError, such as a full disk or a missing permission, into InputError that names the path.

    `errors` are other exceptions by which the writer in the body reports such a failure.
    """
    try:
        yield
    except (OSError, *errors) as e:
        lines = str(getattr(e, "strerror", None) or e).strip().splitlines() or [type(e).__name__]
        remedy = "free some space or make the folder writable"
        if isinstance(e, (FileExistsError, NotADirectoryError)):
            remedy = "it is a file, but must be a folder: choose another place"
        raise InputError(
            f"cannot write {getattr(e, 'filename', None) or path} ({lines[0]}): {remedy}, then rerun; "
            f"finished work is kept"
        ) from e


@contextmanager
def whole_file(path: str | Path, shared: bool = False) -> Iterator[Path]:
    """A temporary name to write to; after the block that file is synced and replaces `path`.

    So `path` is absent, unchanged or complete, even if the process or machine stops. Its mode follows
    the umask. Missing folders are created. `shared`: several commands may write it at the same time, so each
    has its own temporary name. Raises InputError if it cannot be written.
    """
    path = Path(path)
    own = f".{secrets.token_hex(4)}" if shared else ""
    partial = path.with_name(f"{path.name}{own}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if partial.is_file():  # of a killed process, perhaps with another mode
                partial.unlink()
            partial.touch()
            mode = partial.stat().st_mode
            yield partial
            if partial.stat().st_mode != mode:  # safetensors creates its files as 0600
                partial.chmod(stat.S_IMODE(mode))
            sync_file(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_torch(content: Any, path: Path) -> None:
    """Tensors and plain values on the CPU in PyTorch's format, whole or not at all."""
    with whole_file(path) as partial, writing(path, RuntimeError):  # so torch reports a full disk
        torch.save(content, partial)


def sync_file(path: Path) -> None:
    with open(path, "r+b") as file:  # Windows syncs only what may be written
        os.fsync(file.fileno())


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(file: Path) -> dict[str, Any]:
    """A file as manifests list it: its name, size in bytes and hash."""
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)}
