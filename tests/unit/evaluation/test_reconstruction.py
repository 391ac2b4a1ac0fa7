import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from evaluation.reconstruction import (
    Batch,
    CodeUse,
    ImageMean,
    Preview,
    code_figures,
    count_codes,
    figures_of,
    image_batches,
    psnr,
    reconstruct,
)
from modeling.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer

CPU = torch.device("cpu")
T = 7  # codes of an image of `tokenizer`


def scores(tokens=5, codebook=8):
    config = SimpleNamespace(num_tokens=tokens, codebook_size=codebook)
    return [ImageMean("psnr", psnr, CPU), CodeUse(config, CPU)]


def metrics_of(images, reconstructions, codes, codebook=8):
    consumers = scores(codes.shape[1], codebook)
    add(consumers, images, reconstructions, codes)
    return figures_of(consumers)


def add(consumers, images, reconstructions, codes):
    for consumer in consumers:
        consumer.add(Batch(0, (images * 255).byte(), images, codes, reconstructions))


def pair(*differences):
    """Images of zeros and reconstructions that are off by the given amounts."""
    images = torch.zeros(len(differences), 3, 4, 4)
    return images, images + torch.tensor(differences)[:, None, None, None]


# The mean is that of the images' figures, not the figure of their mean error.
@pytest.mark.parametrize(
    "differences, expected",
    [([1.0], 0.0), ([0.1], 20.0), ([0.01], 40.0), ([0.1, 0.01], 30.0), ([0.0], 100.0)],
)
def test_psnr_by_hand(differences, expected):
    codes = torch.zeros(len(differences), 5, dtype=torch.int64)
    assert metrics_of(*pair(*differences), codes)["psnr"] == pytest.approx(expected, abs=1e-4)


def test_sums_of_two_halves_add_up_to_the_whole():
    images, reconstructions = torch.rand(6, 3, 4, 4), torch.rand(6, 3, 4, 4)
    codes = torch.randint(8, (6, 5))
    consumers = scores()
    add(consumers, images[:2], reconstructions[:2], codes[:2])
    add(consumers, images[2:], reconstructions[2:], codes[2:])
    assert consumers[0].sums[1] == 6 and consumers[1].counts.sum() == 30
    assert figures_of(consumers) == pytest.approx(metrics_of(images, reconstructions, codes))


def test_a_figure_of_a_whole_batch_counts_once_per_image():
    mean = ImageMean("x", lambda a, b: a.mean(), CPU)
    add([mean], *pair(0.2, 0.4), torch.zeros(2, 5))
    add([mean], *pair(0.9), torch.zeros(1, 5))
    assert mean.metrics() == {"x": pytest.approx(0.5)}


