"""Images from classes in three lines: both models from their weight files, on one device."""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from .engine import Engine, ImageDecoder, default_dtype, find_device
from .errors import InputError
from .generator import Generator, GeneratorConfig
from .sampling import Sampling
from .tokenizer import Tokenizer, TokenizerConfig
from .weights import describe, load_tensors, load_weights, read_state_dict


def generator_config(state: dict[str, Tensor], seq_len: int, source: str) -> GeneratorConfig:
    """The sizes of a generator, read off its tensors; `seq_len` codes an image."""
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
        raise InputError(f"{source} is no generator but {describe(state)}") from e


class Pipeline:
    """A generator and a tokenizer with their weights, ready to make images.

    `device` is CUDA where there is one. `dtype` is that of the generator's matrices: by default
    bfloat16 on CUDA (from Ampere on) and float32 elsewhere. `compiled` takes a minute first and is worth it on CUDA
    for many images of equal batch. Raises InputError for files that do not fit and for a device
    that is not there.
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

    def __call__(self, classes: Sequence[int], seed: int = 0, **sampling: Any) -> Tensor:
        """Images of these classes: (N, S, S, 3), uint8, on the CPU.

        `sampling` are the fields of `modeling.sampling.Sampling`: guidance_scale, guidance_power,
        guidance_schedule, temperature, top_k, top_p.
        """
        asked = Sampling(**sampling)
        labels = torch.tensor(classes)
        if self.engine is None or (self.engine.batch, self.engine.sampling) != (len(labels), asked):
            self.engine = None  # frees its memory for the next
            self.engine = Engine(self.generator, len(labels), asked, self.dtype, self.compiled)
        random = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(labels), self.generator.config.image_seq_len, generator=random)
        codes = self.engine.sample(labels, uniforms)
        return self.decoder(codes).cpu()
