"""Stopping on request: the step is finished on all ranks together, saved, and the status says so."""

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist

SAVED_AND_STOPPED = 75  # exit status: the same command goes on (sysexits' EX_TEMPFAIL)


class StopSignal:
    """SIGTERM or SIGUSR1 to any rank asks all of them to stop; a second one exits at once.

    `agreed` is one small all-reduce between the CPUs of the ranks; it waits for no device.
    """

    def __init__(self) -> None:
        self.asked = False
        self.process = os.getpid()
        self.group = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.group = dist.new_group(backend="gloo")
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A DataLoader's worker inherits the handler; it has nothing to save.
        if self.asked or os.getpid() != self.process:
            os._exit(128 + number)
        self.asked = True

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        if self.group is None:
            return self.asked
        flag = torch.tensor([float(self.asked)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)
