"""The endless loader of both trainers, and how many workers read data."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from configs.schema import Training
from data.order import SampleOrder
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


def training_loader(
    dataset: Dataset,
    items: int,
    training: Training,
    workers: int | None,
    accelerator: Accelerator,
    first_step: int,
) -> DataLoader:
    """Endless micro-batches of this rank from step `first_step` on.

    A step takes `training.gradient_accumulation_steps` of them. The dataset is indexed by
    (epoch, index) with index < `items`. Raises InputError if a micro-batch of all ranks exceeds `items`.
    """
    order = SampleOrder(
        items,
        training.per_gpu_batch_size,
        training.seed,
        accelerator.process_index,
        accelerator.num_processes,
        start=(first_step - 1) * training.gradient_accumulation_steps,
    )
    return batch_loader(dataset, order, worker_count(workers), accelerator.device)


def batch_loader(dataset: Dataset, batches: Any, workers: int, device: torch.device) -> DataLoader:
    """Batches of these indices for a device, read by workers that outlive their rank's first signal."""
    return DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, pin_memory=device.type == "cuda",
        worker_init_fn=outlive_first_signal,
    )  # fmt: skip
