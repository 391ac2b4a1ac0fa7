"""Metrics of sets of images, as objects that define sums over one set and figures from two sets.

A new metric is a class here and an entry of `METRICS`; its figures then appear in the table, the JSON and the
log of training.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

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


class Sums(Protocol):
    """A metric's sums over one set; their size must not grow with the number of images."""

    def add(self, features: Tensor, indices: Tensor, /) -> None:
        """Add features (B, width) of the images at `indices` (B,), on the CPU."""
        ...

    def reduced(self) -> Part:
        """The sums over all processes, which call this together."""
        ...


class SetMetric(Protocol):
    names: tuple[str, ...]  # of its figures
    part: str  # the name of its sums; metrics with the same name share them
    feature: int  # POOL, SPATIAL or LOGITS
    terms: str  # what else its figures depend on
    compares: bool  # with a reference; if that lacks the part, the figures are None

    def sums(self, width: int, images: int, device: torch.device) -> Sums: ...

    def figures(self, ours: Part, theirs: Part, device: torch.device, half: bool) -> Part: ...


class FrechetDistance:
    compares, terms = True, ""

    def __init__(self, name: str, part: str, feature: int):
        self.names, self.part, self.feature = (name,), part, feature

    def sums(self, width: int, images: int, device: torch.device) -> Moments:
        return Moments(width, device)

    def figures(self, ours: Part, theirs: Part, device: torch.device, half: bool) -> Part:
        moments = [m.to(device) for m in (*ours, *theirs)]
        return (frechet_distance_of_moments(*moments),)


class Score:
    """The Inception Score and its deviation over splits."""

    names, part, feature, compares = ("IS", "IS_std"), "score", LOGITS, False
    terms = f", splits of {IS_SPLIT} in file order"

    def sums(self, width: int, images: int, device: torch.device) -> InceptionScore:
        return InceptionScore(images, width, device)

    def figures(self, ours: Part, theirs: Part, device: torch.device, half: bool) -> Part:
        return ours


class Manifolds:
    """Precision and recall; `half` computes their distances in float16."""

    names, part, feature, compares = ("precision", "recall"), "manifold", POOL, True
    terms = f", k = {NEIGHBOURS}"

    def sums(self, width: int, images: int, device: torch.device) -> FeatureSample:
        return FeatureSample(width, images, device)

    def figures(self, ours: Part, theirs: Part, device: torch.device, half: bool) -> Part:
        return precision_recall(theirs[0], ours[0], device, half=half)


FID = FrechetDistance("FID", "pool", POOL)
METRICS: list[SetMetric] = [
    FID,
    FrechetDistance("sFID", "spatial", SPATIAL),
    Score(),
    Manifolds(),
]
LABELS = {"dinov2": "DINOv2"}  # of feature spaces, in the names of their figures


def named(name: str, space: str) -> str:
    """The name of a figure in results: gFID in Inception's space, FD_DINOv2 in DINOv2's."""
    if space == "inception":
        return {"FID": "gFID"}.get(name, name)
    return f"{'FD' if name == 'FID' else name}_{LABELS[space]}"
