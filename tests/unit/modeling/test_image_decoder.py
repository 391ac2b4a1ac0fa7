"""Codes to pixels: bfloat16, compiled parts, a decoder that does not compile."""

import dataclasses

import pytest
import torch

from modeling.image_decoder import ImageDecoder
from modeling.tokenizer import Tokenizer, TokenizerConfig

SHALLOW = TokenizerConfig(
    image_size=64, encoder_layers=1, encoder_width=64, encoder_heads=2,
    decoder_layers=4, decoder_width=256, decoder_heads=4,
)  # fmt: skip


@pytest.mark.parametrize("layers", [4, 24])
def test_bfloat16_decoding_stays_near_float32_and_leaves_the_tokenizer_alone(fill, layers):
    """On CUDA this is the default; here on a CPU, told that bfloat16 pays. 24 layers are published."""
    tokenizer = fill(Tokenizer(dataclasses.replace(SHALLOW, decoder_layers=layers)))
    codes = torch.randint(4096, (3, SHALLOW.num_tokens))
    exact = ImageDecoder(tokenizer, torch.float32)(codes)
    assert torch.equal(ImageDecoder(tokenizer, torch.bfloat16)(codes), exact)  # a CPU's choice
    decoder = ImageDecoder(tokenizer, torch.bfloat16)
    decoder.autocast = True
    rough = decoder(codes)
    difference = (rough.float() - exact.float()).abs()
    assert 0 < difference.mean() < 0.5 and difference.max() <= 4  # of 255
    assert exact.float().std() > 10  # a picture, not a grey field


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_compiled_decoding_fills_parts_up_and_cuts_them_again(fill, traced, count):
    tokenizer = fill(Tokenizer(SHALLOW))
    codes = torch.randint(4096, (count, SHALLOW.num_tokens))
    decoder = ImageDecoder(tokenizer, torch.float32, compiled=True, batch=4)
    assert decoder.compiled and decoder.part == 4
    images = decoder(codes)
    expected = ImageDecoder(tokenizer, torch.float32)(codes)
    assert (images.int() - expected.int()).abs().max() <= 1  # truncation beside rounding


@pytest.mark.parametrize("at_once", [False, True])
def test_decoder_that_does_not_compile_says_so_once_and_stays_eager(fill, monkeypatch, at_once):
    def fail(*arguments, **options):
        raise RuntimeError("broken")

    # torch.compile itself fails if Python is too new for it.
    monkeypatch.setattr(torch, "compile", fail if at_once else lambda *_, **__: fail)
    tokenizer = fill(Tokenizer(SHALLOW))
    with pytest.warns(UserWarning, match="decoding is not compiled.*: RuntimeError: broken"):
        decoder = ImageDecoder(tokenizer, torch.float32, compiled=True, batch=2)
    assert not decoder.compiled
    assert decoder(torch.zeros(3, SHALLOW.num_tokens, dtype=torch.int64)).shape == (3, 64, 64, 3)
