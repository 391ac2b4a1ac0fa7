"""Stopping on a signal: all ranks finish the same step and save it; the exit status says so."""

import os
import signal
import time
from datetime import timedelta
from types import FrameType

import torch.distributed as dist
from torch.distributed import distributed_c10d

from runtime.errors import InputError

SAVED_AND_STOPPED = 75  # exit status: the same command resumes (sysexits' EX_TEMPFAIL)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
PATIENCE = 3.0  # seconds within which another signal is the same one, forwarded by a launcher
# Seconds after a signal within which all ranks must answer: launchers kill after 30, so waiting longer
# for a dead rank is useless.
ANSWER_WITHIN = 20.0


class StopRequest:
    """A signal handler that notes the first signal and ends the process at the second."""

    def __init__(self) -> None:
        self.at: float | None = None  # seconds on the monotonic clock

    def __call__(self, number: int, frame: FrameType | None) -> None:
        alone = number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ
        if self.at is None:
            self.at = time.monotonic()
        elif time.monotonic() - self.at > (0.0 if alone else PATIENCE):
            os._exit(128 + number)


def listen(request: StopRequest) -> None:
    """Install `request` as the handler of every stop signal that is not ignored (nohup)."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, request)


class StopSignal:
    """SIGTERM, SIGUSR1, SIGINT (Ctrl-C) or SIGHUP to any rank asks all of them to stop; a second signal
    exits at once.

    A scheduler or terminal may signal all processes while torchrun forwards the same signal, so a signal
    counts as the second only `PATIENCE` seconds after the first; a second Ctrl-C without torchrun counts
    at once. `agreed` uses the store of the process group: it needs no device and no network besides
    NCCL's, and waits at most `timeout` for a rank.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.request = StopRequest()
        self.store: distributed_c10d.Store | None = None
        self.timeout = timeout.total_seconds()
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.store = distributed_c10d.PrefixStore("stop", distributed_c10d._get_default_store())
        self.rounds = 0
        listen(self.request)

    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.request.at is not None

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        if self.store is None:
            return self.asked()
        self.rounds += 1
        answer = f"answer {self.rounds}"
        if self.asked():
            self.store.set("asked", "")
        # No rank is a round ahead, so the last call of a round completes a multiple of the world size.
        if self.store.add("calls", 1) == self.rounds * dist.get_world_size():
            self.store.delete_key(f"answer {self.rounds - 1}")  # all have read it by now
            self.store.set(answer, str(self.store.check(["asked"])))
        self._wait_for(self.store, answer)
        return self.store.get(answer) == b"True"

    def _wait_for(self, store: distributed_c10d.Store, answer: str) -> None:
        """Wait for all ranks, a second at a time, so that signals are handled in between.

        Raises InputError if a rank does not answer in time.
        """
        started = time.monotonic()
        while True:
            try:
                return store.wait([answer], timedelta(seconds=1))
            except dist.DistStoreError as e:
                now, asked = time.monotonic(), self.request.at
                late = asked and now - max(asked, started) > ANSWER_WITHIN
                if now - started > self.timeout or late:
                    raise InputError(
                        "another rank died or does not answer: see its messages, then run the same "
                        "command again to resume"
                    ) from e


def outlive_first_signal(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: keeps workers alive while their rank finishes its step after a signal.

    torchrun signals whole process groups, workers included. They end when their rank ends or stops them.
    """
    listen(StopRequest())
