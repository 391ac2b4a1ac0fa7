import importlib.util

import numpy as np
import pytest
from PIL import Image

from data.images import scan_images
from experiments.alignment import data_trial
from experiments.alignment.data_trial import CROPS, nearest, patches, read_crops, small, try_out
from experiments.alignment.emoji import SIZE
from tests.refusals import refusal


def write_noise(folder, splits=("train", "val")):
    """Images of the same 256 patches in random order: a mean each.

    With fewer patches than means, several means would lie on one patch, and rounding would decide
    between them, which differs between processors.
    """
    rng = np.random.default_rng(0)
    known = rng.integers(0, 256, (256, 4, 4, 3), dtype=np.uint8)
    for split in splits:
        orders = np.concatenate([rng.permutation(256).reshape(4, 64) for _ in range(10)])
        for number, order in enumerate(orders):
            cut = known[order].reshape(8, 8, 4, 4, 3)
            pixels = cut.transpose(0, 2, 1, 3, 4).reshape(32, 32, 3)
            target = folder / split / "all" / f"{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)


def test_patches_are_row_major_and_small_images_their_means():
    images = np.random.default_rng(0).random((2, 32, 32, 3), dtype=np.float32)
    cut = patches(images).reshape(2, 64, 4, 4, 3)
    np.testing.assert_array_equal(cut[1, 10], images[1, 4:8, 8:12])  # row 1, column 2
    np.testing.assert_allclose(small(images).reshape(2, 64, 3), cut.mean((2, 3)), rtol=1e-5)


def test_the_nearest_image_is_not_the_image_itself():
    known = np.array([[0.0, 0], [0, 1], [0, 3]])
    np.testing.assert_allclose(nearest(known, known), np.array([1, 1, 2]) / np.sqrt(2))
    np.testing.assert_allclose(nearest(known[:1].copy(), known), 0)


def test_figures_of_images_that_are_made_of_the_same_patches(tmp_path):
    write_noise(tmp_path)
    found = try_out(tmp_path)
    assert found.images == (40, 40) and min(found.psnr) > 60
    assert found.perplexity == pytest.approx((256, 256))
    assert min(found.bits) > 5  # in random order: nothing to predict but which ones are there
    assert read_crops(tmp_path / "val").shape == (40, 32, 32, 3)


def test_the_command_writes_what_is_missing_and_prints_a_line_each(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data_trial, "WRITERS", {"noise": write_noise})
    data_trial.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[2].startswith("| noise | 40 / 40 | ")
    assert len({line.count("|") for line in lines}) == 1
    refusal(lambda: data_trial.main([str(tmp_path), "digit"]), "digit", "noise")


@pytest.mark.skipif(
    importlib.util.find_spec("skimage") is None,
    reason="needs skimage: pip install scikit-image",
)
def test_photos_are_crops_of_the_right_size(tmp_path):
    data_trial.write_photos(tmp_path)
    for split, count in CROPS.items():
        listing = scan_images(tmp_path / split)
        samples, classes = listing.samples, listing.classes
        assert len(classes) == 8 and len(samples) == 8 * count
        with Image.open(samples[0][0]) as image:
            assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
