"""All randomness is derived from what it is for, so that resuming needs no saved generator."""

import numpy as np
import torch


def generator_for(seed: int, *key: int) -> np.random.Generator:
    """The stream of one purpose: a pure function of the seed and, say, (epoch, index)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed torch's generators (dropout) for one step of one rank."""
    state = np.random.SeedSequence(seed, spawn_key=(rank, step)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def image_uniforms(seed: int, indices: range, steps: int) -> torch.Tensor:
    """Uniforms in [0, 1) of the images `indices`: (len(indices), steps), float32.

    Row i depends on (seed, index) alone, never on the rank, the batch or the device.
    """
    rows = [generator_for(seed, i).random(steps, dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows))
