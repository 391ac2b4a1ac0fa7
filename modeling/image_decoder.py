"""Codes to uint8 images: the decoder in the device's type, optionally compiled."""

import copy
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiling import compile_function
from .errors import describe
from .pixels import to_uint8
from .tokenizer import Tokenizer

DECODED_AT_ONCE = 64  # images; more do not fill a GPU better and take more memory


class ImageDecoder:
    """Codes (B, T) -> images (B, S, S, 3), uint8, by ×255 and truncation as published.

    `dtype` bfloat16 means autocast on CUDA, attention included; CPUs always compute in float32, which is
    faster for large matrices. `compiled` compiles the blocks for parts of at most `batch` and
    DECODED_AT_ONCE images; smaller parts are padded. The weights are shared with the tokenizer.
    """

    @torch.inference_mode()
    def __init__(
        self,
        tokenizer: Tokenizer,
        dtype: torch.dtype,
        compiled: bool = False,
        batch: int = DECODED_AT_ONCE,
    ):
        self.lookup, self.decoder = tokenizer.quantize.lookup, tokenizer.decoder
        self.device = tokenizer.latent_tokens.device
        self.autocast = dtype == torch.bfloat16 and self.device.type == "cuda"
        self.part = min(batch, DECODED_AT_ONCE)
        self.compiled = False
        if compiled:
            self._compile(tokenizer.config.num_tokens)

    def _compile(self, tokens: int) -> None:
        """Compile the blocks, which share one program, by decoding once."""
        eager = self.decoder
        shared = {id(x): x for x in (*eager.parameters(), *eager.buffers())}
        self.decoder = copy.deepcopy(eager, shared)
        try:
            for block in self.decoder.transformer:
                block.forward = compile_function(block.forward)  # type: ignore[method-assign]
            self._decode(torch.zeros(self.part, tokens, dtype=torch.int64, device=self.device))
            self.compiled = True
        except Exception as e:
            self.decoder = eager
            warnings.warn(f"decoding is not compiled, which is slower: {describe(e)}", stacklevel=4)

    @torch.inference_mode()
    def __call__(self, codes: Tensor) -> Tensor:
        return torch.cat([self._decode(part) for part in codes.split(self.part)])

    def _decode(self, codes: Tensor) -> Tensor:
        count = len(codes)
        if self.compiled:
            codes = F.pad(codes, (0, 0, 0, self.part - count))
        with torch.autocast(self.device.type, torch.bfloat16, self.autocast):
            pixels = self.decoder(self.lookup(codes))[0][:count]
        return to_uint8(pixels).permute(0, 2, 3, 1)
