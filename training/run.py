"""What both training loops share: `Run`, and the folder that it works in, `RunFolder`."""

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NoReturn, Optional, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

import configs.load
from configs.schema import Experiment, Training
from data.loader import training_loader
from data.unreadable import SkipUnreadable, lines_of
from modeling.weights.metadata import About
from modeling.weights.tensors import read_state_dict, tensors_hash
from runtime.errors import InputError
from runtime.files import lock_folder, write_whole
from runtime.parts import differing
from runtime.processes import on_main
from runtime.randomness import STREAMS_VERSION
from runtime.signals import SAVED_AND_STOPPED, StopSignal
from training import checkpoint
from training.accelerator import precision
from training.dry_run import DryRun, Stretch
from training.initial import Record, check_same_start, initial_file
from training.log import RunLog, Window, due
from training.optim import FiniteGuard
from training.utilisation import peak_flops

T = TypeVar("T")
UNREADABLE = "unreadable.txt"  # in a run's folder: images that others replace, one path per line
REPORTED = ".reported"  # in a run's folder: the last checkpointed step whose reports are complete
RENAMED_SETTINGS = {"batch in all": "global batch"}  # as earlier checkpoints call them
# Options that earlier checkpoints do not name, with the values that those runs had.
ADDED_SETTINGS = {
    "training.numerics": "auto",
    "training.ema_warmup": False,
    "optimizer.params.count_from": 1,
    "lr_scheduler.params.count_from": 1,
    "model.critic_init": "scratch",
    "model.cluster_in_critic_steps": False,
    "model.vq_model.position_init": "own_patch",
    "losses.critic_weight": 1.0,
    "phases.critic_after": 1,  # of every phase
    "perceptual.precision": "fp32",
}


