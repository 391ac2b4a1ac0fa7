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
TF32, FLOAT32 = 300e12, 50e12  # FLOP/s of products of float32 matrices, with and without TF32
FLASH = 350e12  # FLOP/s of the library's attention in training, over the tiles that it computes
TILE = 128  # rows and columns of a product, or of an attention, that one multiprocessor computes at a time
ISSUED = 0.75 * H100.multi_processor_count * 4 * 32 * 1.755e9  # instructions/s, of threads
LAUNCH = 3.3e-6  # seconds from one kernel to the next in a CUDA graph: its ends and the gap
OVERLAPPED = 1.8e-6  # the same where a kernel starts while the one before it ends
# Seconds of a program of the fused attention: until its first tile is asked for, per tile of one warp
# and of several (which wait for each other), and at its end.
START, ONE_WARP, WARPS, END = 1.8e-6, 1.1e-6, 1.4e-6, 0.4e-6
# Launches of a step outside the counted programs: the output layer, and what moves the state.
AROUND = 7
OPTIMIZER = 40  # bytes per parameter: the norm reads 4, clipping moves 8, AdamW 28
EMBEDDING = 8  # times that a training step reads or writes the embeddings' float32 output
PEAK = 989e12  # bf16 FLOP/s on the data sheet, the reference of MFU


class Part(NamedTuple):
    """A share of a modelled step."""

    name: str
    seconds: float


class Attention(NamedTuple):
    """The fused attention as it is compiled for one head size."""

    instructions: float  # of threads, per element of K or V
    programs: int  # that share a multiprocessor
    block: int  # positions per tile
    warps: int


class Shapes(NamedTuple):
    """The sizes that the arithmetic needs."""

    hidden: int
    inner: int  # of the MLP
    layers: int
    codes: int  # T
    codebook: int
    heads: int

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
        config.codebook_size, config.num_attention_heads,
    )  # fmt: skip


def product(
    rows: int, outputs: int, inputs: int, rate: float = PRODUCTS, itemsize: int = 2
) -> float:
    """Seconds of one product, without its launch."""
    waves = math.ceil(
        math.ceil(rows / TILE) * math.ceil(outputs / TILE) / H100.multi_processor_count
    )
    full = waves * H100.multi_processor_count * TILE**2  # results, idle multiprocessors counted
    moved = itemsize * (rows * inputs + inputs * outputs + rows * outputs)
    return max(2 * full * inputs / rate, moved / BANDWIDTH)


def cached_bytes(shape: Shapes, rows: int, filled: float, per_element: float) -> float:
    """Bytes of one block's keys and values up to a position."""
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


def attention_seconds(
    shape: Shapes, rows: int, filled: int, per_element: float, attention: Attention
) -> float:
    """Seconds of one block's attention at a position: the longest of reading, computing and waiting."""
    read = cached_bytes(shape, rows, filled, per_element) / ATTENTION_BANDWIDTH
    computed = 2 * shape.hidden * rows * filled * attention.instructions / ISSUED
    tile = ONE_WARP if attention.warps == 1 else WARPS
    life = START + math.ceil(filled / attention.block) * tile + END
    at_once = H100.multi_processor_count * attention.programs
    return max(read, computed, rows * shape.heads / at_once * life)


def sampling_step(
    config: GeneratorConfig,
    batch: int,
    attention: Attention,
    between: Program,
    choose: Program,
    per_element: float = 2.0,
    launch: float = LAUNCH,
    output: float = TF32,
    fewer: int = 0,
) -> list[Part]:
    """The parts of a step, the mean over its positions. `between` and `choose` are counted.

    `launch` is the time of one, `output` the rate of the output layer, and `fewer` how many kernels a
    block might spare, with what they move.
    """
    shape, rows = shapes(config), 2 * batch
    positions = range(shape.codes)
    attended = sum(attention_seconds(shape, rows, p, per_element, attention) for p in positions)
    kept = 1 - fewer / len(between.kernels) if fewer else 1.0
    launches = shape.layers * (between.launches + 1 - fewer) + choose.launches + AROUND
    return [
        Part("attention", shape.layers * attended / shape.codes),
        Part("products", shape.layers * sum(product(rows, *m) for m in shape.matrices)),
        Part("other kernels", kept * shape.layers * between.moved["kernels"] / BANDWIDTH),
        Part("output layer", product(rows, shape.codebook, shape.hidden, output, 4)),
        Part("choosing", choose.bytes / BANDWIDTH),
        Part("launches", launches * launch),
    ]


def attention_of_training(shape: Shapes, batch: int, moved: float) -> float:
    """Seconds of one block's attention, forward and backward; `moved` are its counted bytes.

    The library computes whole tiles, of the lower triangle of T x T, for heads filled up to a
    multiple of 32, and backward 2.5 times what it computes forward.
    """
    tiles = math.ceil(shape.codes / TILE)
    pairs = tiles * (tiles + 1) / 2 * TILE**2
    head = math.ceil(shape.hidden / shape.heads / 32) * 32
    flops = 3.5 * 4 * pairs * head * shape.heads * batch
    return max(flops / FLASH, moved / BANDWIDTH)


class Counted(NamedTuple):
    """Forward and backward of a compiled function of a training step."""

    moved: dict[str, float]  # bytes by kind
    launches: int


def training_step(
    config: GeneratorConfig, batch: int, block: Counted, loss: Counted, parameters: int
) -> list[Part]:
    """The parts of a step from what one block and the loss move and launch."""
    shape, rows = shapes(config), batch * config.image_seq_len
    of_block = 3 * sum(product(rows, *m) for m in shape.matrices)  # forward, and two backward
    embedded = 4 * EMBEDDING * rows * shape.hidden
    attention = attention_of_training(shape, batch, block.moved["others"])
    return [
        Part("products", shape.layers * of_block),
        Part("attention", shape.layers * attention),
        Part("other kernels", shape.layers * block.moved["kernels"] / BANDWIDTH),
        Part(
            "output and loss",
            3 * product(rows, shape.codebook, shape.hidden) + loss.moved["kernels"] / BANDWIDTH,
        ),
        Part("embedding", embedded / BANDWIDTH),
        Part("optimizer", OPTIMIZER * parameters / BANDWIDTH),
        Part("launches", (shape.layers * block.launches + loss.launches) * LAUNCH),
    ]


def total(parts: list[Part]) -> float:
    return sum(part.seconds for part in parts)


def utilisation(config: GeneratorConfig, batch: int, seconds: float) -> float:
    """Model FLOPs utilisation of a training step, against the data sheet's peak."""
    return training_flops(config) * batch / seconds / PEAK
