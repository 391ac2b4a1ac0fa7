"""What both training loops share around their steps: `Run`."""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn

import configs.load
from configs.schema import Experiment, Phase, Training
from data.classes import printable
from data.loader import batch_loader, worker_count
from data.order import SampleOrder
from data.unreadable import SkipUnreadable
from modeling.devices import has_bfloat16
from modeling.errors import describe
from modeling.weights.tensors import write_state_dict
from runtime.errors import InputError
from runtime.files import write_whole
from runtime.parts import differing
from runtime.processes import check_same, device_name, on_main
from runtime.program import leave
from runtime.signals import SAVED_AND_STOPPED, StopSignal
from training.checkpoint import Checkpoint, whole_tensors
from training.dry_run import DryRun
from training.log import RunLog, Window, due
from training.optim import FiniteGuard
from training.schedule import phase_steps
from training.utilisation import peak_flops

UNREADABLE = "unreadable.txt"  # in a run's folder: paths of replaced images, one per line
STARTS = ("init_weights", "stage1_checkpoint")  # a new run's weights; the second only in stage 2
PERIODS = ("save_every", "eval_every", "generate_every", "log_every", "log_grad_norm_every")
GRAD_NORM = "grad_norm"  # of the window, beside the loss's terms
REPORTED = ".reported"  # in a run's folder: the last checkpointed step with complete reports


# ---------------------------------------------------------------------- the same run?
def batch_remedy(earlier: dict[str, Any], now: dict[str, Any], ranks: int) -> str:
    """The options that restore the earlier global batch on `ranks` GPUs; empty if it is the same."""
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


# ---------------------------------------------------------------------- the run
class Due(NamedTuple):
    """What follows a step; `stop` after a signal."""

    log: bool = False
    save: bool = False
    evaluate: bool = False
    generate: bool = False
    stop: bool = False


