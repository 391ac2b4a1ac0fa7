"""Checkpoints that are whole or absent: written aside, synced, then renamed.

A checkpoint is a folder `checkpoints/step-00001000` of files and a manifest with their sizes and
sha256. It counts only while its manifest holds, so a killed save or a damaged disk costs one
checkpoint and no more. Tensors and plain values only; nothing in it is ever executed.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from modeling.weights import read_state_dict, write_state_dict
from runtime.errors import InputError
from runtime.files import file_sha256, sync_folder, whole_file, write_whole, writing

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")


def save(
    run_dir: Path,
    step: int,
    weights: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    keep: int,
    keep_every: int = 0,
    origin: str | None = None,
) -> Path:
    """Write one checkpoint, then remove later ones and all but the newest `keep`.

    `weights` become NAME.safetensors, usable on their own; `state` (optimizers and plain values)
    becomes state.pt. Steps that `keep_every` divides stay for good. `origin` is the path that the
    run was started from by name, if it was. Raises InputError, with the earlier checkpoints
    untouched, where the disk is full or not writable.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step-{step:08d}"
    aside = folder / f"{final.name}.partial"
    for left in folder.glob("*.partial"):  # by a run killed while it saved
        shutil.rmtree(left, ignore_errors=True)
    try:
        with writing(final):
            aside.mkdir(parents=True)
            needed, free = size_of([weights, state]), shutil.disk_usage(folder).free
            if needed > free:
                raise InputError(
                    f"no room for the checkpoint of step {step} in {folder}: {needed / 1e9:.2f} GB "
                    f"needed, {free / 1e9:.2f} GB free; make room and run the same command again"
                )
            write_files(aside, step, weights, state, origin)
            # Later ones, and a damaged one of the same step, are of a run that was left: this one
            # went on from an earlier checkpoint. None may outlive the new one by a kill.
            for other in reversed(all_checkpoints(run_dir)):
                if step_of(other) >= step:
                    shutil.rmtree(other)
            os.rename(aside, final)
            sync_folder(folder)
    except InputError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    with writing(folder):
        for other in all_checkpoints(run_dir)[:-keep]:
            if not (keep_every and step_of(other) % keep_every == 0):
                shutil.rmtree(other)
    return final


def write_files(
    folder: Path,
    step: int,
    weights: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    origin: str | None,
) -> None:
    """The files of a checkpoint and, last of all, their manifest."""
    for name, tensors in weights.items():
        write_state_dict(tensors, folder / f"{name}.safetensors")
    with whole_file(folder / "state.pt") as partial:
        torch.save(state, partial)
    entries = [
        {"name": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)}
        for file in sorted(folder.iterdir())
    ]
    manifest = {"step": step, "origin": origin, "files": entries}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync_folder(folder)


def size_of(tree: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        tree = list(tree.values())
    return sum(map(size_of, tree)) if isinstance(tree, (list, tuple)) else 0


def step_of(path: Path) -> int:
    return int(NAME.fullmatch(path.name)[1])


def all_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first, whether valid or not."""
    found = (run_dir / "checkpoints").glob("step-*")
    folders = [p for p in found if NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(folders, key=step_of)


def problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        entries = json.loads((path / MANIFEST).read_text())["files"]
        if not entries:
            return "its manifest names no files"
        for entry in entries:
            name = entry["name"]
            if Path(name).name != name:
                return f"its manifest names {name}, outside its folder"
            if file_sha256(path / name) != entry["sha256"]:
                return f"{name} was altered or cut short"
    except (OSError, ValueError, KeyError, TypeError) as e:
        return f"its manifest or a file of it is missing or unreadable ({type(e).__name__})"
    return None


def origin_of(path: Path) -> str | None:
    """What `save` was given as `origin`."""
    try:
        return json.loads((path / MANIFEST).read_text())["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def choose(run_dir: Path, resume: bool | str) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run starts from (None: from the beginning) and warnings to print.

    `resume` True takes the newest valid one of the run, False refuses a run that has any, a path
    takes that checkpoint, or that run's newest; or what this run has saved since it took it, so
    that the same command goes on. A folder that holds another run's is refused then.
    """
    found = all_checkpoints(run_dir)
    if resume is False:
        if found:
            raise InputError(
                f"{run_dir} already holds {found[-1].name} and experiment.resume=False: give "
                f"another experiment.output_dir"
            )
        return None, []
    if isinstance(resume, str):
        given = Path(resume).resolve()
        ours = [path for path in found if origin_of(path) == str(given)]
        if len(ours) < len(found) and not given.is_relative_to(run_dir.resolve()):
            raise InputError(
                f"{run_dir} holds checkpoints that did not come from experiment.resume={resume}: "
                f"give another experiment.output_dir"
            )
        found = all_checkpoints(given) if (given / "checkpoints").is_dir() else [given]
        found = [path for path in found if path.is_dir()] + ours
        if not found:
            raise InputError(f"experiment.resume={resume}: no checkpoint there")
    warnings = []
    for path in reversed(found):
        reason = problem(path)
        if reason is None:
            return path, warnings
        warnings.append(f"checkpoint {path} is damaged: {reason}; trying the one before")
    if found:
        raise InputError(
            f"no checkpoint of {run_dir if resume is True else resume} is whole: {reason}"
        )
    return None, []


def load_state(path: Path) -> dict[str, Any]:
    """What `save` was given as `state`."""
    file = path / "state.pt"
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a forged pickle raises almost anything
        raise InputError(
            f"{file} is no file of tensors and plain values: remove {path}, or give another "
            f"experiment.resume"
        ) from e


def first_weights(path: Path, *names: str) -> Path:
    """The file of the first of `names` that a checkpoint holds weights of, else that of the last."""
    files = [path / f"{name}.safetensors" for name in names]
    return next((file for file in files if file.is_file()), files[-1])


def load_weights_of(path: Path, *names: str) -> dict[str, torch.Tensor]:
    """What `save` was given as `weights[name]`, of the first of `names` that is there."""
    return read_state_dict(first_weights(path, *names))


def weights_file(given: str | Path, *names: str) -> Path:
    """The weights behind a path: the file itself, or `first_weights` of a run's newest checkpoint."""
    given = Path(given)
    if not given.is_dir():
        return given  # whoever reads it says what is wrong with it
    newest, _ = choose(given, True)
    if newest is None:
        raise InputError(f"{given} holds no checkpoints: give a weights file or a run folder")
    return first_weights(newest, *names)


def read_weights(given: str | Path, *names: str) -> dict[str, torch.Tensor]:
    """Tensors of a weights file, or of a run's newest valid checkpoint (`weights_file`)."""
    return read_state_dict(weights_file(given, *names))