def test_code_counts_are_those_of_all_images():
    counts = torch.zeros(3, 8)
    count_codes(counts, torch.tensor([[0, 1, 1], [7, 1, 0]]))
    assert counts.sum(0).tolist() == [2, 3, 0, 0, 0, 0, 0, 1]
    assert counts[1].tolist() == [0, 2, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("used", [1, 3, 8])
def test_perplexity_of_evenly_used_codes_is_their_number(used):
    counts = torch.zeros(1, 8, dtype=torch.float64)
    counts[0, :used] = 5
    found = code_figures(counts)
    assert found["codebook_use"] == used / 8 and found["perplexity"] == pytest.approx(used)


def agreement(codes):
    counts = torch.zeros(codes.shape[1], 8)
    for part in codes.split(2):
        count_codes(counts, part)
    return code_figures(counts)["code_agreement"]


def test_agreement_by_hand():
    codes = torch.tensor([[0, 1], [0, 2], [0, 2], [3, 4]])
    assert agreement(codes) == pytest.approx((3 / 6 + 1 / 6) / 2)  # of the 6 pairs of images


def test_identical_codes_agree_however_many_they_are():
    same, other = torch.arange(8).expand(5, 8), torch.arange(8)[:, None].expand(8, 8)
    assert agreement(same) == 1 and agreement(other) == 0
    images = torch.zeros(5, 3, 4, 4)
    metrics = metrics_of(images, images, same)
    assert metrics["codebook_use"] == 1 and metrics["code_agreement"] == 1
    assert "code_agreement" not in metrics_of(images[:1], images[:1], same[:1])


def test_perplexity_by_hand():
    found = code_figures(torch.tensor([[1.0, 3, 0, 0]]))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert found["codebook_use"] == 0.5 and found["perplexity"] == pytest.approx(math.exp(entropy))


@pytest.fixture
def tokenizer():
    return Tokenizer(tiny_tokenizer(image_size=8, patch_size=4))


BATCHES = torch.arange(3 * 2 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(3, 2, 3, 8, 8)


class Everything:
    def __init__(self):
        self.batches = []

    def add(self, batch):
        self.batches.append(batch)


def run(tokenizer, batches, *consumers):
    numbered = ((2 * i, pixels) for i, pixels in enumerate(batches))
    reconstruct(tokenizer, numbered, consumers)


def test_all_batches_are_reconstructed_and_the_first_is_shown(tokenizer):
    consumers, preview = scores(T, 16), Preview(2)
    run(tokenizer, BATCHES, *consumers, preview)
    images = BATCHES.flatten(0, 1) / 255
    codes = tokenizer.eval().encode(images)
    with torch.no_grad():
        expected = tokenizer.decode(codes)
    torch.testing.assert_close(preview.pairs[[0, 2]], images[:2])
    torch.testing.assert_close(preview.pairs[[1, 3]], expected[:2])
    assert figures_of(consumers) == pytest.approx(metrics_of(images, expected, codes, 16))


@pytest.mark.parametrize("training", [True, False])
def test_reconstructing_leaves_the_tokenizer_in_its_mode(tokenizer, training):
    tokenizer.train(training)
    run(tokenizer, BATCHES[:1])
    assert tokenizer.training is training and tokenizer.encoder.training is training
    with pytest.raises(ZeroDivisionError):
        reconstruct(tokenizer, (1 / 0 for _ in range(1)), [])
    assert tokenizer.training is training and tokenizer.encoder.training is training


def test_every_consumer_gets_every_batch_once(tokenizer, monkeypatch):
    calls = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda codes: calls.append(codes) or decode(codes))
    first, second = Everything(), Everything()
    run(tokenizer, BATCHES, first, second)
    assert len(calls) == len(first.batches) == len(second.batches) == 3
    assert [batch.first for batch in first.batches] == [0, 2, 4]
    assert all(a is b for a, b in zip(first.batches, second.batches))
    assert torch.equal(first.batches[1].pixels, BATCHES[1])


def test_no_images_are_no_error(tokenizer):
    consumers, preview = scores(T, 16), Preview(2)
    run(tokenizer, [], *consumers, preview)  # a rank beyond the held-out images
    assert not len(preview.pairs) and not consumers[0].sums.any()


def test_ranks_share_fixed_batches_of_consecutive_images(tmp_path):
    paths = []
    for i in range(7):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", (8, 8), (i, 0, 0)).save(paths[-1])
    whole = dict(image_batches(paths, 8, 2, workers=0))
    assert list(whole) == [0, 2, 4, 6] and whole[6].shape == (1, 3, 8, 8)
    for world in (2, 3, 5):
        shares = [dict(image_batches(paths, 8, 2, 0, rank, world)) for rank in range(world)]
        assert sorted(first for share in shares for first in share) == [0, 2, 4, 6]
        for share in shares:
            assert all(torch.equal(pixels, whole[first]) for first, pixels in share.items())
    assert whole[4][1, 0, 0, 0] == 5


def test_previews_show_before_and_after_in_turn():
    preview = Preview(2)
    add([preview], torch.zeros(3, 3, 1, 1), torch.ones(3, 3, 1, 1), torch.zeros(3, 5))
    assert preview.pairs[:, 0, 0, 0].tolist() == [0, 1, 0, 1]
