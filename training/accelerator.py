"""The accelerator of a training program: its processes, autocast type and FSDP."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)

from configs.environment import check_environment
from configs.numerics import Numerics, resolve
from configs.schema import Training
from modeling.devices import has_bfloat16, uses_cuda
from runtime.errors import InputError
from runtime.processes import refuse_leftovers, set_tf32


def describe_precision(training: Training) -> str:
    """The autocast type for a run's header, with the reason if the GPU decided it."""
    found = numerics_of(training).autocast
    by_gpu = found == "fp16" and training.numerics == training.mixed_precision == "auto"
    return f"{found} (this GPU does not compute in bf16)" if by_gpu else found


def numerics_of(training: Training) -> Numerics:
    """The numerics of a run on this machine (`configs.numerics.resolve`)."""
    cuda = uses_cuda()
    bf16 = not cuda or has_bfloat16(torch.device("cuda"))
    return resolve(training, cuda, bf16)


def start_training(training: Training) -> Accelerator:
    """The accelerator of a training program, with the run's numerics.

    Raises InputError if the environment contradicts the options.
    """
    numerics = numerics_of(training)
    if numerics.autocast == "bf16" and uses_cuda() and not has_bfloat16(torch.device("cuda")):
        raise InputError(
            "this GPU only emulates bf16: leave training.numerics and training.mixed_precision at auto, "
            "or set training.mixed_precision=fp16"
        )
    check_environment(training, numerics.autocast)
    refuse_leftovers()
    accelerator = Accelerator(
        cpu=not uses_cuda(),
        mixed_precision=numerics.autocast,
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        log_with="wandb" if training.enable_wandb else None,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=training.timeout_minutes)),
            # No model has buffers that differ between ranks; a view spares a copy of all gradients.
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        ],
    )
    if (
        os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
        and accelerator.num_processes > 1
    ):
        start_fsdp(accelerator)
    set_tf32(numerics.tf32_products, numerics.tf32_convolutions)
    return accelerator


def start_fsdp(accelerator: Accelerator) -> None:
    """Make accelerate's FSDP run on CPUs too, with the numerics of DDP."""
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:  # accelerate: FSDP on GPUs only
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()  # reads the launcher's environment
    # FSDP's own policy would round the inputs of each block, the rotary table and the residual stream.
    assert state.fsdp_plugin is not None, "accelerate sets it for FSDP"
    state.fsdp_plugin.mixed_precision_policy = None
