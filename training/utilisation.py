"""Utilisation of the hardware: the model's FLOPs and the devices' peak FLOP/s."""

import torch
from torch import nn

from modeling.generator import Generator, GeneratorConfig
from runtime.processes import device_name

# Dense bf16 peaks in TFLOP/s by a part of the device's name, from data sheets; the first match counts.
PEAKS = {
    "B200": 2250,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "GH200": 989,
    "H200": 989,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "RTX 4090": 165,
    "RTX 3090": 71,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device in 16-bit matrix products; None if unknown."""
    if device.type != "cuda" or precision == "no":
        return None
    name = device_name(device)
    return next((tera * 1e12 for part, tera in PEAKS.items() if part in name), None)


def training_flops(config: GeneratorConfig) -> float:
    """FLOPs of forward and backward for one image, without what recomputation adds.

    Every weight of a matrix costs 2 FLOPs per position forward and 4 backward. Attention is counted
    causally: half of the N x N scores, 2h FLOPs each for q·k and for the weighted sum of v, times 3.
    """
    with torch.device("meta"):
        model = Generator(config)
    positions = config.image_seq_len  # the class and all codes but the last
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    attention = config.num_hidden_layers * config.hidden_size * positions**2
    return 6.0 * (matrices * positions + attention)
