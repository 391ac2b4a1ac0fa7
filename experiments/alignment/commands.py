"""Chains of commands, several at once: resumable, timed, stopped together at the first failure.

A chain is a folder and the steps that fill it, in order. FOLDER/steps.json says which commands are done;
FOLDER/STEP.log and FOLDER/STEP.err hold what they printed.
"""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from runtime.errors import InputError
from runtime.files import file_sha256, write_whole


@dataclass(frozen=True)
class Step:
    """A command of Python, without the interpreter, and the files by which it is known to be done.

    `answer` is a file for the last line that it prints, a JSON object. Outputs of other options are
    refused; with `again` they are made anew.
    """

    name: str
    command: list[str]
    outputs: list[Path]
    answer: Path | None = None
    again: bool = False

    @property
    def done(self) -> bool:
        return all(
            path.exists() for path in [*self.outputs, *([self.answer] if self.answer else [])]
        )

    def identity(self) -> dict[str, Any]:
        """What must not have changed for the outputs to count: the command and the configs that it names."""
        files = [
            word.removeprefix("config=") for word in self.command if word.startswith("config=")
        ]
        return {
            "command": self.command,
            "configs": {file: file_sha256(Path(file)) for file in files},
        }


@dataclass(frozen=True)
class Chain:
    """Steps that follow one another; chains are independent of each other."""

    title: str
    folder: Path
    steps: list[Step]


@dataclass
class Times:
    """Minutes of finished commands, by the clock and on processors."""

    wall: float
    processor: float


@dataclass
class Commands:
    """Runs chains, at most `jobs` at once; every command has its share of the cores' threads."""

    jobs: int
    started: float = field(default_factory=time.monotonic)
    processor: float = 0.0  # minutes of this run's commands
    ran: int = 0  # commands of this run
    skipped: int = 0  # commands that were done before
    stopped: bool = False
    _running: set[int] = field(default_factory=set)
    _lock: Lock = field(default_factory=Lock)

    @property
    def minutes(self) -> float:
        return (time.monotonic() - self.started) / 60

    def run(self, chains: list[Chain]) -> None:
        """Finish all chains, the longest first. Raises InputError with the one line of a command that failed."""
        longest_first = sorted(chains, key=lambda chain: -len(chain.steps))
        at_once = max(min(self.jobs, len(chains)), 1)
        variables = {
            **os.environ,
            "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // at_once, 1)),
        }
        with ThreadPoolExecutor(at_once) as pool:
            futures = [pool.submit(self._run_chain, chain, variables) for chain in longest_first]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self._stop()
                raise

    def _stop(self) -> None:
        """Ask the running commands to stop: trainers save their step first."""
        with self._lock:
            self.stopped = True
            for process in self._running:
                os.kill(process, signal.SIGTERM)

    def _say(self, line: str) -> None:
        print(f"[{self.minutes:5.1f} min] {line}", flush=True)

    def _run_chain(self, chain: Chain, variables: dict[str, str]) -> None:
        chain.folder.mkdir(parents=True, exist_ok=True)
        file = chain.folder / "steps.json"
        records = json.loads(file.read_text()) if file.exists() else {}
        for number, step in enumerate(chain.steps):
            record, identity = records.get(step.name), step.identity()
            same = record is not None and {name: record[name] for name in identity} == identity
            if record is not None and step.done and not (same or step.again):
                raise InputError(
                    f"{chain.folder} was made by other options of {step.name} (steps.json there has "
                    f"its command): remove the folder, or pass another --output"
                )
            if same and step.done:
                self.skipped += 1
                continue
            for later in chain.steps[number:]:  # made from what is about to change
                records.pop(later.name, None)
            times = self._run_step(chain, step, variables)
            if times is None:
                return
            records[step.name] = {
                **identity, "minutes": round(times.wall, 3), "processor minutes": round(times.processor, 3)
            }  # fmt: skip
            write_whole(file, json.dumps(records, indent=1).encode())

    def _run_step(self, chain: Chain, step: Step, variables: dict[str, str]) -> Times | None:
        """Run one command to its end; None where it was stopped because another one failed."""
        log, errors = (chain.folder / f"{step.name}.{suffix}" for suffix in ("log", "err"))
        with open(log, "w") as out, open(errors, "w") as err:
            with self._lock:
                if self.stopped:
                    return None
                # A session of its own: the terminal's ^C reaches it through `_stop`, so it saves.
                process = subprocess.Popen(
                    [sys.executable, *step.command], stdout=out, stderr=err,
                    env=variables, start_new_session=True,
                )  # fmt: skip
                self._running.add(process.pid)
            began = time.monotonic()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        times = Times((time.monotonic() - began) / 60, (usage.ru_utime + usage.ru_stime) / 60)
        with self._lock:
            self._running.discard(process.pid)
            self.processor += times.processor
            self.ran += 1
            if self.stopped and process.returncode:
                return None
        if process.returncode:
            raise InputError(
                f"{chain.title}: {step.name} failed: {reason(errors)} (all in {errors})"
            )
        if step.answer is not None:
            write_whole(step.answer, last_line(log).encode())
        missing = [path for path in step.outputs if not path.exists()]
        if missing:
            raise InputError(f"{chain.title}: {step.name} did not write {missing[0]}: see {log}")
        self._say(
            f"{chain.title}: {step.name} took {times.wall:.2f} min, {times.processor:.2f} of processor time"
        )
        return times


def last_line(file: Path) -> str:
    """The last line of a log that is not empty."""
    lines = [line.strip() for line in file.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"


def reason(errors: Path) -> str:
    """Why a command failed, in one line: its own, or the last one of its traceback."""
    lines = errors.read_text(errors="replace").splitlines()
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return own[-1] if own else last_line(errors)
