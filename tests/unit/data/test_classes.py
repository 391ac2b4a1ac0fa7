import numpy as np
import pytest

from data.classes import (
    describe_classes,
    map_labels,
)
from tests.refusals import refusal


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
