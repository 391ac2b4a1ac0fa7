"""The random numbers of an image: a pure function of (seed, index), the same on every machine."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def image_uniforms(seed: int, indices: Sequence[int], steps: int) -> Tensor:
    """Uniforms in [0, 1) of the images `indices`: (len(indices), steps), float32, on the CPU.

    Row i depends on (seed, indices[i]) alone, never on the rank, the batch or the device.
    """
    rows = np.empty((len(indices), steps), np.float32)
    for row, index in zip(rows, indices):
        sequence = np.random.SeedSequence(seed, spawn_key=(index,))
        np.random.Generator(np.random.Philox(sequence)).random(dtype=np.float32, out=row)
    return torch.from_numpy(rows)
