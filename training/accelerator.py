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
from configs.schema import Training
from runtime.errors import InputError
from runtime.processes import set_matmul_precision

# Gradients per all-reduce. torch.compile also splits a model at every bucket and compiles each part:
# with PyTorch's 25 MiB, B is compiled in 26 parts and XL in 66.
BUCKET_MIB = 250


def precision(training: Training) -> str:
    """The autocast type by accelerate's name; auto is bf16 on CUDA and float32 on a CPU."""
    if training.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise InputError("training.mixed_precision=fp16 needs a CUDA device: choose bf16 or no")
    if training.mixed_precision != "auto":
        return training.mixed_precision
    return "bf16" if torch.cuda.is_available() else "no"


def start_training(training: Training) -> Accelerator:
    """The accelerator of a training program, with the run's matmul precision."""
    check_environment(training, precision(training))
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=precision(training),
        gradient_accumulation_steps=training.gradient_accumulation_steps,
        log_with="wandb" if training.enable_wandb else None,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=training.timeout_minutes)),
            # No model has buffers that differ between ranks; a view spares a copy of all gradients.
            DistributedDataParallelKwargs(
                bucket_cap_mb=BUCKET_MIB, broadcast_buffers=False, gradient_as_bucket_view=True
            ),
        ],
    )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.num_processes > 1:
        start_fsdp(accelerator)
    set_matmul_precision("tf32" if training.enable_tf32 else "fp32")
    return accelerator


def tune_convolutions(device: torch.device) -> None:
    """On CUDA, let cuDNN time its algorithms once per shape; the shapes of training are fixed."""
    torch.backends.cudnn.benchmark = device.type == "cuda"


def start_fsdp(accelerator: Accelerator) -> None:
    """Let the FSDP that accelerate's config asks for run on CPUs too, and compute as DDP does."""
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:  # accelerate: FSDP on GPUs only
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()  # reads the launcher's environment
    # Autocast alone decides the types. FSDP's own policy would also round what enters each block:
    # the rotary table and the residual stream.
    assert state.fsdp_plugin is not None, "accelerate sets it where FSDP is asked for"
    state.fsdp_plugin.mixed_precision_policy = None
