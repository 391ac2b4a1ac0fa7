"""ImageNet's classes, and warnings of labels that differ from the numbers that class names suggest."""

import re
from collections.abc import Sequence

from data.classes import printable

SYNSET = re.compile(r"n\d{8}")


def misnumbered(classes: Sequence[str]) -> str | None:
    """A warning if labels differ from the numbers that class names suggest; None if they agree.

    If most classes are synsets, but not ImageNet's 1,000 in order, published weights expect other labels, which
    nothing else would detect.
    """
    from modeling.weights.class_names import sorted_as_text  # loads models: only when needed

    doubt = sorted_as_text(dict(enumerate(classes)))
    synsets = sum(SYNSET.fullmatch(name) is not None for name in classes)
    if doubt or 2 * synsets <= len(classes):
        return doubt
    from timm.data.imagenet_info import ImageNetInfo  # loads all of timm, so only when needed

    expected = list(ImageNetInfo().label_names())  # the 1,000 synsets of ILSVRC 2012, sorted
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
