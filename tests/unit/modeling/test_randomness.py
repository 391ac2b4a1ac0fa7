"""The uniforms against NumPy's own generator, which images have been drawn with since the first."""

import numpy as np
import pytest
import torch

from modeling.randomness import image_uniforms


def by_numpy(seed, indices, steps):
    rows = []
    for index in indices:
        sequence = np.random.SeedSequence(seed, spawn_key=(index,))
        generator = np.random.Generator(np.random.Philox(sequence))
        rows.append(generator.random(steps, dtype=np.float32))
    return torch.from_numpy(np.stack(rows))


@pytest.mark.parametrize("steps", [1, 2, 7, 8, 9, 273, 1057])
@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32, 2**64 - 1, 2**70 + 3, 2**130 + 9])
def test_uniforms_are_those_of_numpys_philox(seed, steps):
    for indices in (range(5), range(49_990, 50_000), range(2**32 - 2, 2**32 + 2)):
        expected = by_numpy(seed, indices, steps)
        assert torch.equal(image_uniforms(seed, indices, steps), expected)


def test_no_images_take_no_numbers():
    assert image_uniforms(0, range(0), 7).shape == (0, 7)
