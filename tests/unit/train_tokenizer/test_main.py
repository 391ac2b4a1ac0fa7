from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from tests.refusals import refusal
from train_tokenizer.__main__ import (
    MIN_IMAGES,
    has_collapsed,
    images_look_alike,
    refuse_fsdp,
)


@pytest.mark.parametrize(
    "used, each, collapsed",
    [(9, 1000, True), (10, 1000, False), (9, 100, False)],  # the last: 9 tokens a code at most
)
def test_codebook_has_collapsed_below_a_tenth_once_enough_tokens_are_counted(used, each, collapsed):
    counts = torch.zeros(100)
    counts[:used] = each
    assert has_collapsed(counts) is collapsed


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
    assert not has_collapsed(counts.sum(0)) and images_look_alike(counts) is alike


def test_fsdp_is_refused_in_one_line_with_the_remedy():
    refuse_fsdp(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU))
    fsdp = SimpleNamespace(distributed_type=DistributedType.FSDP)
    refusal(lambda: refuse_fsdp(fsdp), "FSDP", "torchrun")
