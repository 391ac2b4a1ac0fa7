"""All randomness is derived from what it is for, so that resuming needs no saved generator."""

import numpy as np
import torch

from modeling.randomness import image_uniforms

__all__ = ["generator_for", "image_uniforms", "seed_step"]


def generator_for(seed: int, *key: int) -> np.random.Generator:
    """The stream of one purpose: a pure function of the seed and, say, (epoch, index)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed torch's generators (dropout) for one step of one rank."""
    state = np.random.SeedSequence(seed, spawn_key=(rank, step)).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))
