"""The sizes of models are those of their weights; an option that says otherwise is refused."""

from dataclasses import replace

import pytest
import yaml

from configs.load import load
from configs.schema import GeneratorRun
from configs.sizes import tokenizer_of, with_weights
from modeling.generator import Generator
from modeling.tokenizer import Tokenizer
from modeling.weights.metadata import GENERATOR, TOKENIZER, about_model
from modeling.weights.opened import open_weights
from modeling.weights.tensors import write_state_dict
from tests.refusals import refusal
from tests.tiny import tiny_generator, tiny_tokenizer

SIZES = tiny_tokenizer(
    codebook_size=64, num_latent_tokens=6, causal=True, encoder_heads=4, num_buffer_tokens=1
)


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer's weights, which state their sizes; `bare` is a copy that does not."""
    state = Tokenizer(SIZES).state_dict()
    write_state_dict(state, tmp_path / "t.pth", about_model(TOKENIZER, SIZES))
    write_state_dict(state, tmp_path / "bare.pth")
    return open_weights(tmp_path / "t.pth", TOKENIZER)


@pytest.fixture
def generator(tmp_path):
    config = tiny_generator(hidden_size=64, codebook_size=64, image_seq_len=6)
    about = about_model(GENERATOR, config)
    write_state_dict(Generator(config).state_dict(), tmp_path / "g.bin", about)
    return open_weights(tmp_path / "g.bin", GENERATOR)


@pytest.fixture
def read(tmp_path):
    """Options of a config with these sizes and of a command line."""

    def start(*argv, **models):
        (tmp_path / "c.yaml").write_text(
            yaml.safe_dump({"model": models, "experiment": {"name": "x"}})
        )
        return load(GeneratorRun, [f"config={tmp_path}/c.yaml", *argv], "sample_imagenet")

    return start


def test_weights_bring_their_sizes_and_leave_the_rest(read, tokenizer, generator, capsys):
    options = read(generator={"guidance_scale": 3.0}, vq_model={"encoder_heads": 4})
    used = with_weights(options, tokenizer, generator).model
    assert used.vq_model == SIZES
    assert (used.generator.hidden_size, used.generator.image_seq_len) == (64, 6)
    assert (used.generator.guidance_scale, used.generator.dropout) == (3.0, 0.1)  # not sizes
    assert options.model.vq_model.image_size == 256  # the options are as they were
    assert not capsys.readouterr().err


def test_a_generator_that_is_to_be_trained_makes_the_codes_of_the_tokenizer(read, tokenizer):
    used = with_weights(read(generator={"hidden_size": 64}), tokenizer).model.generator
    assert (used.hidden_size, used.image_seq_len, used.codebook_size) == (64, 6, 64)
    other = read("model.generator.image_seq_len=273")
    refusal(lambda: with_weights(other, tokenizer), "image_seq_len=273", "6 codes")


@pytest.mark.parametrize(
    "option, value, size", [("vq_model.decoder_heads", 4, 2), ("generator.hidden_size", 128, 64)]
)
def test_an_option_that_contradicts_the_weights_is_refused_where_it_stands(
    read, tokenizer, generator, option, value, size
):
    section, name = option.split(".")
    options = read(f"model.{option}={value}")
    named = f"model.{option}={value} (the command line)", f"{name}={size}"
    refusal(lambda: with_weights(options, tokenizer, generator), *named)
    options = read(**{section: {name: value}})
    named = f"model.{option}={value}", "c.yaml, line"
    refusal(lambda: with_weights(options, tokenizer, generator), *named)
    assert with_weights(read(f"model.{option}={size}"), tokenizer, generator)


def test_null_is_no_number_of_codes_of_its_own(read, tokenizer):
    options = read(vq_model={"num_latent_tokens": None})
    assert with_weights(options, tokenizer).model.vq_model.num_tokens == 6


def test_a_program_with_flags_has_the_same_rule(tmp_path, tokenizer):
    file = tmp_path / "d.yaml"
    path = str(tokenizer.file)
    assert tokenizer_of(path).config == SIZES
    named = "image_size=32 (the command line)", tokenizer.file
    refusal(lambda: tokenizer_of(path, image_size=32), *named)
    file.write_text("model: {vq_model: {encoder_heads: 2}}")
    refusal(lambda: tokenizer_of(path, str(file)), f"encoder_heads=2 ({file}, line 1)")


def test_what_no_tensor_shows_is_what_somebody_sets(tmp_path, tokenizer):
    file, bare = tmp_path / "d.yaml", str(tmp_path / "bare.pth")
    file.write_text("model: {vq_model: {encoder_heads: 2, decoder_heads: 8, causal: true}}")
    expected = replace(SIZES, encoder_heads=2, decoder_heads=8)
    assert tokenizer_of(bare, str(file)).config == expected
