"""Images from classes in three lines: both models from their weight files, on one device."""

import operator
from collections.abc import Sequence
from dataclasses import fields
from typing import Optional

import torch
from torch import Tensor

from .engine import Engine, ImageDecoder, default_dtype, find_device
from .errors import InputError
from .generator import Generator, GeneratorConfig
from .randomness import image_uniforms
from .sampling import Sampling, check_classes
from .tokenizer import Tokenizer, TokenizerConfig
from .weights import describe, load_tensors, load_weights, read_state_dict


def generator_config(state: dict[str, Tensor], seq_len: int, source: str) -> GeneratorConfig:
    """The sizes of a generator, read off its tensors; an image has `seq_len` codes."""
    try:
        codes, hidden = state["output.weight"].shape
        return GeneratorConfig(
            hidden_size=hidden,
            num_hidden_layers=sum(name.endswith(".attn.qkv.weight") for name in state),
            num_attention_heads=hidden // len(state["blocks.0.attn.q_norm.weight"]),
            codebook_size=codes,
            image_seq_len=seq_len,
            condition_num_classes=len(state["embeddings.weight"]) - codes - 2,
        )
    except (KeyError, ValueError) as e:
        raise InputError(f"{source} is not a generator but {describe(state)}") from e


class Pipeline:
    """A generator and a tokenizer with their weights, ready to make images.

    `device` is CUDA where there is one. `dtype` is that of the generator's matrices: by default
    bfloat16 on CUDA, from Ampere on, and float32 elsewhere. `compiled` takes a minute first; it pays on
    CUDA for many images in batches of one size. Raises InputError for files or a device that do not
    fit.
    """

    def __init__(
        self,
        generator: str,
        tokenizer: str,
        tokenizer_config: Optional[TokenizerConfig] = None,
        device: Optional[str] = None,
        dtype: Optional[torch.dtype] = None,
        compiled: bool = False,
    ):
        self.device = find_device(device)
        self.dtype = dtype or default_dtype(self.device)
        self.compiled = compiled
        config = tokenizer_config or TokenizerConfig()
        self.tokenizer = Tokenizer(config).eval()
        load_weights(self.tokenizer, tokenizer)
        state = read_state_dict(generator)
        self.generator = Generator(generator_config(state, config.num_tokens, generator)).eval()
        load_tensors(self.generator, state, generator)
        self.tokenizer.to(self.device)
        self.generator.to(self.device)
        self.decoder = ImageDecoder(self.tokenizer, self.dtype)
        self.engine: Optional[Engine] = None

    def __call__(
        self, classes: Sequence[int], seed: int = 0, **sampling: float | int | str
    ) -> Tensor:
        """Images of these classes: (N, S, S, 3), uint8, on the CPU.

        `sampling` are the fields of `modeling.sampling.Sampling`: guidance_scale, guidance_power,
        guidance_schedule, temperature, top_k, top_p. Image i draws from (seed, i) alone, as image i
        of sample_imagenet.py does: the same class, seed, settings and precision make the same
        image, up to rounding that depends on the batch and on compiling. Raises InputError for no
        classes or unknown ones, and for settings that make no sense.
        """
        labels = class_labels(classes)
        known = self.generator.config.condition_num_classes
        check_classes(int(labels.min()), int(labels.max()), known)
        settings = sampling_settings(sampling)
        batch = len(labels)
        if self.engine is None or (self.engine.batch, self.engine.sampling) != (batch, settings):
            self.engine = None  # frees its memory for the next
            self.engine = Engine(self.generator, batch, settings, self.dtype, self.compiled)
        uniforms = image_uniforms(seed, range(batch), self.generator.config.image_seq_len)
        codes = self.engine.sample(labels, uniforms)
        return self.decoder(codes).cpu()


def class_labels(classes: Sequence[int]) -> Tensor:
    """Class numbers as labels (N,), int64; anything else is refused."""
    try:
        numbers = [operator.index(number) for number in classes]
    except TypeError as e:
        raise InputError(f"classes {classes!r}: pass a list of class numbers, as [207]") from e
    if not numbers:
        raise InputError("no classes: pass at least one class number, as [207]")
    return torch.tensor(numbers)


def sampling_settings(values: dict[str, float | int | str]) -> Sampling:
    names = [field.name for field in fields(Sampling)]
    for name in values:
        if name not in names:
            raise InputError(f"no sampling setting {name}: there are {', '.join(names)}")
    return Sampling(**values)  # type: ignore[arg-type] (their own checks refuse wrong values)
