"""Checkpoints that are whole or absent: written aside, synced, then renamed.

A checkpoint is a folder `checkpoints/step-00001000` of files and a manifest with their sizes and
sha256. It counts only while its manifest holds, so a killed save or a damaged disk costs one
checkpoint and no more. Tensors and plain values only; nothing in it is ever executed.
"""

import hashlib
import json
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from data.parts import file_sha256, sync_folder, write_whole
from modeling.errors import InputError
from modeling.weights import read_state_dict, write_state_dict

MANIFEST = "manifest.json"
NAME = re.compile(r"step-(\d{8,})")


def save(
    run_dir: Path,
    step: int,
    weights: dict[str, dict[str, torch.Tensor]],
    state: dict[str, Any],
    keep: int,
    keep_every: int = 0,
) -> Path:
    """Write one checkpoint, then remove later ones and all but the newest `keep`.

    `weights` become NAME.safetensors, usable on their own; `state` (optimizers and plain values)
    becomes state.pt. Steps that `keep_every` divides stay for good. Raises InputError, with the
    earlier checkpoints untouched, where the disk is full or not writable.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step-{step:08d}"
    aside = folder / f"{final.name}.partial"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        needed, free = size_of([weights, state]), shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"no room for the checkpoint of step {step} in {folder}: {needed / 1e9:.2f} GB "
                f"needed, {free / 1e9:.2f} GB free; make room and run the same command again"
            )
        write_files(aside, step, weights, state)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step
        os.rename(aside, final)
        sync_folder(folder)
    except InputError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    except (OSError, RuntimeError, SafetensorError) as e:  # each writer has its own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise InputError(
            f"the checkpoint of step {step} could not be written to {folder} ({first_line(e)}); the "
            f"earlier ones are whole: make room or rights and run the same command again"
        ) from e
    # Later steps are of a run that was left: this one went on from an earlier checkpoint.
    found = all_checkpoints(run_dir)
    place = found.index(final)
    for other in found[: max(place + 1 - keep, 0)] + found[place + 1 :]:
        if other in found[place + 1 :] or not (keep_every and step_of(other) % keep_every == 0):
            shutil.rmtree(other)
    return final


def write_files(
    folder: Path, step: int, weights: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]
) -> None:
    """The files of a checkpoint, synced, and last of all their manifest."""
    for name, tensors in weights.items():
        write_state_dict(tensors, folder / f"{name}.safetensors")
    torch.save(state, folder / "state.pt")
    entries = []
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        entries.append({"name": file.name, "bytes": file.stat().st_size, "sha256": digest})
    write_whole(folder / MANIFEST, json.dumps({"step": step, "files": entries}, indent=1).encode())
    sync_folder(folder)


def size_of(tree: Any) -> int:
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        tree = list(tree.values())
    return sum(map(size_of, tree)) if isinstance(tree, (list, tuple)) else 0


def first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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


def choose(run_dir: Path, resume: bool | str) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run starts from (None: from the beginning) and warnings to print.

    `resume` True takes the newest valid one of the run, False refuses a run that has any, a path
    takes that checkpoint, or that run's newest.
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
        given = Path(resume)
        found = all_checkpoints(given) if (given / "checkpoints").is_dir() else [given]
        if not given.is_dir() or not found:
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
    try:
        return torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as e:
        raise InputError(f"{path / 'state.pt'} holds more than tensors and plain values") from e


def load_weights_of(path: Path, name: str) -> dict[str, torch.Tensor]:
    """What `save` was given as `weights[name]`."""
    return read_state_dict(path / f"{name}.safetensors")


def weights_file(given: str | Path, name: str) -> Path:
    """The weights behind a path: the file itself, or NAME of a run's newest valid checkpoint."""
    given = Path(given)
    if not given.is_dir():
        return given  # whoever reads it says what is wrong with it
    newest, _ = choose(given, True)
    if newest is None:
        raise InputError(f"{given} holds no checkpoints: give a weights file or a run folder")
    return newest / f"{name}.safetensors"


def read_weights(given: str | Path, name: str) -> dict[str, torch.Tensor]:
    """Tensors of a weights file, or of a run's newest valid checkpoint."""
    return read_state_dict(weights_file(given, name))
