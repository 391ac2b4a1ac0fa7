"""Modelled times on one H100: counted bytes, products, instructions and launches over assumed rates.

Nothing here is measured. The rates are assumptions about one H100 SXM5, written down once, below.
"""

import math
from typing import NamedTuple

from benchmarks.paper.inductor import H100, Program
from modeling.generator import GeneratorConfig
from training.utilisation import training_flops

BANDWIDTH = 3.0e12  # bytes/s that large kernels reach, of 3.35e12 on the data sheet
ATTENTION_BANDWIDTH = 0.88 * BANDWIDTH  # thousands of short streams
PRODUCTS = 800e12  # bf16 FLOP/s that large products reach, of 989e12 on the data sheet
TILE = 128  # rows and columns of a product that one multiprocessor computes at a time
ISSUED = 0.75 * H100.multi_processor_count * 4 * 32 * 1.755e9  # instructions/s, of threads
LAUNCH = 3.3e-6  # seconds from one kernel to the next in a CUDA graph: its ends and the gap
PEAK = 989e12  # bf16 FLOP/s on the data sheet, what MFU is of


class Part(NamedTuple):
    """A share of a modelled step."""

    name: str
    seconds: float


class Shapes(NamedTuple):
    """The sizes that the arithmetic needs."""

    hidden: int
    inner: int  # of the MLP
    layers: int
    codes: int  # T
    codebook: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of one block's products."""
        D, inner = self.hidden, self.inner
        return [(3 * D, D), (D, D), (2 * inner, D), (D, inner)]

    @property
    def weights(self) -> int:
        """Weights that a step reads: all matrices of the blocks, and the output layer."""
        block = sum(outputs * inputs for outputs, inputs in self.matrices)
        return self.layers * block + self.codebook * self.hidden


def shapes(config: GeneratorConfig) -> Shapes:
    inner = -(-(8 * config.hidden_size // 3) // 256) * 256
    return Shapes(
        config.hidden_size, inner, config.num_hidden_layers, config.image_seq_len,
        config.codebook_size,
    )  # fmt: skip


def product(rows: int, outputs: int, inputs: int) -> float:
    """Seconds of one bf16 product, without its launch."""
    waves = math.ceil(
        math.ceil(rows / TILE) * math.ceil(outputs / TILE) / H100.multi_processor_count
    )
    full = waves * H100.multi_processor_count * TILE**2  # results, idle multiprocessors counted
    moved = 2 * (rows * inputs + inputs * outputs + rows * outputs)
    return max(2 * full * inputs / PRODUCTS, moved / BANDWIDTH)


def cached_bytes(shape: Shapes, rows: int, filled: float, per_element: float) -> float:
    """Of keys and values of one block up to a position."""
    return 2 * shape.hidden * rows * filled * per_element


def sampling_roofline(config: GeneratorConfig, batch: int, per_element: float = 2.0) -> float:
    """Codes of that many images per second at best, with guidance.

    A step reads weights and filled cache once and makes 2 FLOPs per weight and row; whichever takes
    longer counts.
    """
    shape, rows, total = shapes(config), 2 * batch, 0.0
    for filled in range(1, shape.codes + 1):
        cache = shape.layers * cached_bytes(shape, rows, filled, per_element)
        read = (2 * shape.weights + cache) / BANDWIDTH
        total += max(read, 2 * shape.weights * rows / PRODUCTS)
    return batch / total


def sampling_step(
    config: GeneratorConfig, batch: int, instructions: float, between: Program,
    per_element: float = 2.0,
) -> list[Part]:  # fmt: skip
    """The parts of a step at the mean position. `between` is counted; `instructions` per element."""
    shape, rows = shapes(config), 2 * batch
    filled = (shape.codes + 1) / 2
    elements = 2 * shape.hidden * rows * filled
    attention = max(
        cached_bytes(shape, rows, filled, per_element) / ATTENTION_BANDWIDTH,
        elements * instructions / ISSUED,
    )
    launches = shape.layers * (between.launches + 1)
    return [
        Part("attention", shape.layers * attention),
        Part("products", shape.layers * sum(product(rows, *m) for m in shape.matrices)),
        Part("other kernels", shape.layers * between.moved["kernels"] / BANDWIDTH),
        # float32: tensor cores take TF32 at best, and full float32 is an eighth of that.
        Part("output layer", 2 * rows * shape.hidden * shape.codebook / 50e12),
        Part("launches", launches * LAUNCH),
    ]


def training_step(config: GeneratorConfig, batch: int, moved: dict[str, float]) -> list[Part]:
    """The parts of a training step from the bytes that one layer moves; without the optimizer."""
    layers = config.num_hidden_layers
    flops = training_flops(config) * batch
    return [
        Part("products and attention", flops / PRODUCTS),
        Part("other kernels", layers * moved["kernels"] / BANDWIDTH),
    ]


def total(parts: list[Part]) -> float:
    return sum(part.seconds for part in parts)


def utilisation(config: GeneratorConfig, batch: int, seconds: float) -> float:
    """Model FLOPs utilisation of a training step, against the data sheet's peak."""
    return training_flops(config) * batch / seconds / PEAK
