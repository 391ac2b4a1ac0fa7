"""The published forward pass that encoding is measured against."""

import torch

from benchmarks.tokens import plain_codes
from encoding.job import encode
from modeling.tokenizer import Tokenizer, TokenizerConfig
from tests.golden.fill import images


def test_plain_way_makes_the_published_codes(fill, golden):
    tokenizer = fill(Tokenizer(TokenizerConfig(encoder_layers=2), with_decoder=False))
    pixels = torch.from_numpy(images(2, 256, 1))
    codes = plain_codes(tokenizer, pixels)
    assert (codes.numpy() == golden("tokenizer_small.npz")["codes"]).all()
    assert torch.equal(codes, encode(tokenizer, pixels, "fp32"))
