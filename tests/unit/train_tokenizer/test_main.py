from types import SimpleNamespace

import pytest
import torch

from train_tokenizer.__main__ import MIN_IMAGES, CodebookUse


def warnings_of(counts):
    """What a report on counts (T, codebook_size) warns of, twice."""
    config = SimpleNamespace(
        num_tokens=len(counts), codebook_size=counts.shape[1], clustering=False
    )
    accelerator = SimpleNamespace(device="cpu", reduce=lambda counts, _: counts.clone())
    use, said = CodebookUse(config, accelerator), []
    for _ in range(2):
        use.counts += counts
        use.report(SimpleNamespace(log=SimpleNamespace(say=said.append)))
    return said


@pytest.mark.parametrize(
    "used, each, collapsed",
    [(9, 1000, True), (10, 1000, False), (9, 100, False)],  # the last: 9 tokens a code at most
)
def test_codebook_has_collapsed_below_a_tenth_once_enough_tokens_are_counted(used, each, collapsed):
    counts = torch.zeros(1, 100, dtype=torch.float64)
    counts[0, :used] = each
    said = warnings_of(counts)
    assert ["collapsed" in line for line in said] == [True] * collapsed  # once


@pytest.mark.parametrize(
    "images, different, alike",
    [
        (MIN_IMAGES, 0, True),  # every image has the same codes, 40 % of the codebook
        (MIN_IMAGES - 1, 0, False),  # too few images
        (100, 1, True),
        (100, 40, False),
    ],
)
def test_identical_codes_for_all_images_are_seen_however_many_they_are(images, different, alike):
    counts = torch.zeros(40, 100, dtype=torch.float64)
    counts[range(40), range(40)] = images - different
    counts[range(40), range(40, 80)] = different
    assert ["hardly depend" in line for line in warnings_of(counts)] == [True] * alike
