"""The weights in the folder of a training run, for reading; `training/checkpoint.py` writes them.

RUN_DIR/checkpoints/step-00001000/ holds NAME.safetensors and, written last, manifest.json with the
sha256 of every file.
"""

import json
import re
from pathlib import Path

from ..errors import InputError
from .files import file_sha256

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")


def weights_in(path: str | Path, *names: str) -> Path:
    """The weights file that a path stands for: itself, or, in the newest checkpoint of a run's folder
    (or in the checkpoint that is passed), that of the first of `names` that is there.

    A checkpoint whose save was cut short does not count. Raises InputError where there is none, and
    where the file is not the one that was saved.
    """
    path = Path(path)
    if not path.is_dir():
        return path  # whoever reads it says what is wrong with it
    found = [path] if NAME.fullmatch(path.resolve().name) else all_checkpoints(path)
    found = [folder for folder in found if (folder / MANIFEST).is_file()]
    if not found:
        raise InputError(
            f"{path} holds no checkpoints: pass a weights file, a run folder or a checkpoint of it"
        )
    files = [found[-1] / f"{name}.safetensors" for name in names]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise InputError(f"{path} has no weights of a {names[-1]}: pass a run of the right kind")
    if not is_whole(file):
        raise InputError(f"{file} was altered or cut short: pass an earlier checkpoint of the run")
    return file


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whether valid or not."""
    found = (run_dir / "checkpoints").glob("step-*")
    folders = [p for p in found if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(folders, key=step_of)


def is_whole(file: Path) -> bool:
    """Whether a file has the hash that its checkpoint's manifest states."""
    try:
        entries = json.loads((file.parent / MANIFEST).read_text())["files"]
        stated = {entry["name"]: entry["sha256"] for entry in entries}
        return file_sha256(file) == stated[file.name]
    except (OSError, ValueError, KeyError, TypeError):
        return False
