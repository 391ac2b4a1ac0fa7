"""The data loader of both trainers."""

from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from configs.schema import Training
from data.order import SampleOrder
from runtime.signals import outlive_first_signal


def training_loader(
    dataset: Dataset,
    items: int,
    training: Training,
    workers: int,
    accelerator: Accelerator,
    first_step: int,
) -> DataLoader:
    """Endless micro-batches of this rank from step `first_step` on.

    Every `training.gradient_accumulation_steps` of them are a step. The dataset is indexed by
    (epoch, index) with index < `items`. Raises InputError where a global batch has more samples.
    """
    order = SampleOrder(
        items,
        training.per_gpu_batch_size,
        training.seed,
        accelerator.process_index,
        accelerator.num_processes,
        start=(first_step - 1) * training.gradient_accumulation_steps,
    )
    return DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
        worker_init_fn=outlive_first_signal,
    )
