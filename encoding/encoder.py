"""The encoder of pretokenization: without a decoder, in a chosen precision."""

import torch
from torch import Tensor

from modeling.tokenizer import Tokenizer
from runtime.processes import matmul_precision

# Largest activation in bytes when a CPU encodes images: glibc returns blocks over 32 MiB to the system,
# which clears each page at the next use. Another value rounds differently.
CPU_ACTIVATION = 24 * 2**20


@torch.inference_mode()
def encode(tokenizer: Tokenizer, images: Tensor, dtype: str) -> Tensor:
    """Images (B, 3, S, S), float32 in [0, 1] -> codes (B, T), int64.

    `dtype` is the precision of the encoder: fp32, tf32 (matrix products and convolutions on CUDA) or
    bf16 (autocast). The nearest code is always found in full float32.
    """
    bf16 = torch.autocast(images.device.type, torch.bfloat16, enabled=dtype == "bf16")
    codes = []
    for part in images.split(encoded_at_once(tokenizer, images)):
        with matmul_precision("tf32" if dtype == "tf32" else "fp32"), bf16:
            latents = tokenizer.encoder(part, tokenizer.latent_tokens)
        with matmul_precision("fp32"):
            codes.append(tokenizer.quantize.encode(latents))
    return torch.cat(codes)


def encoded_at_once(tokenizer: Tokenizer, images: Tensor) -> int:
    """How many of the images are encoded together: all on a GPU, a few on a CPU."""
    if images.device.type != "cpu":
        return len(images)
    config = tokenizer.config
    tokens = config.grid**2 + config.num_tokens
    hidden = tokens * 4 * config.encoder_width * images.element_size()  # of the MLP, per image
    return max(CPU_ACTIVATION // hidden, 1)
