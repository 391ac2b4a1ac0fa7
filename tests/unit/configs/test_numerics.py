"""What training.numerics means on each device, and what contradicts it."""

import pytest

from configs.numerics import Numerics, resolve
from configs.schema import TokenizerTraining, Training
from runtime.errors import InputError


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
def test_without_a_named_mode_the_other_options_decide(word):
    training = TokenizerTraining(mixed_precision="fp16", enable_tf32=word)
    found = resolve(training, cuda=True, exact_attention=True)
    assert found == Numerics("fp16", word, word, False)
    assert resolve(TokenizerTraining(mixed_precision="bf16"), cuda=False).autocast == "bf16"


@pytest.mark.parametrize(
    "mode, options, exact_attention",
    [
        ("published", {"mixed_precision": "fp16"}, False),
        ("fast", {"mixed_precision": "bf16", "enable_tf32": True}, False),
        ("exact", {"mixed_precision": "no", "enable_tf32": False}, True),
    ],
)
def test_options_that_repeat_the_mode_change_nothing(mode, options, exact_attention):
    repeated = TokenizerTraining(numerics=mode, **options)
    plain = resolve(TokenizerTraining(numerics=mode), cuda=True)
    assert resolve(repeated, True, exact_attention) == plain


@pytest.mark.parametrize(
    "mode, options, exact_attention, words",
    [
        ("published", {"mixed_precision": "bf16"}, False, "training.mixed_precision=bf16"),
        ("published", {"mixed_precision": "no"}, False, "training.mixed_precision=no"),
        ("published", {"enable_tf32": True}, False, "training.enable_tf32=True"),
        ("published", {"enable_tf32": False}, False, "training.enable_tf32=False"),
        ("published", {}, True, "model.vq_model.exact_attention=True"),
        ("fast", {"mixed_precision": "fp16"}, False, "training.mixed_precision=fp16"),
        ("fast", {"enable_tf32": False}, False, "training.enable_tf32=False"),
        ("fast", {}, True, "model.vq_model.exact_attention=True"),
        ("exact", {"mixed_precision": "bf16"}, False, "training.mixed_precision=bf16"),
        ("exact", {"enable_tf32": True}, False, "training.enable_tf32=True"),
    ],
)
def test_an_option_that_contradicts_the_mode_is_refused(mode, options, exact_attention, words):
    training = TokenizerTraining(numerics=mode, **options)
    for cuda in (True, False):
        with pytest.raises(InputError) as error:
            resolve(training, cuda, exact_attention)
        message = str(error.value)
        assert f"training.numerics={mode}" in message and words in message and "\n" not in message
