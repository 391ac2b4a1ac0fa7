"""All randomness is derived from its purpose, so that resuming needs no saved generator."""

from enum import IntEnum

import numpy as np
import torch


class Stream(IntEnum):
    """The purpose of a random stream in training, the first number of its key, so streams never overlap.

    Sampling's streams use the image's index alone as key (`image_uniforms`), because published samples
    depend on it. Every key here is longer.
    """

    ORDER = 1  # (epoch): the order of an epoch's images
    VIEW = 2  # (epoch): the view of each image and whether its class is dropped
    CROP = 3  # (epoch, index): the random crop and flip of an image
    STEP = 4  # (rank, step): torch's generators, for dropout


def generator_for(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """The random stream of a seed, a purpose and the rest of its key (see `Stream`)."""
    sequence = np.random.SeedSequence(seed, spawn_key=(stream, *key))
    return np.random.Generator(np.random.Philox(sequence))


def seed_step(seed: int, rank: int, step: int) -> None:
    """Seed torch's generators (dropout) for one step of one rank."""
    sequence = np.random.SeedSequence(seed, spawn_key=(Stream.STEP, rank, step))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))
