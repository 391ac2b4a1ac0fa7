from itertools import product

import numpy as np
import pytest
import torch

from modeling.sampling import image_uniforms
from runtime.randomness import Stream, generator_for, seed_step


def test_uniforms_of_an_image_do_not_depend_on_what_is_drawn_with_it():
    whole = image_uniforms(42, range(12), 7)
    for size in (1, 5, 12):
        parts = [image_uniforms(42, range(i, min(i + size, 12)), 7) for i in range(0, 12, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_uniforms_of_a_strided_share_are_those_of_the_whole():
    assert torch.equal(
        image_uniforms(42, range(1, 12, 3), 7), image_uniforms(42, range(12), 7)[1::3]
    )


def test_more_steps_only_lengthen_the_uniforms():
    assert torch.equal(image_uniforms(42, range(4), 9)[:, :6], image_uniforms(42, range(4), 6))


def test_uniforms_differ_between_images_and_seeds():
    rows = torch.cat([image_uniforms(seed, range(50), 7) for seed in (2, 42)])
    assert len(rows.unique(dim=0)) == 100


def test_uniforms_are_float32_in_the_unit_interval_and_spread_over_it():
    values = image_uniforms(42, range(200), 273)
    assert values.dtype == torch.float32 and values.shape == (200, 273)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 3 / (12 * values.numel()) ** 0.5


def test_uniforms_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    image_uniforms(42, range(3), 7)
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_of_different_keys_differ():
    keys = list(product(range(3), Stream, range(1, 4), range(1, 4)))
    draws = {generator_for(*key).random(4).tobytes() for key in keys}
    assert len(draws) == len(keys)


def test_no_purpose_draws_what_another_draws():
    """An epoch's order, its views, a crop, a step and an image's uniforms, of the same numbers."""
    small = range(6)
    draws = [image_uniforms(7, range(i, i + 1), 4).numpy().tobytes() for i in small]
    for stream in (Stream.ORDER, Stream.VIEW):
        draws += [generator_for(7, stream, i).random(4, np.float32).tobytes() for i in small]
    for stream in (Stream.CROP, Stream.STEP):
        for i, j in product(small, small):
            draws.append(generator_for(7, stream, i, j).random(4, np.float32).tobytes())
    assert len(set(draws)) == len(draws)


def test_uniforms_of_sampling_are_those_of_published_samples():
    expected = [0.11611402034759521, 0.3161378502845764, 0.32390618324279785]
    assert image_uniforms(42, range(5, 6), 3).tolist() == [expected]


def test_stream_is_a_function_of_seed_and_key():
    assert (
        generator_for(1, Stream.CROP, 3).random(4) == generator_for(1, Stream.CROP, 3).random(4)
    ).all()
    assert isinstance(generator_for(1, Stream.CROP, 3), np.random.Generator)


def draw(seed, rank, step):
    seed_step(seed, rank, step)
    return torch.rand(4).tolist()


def test_a_step_draws_the_same_whatever_was_drawn_before():
    first = draw(42, 1, 5)
    torch.rand(100)
    assert draw(42, 1, 5) == first


@pytest.mark.parametrize("other", [(43, 1, 5), (42, 0, 5), (42, 1, 6), (42, 5, 1)])
def test_other_seed_rank_or_step_draws_otherwise(other):
    assert draw(*other) != draw(42, 1, 5)
