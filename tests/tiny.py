"""Sizes of models that a test builds in milliseconds; a test names what differs."""

from modeling.generator import GeneratorConfig
from modeling.tokenizer import TokenizerConfig


def tiny_tokenizer(**changes) -> TokenizerConfig:
    """Stage 2's layout on 2x2 patches: 7 codes of 16 per image of 16 pixels, with prefix tokens."""
    sizes = dict(
        codebook_size=16, token_size=4, image_size=16, patch_size=8,
        encoder_width=16, encoder_layers=1, encoder_heads=2,
        decoder_width=16, decoder_layers=1, decoder_heads=2, num_buffer_tokens=2,
    )  # fmt: skip
    return TokenizerConfig(**{**sizes, **changes})


def tiny_generator(**changes) -> GeneratorConfig:
    """Of `tiny_tokenizer`'s codes, three classes."""
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        codebook_size=16, image_seq_len=7, condition_num_classes=3,
    )  # fmt: skip
    return GeneratorConfig(**{**sizes, **changes})
