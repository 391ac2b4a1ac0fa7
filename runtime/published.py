"""Finds the published weight files of other projects."""

from pathlib import Path

import torch

from runtime.errors import InputError

WEIGHTS = Path("weights")  # the folder of the published files


class MissingFile(InputError):
    """A published file is missing; callers may continue without it."""


def find_published(name: str, folder: Path, otherwise: str = "") -> Path:
    """FOLDER/NAME, or the copy in torch's download cache.

    Raises MissingFile, which says where to put the file; `otherwise` adds another remedy.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for path in (folder / name, cache / name):
        if path.is_file():
            return path
    raise MissingFile(
        f"no {name} in {folder}/ or {cache}: put it in either (weights/README.md names its "
        f"source){otherwise}"
    )
