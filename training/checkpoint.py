"""Checkpoints of a run. On disk each is whole or absent: written aside, synced, renamed.

A checkpoint is a folder `checkpoints/step-00001000` with a manifest of the sizes and sha256 of its files.
It is valid only while they match, so a killed save or a damaged disk costs at most one checkpoint. It
holds tensors and plain values; nothing in it is executed.

NAME.safetensors holds the weights to use: the average, if the run keeps one. Then NAME_raw.safetensors
holds the weights that training continues from.
"""

import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils._pytree import tree_leaves

import configs.load
from configs.schema import Experiment
from modeling.weights.metadata import About
from modeling.weights.runs import (
    MANIFEST,
    all_checkpoints,
    damage,
    is_checkpoint,
    named_by,
    step_of,
)
from modeling.weights.tensors import load_tensors, read_state_dict, write_state_dict
from runtime.errors import InputError
from runtime.files import file_entry, lock_folder, sync_folder, write_torch, write_whole, writing
from runtime.processes import on_main
from training.optim import EMA

FORMAT = 2  # of a checkpoint; others are refused
Weights = dict[str, tuple[dict[str, Tensor], About | None]]  # by name: tensors and their metadata
# Whole tensors by the model's own names, however DDP, FSDP or torch.compile wrap it, so that a run can
# resume with another launcher and number of processes.
WHOLE = StateDictOptions(full_state_dict=True)
WHOLE_ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)  # {} on other ranks


class Checkpoint:
    """All state of a run. Every object with state registers here when it is built.

    `register` and `register_model` restore the state if the run resumes; `save` saves all of it,
    including the plain values in `values`. `source` is the checkpoint that the run resumes from, None
    for a new run; `first_step` is the step after it; `warnings` are for the user.

    All ranks call every method. The main process searches and writes; its errors are raised on all
    ranks. Each rank reads the source itself.
    """

    def __init__(self, accelerator: Accelerator, experiment: Experiment):
        self.experiment, self.folder = experiment, Path(experiment.output_dir)
        # By name: what is saved, and the metadata of its file.
        self.weights: dict[str, tuple[nn.Module, About | None]] = {}
        self._objects: dict[str, Stateful] = {}
        self._lock: IO[str] | None = None
        resume = experiment.resume

        def find() -> tuple:
            named = None if isinstance(resume, bool) else str(named_by(resume))
            source, warnings = choose(self.folder, resume)
            earlier = None if source is None else origin_of(source)
            folder = (self.folder / "checkpoints").resolve()  # may be a link to another disk
            own = source is None or source.parent.resolve() == folder
            found = all_checkpoints(self.folder)
            # A resumed run keeps the checkpoint that it once branched off from.
            return named or earlier, earlier, source, own, warnings, found

        self.source: Path | None
        # `own`: whether it lies in the run's folder.
        self._origin, earlier, self.source, self.own, self.warnings, self._found = on_main(find)
        self.first_step = 1 if self.source is None else step_of(self.source) + 1
        # Whether this start branches off from a named checkpoint, rather than resumes what an earlier
        # start from it has saved since.
        self.forks = not self.own or self._origin != earlier
        self._saved = {} if self.source is None else load_state(self.source)
        self.values: dict[str, Any] = self._saved.pop("values", {})
        if accelerator.scaler is not None:
            self.register("scaler", accelerator.scaler, optional=True)

    # -------------------------------------------------- what is saved
    def register(self, name: str, stateful: Stateful, optional: bool = False) -> None:
        """Save the state of an object from now on, and restore it from `source`, if any.

        Raises InputError if the source's state is missing, unless `optional`, or does not fit.
        """
        self._objects[name] = stateful
        if self.source is None or (optional and name not in self._saved):
            return
        try:
            stateful.load_state_dict(self._saved.pop(name))
        except (KeyError, ValueError) as e:  # possible if the user named the checkpoint
            raise InputError(
                f"{self.source} is from a run that trained something else: its {name} does not fit ({e})"
            ) from e

    def register_model(
        self,
        name: str,
        model: nn.Module,
        about: About | None = None,
        average: EMA | None = None,
        optional: bool = False,
    ) -> None:
        """`register` the weights of a model, before the accelerator wraps it, and their average.

        `about` is the metadata of their files. If `source` has no average, it starts at the weights.
        """
        parts = {name: model} if average is None else {name: average.model, f"{name}_raw": model}
        self.weights |= {name: (part, about) for name, part in parts.items()}
        if self.source is not None and (self.holds(name) or not optional):
            if not self.holds(name):
                raise InputError(f"{self.source} has no {name}: pass a run of the right kind")
            file, raw = (self.source / f"{n}.safetensors" for n in (name, f"{name}_raw"))
            state = read_state_dict(raw if raw.is_file() else file)
            load_tensors(model, state, str(self.source))
            if average is not None:
                load_tensors(average.model, read_state_dict(file), str(self.source))
        if average is not None:
            self.register(f"{name}_average", average, optional=True)

    def holds(self, name: str) -> bool:
        """Whether the run resumes from a checkpoint with weights of this name."""
        return self.source is not None and (self.source / f"{name}.safetensors").is_file()

    def open(self, options: Any) -> None:
        """Lock the run's folder until this process ends, and write the options into it."""

        def lock() -> None:
            self._lock = lock_folder(self.folder)  # held while this object lives
            if all_checkpoints(self.folder) != self._found:
                raise InputError(
                    f"another run has just changed the checkpoints in {self.folder}: run the same "
                    f"command again"
                )
            configs.load.save(options, self.folder / "config.yaml")

        on_main(lock)

    def save(self, step: int) -> None:
        """Write a checkpoint."""
        weights = {
            name: (whole_tensors(model), about) for name, (model, about) in self.weights.items()
        }
        state = {name: stateful.state_dict() for name, stateful in self._objects.items()}
        state["values"] = self.values
        keep, keep_every = self.experiment.keep_checkpoints, self.experiment.keep_every
        on_main(lambda: save(self.folder, step, weights, state, keep, keep_every, self._origin))


