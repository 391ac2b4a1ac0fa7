"""Stopping on request: the step is finished on all ranks together, saved, and the status says so."""

import os
import signal
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

SAVED_AND_STOPPED = 75  # exit status: the same command goes on (sysexits' EX_TEMPFAIL)
ASKING = (signal.SIGTERM, signal.SIGUSR1)


class StopSignal:
    """SIGTERM or SIGUSR1 to any rank asks all of them to stop; a second one exits at once.

    `agreed` is one small all-reduce between the CPUs of the ranks; it waits for no device, and
    for a rank that does not answer no longer than `timeout`.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.asked = False
        self.group = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo", timeout=timeout)
        for number in ASKING:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(128 + number)
        self.asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        if self.group is None:
            return self.asked
        flag = torch.tensor([float(self.asked)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)


def outlive_first_signal(worker: int) -> None:
    """A DataLoader's `worker_init_fn`: the step that is to be finished needs its workers.

    torchrun, SLURM and a terminal signal a whole process group, workers included, which PyTorch
    lets die of it. They end with their rank, or at the second signal.
    """
    asked = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            os._exit(128 + number)
        asked = True

    for number in ASKING:
        signal.signal(number, handle)
