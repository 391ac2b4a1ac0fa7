"""The judge of generated images: what it reads, and in which features."""

import numpy as np
import pytest
from PIL import Image

from quickstart.report import Judge, features

RED, GREEN = (200, 50, 50), (50, 200, 50)  # of equal grey


@pytest.fixture
def folder(tmp_path):
    """Makes an image folder of two classes, of the colours of its arguments with a little noise."""

    def make(*colours):
        rng = np.random.default_rng(0)
        for split, count in (("train", 6), ("val", 3)):
            for label, colour in enumerate(colours):
                for i in range(count):
                    shift = rng.integers(-9, 10, (20, 20, 1))  # the same in all channels
                    path = tmp_path / split / f"class{label}" / f"{i}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray((np.array(colour) + shift).astype(np.uint8)).save(path)
        return tmp_path

    return make


def flat(*colours):
    """One image of 16 x 16 pixels per colour."""
    return np.stack([np.full((16, 16, 3), colour, np.uint8) for colour in colours])


def test_grey_features_are_means_of_two_by_two_pixels_and_channels():
    image = np.zeros((1, 4, 4, 3), np.uint8)
    image[0, 0, 1] = 30, 60, 90
    image[0, 3, 2] = 255
    expected = [60 / 4 / 255, 0, 0, 0.25]
    np.testing.assert_allclose(features(image), [expected], rtol=1e-6)
    np.testing.assert_allclose(
        features(image, colour=True), [[(30 / 255 + 1) / 16, (60 / 255 + 1) / 16, (90 / 255 + 1) / 16]], rtol=1e-6
    )  # fmt: skip


def test_the_judge_reads_image_i_as_class_i_modulo_the_classes(folder):
    judge = Judge(folder((60, 60, 60), (190, 190, 190)), 16)
    assert not judge.colour and judge.classes == 2
    dark, light = (60, 60, 60), (190, 190, 190)
    assert judge.of_samples(flat(dark, light, dark, dark))["recognised"] == 0.75
    assert judge.of_samples(flat(light, dark))["recognised"] == 0
    held_out = judge.of_validation()
    assert held_out["recognised_val"] == 1
    assert held_out["fid_val"] < judge.of_samples(flat(dark, dark))["fid"]


def test_coloured_images_are_judged_by_their_colour(folder):
    judge = Judge(folder(RED, GREEN), 16)
    assert judge.colour
    assert judge.of_samples(flat(RED, GREEN, GREEN, RED))["recognised"] == 0.5
    assert judge.of_validation()["recognised_val"] == 1
