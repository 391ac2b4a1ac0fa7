"""`open_weights`: every kind of path, what the file says, and what its tensors show."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from modeling.generator import Generator, GeneratorConfig
from modeling.tokenizer import Tokenizer, TokenizerConfig
from modeling.weights.metadata import DISCRIMINATOR, GENERATOR, TOKENIZER, about_model
from modeling.weights.opened import check_same_codes, load_tokenizer, open_weights
from modeling.weights.tensors import fingerprint, write_state_dict
from tests.refusals import refusal
from tests.tiny import STAGE1, tiny_generator, tiny_tokenizer
from training import checkpoint

FORMATS = ("pth", "bin", "safetensors")
SMALL, TINY = tiny_tokenizer(), tiny_generator()
WIDE = replace(SMALL, encoder_width=128, encoder_heads=2, decoder_width=64, decoder_heads=1)


@pytest.fixture
def tokenizer(fill):
    return fill(Tokenizer(SMALL)).state_dict()


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_says_what_it_is(tmp_path, tokenizer, suffix):
    file = tmp_path / f"t.{suffix}"
    write_state_dict(tokenizer, file, about_model(TOKENIZER, SMALL, stage=2))
    opened = open_weights(file, TOKENIZER)
    assert opened.config(TokenizerConfig()) == replace(SMALL, num_latent_tokens=7)
    assert (opened.about.stage, opened.about.tokenizer) == (2, fingerprint(tokenizer))
    file = tmp_path / f"g.{suffix}"
    about = about_model(GENERATOR, TINY, "f" * 16, classes=["ant", "bee"], untrained=[1])
    write_state_dict(Generator(TINY).state_dict(), file, about)
    opened = open_weights(file, GENERATOR)
    assert opened.config(GeneratorConfig()) == TINY and opened.about == about
    assert opened.about.without_images([0, 1, 2]) == [1, 2]


@pytest.mark.parametrize("suffix", FORMATS)
def test_copies_and_prefixes_keep_what_a_file_says(tmp_path, tokenizer, suffix):
    file = tmp_path / f"t.{suffix}"
    write_state_dict({f"module.{name}": tensor for name, tensor in tokenizer.items()}, file,
                     replace(about_model(TOKENIZER, SMALL, stage=1)))  # fmt: skip
    assert open_weights(file, TOKENIZER).about.stage == 1


def test_the_published_format_is_what_it_was_for_strict_loading(tmp_path, tokenizer):
    """As the published programs read it: torch.load, then load_state_dict."""
    write_state_dict(tokenizer, tmp_path / "t.pth", about_model(TOKENIZER, SMALL, stage=2))
    for mmap in (False, True):
        content = torch.load(tmp_path / "t.pth", map_location="cpu", weights_only=True, mmap=mmap)
        assert isinstance(content, dict) and list(content) == list(tokenizer)
        assert content._metadata.keys() == {"alitok"}
        model = Tokenizer(SMALL)
        model.load_state_dict(content, strict=True)
        assert all(torch.equal(value, tokenizer[name]) for name, value in model.state_dict().items())  # fmt: skip


# ---------------------------------------------------------------------- files that say nothing
@pytest.mark.parametrize("stage1", [False, True])
def test_tensors_show_the_sizes_and_the_heads_are_the_published_ones(tmp_path, stage1):
    config = replace(WIDE, **{**STAGE1, "clustering": False}) if stage1 else WIDE
    torch.save(Tokenizer(config).state_dict(), tmp_path / "t.pth")
    opened = open_weights(tmp_path / "t.pth", TOKENIZER)
    assert opened.config(TokenizerConfig()) == replace(config, num_latent_tokens=7)
    assert opened.about.stage == (1 if stage1 else None)
    chosen = {"encoder_heads": 4, "num_latent_tokens": None}
    assert opened.config(TokenizerConfig(), chosen).encoder_heads == 4


def test_the_published_sizes_are_found_without_a_word(tmp_path):
    with torch.device("meta"):
        models = Tokenizer(TokenizerConfig()), Generator(GeneratorConfig(1280, 32))
    for model, name in zip(models, "tg"):
        state = {k: torch.zeros(()).expand(v.shape) for k, v in model.state_dict().items()}
        torch.save(state, tmp_path / f"{name}.bin")
    tokenizer = open_weights(tmp_path / "t.bin", TOKENIZER).config(TokenizerConfig(encoder_heads=1))
    assert tokenizer == TokenizerConfig(num_latent_tokens=273)
    generator = open_weights(tmp_path / "g.bin", GENERATOR).config(GeneratorConfig())
    assert generator == GeneratorConfig(1280, 32)


def test_a_width_of_no_whole_heads_leaves_them_to_whoever_knows(tmp_path, tokenizer):
    torch.save(tokenizer, tmp_path / "t.pth")  # width 16
    opened = open_weights(tmp_path / "t.pth", TOKENIZER)
    named = tmp_path / "t.pth", "encoder_width=16", "heads=12"
    refusal(lambda: opened.config(TokenizerConfig()), *named)
    heads = {"encoder_heads": 2, "decoder_heads": 2}
    assert opened.config(TokenizerConfig(**heads), heads).encoder_heads == 2


# ---------------------------------------------------------------------- refusals
@pytest.mark.parametrize("about", [None, about_model(TOKENIZER, SMALL)])
def test_a_size_that_somebody_set_otherwise_is_refused_by_name(tmp_path, tokenizer, about):
    write_state_dict(tokenizer, tmp_path / "t.pth", about)
    opened = open_weights(tmp_path / "t.pth", TOKENIZER)
    given = {"image_size": 32}, "--size {}={}".format
    named = "--size image_size=32", tmp_path / "t.pth", "image_size=16"
    refusal(lambda: opened.config(TokenizerConfig(), *given), *named)


@pytest.mark.parametrize("stated", [True, False])
def test_another_kind_is_named(tmp_path, tokenizer, stated):
    about = about_model(TOKENIZER, SMALL) if stated else None
    write_state_dict(tokenizer, tmp_path / "t.pth", about)
    file = tmp_path / "t.pth"
    refusal(lambda: open_weights(file, GENERATOR), file, "a generator", "a stage-2 tokenizer")
    refusal(
        lambda: open_weights(file, DISCRIMINATOR), file, "a discriminator", "a stage-2 tokenizer"
    )


def test_a_generator_of_other_codes_is_refused(tmp_path, tokenizer):
    def opened(name, state, about=None):
        write_state_dict(state, tmp_path / f"{name}.pth", about)
        return open_weights(tmp_path / f"{name}.pth", about.kind if about else TOKENIZER)

    generator = Generator(TINY).state_dict()
    about = about_model(GENERATOR, TINY, fingerprint(tokenizer))
    made = opened("g", generator, about)
    decoder = {**tokenizer, "decoder.conv_out.bias": tokenizer["decoder.conv_out.bias"] + 1}
    other = {**tokenizer, "quantize.embedding.weight": tokenizer["quantize.embedding.weight"] + 1}
    for fitting in (tokenizer, decoder):  # another decoder for the same codes
        check_same_codes(made, opened("t", fitting))
    check_same_codes(opened("u", generator, about_model(GENERATOR, TINY)), opened("o", other))
    fewer = Tokenizer(replace(SMALL, num_latent_tokens=6)).state_dict()
    for name, state, named in (("o", other, ()), ("f", fewer, ("expects 7", "makes 6"))):
        unfit, files = opened(name, state), (tmp_path / "g.pth", tmp_path / f"{name}.pth")
        refusal(lambda unfit=unfit: check_same_codes(made, unfit), *files, *named)


# ---------------------------------------------------------------------- runs
def test_a_run_and_its_checkpoints_are_opened(tmp_path, tokenizer):
    about = about_model(TOKENIZER, SMALL, stage=1)
    for step in (2, 4):
        state = {**tokenizer, "latent_tokens": tokenizer["latent_tokens"] + step}
        checkpoint.save(tmp_path / "run", step, {"tokenizer": (state, about)}, {}, keep=2)
    second = tmp_path / "run/checkpoints/step-00000002"
    for path, step in ((tmp_path / "run", 4), (second, 2), (second / "tokenizer.safetensors", 2)):
        opened = open_weights(path, TOKENIZER)
        assert opened.about.stage == 1
        assert torch.equal(opened.state["latent_tokens"], tokenizer["latent_tokens"] + step)
    loaded = load_tokenizer(opened, opened.config(TokenizerConfig()))
    assert torch.equal(loaded.latent_tokens, opened.state["latent_tokens"]) and not loaded.training


def test_a_run_of_the_published_generator_trainer_is_opened(tmp_path):
    """Its checkpoints as accelerate and its own code lay them out; its final file lies above them."""
    state, run = Generator(TINY).state_dict(), tmp_path / "run"

    def write(name, value):
        file = run / name
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {**state, "output.bias": torch.full_like(state["output.bias"], value)}
        (save_file if file.suffix == ".safetensors" else torch.save)(tensors, file)

    def found(path):
        return open_weights(path, GENERATOR).state["output.bias"][0].item()

    write("checkpoint-900/unwrapped_model/pytorch_model.bin", 1.0)
    write("checkpoint-1000/model.safetensors", 2.0)
    assert found(run / "checkpoint-900") == 1 and found(run) == 2
    write("checkpoint-1000/unwrapped_model/pytorch_model.bin", 3.0)
    assert found(run) == 3
    write("checkpoint-1000/ema_model/pytorch_model.bin", 4.0)
    assert found(run) == found(run / "checkpoint-1000") == 4
    write("pytorch_model.bin", 5.0)
    assert found(run) == 5
    shutil.rmtree(run)
    (run / "checkpoint-2").mkdir(parents=True)
    refusal(lambda: found(run), run, "no checkpoints")


def test_the_discriminator_beside_a_published_tokenizer_is_opened(tmp_path, tokenizer):
    critic = {"block_in.0.weight": torch.ones(2), "to_logits.0.bias": torch.zeros(1)}
    content = {
        "model_state": tokenizer,
        "criterion_state": {f"discriminator.{name}": value for name, value in critic.items()},
    }
    torch.save(content, tmp_path / "last.pth")
    opened = open_weights(tmp_path / "last.pth", DISCRIMINATOR)
    assert opened.state.keys() == critic.keys() and opened.about.kind == DISCRIMINATOR
    assert open_weights(tmp_path / "last.pth", TOKENIZER).state.keys() == tokenizer.keys()