class Run:
    """Everything around a training step that does not depend on the model.

    `Run(…)` finds the checkpoint to resume from and compares its settings. The program then builds its
    models and registers them with `checkpoint`, which restores them.
    `start` builds the loader, locks the folder and opens the log; a command refused earlier writes
    nothing. `for step in run.steps()` calls `next_batch`, `window.add`, `watch` and `due`; `finish` ends the run.
    """

    loader_iterator: Iterator[Any]
    log: RunLog
    stop: StopSignal

    def __init__(
        self,
        accelerator: Accelerator,
        options: Any,
        phases: Sequence[Phase],
        data: dict[str, Any],
        dry_run: bool,
    ):
        """`data` identifies the training data. If the run resumes, it must match, and so must all options but
        those declared with `resumes=True`.

        Raises InputError otherwise, and if the run of the checkpoint did not start from the weights that the
        options name (`STARTS`).
        """
        self.accelerator, self.options, self.phases, self.data = accelerator, options, phases, data
        self.experiment: Experiment = options.experiment
        self.training: Training = options.training
        self.total_steps = sum(phase.steps for phase in phases)
        self.batch = self.training.per_gpu_batch_size * accelerator.num_processes
        self.global_batch = self.batch * self.training.gradient_accumulation_steps
        self.flops_per_image: float | None = None  # for the log's MFU
        if not dry_run:  # which a signal may end at once
            self.stop = StopSignal(timedelta(minutes=self.training.timeout_minutes))
        self.checkpoint = Checkpoint(accelerator, self.experiment)
        self.folder, self.first_step = self.checkpoint.folder, self.checkpoint.first_step
        device = accelerator.device
        self.dry_run = DryRun(phases, self.first_step, device) if dry_run else None
        self.window, self.guard = Window(accelerator), FiniteGuard(accelerator)
        self.notes: list[str] = []  # lines for the log, before the first step
        self._timed_from: float | None = None  # until the expected time is logged
        self._unreadable = 0  # images that were reported as replaced
        self._check_ranks()
        names = STARTS if getattr(options.model, "stage", 1) == 2 else STARTS[:1]
        starts = {name: getattr(self.experiment, name) for name in names}
        if self.resumed:
            starts = self._check_resume(starts)
            self.experiment = replace(self.experiment, **starts)
            self.options = options.changed(experiment=self.experiment)
        values = self.checkpoint.values
        values |= {**starts, "autocast": accelerator.mixed_precision}
        if self.checkpoint.forks:  # which may go back: wandb ignores steps before a page's last
            values.pop("wandb", None)
        if self.training.enable_wandb:
            values.setdefault("wandb", secrets.token_hex(4))  # the id of its page

    # -------------------------------------------------- set-up
    def settings(self, step: int) -> dict[str, Any]:
        """Settings that must match when the run resumes after `step`; later phases may change."""
        phases = enumerate(phase_steps(self.phases))
        coming = tuple(f"phases[{i}]." for i, steps in phases if steps.start > step)
        options = configs.load.lasting(self.options).items()
        begun = {name: value for name, value in options if not name.startswith(coming)}
        return {**begun, **self.data, "global batch": self.global_batch}

    def _check_ranks(self) -> None:
        """Refuse a process whose command or files differ from the main one's: DDP would average gradients of
        weights that drift apart, and with other periods, ranks would wait in different collectives."""
        facts = self.settings(self.total_steps)
        facts |= {name: getattr(self.experiment, name) for name in PERIODS}
        facts["autocast"] = self.accelerator.mixed_precision
        device = self.accelerator.device  # the start has asked the first GPU of every machine only
        facts["GPU computes in bf16"] = device.type != "cuda" or has_bfloat16(device)
        facts["training.per_gpu_batch_size"] = self.training.per_gpu_batch_size
        check_same(facts, "other options or data")

    def _check_resume(self, starts: dict[str, Optional[str]]) -> dict[str, Optional[str]]:
        """Compare the settings and `STARTS` with the checkpoint's; returns the latter as recorded.

        Raises InputError if settings differ, unless the user named the checkpoint, and if `STARTS` do.
        """
        state, source = self.checkpoint, self.checkpoint.source
        earlier, now = state.values["run"], self.settings(self.first_step - 1)
        changed = differing(earlier, now)
        if changed and not state.forks:
            remedy = batch_remedy(earlier, now, self.accelerator.num_processes)
            raise InputError(
                f"{source} belongs to a run with other options or data: {changed}; restore those{remedy}, or "
                f"start another run from it with another experiment.output_dir and "
                f"experiment.resume={source}"
            )
        if changed:
            state.warnings.append(f"resumes from {source} with other options or data: {changed}")
        trained, autocast = state.values.get("autocast"), self.accelerator.mixed_precision
        if "autocast" in state.values and trained != autocast:
            state.warnings.append(
                f"{source} was trained with autocast {trained}; this run continues with {autocast}"
            )
        # A run of another kind records no stage 1; `Checkpoint.register_model` refuses it.
        recorded = {name: state.values.get(name) for name in starts}
        for name, given in starts.items():  # paths: the weights may be gone; None fits any start
            began = recorded[name]
            if given and (began is None or Path(given).resolve() != Path(began).resolve()):
                raise InputError(
                    f"{source} belongs to a run that started with experiment.{name}={began or 'null'}, "
                    f"not {given}: leave it out (null) to resume, or set another "
                    f"experiment.output_dir to start a run from these weights"
                )
        return recorded

    @property
    def resumed(self) -> bool:
        return self.checkpoint.source is not None

    def start(self, dataset: Any, images: int, listed: int) -> None:
        """Build the loader over (epoch, index < `images`), lock the folder, open the log, and warn if fewer images
        are used than the `listed` ones.

        Raises InputError if a micro-batch of all ranks has more than `images`, and if another run, which this one
        starts from, has made all of its steps.
        """
        source, last = self.checkpoint.source, self.first_step - 1
        if not self.checkpoint.own and last >= self.total_steps:
            raise InputError(
                f"{source} is at step {last} of {self.total_steps}, so no step is left to train: set more "
                f"steps, or experiment.init_weights={source} to start anew from its weights"
            )
        accelerator, params = self.accelerator, self.options.dataset.params
        if params.train_dir is not None:  # a token cache holds no images
            report = self.folder / UNREADABLE if self.dry_run is None else None
            dataset = SkipUnreadable(dataset, images, params.skip_unreadable, report)
        order = SampleOrder(  # of the micro-batches of this rank; it never ends
            images, self.training.per_gpu_batch_size, self.training.seed,
            accelerator.process_index, accelerator.num_processes,
            start=(self.first_step - 1) * self.training.gradient_accumulation_steps,
        )  # fmt: skip
        workers = worker_count(params.num_workers_per_gpu)
        loader = batch_loader(dataset, order, workers, accelerator.device)
        if self.dry_run is None:
            self.checkpoint.open(self.options)
        self.loader_iterator = iter(loader)  # its workers start to read and list unreadable images
        asked = self.stop.asked if self.dry_run is None else lambda: False
        self.log = RunLog(
            accelerator, self.experiment, asdict(self.options), self.first_step, self.total_steps,
            self.checkpoint.values.get("wandb", ""), self.dry_run is None, asked,
        )  # fmt: skip
        for line in (*(f"warning: {text}" for text in self.checkpoint.warnings), *self.notes):
            self.log.say(line)
        if images < listed:
            self.log.say(
                f"warning: experiment.max_train_examples={images} leaves images out: {listed - images} of "
                f"{listed}, evenly over all classes"
            )
        self.window.reset()
        self.checkpoint.register("window", self.window)
        self._report_unreadable()

    def describe(self, model: nn.Module, compiled: bool, images: int) -> None:
        """Log the size of the trained model, hardware, precision, batch and length."""
        training, world = self.training, self.accelerator.num_processes
        count = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        autocast = self.accelerator.mixed_precision
        by_gpu = autocast == "fp16" and training.numerics == training.mixed_precision == "auto"
        reason = " (this GPU does not compute in bf16)" * by_gpu
        self.log.say(
            f"{count / 1e6:.1f}M parameters{' sharded' * self.accelerator.is_fsdp2}, {trained / 1e6:.1f}M "
            f"trained, on {world} x {device_name(self.accelerator.device)}; numerics {training.numerics}: "
            f"autocast {autocast}{reason}{', compiled' * compiled}"
        )
        self.log.say(
            f"{images} images; {self.global_batch} per step = {training.per_gpu_batch_size} x {world} ranks x "
            f"{training.gradient_accumulation_steps}; steps {self.first_step} to {self.total_steps}, "
            f"{self.total_steps * self.global_batch / images:.1f} epochs"
        )

    def warn_of_same_data(self, path: object, identity: dict[str, str]) -> None:
        """Warn if the validation data at `path` has the identity of the training data."""
        if identity.items() <= self.data.items():
            self.log.say(
                f"warning: {printable(path)}: the validation data equals the training data, so it "
                f"shows no overfitting"
            )

    def _report_unreadable(self) -> None:
        """Warn if more images were replaced since the last call."""
        if not self.accelerator.is_main_process or self.dry_run is not None:
            return
        report = self.folder / UNREADABLE
        count = report.read_bytes().count(b"\n") if report.exists() else 0
        if count > self._unreadable:
            self.log.say(
                f"warning: {count} unreadable image{'s are' if count > 1 else ' is'} replaced by "
                f"others; {report} lists them"
            )
        self._unreadable = count

    # -------------------------------------------------- around a step
    def steps(self) -> Iterator[int]:
        """The steps to make; in a dry run, a few per phase."""
        if self.dry_run is not None:
            yield from self.dry_run.steps()
            return
        for step in range(self.first_step, self.total_steps + 1):
            yield step
            if step == self.first_step:  # the first step compiles and selects kernels
                self._timed_from = time.perf_counter()

    def next_batch(self) -> Any:
        """The next micro-batch of this rank, on the device."""
        began = time.perf_counter()
        batch = next(self.loader_iterator)
        batch = send_to_device(batch, self.accelerator.device, non_blocking=True)
        self.window.waited += time.perf_counter() - began
        self.window.images += self.batch
        return batch

    def watch(
        self, step: int, norm: Tensor, optimizer: Any, model: str = "", alternates: bool = False
    ) -> None:
        """Guard the weights against a non-finite step; `optimizer` is the prepared one.

        `model` begins the norm's name in the log. If steps alternate between two models, the norm of the step
        before a due one, which trains the other model, is logged too.
        """
        self.guard.watch(step, norm, optimizer.optimizer, self._terms())
        every = self.experiment.log_grad_norm_every
        if due(step, every) or (alternates and due(step + 1, every)):
            self.window.add(**{model + GRAD_NORM: norm})

    def _terms(self) -> dict[str, Tensor]:
        """The log window's sums of the loss terms, which the guard watches too."""
        sums = self.window.sums.items()
        return {name: value for name, value in sums if not name.endswith(GRAD_NORM)}

    def due(self, step: int) -> Due:
        """What is due after this step, the same on every rank.

        Raises InputError if a step since the last report was non-finite, before anything is logged or
        saved. Syncs with the host only if something is due.
        """
        if self.dry_run is not None:
            return Due()
        self.log.advance()
        found = self.scheduled(step, self.stop.agreed())
        if any(found):
            self.guard.raise_if_bad(self._terms())
        return found

    def scheduled(self, step: int, stop: bool = False) -> Due:
        """What is due at this step by the periods; the reports of a stopping run wait for its resume."""
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
        """Log `values` and the window's means, rates and hours left, and start a new window."""
        window, world = self.window.close(), self.accelerator.num_processes
        rate = window["images/s"]
        values = {**values, **window, "images/s per device": rate / world}
        peak = peak_flops(self.accelerator.device, self.accelerator.mixed_precision)
        if self.flops_per_image is not None and peak is not None:
            values["mfu"] = rate / world * self.flops_per_image / peak
        left = self.total_steps - step
        values["hours left"] = left * self.global_batch / rate / 3600
        self.log.metrics(step, values)
        self._report_unreadable()
        if self._timed_from is not None:
            seconds = (time.perf_counter() - self._timed_from) / (step - self.first_step)
            self.log.say(
                f"expected time: {left * seconds / 3600:.2f} hours for the {left} steps left, at "
                f"{seconds:.3g} s per step"
            )
            self._timed_from = None  # logged once

    @contextmanager
    def reporting(self, step: int, due: Due) -> Iterator[None]:
        """Around the reports of a step: excludes their time from training time, and records that those of
        a checkpointed step are complete (`missing_reports`)."""
        # Eager: odd batch sizes are not worth compiling for.
        with self.window.paused(), torch.compiler.set_stance("force_eager"):
            yield
        if due.save or (any(due) and step < self.first_step):
            on_main(lambda: write_whole(self.folder / REPORTED, str(step).encode()))

    def save(self, step: int, stop: bool) -> None:
        """Write a checkpoint; after a signal (`stop`) end the process."""
        with self.window.paused():
            self.checkpoint.values["run"] = self.settings(step)
            self.checkpoint.save(step)
        if stop:
            self.log.say(f"asked to stop: saved step {step}; run the same command again to resume")
            self._end(SAVED_AND_STOPPED)
            raise SystemExit(SAVED_AND_STOPPED)

    def export(self, model: str, name: str, suffix: str) -> None:
        """Write the weights that `checkpoint` has under the name `model`, the average if there is one, into the
        run's folder as NAME + `suffix`, the published format, and as NAME.safetensors. All ranks call this."""
        module, about = self.checkpoint.weights[model]
        weights = whole_tensors(module)

        def write() -> None:
            for ending in (suffix, ".safetensors"):
                write_state_dict(weights, self.folder / (name + ending), about)

        on_main(write)

    def attempt(
        self, name: str, work: Callable[[], Any], reduce: Optional[Callable[[Any], Any]] = None
    ) -> Any:
        """`work()` or `reduce(work())`; if either fails on any rank, a warning and None on every rank, so that
        training continues.

        Neither may talk to other ranks before everything in it that can fail has succeeded.
        """
        result, problem = None, None
        try:
            result = work()
        except torch.AcceleratorError:
            raise  # the device is unusable now
        except Exception as e:
            # A data worker's text has its traceback before it.
            text = str(e).rsplit("InputError: ")[-1].strip()
            problem = text.splitlines()[0] if isinstance(e, InputError) and text else describe(e)
        problems = [p for p in gather_object([problem]) if p is not None]
        if problems:
            self.log.say(f"warning: {name} failed: {problems[0]}; training continues without it")
            return None
        return result if reduce is None else self.attempt(name, lambda: reduce(result))

    def missing_reports(self) -> Due:
        """The reports that were due at the checkpoint that the run resumes from, if a kill prevented
        them: checkpoints are written first."""
        step, path = self.first_step - 1, self.folder / REPORTED

        def complete() -> bool:
            found = path.is_file() and path.read_text().strip() == str(step)
            if not found:
                path.unlink(missing_ok=True)  # of steps that will be made again
            return found

        if self.dry_run is not None:
            return Due()
        if on_main(complete) or not self.resumed or self.checkpoint.forks:
            return Due()
        return self.scheduled(step)._replace(log=False, save=False)

    def finish(self, name: str, suffix: str) -> None:
        """End the run, and with several ranks the process: `export` the model `name` or, of a dry run, say
        what its steps need. Raises InputError if a step of a dry run was non-finite."""
        if self.dry_run is None:
            self.export(name, name, suffix)
            self.log.say(f"done; weights in {self.folder / (name + suffix)} and .safetensors")
        else:
            self.guard.raise_if_bad(self._terms())
            for line in self.dry_run.report(self.global_batch):
                self.log.say(line)
        self._end(0)

    def _end(self, status: int) -> None:
        """Close the log. With several ranks, exit at once: freeing DDP's objects may deadlock with gloo's
        thread, which needs the interpreter to free a tensor (seen with torch 2.9.1)."""
        self.log.close()
        if self.accelerator.num_processes > 1:
            leave(status)
