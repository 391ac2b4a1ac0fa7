"""Reports of a run: a progress bar, a line per window, metrics.jsonl, PNGs and wandb."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from configs.schema import Experiment
from data.pictures import picture_grid, to_pixels, with_captions, write_png
from runtime.errors import InputError
from runtime.files import write_whole, writing


def due(step: int, every: int) -> bool:
    """Whether something that happens every `every` steps (0: never) happens at this step."""
    return every > 0 and step % every == 0


Records = list[dict[str, float]]


def read_records(path: Path) -> Records:
    """The records of a metrics.jsonl. Lines that a kill cut short are left out; a missing file has none."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [record for record in found if isinstance(record, dict) and "step" in record]


class RunLog:
    """Reports of one run by the main process; calls on other processes do nothing.

    `page` is the run's id at wandb. With `write=False` lines are printed, but nothing goes to files or wandb.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        experiment: Experiment,
        config: dict[str, Any],
        first_step: int,
        total_steps: int,
        page: str = "",
        write: bool = True,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ):
        self.accelerator = accelerator
        self.main = accelerator.is_main_process
        self.write = self.main and write
        self.folder = Path(experiment.output_dir)
        self._earlier: set[tuple[float, frozenset[str]]] = set()
        self._tracks = True  # until wandb fails
        self.asked_to_stop = asked_to_stop
        if accelerator.log_with and write:
            self._start_wandb(experiment, config, page)
        if self.write:
            self._cut(first_step)
            with writing(self.folder):
                self.file = open(self.folder / "metrics.jsonl", "a")  # noqa: SIM115
        hidden = None if self.write else True  # None: without a terminal
        self.bar = tqdm(total=total_steps, initial=first_step - 1, unit="step", disable=hidden)

    def _start_wandb(self, experiment: Experiment, config: dict[str, Any], page: str) -> None:
        init = {"name": experiment.name, "dir": str(self.folder), "id": page, "resume": "allow"}
        try:
            self.accelerator.init_trackers(
                experiment.project, config=config, init_kwargs={"wandb": init}
            )
        except Exception as e:  # wandb's errors share no base class
            reason = (str(e).strip() or repr(e)).splitlines()[0]
            raise InputError(
                f"wandb did not start ({reason}); run `wandb login`, set WANDB_MODE=offline or "
                f"training.enable_wandb=False"
            ) from e

    def _cut(self, first_step: int) -> None:
        """Drop records of steps that a resumed run will repeat; remember those of the step before."""
        path = self.folder / "metrics.jsonl"
        kept = [record for record in read_records(path) if record["step"] < first_step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        if path.exists() and path.read_text(errors="replace") != text:
            write_whole(path, text.encode())
        last = [record for record in kept if record["step"] == first_step - 1]
        self._earlier = {(record["step"], frozenset(record) - {"step"}) for record in last}

    @contextmanager
    def _printing(self) -> Iterator[None]:
        """Ignores errors of the terminal or pipe once the run is asked to stop. The event that closed them, such as
        Ctrl-C in a pipeline, may also have sent the signal, and the step must still be saved."""
        try:
            yield
        except OSError:
            if not self.asked_to_stop():
                raise

    def say(self, text: str) -> None:
        if self.main:
            with self._printing():
                tqdm.write(f"{time.strftime('%H:%M:%S')} {text}")

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        with self._printing():
            self.bar.update()

    def metrics(self, step: int, values: dict[str, float] | None) -> None:
        """Print a record and add it to metrics.jsonl and wandb.

        None, of a report that failed, is skipped, and so is a record that an earlier start of the run has
        written (same step and names).
        """
        if not self.main or values is None or (step, frozenset(values)) in self._earlier:
            return
        if self.write:
            with writing(self.file.name):
                self.file.write(json.dumps({"step": step, **values}) + "\n")
                self.file.flush()
                # Durable before the checkpoints and marks that rely on it.
                os.fsync(self.file.fileno())
            self._track(lambda: self.accelerator.log(values, step=step))
        line = " ".join(f"{k} {v:.4g}" for k, v in values.items())
        self.say(f"step {step} {line}")

    def lowest(self, name: str, since: int) -> float:
        """The lowest value of `name` from step `since` on; infinite if there is none."""
        records = read_records(self.folder / "metrics.jsonl") if self.write else []
        found = [record[name] for record in records if name in record and record["step"] >= since]
        return min((value for value in found if not math.isnan(value)), default=math.inf)

    def images(
        self, step: int, name: str, images: Tensor, per_row: int, captions: Sequence[str] = ()
    ) -> None:
        """A grid of images (N, 3, H, W) in [0, 1] as NAME-STEP.png and to wandb."""
        if not self.write:
            return
        pixels = to_pixels(images.float())
        if captions:
            pixels = with_captions(pixels, captions)
        picture = picture_grid(pixels, per_row, margin=2)
        write_png(picture, self.folder / "previews" / f"{name}-{step:08d}.png")
        shown = {name: [Image.fromarray(picture)]}
        for tracker in self.accelerator.trackers:  # wandb, if any
            self._track(partial(tracker.log_images, shown, step=step))  # type: ignore[attr-defined]

    def close(self) -> None:
        """End the run's trackers and the progress bar."""
        with self._printing():
            self.bar.close()
        if self.write:
            self.file.close()
        self._tracks = True  # also what was queued before a failure
        for tracker in self.accelerator.trackers:
            self._track(tracker.finish)
        self.accelerator.state.destroy_process_group()

    def _track(self, send: Callable[[], None]) -> None:
        """Send something to wandb. Its first failure is a warning, and nothing is sent after it."""
        if self._tracks:
            try:
                send()
            except Exception as e:  # wandb's errors share no base class
                self._tracks = False
                self.say(f"warning: wandb failed ({e!r}); training continues without it")


class Window:
    """Means since the last report, kept on the device, so that only logging steps transfer data."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.images = 0  # of all ranks
        self.waited = 0.0  # seconds spent waiting for data
        self.started = time.perf_counter()

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time within, for evaluation, previews and saving, from training time."""
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def state_dict(self) -> dict[str, Any]:
        """An unfinished window: names, sums (ranks, names), counts."""
        names = sorted(self.sums)
        if not names:
            return {}
        row: Any = torch.stack([self.sums[n] for n in names])[None]
        sums: Any = self.accelerator.gather(row)  # a row per rank
        return {"names": names, "sums": sums.cpu(), "counts": dict(self.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume a window; on another number of ranks each gets the mean of the sums."""
        if not state_dict:
            return
        sums, accelerator = state_dict["sums"], self.accelerator
        same_ranks = len(sums) == accelerator.num_processes
        own = sums[accelerator.process_index] if same_ranks else sums.mean(0)
        self.sums = dict(zip(state_dict["names"], own.to(accelerator.device)))
        self.counts = dict(state_dict["counts"])

    def close(self) -> dict[str, float]:
        """Means over the window and all ranks, total images/s and the share of time spent waiting for
        data; then the window starts anew."""
        names = sorted(self.sums)
        own: Any = torch.stack([self.sums[n] / self.counts[n] for n in names])
        means: Any = self.accelerator.reduce(own, "mean")
        seconds = time.perf_counter() - self.started
        result = dict(zip(names, means.tolist()))
        result["images/s"] = self.images / seconds
        result["data wait"] = self.waited / seconds
        self.reset()
        return result
