import math

import pytest
import torch

from evaluation.reconstruction import ReconstructionSums, codebook_use, reconstruct_all
from modeling.tokenizer import Tokenizer, TokenizerConfig

CPU = torch.device("cpu")


def sums_of(images, reconstructions, codes, codebook=8):
    sums = ReconstructionSums(codebook, CPU)
    sums.add(images, reconstructions, codes)
    return sums


def pair(*differences):
    """Images of zeros and reconstructions that are off by the given amounts."""
    images = torch.zeros(len(differences), 3, 4, 4)
    return images, images + torch.tensor(differences)[:, None, None, None]


@pytest.mark.parametrize("difference, psnr", [(1.0, 0.0), (0.1, 20.0), (0.01, 40.0)])
def test_psnr_by_hand(difference, psnr):
    metrics = sums_of(*pair(difference), torch.zeros(1, 5, dtype=torch.int64)).metrics()
    assert metrics["psnr"] == pytest.approx(psnr, abs=1e-4)


def test_psnr_is_the_mean_over_images_not_that_of_the_mean_error():
    metrics = sums_of(*pair(0.1, 0.01), torch.zeros(2, 5, dtype=torch.int64)).metrics()
    assert metrics["psnr"] == pytest.approx(30.0, abs=1e-4)


def test_psnr_of_a_perfect_reconstruction_is_finite():
    metrics = sums_of(*pair(0.0), torch.zeros(1, 5, dtype=torch.int64)).metrics()
    assert metrics["psnr"] == 100.0


def test_sums_of_two_halves_add_up_to_the_whole():
    images, reconstructions = torch.rand(6, 3, 4, 4), torch.rand(6, 3, 4, 4)
    codes = torch.randint(8, (6, 5))
    whole = sums_of(images, reconstructions, codes)
    one = sums_of(images[:2], reconstructions[:2], codes[:2])
    other = sums_of(images[2:], reconstructions[2:], codes[2:])
    torch.testing.assert_close(one.values + other.values, whole.values, rtol=1e-12, atol=0)
    one.add(images[2:], reconstructions[2:], codes[2:])
    assert one.metrics() == pytest.approx(whole.metrics())


def test_code_counts_are_those_of_all_images():
    sums = sums_of(*pair(0.1, 0.1), torch.tensor([[0, 1, 1], [7, 1, 0]]))
    assert sums.values[1:].tolist() == [2, 2, 3, 0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("used", [1, 3, 8])
def test_perplexity_of_evenly_used_codes_is_their_number(used):
    counts = torch.zeros(8, dtype=torch.float64)
    counts[:used] = 5
    use, perplexity = codebook_use(counts)
    assert use == used / 8 and perplexity == pytest.approx(used)


def test_perplexity_by_hand():
    use, perplexity = codebook_use(torch.tensor([1, 3, 0, 0]))
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert use == 0.5 and perplexity == pytest.approx(math.exp(entropy))


def test_no_codes_at_all_are_no_use():
    assert codebook_use(torch.zeros(4))[0] == 0


@pytest.fixture
def tokenizer():
    sizes = dict(encoder_width=8, encoder_layers=1, encoder_heads=1)
    sizes |= dict(decoder_width=8, decoder_layers=1, decoder_heads=1, num_buffer_tokens=1)
    config = TokenizerConfig(codebook_size=16, token_size=4, image_size=8, patch_size=4, **sizes)
    return Tokenizer(config)


BATCHES = torch.arange(3 * 2 * 3 * 8 * 8).remainder(251).to(torch.uint8).view(3, 2, 3, 8, 8)


def test_all_batches_are_reconstructed_and_the_first_is_shown(tokenizer):
    sums, before, after = reconstruct_all(tokenizer, BATCHES, CPU)
    images = BATCHES.flatten(0, 1) / 255
    codes = tokenizer.eval().encode(images)
    with torch.no_grad():
        expected = tokenizer.decode(codes)
    torch.testing.assert_close(before, images[:2])
    torch.testing.assert_close(after, expected[:2])
    assert sums.metrics() == pytest.approx(sums_of(images, expected, codes, 16).metrics())


@pytest.mark.parametrize("training", [True, False])
def test_reconstructing_leaves_the_tokenizer_in_its_mode(tokenizer, training):
    tokenizer.train(training)
    reconstruct_all(tokenizer, BATCHES[:1], CPU)
    assert tokenizer.training is training and tokenizer.encoder.training is training


def test_every_batch_is_shown_to_whoever_measures_more(tokenizer):
    seen = []
    _, before, after = reconstruct_all(tokenizer, BATCHES, CPU, lambda *pair: seen.append(pair))
    assert len(seen) == 3
    assert torch.equal(seen[0][0], before) and torch.equal(seen[0][1], after)


def test_no_images_are_no_error(tokenizer):
    sums, before, after = reconstruct_all(tokenizer, [], CPU)  # a rank beyond the held-out images
    assert len(before) == len(after) == 0 and not sums.values.any()