def whole_tensors(model: nn.Module) -> dict[str, Any]:
    """A model's whole weights on the main process's CPU, {} elsewhere; all ranks call this."""
    return get_model_state_dict(model, options=WHOLE_ON_MAIN)


class WholeOptimizer:
    """The state of a prepared optimizer by the names of its model's parameters; shards are gathered."""

    def __init__(self, model: nn.Module, optimizer: Any):
        self.model, self.optimizer = model, optimizer.optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE_ON_MAIN)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(
            self.model, self.optimizer, optim_state_dict=state_dict, options=WHOLE
        )


# ---------------------------------------------------------------------- on disk
def save(
    run_dir: Path,
    step: int,
    weights: Weights,
    state: dict[str, Any],
    keep: int,
    keep_every: int = 0,
    origin: str | None = None,
) -> Path:
    """Write a checkpoint; remove those of later steps and all but the newest `keep`.

    `weights` become NAME.safetensors with their metadata, `state` (optimizers and plain values) becomes
    state.pt. Steps that are multiples of `keep_every` are kept. `origin` is the
    checkpoint that the user named to start from, if any. Raises InputError, leaving earlier checkpoints
    untouched, if the disk is full or not writable.
    """
    folder = run_dir / "checkpoints"
    final = folder / f"step-{step:08d}"
    aside = folder / f"{final.name}.partial"
    for leftover in folder.glob("*.partial"):  # of a killed save, or of `remove`
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with writing(final):
            aside.mkdir(parents=True)
            tensors = [leaf for leaf in tree_leaves([weights, state]) if isinstance(leaf, Tensor)]
            needed, free = sum(x.nbytes for x in tensors), shutil.disk_usage(folder).free
            if needed > free:
                raise InputError(
                    f"no room for the checkpoint of step {step} in {folder}: {needed / 1e9:.2f} GB "
                    f"needed, {free / 1e9:.2f} GB free; free some space, then run the same command again"
                )
            write_files(aside, step, weights, state, origin)
            # After a resume from an earlier checkpoint, later ones and a damaged one of this step are
            # obsolete. They go before the rename: the next start would resume from one that is left.
            for other in reversed(all_checkpoints(run_dir)):
                if step_of(other) >= step:
                    remove(other)
            os.rename(aside, final)
            sync_folder(folder)
    except InputError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    with writing(folder):
        for other in all_checkpoints(run_dir)[:-keep]:
            if not (keep_every and step_of(other) % keep_every == 0):
                remove(other)
    return final


def remove(path: Path) -> None:
    """Remove a checkpoint. No part of it keeps its name: NFS keeps a folder while another process has one of
    its files open, and a kill may leave some; the next save removes those."""
    # Named by its inode: what NFS keeps may be of an earlier checkpoint of this step.
    aside = path.with_name(f"{path.name}.{path.stat().st_ino}.partial")
    os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)


