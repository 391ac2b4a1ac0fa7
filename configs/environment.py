"""Environment variables of accelerate and PyTorch that would silently override a run's config.

`accelerate launch` and its config file set some of them. Variables that contradict the config are refused,
so that a run does what its `config.yaml` says. Those that place processes (ranks, ports, devices) or shard
models (FSDP) are allowed.
"""

import os
from collections.abc import Mapping

from configs.numerics import resolve
from configs.schema import Training
from runtime.errors import InputError

OFF = ("", "0", "no", "false", "none", "off")
# {variable: remedy}; refused unless off.
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "launch without DeepSpeed; configs/accelerate_fsdp.yaml shards models",
    "ACCELERATE_USE_MEGATRON_LM": "launch without Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "launch without a parallelism config",
    "ACCELERATE_DYNAMO_BACKEND": "set training.compile=True instead of a dynamo backend",
}


def check_environment(
    training: Training, precision: str, environment: Mapping[str, str] = os.environ
) -> None:
    """Raise InputError, naming variable and option, if the environment contradicts the config.

    `precision` is the resolved training.mixed_precision: no, bf16 or fp16.
    """

    def value_of(name: str) -> str:
        return environment.get(name, "").strip().lower()

    for name, remedy in UNSUPPORTED.items():
        if value_of(name) not in OFF:
            raise InputError(f"the environment has {name}={environment[name]}: {remedy}")
    name, steps = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", training.gradient_accumulation_steps
    if value_of(name) not in ("", "auto", str(steps)):
        raise contradiction(environment, name, f"training.gradient_accumulation_steps={steps}")
    name, asked = "ACCELERATE_MIXED_PRECISION", training.mixed_precision
    if value_of(name) not in (*OFF, precision):
        shown = asked if asked == precision else f"{asked} ({precision})"
        raise contradiction(environment, name, f"training.mixed_precision={shown}")
    # Both override torch's switches, which the run sets; 0 in the second equals unset.
    numerics = resolve(training, cuda=True)
    tf32 = {numerics.tf32_products, numerics.tf32_convolutions}
    option = "numerics" if training.enable_tf32 == "auto" else "enable_tf32"
    for name, value, forced in (
        ("NVIDIA_TF32_OVERRIDE", "0", False),
        ("NVIDIA_TF32_OVERRIDE", "1", True),
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1", True),
    ):
        if value_of(name) == value and tf32 != {forced}:
            raise contradiction(environment, name, f"training.{option}={getattr(training, option)}")
    if value_of("ACCELERATE_USE_FSDP") == "true" and value_of("FSDP_VERSION") != "2":
        raise InputError(
            f"the environment has ACCELERATE_USE_FSDP=true with FSDP_VERSION="
            f"{environment.get('FSDP_VERSION', '1')}: only FSDP 2 is supported, as "
            f"configs/accelerate_fsdp.yaml sets it"
        )


def contradiction(environment: Mapping[str, str], name: str, option: str) -> InputError:
    return InputError(
        f"the environment has {name}={environment[name]}, but the config has {option}: unset the "
        f"variable or change the option"
    )
