"""ImageNet's classes, and warnings of labels that differ from the numbers that class names suggest."""

import re
from collections.abc import Sequence

from data.classes import printable

SYNSET = re.compile(r"n\d{8}")


def imagenet_synsets() -> list[str]:
    """The 1,000 synsets of ILSVRC 2012 in the order of its classes, which is sorted."""
    from timm.data.imagenet_info import ImageNetInfo  # loads all of timm, so only when needed

    return ImageNetInfo().label_names()  # type: ignore[return-value] - a list, declared wider


def misnumbered(classes: Sequence[str]) -> str | None:
    """A warning if labels differ from the numbers that class names suggest; None if they agree."""
    from modeling.weights.class_names import sorted_as_text  # loads models: only when needed

    return sorted_as_text(dict(enumerate(classes))) or unlike_imagenet(classes)


def unlike_imagenet(classes: Sequence[str]) -> str | None:
    """A warning if most classes are synsets, but not ImageNet's 1,000 in order; None otherwise.

    Published weights then expect other labels, which nothing else would detect.
    """
    synsets = sum(SYNSET.fullmatch(name) is not None for name in classes)
    if 2 * synsets <= len(classes):
        return None
    expected = imagenet_synsets()
    if list(classes) == expected:
        return None
    unequal = [i for i, (name, wanted) in enumerate(zip(classes, expected)) if name != wanted]
    if unequal:
        i = unequal[0]
        first = f"class {i} is {printable(classes[i])}, ImageNet's is {expected[i]}"
    else:
        first = f"the first {min(len(classes), len(expected))} are the same"
    return (
        f"the {len(classes)} classes are synsets, but not ImageNet's {len(expected)} in their order "
        f"({first}): ImageNet's class numbers, and weights trained on all of it, do not fit them"
    )
