"""Stopping on a signal: all ranks finish the same step and save it; the exit status says so."""

import os
import signal
import time
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

SAVED_AND_STOPPED = 75  # exit status: the same command resumes (sysexits' EX_TEMPFAIL)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 3.0  # seconds


class StopRequest:
    """A signal handler that notes the first signal and ends the process at the second."""

    def __init__(self) -> None:
        self.at: float | None = None  # seconds on the monotonic clock

    @property
    def made(self) -> bool:
        return self.at is not None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.at is None:
            self.at = time.monotonic()
        elif time.monotonic() - self.at > PATIENCE:
            os._exit(128 + number)


class StopSignal:
    """SIGTERM or SIGUSR1 to any rank asks all of them to stop; a second one exits at once.

    One request may arrive twice: from the scheduler that signals all processes, and from torchrun,
    which passes it on. So a signal counts as a second one only `PATIENCE` seconds after the first.
    `agreed` is one small all-reduce between the CPUs of the ranks. It does not wait for a device,
    and it waits for a rank that does not answer no longer than `timeout`.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.request = StopRequest()
        self.group: dist.ProcessGroup | None = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            group = dist.new_group(backend="gloo", timeout=timeout)
            self.group = (
                group if isinstance(group, dist.ProcessGroup) else None
            )  # all ranks are in it
        for number in STOP_SIGNALS:
            signal.signal(number, self.request)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        if self.group is None:
            return self.request.made
        flag = torch.tensor([float(self.request.made)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


def outlive_first_signal(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: the step that must be finished needs its data workers.

    torchrun signals a whole process group, workers included, and by default they would die of it.
    With this they end when their rank tells them to, or has ended itself.
    """
    request = StopRequest()
    for number in STOP_SIGNALS:
        signal.signal(number, request)
