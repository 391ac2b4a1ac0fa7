import builtins

import pytest

from modeling.sampling import NO_CLASS
from modeling.weights.class_names import ClassNames
from runtime.errors import InputError

IMAGENET = ClassNames(1000)
DIGITS = ClassNames(5, {i: str(5 + i) for i in range(5)})


def refusal(names, item):
    with pytest.raises(InputError) as caught:
        names.labels([item])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_imagenet_classes_go_by_number_or_name():
    assert IMAGENET.labels([360, "golden retriever", "otter", 0]) == [360, 207, 360, 0]
    assert IMAGENET.labels(["Golden Retriever", "OTTER"]) == [207, 360]
    assert IMAGENET.caption(207) == "golden retriever"


@pytest.mark.parametrize("item", [None, "none", "None"])
def test_none_is_an_image_without_a_class(item):
    assert IMAGENET.labels([item]) == DIGITS.labels([item]) == [NO_CLASS]
    assert IMAGENET.caption(NO_CLASS) == "no class"


@pytest.mark.parametrize("name, labels", [("crane", (134, 517)), ("maillot", (638, 639))])
def test_a_name_of_two_classes_asks_for_the_number(name, labels):
    message = refusal(IMAGENET, name)
    assert "ambiguous: pass the number" in message
    assert all(f"{label} (" in message for label in labels)


def test_names_that_differ_in_case_alone_are_told_apart():
    assert IMAGENET.labels(["Cardigan", "cardigan"]) == [264, 474]
    assert "264 (Cardigan) or 474 (cardigan)" in refusal(IMAGENET, "CARDIGAN")


@pytest.mark.parametrize(
    "name, near",
    [("golden retreiver", "golden retriever (class 207)"), ("oter", "otter (class 360)")],
)
def test_an_unknown_name_gets_the_nearest(name, near):
    assert f"no class is called {name}: the nearest name is {near}" in refusal(IMAGENET, name)


@pytest.mark.parametrize(
    "item, words", [(1000, "class 1000 asked for"), (-1, "class -1"), (0.5, "neither")]
)
def test_a_number_out_of_range_is_refused(item, words):
    assert words in refusal(IMAGENET, item)


def test_accents_may_be_composed_or_not():
    names = ClassNames(1, {0: "cafe\u0301"})
    assert names.labels(["caf\u00e9", "CAFE\u0301"]) == [0, 0]
    assert "the nearest name is cafe" in refusal(names, "caf\u00e9s")


def test_a_runs_folders_are_its_names_and_a_number_is_a_label():
    assert DIGITS.labels(["5", 4, "9"]) == [0, 4, 4]
    assert DIGITS.caption(1) == "6"
    assert "class 5 asked for: this model knows classes 0…4" in refusal(DIGITS, 5)
    assert "nearest name is 5 (class 0)" in refusal(DIGITS, "55")


def test_classes_that_nothing_names_go_by_number():
    names = ClassNames(3)
    assert names.labels([2]) == [2] and names.caption(2) == "2"
    assert "pass numbers, 0…2" in refusal(names, "otter")


def test_wordnet_ids_of_all_of_imagenet_have_imagenets_names():
    folders = {i: f"n{i:08d}" for i in range(1000)}
    names = ClassNames(1000, folders)
    assert names.labels(["n00000207", "otter"]) == [207, 360]
    assert names.caption(207) == "golden retriever"
    fewer = ClassNames(1000, dict(list(folders.items())[:999]))
    assert fewer.caption(207) == "n00000207"
    assert "no class is called otter" in refusal(fewer, "otter")


def test_without_torchvision_numbers_still_work(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchvision"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    names = ClassNames(1000)
    assert names.labels([207]) == [207] and names.caption(207) == "207"
    assert "pip install torchvision" in refusal(names, "otter")
