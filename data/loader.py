"""Loaders of batches, and how many workers read data."""

import os
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from runtime.processes import local_processes
from runtime.signals import outlive_first_signal


def worker_count(asked: int | None = None) -> int:
    """Data workers of this process; by default 8, but at most its share of the machine's cores."""
    if asked is not None:
        return asked
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(min(8, cores // local_processes()), 1)


def batch_loader(dataset: Dataset, batches: Any, workers: int, device: torch.device) -> DataLoader:
    """Batches of these indices for a device, read by workers that outlive their rank's first signal."""
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda",
        worker_init_fn=outlive_first_signal,
    )  # fmt: skip
