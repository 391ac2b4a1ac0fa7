from dataclasses import replace

import numpy as np
import pytest
import torch

from generation.images import sample_images
from modeling.image_decoder import ImageDecoder
from modeling.sampling import Sampling, image_uniforms
from tests.tiny import sample_codes


def joined(batches):
    batches = list(batches)
    indices = [i for batch in batches for i in batch.indices]
    images = np.concatenate([batch.images for batch in batches])
    return indices, images, np.concatenate([batch.codes for batch in batches])


def chunks(count, size):
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


@pytest.mark.parametrize("size", [1, 3, 8])
def test_images_are_those_of_class_seed_and_index_whatever_the_batch(models, job, size):
    made = sample_images(
        job.sampler(models.generator, size), models.tokenizer, job, chunks(8, size)
    )
    indices, images, codes = joined(made)
    assert indices == list(range(8))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    uniforms = image_uniforms(5, range(8), 7)
    expected = sample_codes(models.generator, labels, uniforms, Sampling(2.0))
    assert (torch.from_numpy(codes) == expected).all()
    pixels = ImageDecoder(models.tokenizer, torch.float32)(expected)
    np.testing.assert_array_equal(images, pixels.numpy())


def test_a_job_starts_at_any_index(models, job):
    engine = job.sampler(models.generator, 3)
    _, images, _ = joined(sample_images(engine, models.tokenizer, job, chunks(8, 3)))
    indices, rest, _ = joined(sample_images(engine, models.tokenizer, job, [range(6, 8)]))
    assert indices == [6, 7]
    np.testing.assert_array_equal(rest, images[6:])


def test_stored_codes_are_decoded_to_the_images_they_came_with(models, job):
    engine = job.sampler(models.generator, 3)
    _, images, codes = joined(sample_images(engine, models.tokenizer, job, chunks(8, 3)))
    job = replace(job, prefix=torch.from_numpy(codes))
    stored = sample_images(None, models.tokenizer, job, chunks(8, 5))
    np.testing.assert_array_equal(joined(stored)[1], images)


def test_classes_are_taken_in_turn(job):
    assert replace(job, classes=(2, 0)).labels(range(3, 7)).tolist() == [0, 2, 0, 2]


def test_no_batches_are_no_images(models, job):
    assert not list(sample_images(job.sampler(models.generator, 2), models.tokenizer, job, []))
