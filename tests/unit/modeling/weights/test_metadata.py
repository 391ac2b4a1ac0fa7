"""What weights files say of themselves: written, read, and compared with what is in them."""

import dataclasses
import json
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.generator import Generator, GeneratorConfig
from modeling.tokenizer import Tokenizer, TokenizerConfig
from modeling.weights.metadata import (
    DISCRIMINATOR,
    GENERATOR,
    KEY,
    SIZES,
    TOKENIZER,
    about_model,
    parse,
    shown_sizes,
)
from modeling.weights.opened import open_weights
from modeling.weights.tensors import (
    read_file,
    read_model,
    read_state_dict,
    write_state_dict,
)
from tests.refusals import refusal
from tests.tiny import STAGE1, tiny_generator, tiny_tokenizer

SMALL, TINY = tiny_tokenizer(), tiny_generator()


@pytest.fixture
def generator(tmp_path):
    """A generator's file; returns its path."""
    about = about_model(GENERATOR, TINY, "f" * 16, classes=["ant", "bee"])
    write_state_dict(Generator(TINY).state_dict(), tmp_path / "g.safetensors", about)
    return tmp_path / "g.safetensors"


def about_file(path):
    _, entries = read_file(path)
    return parse(entries[KEY], path) if KEY in entries else None


def edited(path, **changes):
    """The same file with another entry; a value of None removes the name."""
    entry = about_file(path).entry()
    for name, value in changes.items():
        entry[name] = {**entry["config"], **value} if name == "config" else value
    save_file(load_file(path), path, {KEY: json.dumps(entry)})
    return path


def refused(path, *named, kind=GENERATOR):
    refusal(lambda: read_model(path, kind), path, *named)


# ---------------------------------------------------------------------- written and read
def test_sizes_are_those_that_decide_what_a_model_computes():
    training = {"clustering", "position_init"}
    assert set(SIZES[TOKENIZER]) == {f.name for f in dataclasses.fields(TokenizerConfig)} - training
    training = {"dropout", "attn_drop", "tok_dropout", "class_label_dropout", "use_checkpoint"}
    assert set(SIZES[GENERATOR]) == {f.name for f in dataclasses.fields(GeneratorConfig)} - training


def test_a_generators_file_says_its_sizes_codes_and_classes(generator):
    about = about_file(generator)
    assert about.config.items() <= vars(TINY).items()
    assert about.tokenizer == "f" * 16 and about.classes == ["ant", "bee"]


def test_a_discriminators_file_says_what_it_is(tmp_path):
    write_state_dict({"a": torch.ones(2)}, tmp_path / "d.safetensors", about_model(DISCRIMINATOR))
    assert about_file(tmp_path / "d.safetensors").kind == DISCRIMINATOR
    assert read_state_dict(tmp_path / "d.safetensors").keys() == {"a"}


def test_the_same_weights_are_the_same_bytes(generator, tmp_path):
    again = tmp_path / "again.safetensors"
    write_state_dict(read_state_dict(generator), again, about_file(generator))
    assert again.read_bytes() == generator.read_bytes()


def test_names_that_are_not_utf8_come_back(tmp_path):
    about = about_model(GENERATOR, TINY, classes=["a\udce9", "犬"])
    write_state_dict(Generator(TINY).state_dict(), tmp_path / "g.safetensors", about)
    assert about_file(tmp_path / "g.safetensors").classes == ["a\udce9", "犬"]


def test_other_peoples_files_say_nothing(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors", {"format": "pt"})
    save_file({"a": torch.ones(2)}, tmp_path / "b.safetensors")
    assert [about_file(tmp_path / f"{name}.safetensors") for name in "ab"] == [None] * 2
    assert read_state_dict(tmp_path / "a.safetensors").keys() == {"a"}


# ---------------------------------------------------------------------- lies and damage
@pytest.mark.parametrize(
    "name, value, shown",
    [
        ("hidden_size", 64, 32), ("num_hidden_layers", 3, 2), ("num_attention_heads", 4, 2),
        ("codebook_size", 8, 16), ("condition_num_classes", 5, 3),
    ],
)  # fmt: skip
def test_a_size_that_the_tensors_contradict_is_named(generator, name, value, shown):
    refused(edited(generator, config={name: value}), f"{name}={value}", shown)


@pytest.mark.parametrize(
    "name", [n for n in SIZES[TOKENIZER] if n not in ("encoder_heads", "decoder_heads", "causal")]
)
@pytest.mark.parametrize("config", [SMALL, tiny_tokenizer(**STAGE1)])
def test_every_size_of_a_tokenizer_that_shows_is_compared(tmp_path, config, name):
    path, state = tmp_path / "t.safetensors", Tokenizer(config).state_dict()
    about = about_model(TOKENIZER, config)
    assert shown_sizes(TOKENIZER, state, path).items() <= about.config.items()
    value = about.config[name]
    about.config[name] = not value if isinstance(value, bool) else value + 1
    write_state_dict(state, path, about)
    refused(path, f"{name}={about.config[name]}", value, kind=TOKENIZER)


def test_another_kind_than_the_tensors_is_refused(tmp_path, generator):
    state = read_state_dict(generator)
    write_state_dict({"a": torch.ones(())}, generator, about_file(generator))
    refused(generator, "a generator")
    about = about_model(TOKENIZER, SMALL)
    write_state_dict(state, tmp_path / "t.safetensors", about)
    refused(tmp_path / "t.safetensors", "a tokenizer", kind=TOKENIZER)


@pytest.mark.parametrize(
    "changes, word",
    [
        *((dict(version=version), f"version {version!r}") for version in (2, 0, "1", None)),
        (dict(kind="vae"), "kind"), (dict(kind=[]), "kind"),
        (dict(config={"hidden_size": "32"}), "hidden_size='32'"),
        (dict(config={"hidden_size": True}), "hidden_size=True"),
        (dict(config={"experts": 4}), "experts"), (dict(tokenizer=5), "tokenizer"),
        (dict(classes="ab"), "classes"), (dict(classes=[1]), "classes"),
        (dict(classes=list("abcd")), "4 classes"),
    ],
)  # fmt: skip
def test_damage_is_refused(generator, changes, word):
    refused(edited(generator, **changes), word)


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "{}", "[" * 100_000, "\x00"])
def test_an_entry_that_is_no_object_is_one_line(generator, text):
    save_file(load_file(generator), generator, {KEY: text})
    refused(generator, "damaged")


def test_a_missing_size_is_named(generator):
    entry = about_file(generator).entry()
    del entry["config"]["image_seq_len"]
    save_file(load_file(generator), generator, {KEY: json.dumps(entry)})
    refused(generator, "image_seq_len")


def test_sizes_that_no_model_has_are_refused_by_name(generator):
    edited(generator, config={"image_seq_len": 10})
    refusal(lambda: open_weights(generator, GENERATOR).config(TINY), generator, "image_seq_len=10")


@pytest.mark.parametrize("entry", [7, [], {1: 2}, {"version": torch.ones(2)}, "{", None])
def test_damage_in_pytorchs_format_is_one_line(tmp_path, entry):
    state = OrderedDict(Generator(TINY).state_dict())
    state._metadata = {KEY: entry}
    torch.save(state, tmp_path / "g.bin")
    refused(tmp_path / "g.bin", "damaged")
    state._metadata = [entry]  # of somebody else
    torch.save(state, tmp_path / "g.bin")
    assert about_file(tmp_path / "g.bin") is None
