"""Metrics of sets of images: sums over one set, and figures from those of two sets.

A new metric is an entry of `METRICS`; its figures then appear in the table, the JSON and the
log of training.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from evaluation.metrics import (
    IS_SPLIT,
    NEIGHBOURS,
    FeatureSample,
    InceptionScore,
    Moments,
    frechet_distance_of_moments,
    precision_recall,
)

POOL, SPATIAL, LOGITS = range(3)  # what a `FeatureNetwork` returns
Part = tuple[Any, ...]


# A metric's sums over one set, by `add(features (B, width), indices (B,) of the images, on the CPU)`; all
# processes together call `reduced()`. Their size must not grow with the number of images.
Sums = Moments | InceptionScore | FeatureSample


class SetMetric(NamedTuple):
    """How the features of one set are summed up, and the figures of the sums of two sets."""

    names: tuple[str, ...]  # of its figures
    part: str  # the name of its sums; metrics with the same name share them
    feature: int  # POOL, SPATIAL or LOGITS
    sums: Callable[[int, int, torch.device], Sums]  # of width, images, device
    figures: Callable[[Part, Part, torch.device, bool], Part]  # of ours, theirs, device, half
    terms: str = ""  # what else its figures depend on
    compares: bool = True  # with a reference; if that lacks the part, the figures are None


def moments(width: int, images: int, device: torch.device) -> Moments:
    return Moments(width, device)


def distance(ours: Part, theirs: Part, device: torch.device, half: bool) -> Part:
    return (frechet_distance_of_moments(*(m.to(device) for m in (*ours, *theirs))),)


def manifolds(ours: Part, theirs: Part, device: torch.device, half: bool) -> Part:
    """Precision and recall; `half` computes their distances in float16."""
    return precision_recall(theirs[0], ours[0], device, half=half)


FID = SetMetric(("FID",), "pool", POOL, moments, distance)
METRICS: list[SetMetric] = [
    FID,
    SetMetric(("sFID",), "spatial", SPATIAL, moments, distance),
    SetMetric(
        ("IS", "IS_std"), "score", LOGITS, InceptionScore, lambda ours, *_: ours,
        f", splits of {IS_SPLIT} in file order", compares=False,
    ),
    SetMetric(
        ("precision", "recall"), "manifold", POOL, FeatureSample, manifolds, f", k = {NEIGHBOURS}"
    ),
]  # fmt: skip
LABELS = {"dinov2": "DINOv2"}  # of feature spaces, in the names of their figures


def named(name: str, space: str) -> str:
    """The name of a figure in results: gFID in Inception's space, FD_DINOv2 in DINOv2's."""
    if space == "inception":
        return {"FID": "gFID"}.get(name, name)
    return f"{'FD' if name == 'FID' else name}_{LABELS[space]}"
