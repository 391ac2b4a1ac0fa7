import hashlib

import pytest

from modeling.randomness import image_uniforms


@pytest.mark.parametrize(
    "seed, digest",
    [
        (0, "09a1e87a0afba5e7"),
        (42, "da09ec02135ca1fb"),
        (2**32, "cfb4a8a24751a27b"),
        (2**130 + 9, "1f7ac0f67d8eb454"),
    ],
)
def test_uniforms_are_those_of_published_samples(seed, digest):
    """Philox's numbers, hashed: another release of NumPy that draws others would change every image."""
    uniforms = image_uniforms(seed, [0, 7, 49_999, 2**32 + 1], 273)
    assert hashlib.sha256(uniforms.numpy().tobytes()).hexdigest().startswith(digest)


def test_no_images_take_no_numbers():
    assert image_uniforms(0, range(0), 7).shape == (0, 7)