# ---------------------------------------------------------------------- the same run?
def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options -> {"section.option": value}; sections in a list become "name[0].option"."""
    flat = {}
    for name, value in options.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, item in enumerate(value):
                flat |= flatten(item, f"{prefix}{name}[{i}].")
        else:
            flat[prefix + name] = value
    return flat


def check_same_run(
    earlier: dict[str, Any],
    now: dict[str, Any],
    ignored: tuple[str, ...],
    source: str,
    fork: bool,
    ranks: int = 1,
) -> list[str]:
    """Compare settings with those of the checkpoint `source`; returns warnings for the user.

    Names that start with one of `ignored` may differ. Any other difference raises InputError that
    lists all of them, unless `fork` says that the checkpoint was named on purpose. Where the global
    batch differs, the message names the batch per GPU that restores it on `ranks` GPUs.
    """
    changed = differing(earlier, now, ignored)
    if changed and not fork:
        raise InputError(
            f"{source} belongs to a run with other options: {changed}; restore those"
            f"{batch_remedy(earlier, now, ranks)}, or start "
            f"another run from it with another experiment.output_dir and "
            f"experiment.resume={source}"
        )
    return [f"resumes from {source} with other options: {changed}"] * bool(changed)


def batch_remedy(earlier: dict[str, Any], now: dict[str, Any], ranks: int) -> str:
    """The options that restore the earlier global batch on `ranks` GPUs; empty where it is kept."""
    batch = earlier.get("global batch")
    if not isinstance(batch, int) or batch == now.get("global batch"):
        return ""
    if batch % ranks:
        return f" (on a number of GPUs that divides {batch}, not {ranks})"
    per_gpu = batch // ranks
    return (
        f" (on {ranks} GPUs, training.per_gpu_batch_size x training.gradient_accumulation_steps = "
        f"{per_gpu}, for example training.per_gpu_batch_size={per_gpu} "
        f"training.gradient_accumulation_steps=1)"
    )


# ---------------------------------------------------------------------- its folder
class RunFolder:
    """The folder of a run: the checkpoint to resume from, the lock, the checkpoints to write.

    The main process looks through the folder and writes; the other ranks follow what it found.
    `source` is the checkpoint that the run resumes from (None: from the beginning), `first_step`
    the step after it, `warnings` are for the user. Every method is called on all ranks. What the
    main process cannot do is an InputError on all; each rank reads weights by itself.
    """

    def __init__(self, accelerator: Accelerator, experiment: Experiment):
        self.accelerator, self.experiment = accelerator, experiment
        self.path, resume = Path(experiment.output_dir), experiment.resume
        self._lock: IO[str] | None = None

        def choose() -> tuple:
            source, warnings = checkpoint.choose(self.path, resume)
            earlier = None if source is None else checkpoint.origin_of(source)
            return source, earlier, warnings, checkpoint.all_checkpoints(self.path)

        self.source: Path | None
        self.source, earlier, self.warnings, self._checkpoints = on_main(choose)
        self.first_step = 1 if self.source is None else checkpoint.step_of(self.source) + 1
        named = None if isinstance(resume, bool) else str(Path(resume).resolve())
        # Whether this start branches off from a checkpoint that was named, rather than resumes what
        # an earlier start from that checkpoint has saved since.
        self.forks = named is not None and named != earlier
        self.origin = named if self.forks else earlier

    def state(self, settings: dict[str, Any], ignored: tuple[str, ...]) -> dict[str, Any]:
        """The `state` that `save` wrote into `source`; loss scaling resumes from it.

        `settings` are compared with those of the checkpoint (`check_same_run`).
        """
        source = self._source()
        state = checkpoint.load_state(source)
        if "run" not in state:
            raise InputError(f"{source} is of an earlier version: start a new run")
        earlier = dict(state["run"])
        for old, new in RENAMED_SETTINGS.items():
            if old in earlier:
                earlier[new] = earlier.pop(old)
        for name in settings:
            option = re.sub(r"\[\d+\]", "", name)
            if option in ADDED_SETTINGS:
                earlier.setdefault(name, ADDED_SETTINGS[option])
        self.warnings += check_same_run(
            earlier, settings, ignored, str(source), self.forks, self.accelerator.num_processes
        )
        if state.pop("streams", 1) != STREAMS_VERSION:
            self.warnings.append(
                f"{source} is of a version that drew random numbers otherwise: from here on the order "
                f"of the images, their crops and dropout are not those that this run would have had"
            )
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state

    def _source(self) -> Path:
        assert self.source is not None, "a run from the beginning has no checkpoint to read"
        return self.source

    def weights(self, *names: str) -> dict[str, Tensor]:
        """The tensors of `source` under the first of `names` that the checkpoint holds."""
        return checkpoint.load_weights_of(self._source(), *names)

    def holds(self, name: str) -> bool:
        """Whether `source` has weights under this name."""
        return self.source is not None and checkpoint.first_weights(self.source, name).is_file()

    def open(self, options: Any) -> None:
        """Keep other runs out until this process ends, and write the options down."""

        def lock() -> None:
            self._lock = lock_folder(self.path)  # held while this object lives
            if checkpoint.all_checkpoints(self.path) != self._checkpoints:
                raise InputError(
                    f"another run has just saved or removed a checkpoint in {self.path}: run the "
                    f"same command again"
                )
            configs.load.save(options, self.path / "config.yaml")

        on_main(lock)

    def save(
        self,
        step: int,
        weights: dict[str, dict[str, Tensor]],
        state: dict[str, Any],
        about: Mapping[str, About] | None = None,
    ) -> None:
        """One checkpoint, whole when this returns; the main process's tensors are written.

        `about` is what the files of weights say of themselves, by the names of `weights`.
        """
        state = {**state, "streams": STREAMS_VERSION}
        if self.accelerator.scaler is not None:
            state = {**state, "scaler": self.accelerator.scaler.state_dict()}
        keep, keep_every = self.experiment.keep_checkpoints, self.experiment.keep_every

        def write() -> None:
            checkpoint.save(self.path, step, weights, state, keep, keep_every, self.origin, about)

        on_main(write)


# ---------------------------------------------------------------------- the run
@dataclass(frozen=True)
class Due:
    """What follows a step. `stop`: a signal asked for it; the checkpoint is `save`'s."""

    log: bool = False
    save: bool = False
    evaluate: bool = False
    generate: bool = False
    stop: bool = False

    def __bool__(self) -> bool:
        return any(astuple(self))


