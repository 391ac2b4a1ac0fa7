import numpy as np
import pytest
from timm.data.imagenet_info import ImageNetInfo

from data.classes import describe_classes, map_labels, misnumbered
from tests.refusals import refusal

SYNSETS = list(ImageNetInfo().label_names())


@pytest.mark.parametrize(
    "classes, configured, words",
    [
        (["cat"], None, "1 class (cat)"),
        (["a", "b", "c"], 10, "3 classes of 10 configured (a, b, c)"),
        (["a", "b", "c", "d"], None, "4 classes (a, b, c, …)"),
    ],
)
def test_classes_in_words(classes, configured, words):
    assert describe_classes(classes, configured) == words


def test_odd_names_stay_one_line_that_can_be_printed():
    words = describe_classes(["a\nb", "c\udcff", "dög"])
    assert words == "3 classes (a\\nb, c\\udcff, dög)" and words.encode()


def test_labels_are_mapped_by_name():
    labels = np.array([0, 2, 2, 1], np.int32)
    mapped = map_labels(labels, ["ant", "bee", "cat"], ["cat", "dog", "bee", "ant"], "x")
    assert mapped.tolist() == [3, 0, 0, 2] and mapped.dtype == np.int32


@pytest.mark.parametrize("names", [("cafe\u0301", "caf\u00e9"), ("caf\u00e9", "cafe\u0301")])
def test_accents_may_be_composed_in_one_set_and_not_in_the_other(names):
    assert map_labels(np.array([0]), [names[0]], ["ant", names[1]], "x").tolist() == [1]


def test_class_without_images_may_be_unknown():
    assert map_labels(np.array([1]), ["ant", "bee"], ["bee"], "x").tolist() == [0]


def test_unknown_class_with_images_is_named():
    refusal(
        lambda: map_labels(np.array([0, 1]), ["ant", "bee"], ["ant", "cat"], "VAL"), "VAL", "bee"
    )


# ---------------------------------------------------------------------- labels that differ from numbers in names
def test_imagenets_own_classes_are_a_thousand_sorted_synsets():
    assert len(SYNSETS) == 1000 and sorted(set(SYNSETS)) == SYNSETS
    assert SYNSETS[207] == "n02099601" and SYNSETS[360] == "n02444819"  # golden retriever, otter


@pytest.mark.parametrize(
    "classes", [SYNSETS, ["cat", "dog"], [str(i) for i in range(10)], ["n01440764", "cat", "dog"]]
)
def test_imagenet_and_other_sets_are_not_warned_of(classes):
    assert misnumbered(classes) is None


@pytest.mark.parametrize(
    "classes, count, first",
    [
        (SYNSETS[::10], 100, f"class 1 is {SYNSETS[10]}, ImageNet's is {SYNSETS[1]}"),
        (SYNSETS[:10], 10, "the first 10 are the same"),
        ([SYNSETS[1], SYNSETS[0], *SYNSETS[2:]], 1000, f"class 0 is {SYNSETS[1]}"),
        (["extra", *SYNSETS], 1001, f"class 0 is extra, ImageNet's is {SYNSETS[0]}"),
        ([*SYNSETS, "n99999999"], 1001, "the first 1000 are the same"),
    ],
)
def test_other_numbers_and_orders_are_warned_of(classes, count, first):
    said = misnumbered(classes)
    assert said is not None and "\n" not in said
    assert f"the {count} classes are synsets, but not ImageNet's 1000" in said and first in said


@pytest.mark.parametrize(
    "classes, said",
    [
        (["0", "1", "10", "11", "2"], "class 2 is the one called 10"),
        (["1", "2", "3"], "class 0 is the one called 1"),
        (["0", "1", "2"], None),
        (["00", "01", "02"], None),
        (["0", "1", "10", "cat"], None),
        ([], None),
    ],
)
def test_numbers_that_are_sorted_as_text_are_warned_of(classes, said):
    doubt = misnumbered(classes)
    assert (doubt is None) if said is None else (said in doubt and "\n" not in doubt)
