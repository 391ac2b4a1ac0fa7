"""The folder of a training run: what the run goes on from, its lock, its checkpoints."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

import configs.load
from configs.schema import Experiment
from runtime.errors import InputError
from runtime.files import lock_folder
from runtime.processes import on_main
from training import checkpoint
from training.resume import check_same_run


class RunFolder:
    """Looked through and written by the main process; the other ranks follow what it found.

    `source` is the checkpoint that the run goes on from (None: from the beginning), `first_step`
    the step after it, `warnings` are for the user. Every method is called on all ranks. What the
    main process cannot do is an InputError on all; reading is each rank's own.
    """

    def __init__(self, accelerator: Accelerator, experiment: Experiment):
        self.accelerator, self.experiment = accelerator, experiment
        self.path, resume = Path(experiment.output_dir), experiment.resume

        def choose() -> tuple:
            source, warnings = checkpoint.choose(self.path, resume)
            earlier = None if source is None else checkpoint.origin_of(source)
            return source, earlier, warnings, checkpoint.all_checkpoints(self.path)

        self.source, earlier, self.warnings, self._seen = on_main(choose)
        self.first_step = 1 if self.source is None else checkpoint.step_of(self.source) + 1
        named = None if isinstance(resume, bool) else str(Path(resume).resolve())
        # Started from a checkpoint by name, now; not merely gone on with what came of that.
        self.forks = named is not None and named != earlier
        self.origin = named if self.forks else earlier

    def state(self, this_run: dict[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
        """The `state` of `source` as `save` was given it; loss scaling goes on from there.

        `this_run` is compared with its "run" (`check_same_run`).
        """
        state = checkpoint.load_state(self.source)
        if "run" not in state:
            raise InputError(f"{self.source} is of an earlier version: start the run anew")
        self.warnings += check_same_run(state["run"], this_run, free, str(self.source), self.forks)
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state

    def weights(self, *names: str) -> dict[str, Tensor]:
        """The tensors of `source` under the first of `names` that `save` was given weights for."""
        return checkpoint.load_weights_of(self.source, *names)

    def open(self, options: Any) -> None:
        """Keep other runs out until this process ends, and write the options down."""

        def lock() -> None:
            self._lock = lock_folder(self.path)
            if checkpoint.all_checkpoints(self.path) != self._seen:
                raise InputError(
                    f"another run has just saved or removed a checkpoint in {self.path}: give the "
                    f"same command again"
                )
            configs.load.save(options, self.path / "config.yaml")

        on_main(lock)

    def save(self, step: int, weights: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
        """One checkpoint, whole when this returns; the main process's tensors are written."""
        if self.accelerator.scaler is not None:
            state = {**state, "scaler": self.accelerator.scaler.state_dict()}
        keep, keep_every = self.experiment.keep_checkpoints, self.experiment.keep_every

        def write() -> None:
            checkpoint.save(self.path, step, weights, state, keep, keep_every, self.origin)

        on_main(write)
