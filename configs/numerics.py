"""What `training.numerics` stands for: autocast type, TF32, the discriminator's precision."""

from dataclasses import dataclass

from configs.schema import TokenizerTraining, Training
from runtime.errors import InputError


@dataclass(frozen=True)
class Numerics:
    """How a training program computes; without autocast everything is float32.

    Whatever stands here, the tokenizer's losses, quantizer and clustering are float32, and so are the
    perceptual networks unless `perceptual.precision` is bf16; products in quantizer, clustering and a
    frozen encoder use no TF32.
    """

    autocast: str  # accelerate's name: no, bf16 or fp16
    tf32_products: bool  # on CUDA, of what is float32
    tf32_convolutions: bool
    exact_critic: bool  # discriminator in float32 whatever the autocast type


# On CUDA; without it autocast is off unless training.mixed_precision asks for bf16.
TABLE = {
    "published": Numerics("fp16", False, True, exact_critic=True),
    "fast": Numerics("bf16", True, True, exact_critic=False),
    "exact": Numerics("no", False, False, exact_critic=True),
}
PUBLISHED_GENERATOR = TABLE["fast"]  # the generator was published with bf16 and TF32


def resolve(
    training: Training, cuda: bool, exact_attention: bool = False, bf16: bool = True
) -> Numerics:
    """The numerics of a run; `cuda` is whether it trains on CUDA, `bf16` whether that computes in it.

    `auto` is fast (without bf16 what the tokenizer was published with), and `mixed_precision`, `enable_tf32` and `exact_attention` may change it. A mode
    that is named holds as a whole: raises InputError where one of the three contradicts it.
    """
    mode, autocast, tf32 = training.numerics, training.mixed_precision, training.enable_tf32
    numerics = TABLE[mode if mode != "auto" else "fast" if bf16 else "published"]
    if mode == "published" and not isinstance(training, TokenizerTraining):
        numerics = PUBLISHED_GENERATOR
    if mode != "auto":
        refuse_contradictions(training, numerics, exact_attention)
    if autocast == "auto":
        autocast = numerics.autocast if cuda else "no"
    elif autocast == "fp16" and not cuda:
        raise InputError("training.mixed_precision=fp16 needs a CUDA device: choose bf16 or no")
    products, convolutions = numerics.tf32_products, numerics.tf32_convolutions
    if isinstance(tf32, bool):
        products = convolutions = tf32
    return Numerics(autocast, products, convolutions, numerics.exact_critic)


def refuse_contradictions(training: Training, numerics: Numerics, exact_attention: bool) -> None:
    """Raise InputError for an option that says something else than the named mode."""
    tf32 = {numerics.tf32_products, numerics.tf32_convolutions}
    where = "convolutions only" if len(tf32) == 2 else "all products" if True in tf32 else "nothing"
    contradiction = ""
    if training.mixed_precision not in ("auto", numerics.autocast):
        contradiction = (
            f"is mixed_precision={numerics.autocast}, but training.mixed_precision="
            f"{training.mixed_precision}"
        )
    elif training.enable_tf32 != "auto" and tf32 != {training.enable_tf32}:
        contradiction = f"uses TF32 in {where}, but training.enable_tf32={training.enable_tf32}"
    elif exact_attention and numerics.autocast != "no":
        contradiction = (
            f"computes attention in {numerics.autocast}, but model.vq_model.exact_attention=True"
        )
    if contradiction:
        raise InputError(
            f"training.numerics={training.numerics} {contradiction}: leave one of the two out"
        )
