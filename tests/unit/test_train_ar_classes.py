from functools import partial
from pathlib import Path

import pytest
import torch

from modeling.generator import Generator
from modeling.weights.metadata import GENERATOR, about_model, about_shapes
from modeling.weights.opened import Opened
from tests.refusals import refusal
from tests.tiny import tiny_generator
from train_ar import fit_classes


def config(classes, **changes):
    sizes = dict(num_hidden_layers=1, image_seq_len=21, condition_num_classes=classes)
    return tiny_generator(**{**sizes, **changes})


def generator(classes):
    return Generator(config(classes))


def opened(state, names=None):
    """The weights `state` as of a file; with `names` one that states its sizes and classes."""
    about = about_shapes(GENERATOR, state, "g.pth")
    if names is not None:
        about = about_model(GENERATOR, config(len(names)), classes=names)
    return Opened(Path("x.bin"), state, about)


@pytest.mark.parametrize("classes", [2, 7])
def test_another_number_of_classes_keeps_codes_and_no_class_and_starts_classes_at_their_mean(
    classes,
):
    old = generator(4).state_dict()
    state, words = fit_classes(opened(old), generator(classes).config, [])
    before, after = old["embeddings.weight"], state["embeddings.weight"]
    assert torch.equal(after[:17], before[:17])  # the codes, and the row that nothing uses
    assert torch.equal(after[-1], before[-1])
    assert after.shape == (17 + classes + 1, 32)
    for row in after[17:-1]:
        torch.testing.assert_close(row, before[17:21].mean(0))
    assert f"; {classes} instead of 4 classes; {classes} new, at the mean of the old ones" in words
    generator(classes).load_state_dict(state)
    assert old["embeddings.weight"] is before and len(before) == 22  # the file's are as they were


def test_the_same_classes_change_nothing():
    old = generator(4).state_dict()
    for names in (None, ["a", "b", "c", "d"]):
        state, words = fit_classes(opened(old, names), generator(4).config, ["a", "b", "c", "d"])
        assert state is old and words == ""


@pytest.mark.parametrize("names", [["x", "c", "e\u0301", "y"], ["c", "x", "\xe9"]])
def test_classes_have_the_rows_of_their_names_and_new_ones_the_mean(names):
    old = generator(4).state_dict()
    given = opened(old, ["a", "b", "c", "\xe9"]), generator(len(names)).config, names
    state, words = fit_classes(*given)
    before, after = old["embeddings.weight"], state["embeddings.weight"]
    assert torch.equal(after[:17], before[:17]) and torch.equal(after[-1], before[-1])
    mean = before[17:21].mean(0)
    known = {"c": before[19], "\xe9": before[20], "e\u0301": before[20]}
    for name, row in zip(names, after[17:-1], strict=True):
        torch.testing.assert_close(row, known.get(name, mean), rtol=0, atol=1e-7)
    assert words.endswith(
        "; 2 new, at the mean of the old ones: x, y"
        if len(names) == 4
        else "; 3 instead of 4 classes; 1 new, at the mean of the old ones: x"
    )


def test_type_of_the_weights_stays():
    old = {name: tensor.bfloat16() for name, tensor in generator(4).state_dict().items()}
    state, _ = fit_classes(opened(old), generator(3).config, [])
    assert state["embeddings.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name, value, names", [("codebook_size", 32, None), ("image_seq_len", 16, "abc")]
)
def test_other_sizes_than_those_of_the_classes_are_refused(name, value, names):
    old = generator(3).state_dict()
    call = partial(fit_classes, opened(old, names), config(3, **{name: value}), [])
    refusal(call, f"model.generator.{name}={value}", "x.bin")