class Run:
    """Everything around a training step that does not depend on what is trained.

    In this order: `Run(…)` finds the checkpoint to resume from; `resume` reads its state; the
    program builds its models, with `initial_weights` if there are any; `start` builds the loader,
    locks the folder and opens the log, so that nothing is written by a command that is refused.
    Then, within `for step in run.steps()`: `next_batch`, `add`, `watch`, `due`, and whatever is due.
    Last, `finish`.
    """

    loader_iterator: Iterator[Any]
    log: RunLog

    def __init__(
        self, accelerator: Accelerator, options: Any, stretches: list[Stretch], dry_run: bool
    ):
        self.accelerator, self.options = accelerator, options
        self.experiment: Experiment = options.experiment
        self.training: Training = options.training
        self.total_steps = sum(stretch.steps for stretch in stretches)
        self.batch = self.training.per_gpu_batch_size * accelerator.num_processes
        self.global_batch = self.batch * self.training.gradient_accumulation_steps
        self.flops_per_image: float | None = None  # for the log's MFU
        self.about: dict[str, About] = {}  # what files of weights say of themselves, by their names
        self.stop = StopSignal(timedelta(minutes=self.training.timeout_minutes))
        self.folder = RunFolder(accelerator, self.experiment)
        self.first_step = self.folder.first_step
        self.dry_run = None
        if dry_run:
            self.dry_run = DryRun(stretches, self.first_step, accelerator.device)
        self.saved: dict[str, Any] = {}  # the state of the checkpoint, until `start`
        self.initial: Optional[Record] = None  # the weights that the run started from, if any
        self.window, self.guard = Window(), FiniteGuard(accelerator)
        self._timed_from: float | None = None
        self._time_said = False
        self._unreadable = 0  # images that were reported as replaced

    # -------------------------------------------------- set-up
    def resume(self, settings: dict[str, Any], ignored: tuple[str, ...]) -> None:
        """Read the checkpoint's state, if there is a checkpoint, into `saved`.

        Raises InputError where `settings` differ from the checkpoint's, but for `ignored` ones, and
        where `experiment.init_weights` is not what the run of the checkpoint started from.
        """
        source, named = self.folder.source, self.experiment.init_weights
        if source is None:
            return
        self.saved = self.folder.state(settings, ignored)
        self.initial = self.saved.get("initial")
        on_main(lambda: check_same_start(self.initial, named, source))
        if self.initial is not None and named is None:
            self.experiment.init_weights = self.initial["path"]  # for config.yaml

    def initial_weights(self) -> Optional[tuple[dict[str, Tensor], str]]:
        """The tensors of `experiment.init_weights` and the path of their file; all ranks call this.

        None without the option, and where the run resumes: its checkpoint has the weights.
        """
        named = self.experiment.init_weights
        if named is None or self.resumed:
            return None
        file = on_main(lambda: initial_file(named))
        state = read_state_dict(file)
        self.initial = {"path": named, "hash": on_main(lambda: tensors_hash(state))}
        return state, str(file)

    @property
    def resumed(self) -> bool:
        return self.folder.source is not None

    def start(
        self, dataset: Any, images: int, workers: int, skip_unreadable: int | None = None
    ) -> None:
        """Build the loader over (epoch, index < `images`), lock the folder, open the log.

        Of a dataset of images, `skip_unreadable` is the number of unreadable ones that others may
        replace (`SkipUnreadable`); None for a dataset of codes.
        """
        accelerator = self.accelerator
        if skip_unreadable is not None:
            dataset = SkipUnreadable(dataset, images, skip_unreadable, self._unreadable_list())
        loader = training_loader(
            dataset, images, self.training, workers, accelerator, self.first_step
        )
        if self.dry_run is None:
            self.folder.open(self.options)
        self.loader_iterator = iter(loader)  # its workers read, and list what they cannot read
        self.log = RunLog(
            accelerator, self.experiment, configs.load.as_dict(self.options), self.first_step,
            self.total_steps, write=self.dry_run is None,
        )  # fmt: skip
        for warning in self.folder.warnings:
            self.log.say(f"warning: {warning}")
        self.window = Window()
        self.window.restore(self.saved.get("window", {}), accelerator)
        self.saved = {}  # gigabytes of optimizer moments, in host memory
        self._report_unreadable()

    def _unreadable_list(self) -> Path:
        """The file that lists unreadable images; of a dry run, one that goes with it."""
        if self.dry_run is None:
            return self.folder.path / UNREADABLE
        self._scratch = tempfile.TemporaryDirectory(prefix="alitok-")
        return Path(self._scratch.name) / UNREADABLE

    def _report_unreadable(self) -> None:
        """Say how many images are replaced, whenever that number has changed."""
        if not self.accelerator.is_main_process or self.dry_run is not None:
            return
        count = len(lines_of(self.folder.path / UNREADABLE))
        if count > self._unreadable:
            self.log.say(
                f"warning: {count} unreadable image{'s are' if count > 1 else ' is'} replaced by "
                f"others; {self.folder.path / UNREADABLE} lists them"
            )
        self._unreadable = count

    # -------------------------------------------------- around a step
    def steps(self) -> Iterator[int]:
        """The numbers of the steps to make; of a dry run, a few per stretch."""
        if self.dry_run is not None:
            yield from self.dry_run.steps()
            return
        for step in range(self.first_step, self.total_steps + 1):
            yield step
            if step == self.first_step:  # compiling and choosing kernels end with the first step
                self._timed_from = time.perf_counter()

    def next_batch(self) -> Any:
        """The next micro-batch of this rank, on the device."""
        with self.window.waiting():
            batch = send_to_device(
                next(self.loader_iterator), self.accelerator.device, non_blocking=True
            )
        self.window.images += self.batch
        return batch

    def add(self, **values: Tensor) -> None:
        """Add a micro-batch's values to the log window and to the guard's terms of this step."""
        self.window.add(**values)
        self.guard.add(**values)

    def watch(self, step: int, norm: Tensor, optimizer: Any) -> None:
        """Keep a non-finite step from the weights; `optimizer` is the prepared one."""
        if due(step, self.experiment.log_grad_norm_every):
            self.window.add(grad_norm=norm)
        self.guard.watch(step, norm, optimizer.optimizer)

    def due(self, step: int) -> Due:
        """What is due after this step, the same on every rank.

        Raises InputError where a step since the last report was not finite, before anything of it
        is logged or saved. That is the first host sync of a step, and there is none where nothing
        is due.
        """
        if self.dry_run is not None:
            return Due()
        self.log.bar.update()
        found = self.scheduled(step, self.stop.agreed())
        if found:
            self.guard.raise_if_bad()
        return found

    def scheduled(self, step: int, stop: bool = False) -> Due:
        """What the periods ask for at this step; when a run stops, its reports wait for the resume."""
        last, experiment = step == self.total_steps, self.experiment
        reports = last or not stop
        return Due(
            log=last or due(step, experiment.log_every),
            save=last or stop or due(step, experiment.save_every),
            evaluate=reports and (last or due(step, experiment.eval_every)),
            generate=reports and (last or due(step, experiment.generate_every)),
            stop=stop and not last,
        )

    # -------------------------------------------------- after a step
    def log_window(self, step: int, values: dict[str, float]) -> None:
        """Log `values` and the window's means, rates and hours left; the window starts anew."""
        window, world = self.window.close(self.accelerator), self.accelerator.num_processes
        rate = window["images/s"]
        values = {**values, **window, "images/s per device": rate / world}
        peak = peak_flops(self.accelerator.device, precision(self.training))
        if self.flops_per_image is not None and peak is not None:
            values["mfu"] = rate / world * self.flops_per_image / peak
        left = self.total_steps - step
        values["hours left"] = left * self.global_batch / rate / 3600
        self.log.metrics(step, values)
        self._report_unreadable()
        if self._timed_from is not None and not self._time_said:
            seconds = (time.perf_counter() - self._timed_from) / (step - self.first_step)
            self.log.say(
                f"expected time: {left * seconds / 3600:.2f} hours for the {left} steps left, at "
                f"{seconds:.3g} s per step"
            )
            self._time_said = True

    @contextmanager
    def reporting(self, step: int, due: Due) -> Iterator[None]:
        """Around the reports of a step, whose time does not count as training time.

        Notes that the reports of a checkpointed step are complete (`missing_reports`).
        """
        with self.window.paused():
            yield
        if due.save or (due and step < self.first_step):
            on_main(lambda: write_whole(self.folder.path / REPORTED, str(step).encode()))

    def save(
        self,
        step: int,
        settings: dict[str, Any],
        weights: dict[str, dict[str, Tensor]],
        other_state: dict[str, Any],
    ) -> None:
        """Write a checkpoint: of the run that has these settings, with the log window's sums."""
        with self.window.paused():
            window = self.window.state(self.accelerator)
            state = {**other_state, "run": settings, "window": window}
            if self.initial is not None:
                state["initial"] = self.initial
            self.folder.save(step, weights, state, self.about)

    def attempt(self, name: str, work: Callable[[], T]) -> Optional[T]:
        """`work()`, or None on every rank, and a warning, where it failed on any of them.

        A report that fails must not end a training. `work` should not talk to other ranks before
        everything in it that can fail has succeeded.
        """
        result, problem = None, None
        try:
            result = work()
        except torch.AcceleratorError:
            raise  # the device is unusable from here on
        except Exception as e:
            text = str(e).rsplit("InputError: ")[-1].strip().splitlines() or [type(e).__name__]
            problem = text[0] if isinstance(e, InputError) else f"{type(e).__name__}: {text[0]}"
        problems = [p for p in gather_object([problem]) if p is not None]
        if problems:
            self.log.say(f"warning: {name} failed: {problems[0]}; training continues without it")
            return None
        return result

    def missing_reports(self) -> Due:
        """What was due at the checkpoint that the run resumes from, if a kill prevented it.

        Checkpoints are written before the reports of their step.
        """
        step, path = self.first_step - 1, self.folder.path / REPORTED

        def complete() -> bool:
            return path.is_file() and path.read_text().strip() == str(step)

        if not self.resumed or self.folder.forks or self.dry_run is not None or on_main(complete):
            return Due()
        found = self.scheduled(step)
        return Due(evaluate=found.evaluate, generate=found.generate)

    def exit_stopped(self, step: int) -> NoReturn:
        """End the process after a signal, once `step` is saved."""
        self.log.say(f"asked to stop: saved step {step}; run the same command again to resume")
        self.log.close()
        raise SystemExit(SAVED_AND_STOPPED)

    def finish(self, message: str) -> None:
        self.log.say(f"done; {message}")
        self.log.close()

    def report_dry_run(self, models: dict[str, nn.Module]) -> None:
        """Print what a dry run found; raises InputError where a step was not finite."""
        assert self.dry_run is not None
        self.guard.raise_if_bad()
        for line in self.dry_run.report(models, self.global_batch):
            self.log.say(line)
        self.log.close()
