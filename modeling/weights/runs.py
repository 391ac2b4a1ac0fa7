"""The weights that a path stands for: a file, or what the folder of a training run holds.

Ours: RUN_DIR/checkpoints/step-00001000/ holds NAME.safetensors and, written last, manifest.json with
the sha256 of every file (`training/checkpoint.py` writes them). The published generator trainer's:
RUN_DIR/checkpoint-1000/ holds `PUBLISHED`, and RUN_DIR the final pytorch_model.bin.
"""

import json
import logging
import os
import re
from pathlib import Path
from typing import Optional

from ..errors import InputError
from .files import file_entry

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")
# In the published trainer's folders, the average first. The last but one is what accelerate saves.
PUBLISHED = (
    "ema_model/pytorch_model.bin", "unwrapped_model/pytorch_model.bin", "model.safetensors",
    "pytorch_model.bin",
)  # fmt: skip


def expanded(path: str | Path) -> Path:
    """A path with `~` as the home folder; the home of an unknown user stays as it is written."""
    return Path(os.path.expanduser(path))


def find_weights(path: str | Path, kind: str) -> Path:
    """The weights file that a path stands for: a file itself, KIND.safetensors of a checkpoint or, for
    a run's folder, of its newest checkpoint.

    Only the file to use is read, and compared with the hash in the checkpoint's manifest. If it is
    missing or damaged in a run's newest checkpoint, a line in the log says so and the previous checkpoint is used; a
    damaged file of a checkpoint named by `path` is refused. Raises InputError if no file is left.
    """
    path = expanded(path)
    if not path.is_dir():
        in_checkpoint = is_checkpoint(path.parent) and (path.parent / MANIFEST).is_file()
        if in_checkpoint and path.is_file() and damage(path.parent, path.name):
            raise damaged(path)
        return path  # whoever reads it says what is wrong with it
    named = is_checkpoint(path)
    checkpoints = [path] if named else all_checkpoints(path)
    if not checkpoints:
        return file_of_published_run(path)
    files = [folder / f"{kind}.safetensors" for folder in checkpoints]
    if not any(file.is_file() for file in files) and (checkpoints[-1] / MANIFEST).is_file():
        raise InputError(f"{path} has no weights of a {kind}: pass a run of the right kind")
    for file in reversed(files):
        if file.is_file() and damage(file.parent, file.name) is None:
            return file
        if not named:
            log.warning("%s is missing or damaged: trying the previous checkpoint", file)
    raise damaged(path)


def file_of_published_run(path: Path) -> Path:
    """The newest weights in a folder of the published generator trainer."""
    found = [p for p in path.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdecimal()]
    found.sort(key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True)
    files = [folder / name for folder in (path, *found) for name in PUBLISHED]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise InputError(
            f"{path} holds no checkpoints: pass a weights file, a run folder or a checkpoint of it"
        )
    return file


def damaged(path: Path) -> InputError:
    return InputError(f"{path} was altered or cut short: pass an earlier checkpoint of the run")


def is_checkpoint(folder: Path) -> bool:
    return NAME.fullmatch(folder.resolve().name) is not None


def named_by(resume: str) -> Path:
    """The run or checkpoint that a path names; RUN/checkpoints names the run."""
    path = Path(resume).resolve()
    is_part = path.name == "checkpoints" and not (path / "checkpoints").is_dir()
    return path.parent if is_part else path


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whether valid or not."""
    found = (run_dir / "checkpoints").glob("step-*")
    folders = [p for p in found if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(folders, key=step_of)


def damage(checkpoint: Path, only: Optional[str] = None) -> Optional[str]:
    """The damage of a checkpoint, or of its file `only`, by the hashes in its manifest; None if there is none.

    Raises InputError if permission to read it is missing, in which case an older checkpoint does not help.
    """
    try:
        entries = json.loads((checkpoint / MANIFEST).read_text())["files"]
        stated = {entry["name"]: entry for entry in entries}
        for name in stated if only is None else [only]:
            if Path(name).name != name:
                return f"its manifest names {name}, outside its folder"
            if file_entry(checkpoint / name) != stated[name]:
                return f"{name} was altered or cut short"
        return None if stated else "its manifest names no files"
    except PermissionError as e:
        raise InputError(
            f"no permission to read {e.filename}: make it readable (chmod), or run as its owner"
        ) from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"its manifest or one of its files is missing or unreadable ({type(e).__name__})"
