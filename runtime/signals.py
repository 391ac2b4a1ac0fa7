"""Stopping on request: the step is finished on all ranks together, saved, and the status says so."""

import os
import signal
import time
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

SAVED_AND_STOPPED = 75  # exit status: the same command goes on (sysexits' EX_TEMPFAIL)
ASKING = (signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 3.0  # seconds


class Request:
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

    One request may arrive twice, from whoever signals all processes and from torchrun, which passes
    it on: only `PATIENCE` seconds after the first is it a second one.
    `agreed` is one small all-reduce between the CPUs of the ranks; it waits for no device, and
    for a rank that does not answer no longer than `timeout`.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.request = Request()
        self.group = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timeout)
        for number in ASKING:
            signal.signal(number, self.request)

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        if self.group is None:
            return self.request.made
        flag = torch.tensor([float(self.request.made)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


def outlive_first_signal(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: the step that is to be finished needs its workers.

    torchrun signals a whole process group, workers included, which PyTorch lets die of it. They end
    when their rank asks them to or is gone.
    """
    request = Request()
    for number in ASKING:
        signal.signal(number, request)
