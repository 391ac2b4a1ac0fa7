"""The meaning of `training.numerics`: autocast type, TF32, the discriminator's precision."""

from dataclasses import dataclass, replace

from configs.schema import TokenizerTraining, Training
from runtime.errors import InputError


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


# On CUDA; elsewhere autocast is off unless training.mixed_precision=bf16.
TABLE = {
    "published": Numerics("fp16", False, True, exact_critic=True),
    "fast": Numerics("bf16", True, True, exact_critic=False),
    "exact": Numerics("no", False, False, exact_critic=True),
}


def resolve(training: Training, cuda: bool, bf16: bool = True) -> Numerics:
    """The numerics of a run; `cuda`: it trains on CUDA, `bf16`: the device computes in bf16.

    `auto` is fast or, without bf16, published. `mixed_precision` and `enable_tf32` take precedence.
    Raises InputError for fp16 without CUDA.
    """
    mode, autocast, tf32 = training.numerics, training.mixed_precision, training.enable_tf32
    if mode == "published" and not isinstance(training, TokenizerTraining):
        mode = "fast"  # the generator was published with bf16 and TF32
    if mode == "auto":
        mode = "fast" if bf16 else "published"
    numerics = TABLE[mode]
    if autocast == "auto":
        autocast = numerics.autocast if cuda else "no"
    elif autocast == "fp16" and not cuda:
        raise InputError("training.mixed_precision=fp16 needs a CUDA device: choose bf16 or no")
    if isinstance(tf32, bool):
        numerics = replace(numerics, tf32_products=tf32, tf32_convolutions=tf32)
    return replace(numerics, autocast=autocast)
