import pytest
import torch

from generation.job import SamplingJob
from generation.models import Models
from modeling.generator import Generator, GeneratorConfig
from modeling.sampling import Sampling
from modeling.tokenizer import Tokenizer, TokenizerConfig

SIZES = TokenizerConfig(
    codebook_size=16,
    token_size=4,
    image_size=16,
    patch_size=8,
    encoder_width=16,
    encoder_layers=1,
    encoder_heads=2,
    decoder_width=16,
    decoder_layers=1,
    decoder_heads=2,
)
GENERATOR = GeneratorConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    codebook_size=16,
    image_seq_len=7,
    condition_num_classes=3,
)


@pytest.fixture
def models(fill):
    generator, tokenizer = fill(Generator(GENERATOR)), fill(Tokenizer(SIZES))
    hashes = {"tokenizer": "t" * 16, "generator": "g" * 16}
    return Models(tokenizer, generator, hashes, torch.device("cpu"))


@pytest.fixture
def job():
    return SamplingJob(
        count=8, classes=(0, 1, 2), seed=5, sampling=Sampling(2.0), precision="fp32",
        compiled=False, chunk=None,
    )  # fmt: skip
