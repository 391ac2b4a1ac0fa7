import pytest
import torch

from generation.job import SamplingJob
from generation.models import Models
from modeling.generator import Generator
from modeling.sampling import Sampling
from modeling.tokenizer import Tokenizer
from tests.tiny import tiny_generator, tiny_tokenizer

SIZES = tiny_tokenizer(num_buffer_tokens=32)
GENERATOR = tiny_generator(num_hidden_layers=1)


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
