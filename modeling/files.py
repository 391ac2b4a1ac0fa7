"""Files that are there whole or not at all, and errors of writing in one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from .errors import InputError


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """A full disk, or a place that may not be written, becomes InputError, which names it."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # RuntimeErrors, but of the device
    except (OSError, RuntimeError, SafetensorError) as e:  # torch and safetensors have their own
        lines = str(getattr(e, "strerror", None) or e).strip().splitlines() or [type(e).__name__]
        raise InputError(
            f"cannot write {getattr(e, 'filename', None) or path} ({lines[0]}): what is finished "
            f"stays; make room, or the folder writable, and give the same command again"
        ) from e


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name to write to instead of `path`; then the file is synced and takes `path`'s place.

    So `path` is absent, as it was, or complete, even if the process or the machine stops. Missing
    folders are made. Raises InputError where it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync_file(partial)
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
