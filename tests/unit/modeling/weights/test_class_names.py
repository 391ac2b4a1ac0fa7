import builtins

import pytest
from timm.data.imagenet_info import ImageNetInfo

from modeling.sampling import NO_CLASS
from modeling.weights.class_names import ClassNames
from tests.refusals import refusal

IMAGENET = ClassNames(1000)
DIGITS = ClassNames(5, {i: str(5 + i) for i in range(5)})


def refused(names, item, *named):
    refusal(lambda: names.labels([item]), *named)


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
    refused(IMAGENET, name, name, *labels)


def test_names_that_differ_in_case_alone_are_told_apart():
    assert IMAGENET.labels(["Cardigan", "cardigan"]) == [264, 474]
    refused(IMAGENET, "CARDIGAN", "264 (Cardigan)", "474 (cardigan)")


@pytest.mark.parametrize(
    "names, item, named",
    [
        (IMAGENET, "golden retreiver", ("golden retreiver", "golden retriever (class 207)")),
        (IMAGENET, "oter", ("oter", "otter (class 360)")),
        (IMAGENET, 1000, ("class 1000",)),
        (IMAGENET, -1, ("class -1",)),
        (IMAGENET, 0.5, (0.5,)),
        (DIGITS, 5, ("class 5", "0…4")),
        (DIGITS, "55", ("55", "5 (class 0)")),
        (ClassNames(3), "otter", ("otter", "0…2")),
        (ClassNames(1, {0: "cafe\u0301"}), "caf\u00e9s", ("cafe",)),
    ],
)
def test_what_is_no_class_is_refused_with_what_is(names, item, named):
    refused(names, item, *named)


def test_accents_may_be_composed_or_not():
    names = ClassNames(1, {0: "cafe\u0301"})
    assert names.labels(["caf\u00e9", "CAFE\u0301"]) == [0, 0]


def test_a_runs_folders_are_its_names_and_a_number_is_a_label():
    assert DIGITS.labels(["5", 4, "9"]) == [0, 4, 4]
    assert DIGITS.caption(1) == "6"


def test_classes_that_nothing_names_go_by_number():
    names = ClassNames(3)
    assert names.labels([2]) == [2] and names.caption(2) == "2"


def test_wordnet_ids_of_all_of_imagenet_have_imagenets_names():
    folders = dict(enumerate(ImageNetInfo().label_names()))
    names = ClassNames(1000, folders)
    assert names.labels(["n02099601", "otter"]) == [207, 360]
    assert names.caption(207) == "golden retriever"
    fewer = ClassNames(1000, {i: folders[i] for i in range(999)})
    exchanged = ClassNames(1000, {**folders, 999: "n99999999"})
    for other in (fewer, exchanged):  # whose labels may mean other classes
        assert other.caption(207) == "n02099601"
        refused(other, "otter", "otter")


def test_without_torchvision_numbers_still_work(monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchvision"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    names = ClassNames(1000)
    assert names.labels([207]) == [207] and names.caption(207) == "207"
    refused(names, "otter", "pip install torchvision")