def write_files(
    folder: Path, step: int, weights: Weights, state: dict[str, Any], origin: str | None
) -> None:
    """The files of a checkpoint, then their manifest."""
    for name, (tensors, about) in weights.items():
        write_state_dict(tensors, folder / f"{name}.safetensors", about)
    write_torch(state, folder / "state.pt")
    entries = [file_entry(file) for file in sorted(folder.iterdir())]
    manifest = {"format": FORMAT, "step": step, "origin": origin, "files": entries}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync_folder(folder)


def origin_of(path: Path) -> str | None:
    """The `origin` that `save` wrote."""
    try:
        return json.loads((path / MANIFEST).read_text())["origin"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def choose(run_dir: Path, resume: bool | str) -> tuple[Path | None, list[str]]:
    """The checkpoint that a run starts from (None: a new run), and warnings to print.

    `resume` is `experiment.resume`. True: the run's newest valid checkpoint. False: none. A path: the last
    valid one of `checkpoints_from`. Raises InputError if False meets checkpoints, and if all of them are
    damaged.
    """
    candidates = all_checkpoints(run_dir)
    if resume is False and candidates:
        raise InputError(
            f"{run_dir} already holds {candidates[-1].name} and experiment.resume=False: set "
            f"experiment.resume=True to resume it, or another experiment.output_dir"
        )
    if isinstance(resume, str):
        candidates = checkpoints_from(resume, run_dir)
    warnings, reason = [], None
    for path in reversed(candidates):
        reason = damage(path)
        if reason is None:
            found = json.loads((path / MANIFEST).read_text()).get("format")
            if found == FORMAT:
                return path, warnings
            raise InputError(
                f"{path} has checkpoint format {found}, not {FORMAT}: resume it with the version that "
                f"wrote it, or start a new run"
            )
        warnings.append(f"checkpoint {path} is damaged: {reason}; trying the one before")
    if candidates:
        raise InputError(
            f"every checkpoint of {run_dir if resume is True else resume} is damaged: {reason}"
        )
    return None, []


def checkpoints_from(resume: str, run_dir: Path) -> list[Path]:
    """Candidates, oldest first: the checkpoint named by `resume`, or all of the run that it names, then those that
    `run_dir` saved after starting there, so that the same command resumes.

    Raises InputError if there are none, or if `run_dir` holds some of another origin or after the named one.
    """
    named, saved = named_by(resume), all_checkpoints(run_dir)
    own = [path for path in saved if origin_of(path) == str(named)]
    if named.is_relative_to(run_dir.resolve()):
        later = [p for p in saved if is_checkpoint(named) and step_of(p) > step_of(named)]
        if later and not own:
            raise InputError(
                f"{run_dir} holds checkpoints after experiment.resume={resume}, up to {later[-1].name}, "
                f"which the run would replace: remove them, or set another experiment.output_dir"
            )
    elif len(own) < len(saved):
        raise InputError(
            f"{run_dir} holds checkpoints that did not start from experiment.resume={resume}: set "
            f"experiment.resume=True to resume them (for example after moving {resume}), or another "
            f"experiment.output_dir"
        )
    if any(p.is_dir() and p.name.startswith("checkpoint-") for p in (named, *named.glob("*"))):
        raise InputError(
            f"experiment.resume={resume} is from the published trainer, whose optimizer state cannot "
            f"be resumed: set experiment.init_weights={resume} to start from its weights"
        )
    alone = is_checkpoint(named) and named.is_dir()
    candidates = (all_checkpoints(named) or [named] * alone) + own
    if not candidates:
        raise InputError(
            f"experiment.resume={resume} is neither a run with checkpoints nor a checkpoint: pass one of them; a "
            f"copied checkpoint keeps its name (step-00001000)"
        )
    return candidates


def load_state(path: Path) -> dict[str, Any]:
    """The `state` that `save` wrote."""
    file = path / "state.pt"
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # a forged pickle raises almost anything
        if isinstance(e, (OSError, MemoryError)) or "allocate memory" in str(e):
            raise InputError(
                f"cannot read {file} ({str(e) or type(e).__name__}): every machine must see the run's folder and "
                f"have memory for it; then run the same command again"
            ) from e
        raise InputError(
            f"{file} is not a file of tensors and plain values: remove {path}, or set another "
            f"experiment.resume"
        ) from e
