"""The accelerator of a training program: its processes, its numerics and FSDP."""

import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
)

from configs.schema import TokenizerTraining, Training
from modeling.devices import has_bfloat16, uses_cuda
from runtime.errors import InputError
from runtime.processes import refuse_leftovers, set_tf32

OFF = ("", "0", "no", "false", "none", "off")
# {variable of the environment: remedy}; refused unless off.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "launch without DeepSpeed; configs/accelerate_fsdp.yaml shards models",
    "ACCELERATE_USE_MEGATRON_LM": "launch without Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "launch without a parallelism config",
    "ACCELERATE_DYNAMO_BACKEND": "set training.compile=True instead of a dynamo backend",
}


# ---------------------------------------------------------------------- numerics
@dataclass(frozen=True)
class Numerics:
    """How a training program computes; without autocast everything is float32.

    The tokenizer's losses, perceptual networks, quantizer and clustering are always float32; quantizer,
    clustering and a frozen encoder never use TF32.
    """

    autocast: str  # accelerate's name: no, bf16 or fp16
    tf32_products: bool  # on CUDA, of what is float32
    tf32_convolutions: bool
    exact_critic: bool  # discriminator in float32 whatever the autocast type


# By `training.numerics`. On CUDA; elsewhere autocast is off unless training.mixed_precision=bf16.
TABLE = {
    "published": Numerics("fp16", False, True, exact_critic=True),
    "fast": Numerics("bf16", True, True, exact_critic=False),
    "exact": Numerics("no", False, False, exact_critic=True),
}


def numerics_of(training: Training) -> Numerics:
    """The numerics of a run on this machine.

    `auto` is fast or, on a GPU without bf16, published. `mixed_precision` and `enable_tf32` take precedence.
    Raises InputError for an autocast type that the device does not support.
    """
    mode, autocast, tf32 = training.numerics, training.mixed_precision, training.enable_tf32
    cuda = uses_cuda()
    bf16 = not cuda or has_bfloat16(torch.device("cuda"))
    if mode == "published" and not isinstance(training, TokenizerTraining):
        mode = "fast"  # the generator was published with bf16 and TF32
    if mode == "auto":
        mode = "fast" if bf16 else "published"
    numerics = TABLE[mode]
    if autocast == "auto":
        autocast = numerics.autocast if cuda else "no"
    if autocast == "fp16" and not cuda:
        raise InputError("training.mixed_precision=fp16 needs a CUDA device: choose bf16 or no")
    if autocast == "bf16" and not bf16:
        raise InputError(
            "this GPU only emulates bf16: leave training.numerics and training.mixed_precision at auto, "
            "or set training.mixed_precision=fp16"
        )
    if isinstance(tf32, bool):
        numerics = replace(numerics, tf32_products=tf32, tf32_convolutions=tf32)
    return replace(numerics, autocast=autocast)


# ---------------------------------------------------------------------- the environment
def check_environment(training: Training, numerics: Numerics) -> None:
    """Raise InputError, naming variable and option, for a variable of accelerate or PyTorch that would silently
    override the config.

    `accelerate launch` and its config file set some of them. Those that place processes (ranks, ports,
    devices) or shard models (FSDP) are allowed.
    """

    def value_of(name: str) -> str:
        return os.environ.get(name, "").strip().lower()

    def contradiction(name: str, option: str) -> InputError:
        return InputError(
            f"the environment has {name}={os.environ[name]}, but the config has training.{option}: "
            f"unset the variable or change the option"
        )

    for name, remedy in UNSUPPORTED.items():
        if value_of(name) not in OFF:
            raise InputError(f"the environment has {name}={os.environ[name]}: {remedy}")
    name, steps = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", training.gradient_accumulation_steps
    if value_of(name) not in ("", "auto", str(steps)):
        raise contradiction(name, f"gradient_accumulation_steps={steps}")
    name, asked = "ACCELERATE_MIXED_PRECISION", training.mixed_precision
    if value_of(name) not in (*OFF, numerics.autocast):
        shown = asked if asked == numerics.autocast else f"{asked} ({numerics.autocast})"
        raise contradiction(name, f"mixed_precision={shown}")
    # On CUDA both override torch's switches, which the run sets; 0 in the second equals unset.
    tf32 = {numerics.tf32_products, numerics.tf32_convolutions}
    option = "numerics" if training.enable_tf32 == "auto" else "enable_tf32"
    for name, value, forced in (
        ("NVIDIA_TF32_OVERRIDE", "0", False),
        ("NVIDIA_TF32_OVERRIDE", "1", True),
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1", True),
    ):
        if uses_cuda() and value_of(name) == value and tf32 != {forced}:
            raise contradiction(name, f"{option}={getattr(training, option)}")
    if asks_for_fsdp() and value_of("FSDP_VERSION") != "2":
        raise InputError(
            f"the environment has ACCELERATE_USE_FSDP=true with FSDP_VERSION="
            f"{os.environ.get('FSDP_VERSION', '1')}: only FSDP 2 is supported, as "
            f"configs/accelerate_fsdp.yaml sets it"
        )


def asks_for_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


# ---------------------------------------------------------------------- the accelerator
def start_training(training: Training) -> Accelerator:
    """The accelerator of a training program, with the run's numerics.

    Raises InputError if the environment contradicts the options, if the device lacks the autocast type, and
    for a tokenizer under FSDP.
    """
    numerics = numerics_of(training)
    check_environment(training, numerics)
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
    if asks_for_fsdp() and accelerator.num_processes > 1:
        if isinstance(training, TokenizerTraining):
            raise InputError(
                "the tokenizer does not train under FSDP, which shards the codebook that clustering moves: "
                "launch with torchrun, or accelerate without --use_fsdp (its models fit on one GPU)"
            )
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
