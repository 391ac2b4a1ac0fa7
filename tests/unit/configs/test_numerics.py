"""What training.numerics means on each device, and what overrules it."""

import pytest

from configs.numerics import Numerics, resolve
from configs.schema import TokenizerTraining, Training
from tests.refusals import refusal


@pytest.mark.parametrize(
    "mode, on_cuda",
    [
        ("published", Numerics("fp16", False, True, True)),
        ("fast", Numerics("bf16", True, True, False)),
        ("auto", Numerics("bf16", True, True, False)),
        ("exact", Numerics("no", False, False, True)),
    ],
)
def test_modes_of_the_tokenizer(mode, on_cuda):
    training = TokenizerTraining(numerics=mode)
    assert resolve(training, cuda=True) == on_cuda
    assert resolve(training, cuda=False).autocast == "no"


def test_the_generator_was_published_in_bf16():
    published, fast = (Training(numerics=mode) for mode in ("published", "fast"))
    assert resolve(published, cuda=True) == resolve(fast, cuda=True)
    assert resolve(published, cuda=True).autocast == "bf16"


@pytest.mark.parametrize("schema", [Training, TokenizerTraining])
def test_auto_is_fp16_on_a_gpu_without_bf16(schema):
    assert resolve(schema(), True, bf16=False) == Numerics("fp16", False, True, True)
    for named in ({"numerics": "fast"}, {"mixed_precision": "bf16"}):
        assert resolve(schema(**named), True, bf16=False).autocast == "bf16"


@pytest.mark.parametrize("word", [True, False])
def test_the_published_options_overrule_the_mode(word):
    training = TokenizerTraining(mixed_precision="fp16", enable_tf32=word)
    assert resolve(training, cuda=True) == Numerics("fp16", word, word, False)
    assert resolve(TokenizerTraining(mixed_precision="bf16"), cuda=False).autocast == "bf16"


def test_fp16_without_cuda_is_refused():
    training = TokenizerTraining(mixed_precision="fp16")
    refusal(lambda: resolve(training, cuda=False), "training.mixed_precision=fp16", "CUDA")
