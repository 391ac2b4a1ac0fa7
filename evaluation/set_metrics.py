"""The metrics of a set of images as objects: what each sums up of a set, and its figures of two sets.

A new metric is a class here and an entry of `METRICS`: its figures then stand in the table, in the JSON
and in the log of training.
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
    """A metric's sums over one set; memory must not grow with the number of images."""

    def add(self, features: Tensor, indices: Tensor, /) -> None:
        """Features (B, width) of the images at `indices` (B,), on the CPU, of the set."""
        ...

    def reduced(self) -> Part:
        """The sums of all processes, which call this together."""
        ...


class SetMetric(Protocol):
    names: tuple[str, ...]  # of its figures
    part: str  # names its sums, which metrics can share
    feature: int  # POOL, SPATIAL or LOGITS: what it sums up
    terms: str  # that its figures depend on, besides the feature
    compares: bool  # with a reference, which may lack the part: the figures are then None

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


METRICS: list[SetMetric] = [
    FrechetDistance("FID", "pool", POOL),
    FrechetDistance("sFID", "spatial", SPATIAL),
    Score(),
    Manifolds(),
]
LABELS = {"dinov2": "DINOv2"}  # of feature spaces, in the names of their figures


def named(name: str, space: str) -> str:
    """A figure as results name it: gFID of Inception's space, FD_DINOv2 of DINOv2's."""
    if space == "inception":
        return {"FID": "gFID"}.get(name, name)
    return f"{'FD' if name == 'FID' else name}_{LABELS[space]}"
