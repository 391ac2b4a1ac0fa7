"""Sets whose classes look like ImageNet's but are numbered otherwise are warned of."""

import pytest
from timm.data.imagenet_info import ImageNetInfo

from data.imagenet import misnumbered

SYNSETS = list(ImageNetInfo().label_names())


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
