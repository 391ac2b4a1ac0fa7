"""Metrics of sets of images: sums over the features of one set, and figures from the sums of two, in float64.

A new metric is an entry of `METRICS`; its figures then appear in the table, the JSON and the log of training.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather, pad_across_processes, reduce
from torch import Tensor

from runtime.errors import InputError

IS_SPLIT = 5000  # images per split of the Inception Score
NEIGHBOURS = 3  # k of precision and recall
MANIFOLD_IMAGES = 50_000  # of larger sets, precision and recall use this many, evenly spaced
BLOCK = 4096  # rows and columns of a block of distances: 134 MB


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, which call this together."""
    total = reduce(values, "sum")
    assert isinstance(total, Tensor)  # accelerate also reduces nested tensors
    return total


def in_order(parts: list[Tensor], indices: list[Tensor], device: torch.device) -> Tensor:
    """Rows of all processes, sorted by their index in the set."""
    rows = torch.cat([part.to(device) for part in parts])
    places = torch.cat(indices).to(device)
    rows = gather(pad_across_processes(rows))
    places = gather(pad_across_processes(places, pad_index=-1))
    assert isinstance(rows, Tensor) and isinstance(places, Tensor)
    present = places >= 0
    return rows[present][places[present].argsort()]


# ---------------------------------------------------------------------- Fréchet distance
class Moments:
    """Mean and covariance of features that come in batches.

    Each batch is centred on its own mean, and sums are merged as in Chan et al. (1979), so that a large
    mean cancels no digits.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features: Tensor, indices: object = None) -> None:
        """Features (B, width); their places in the set do not matter."""
        features = features.double()
        n, total = len(features), self.count + len(features)
        mean = features.mean(0)
        centred, step = features - mean, mean - self.mean
        self.scatter.addmm_(centred.T, centred)
        self.scatter.addr_(step, step, alpha=self.count * n / total)
        self.mean += step * (n / total)
        self.count = total

    def reduced(self) -> tuple[Tensor, Tensor]:
        """Mean (width,) and unbiased covariance (width, width) of all processes' features."""
        count = summed(torch.tensor([self.count], device=self.mean.device)).item()
        mean = summed(self.mean * self.count) / count
        step = self.mean - mean
        scatter = torch.addr(self.scatter, step, step, alpha=self.count)
        return mean, summed(scatter) / (count - 1)


def frechet_distance_of_moments(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> float:
    """Squared Fréchet distance of two Gaussians, |μa - μb|² + tr(Σa + Σb - 2(Σa Σb)^½), in float64.

    With Σ = F Fᵀ from the eigenvalues of each covariance, the trace of the root is the sum of the singular
    values of Faᵀ Fb, which, unlike a matrix root, is exact for singular covariances.
    """
    root_a, root_b = factor(covariance_a), factor(covariance_b)
    overlap = torch.linalg.svdvals(root_a.T @ root_b).sum()
    difference = (mean_a.double() - mean_b.double()).square().sum()
    distance = difference + root_a.square().sum() + root_b.square().sum() - 2 * overlap
    return max(distance.item(), 0.0)  # rounding can make it negative


def factor(covariance: Tensor) -> Tensor:
    """F (D, rank) with F Fᵀ = covariance (D, D), without the null space up to rounding."""
    covariance = covariance.double()
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1].abs()
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(features_a: Tensor | np.ndarray, features_b: Tensor | np.ndarray) -> float:
    """Squared Fréchet distance of two sets of features (N, D) and (M, D), N and M 2 or more."""
    a, b = (torch.as_tensor(features).double() for features in (features_a, features_b))
    return frechet_distance_of_moments(a.mean(0), a.T.cov(), b.mean(0), b.T.cov())


# ---------------------------------------------------------------------- Inception Score
class InceptionScore:
    """exp of the mean KL(p(y|x) ‖ p(y)) in splits of consecutive images (Salimans et al. 2016)."""

    def __init__(self, classes: int, images: int, device: torch.device | str = "cpu"):
        splits = -(-images // IS_SPLIT)
        # A split's row: Σ p (classes), Σ p log p, images.
        self.sums = torch.zeros(splits, classes + 2, dtype=torch.float64, device=device)

    def add(self, logits: Tensor, indices: Tensor) -> None:
        """Logits (B, classes) of the images at `indices` (B,), on the CPU, of the set."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        rows = torch.cat([p, (p * log_p).sum(1, keepdim=True), torch.ones_like(p[:, :1])], 1)
        self.sums.index_add_(0, (indices // IS_SPLIT).to(rows.device), rows)

    def reduced(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits."""
        sums = summed(self.sums)
        mean_p = sums[:, :-2] / sums[:, -1:]
        divergence = sums[:, -2] / sums[:, -1] - torch.xlogy(mean_p, mean_p).sum(1)
        scores = divergence.exp()
        return scores.mean().item(), scores.std(correction=0).item()


# ---------------------------------------------------------------------- precision and recall
class FeatureSample:
    """The features of at most `MANIFOLD_IMAGES` images, spread evenly over the set, in order."""

    def __init__(self, width: int, images: int, device: torch.device | str = "cpu"):
        self.images, self.device = images, torch.device(device)
        # The lists start with an empty entry, so that a process without images can gather too.
        self.rows = [torch.empty(0, width, device=device)]
        self.places = [torch.empty(0).long()]

    def add(self, features: Tensor, indices: Tensor) -> None:
        """Features (B, width) of the images at `indices` (B,), on the CPU, of the set."""
        share = min(MANIFOLD_IMAGES, self.images)
        chosen = (indices + 1) * share // self.images > indices * share // self.images
        kept = chosen.nonzero().squeeze(1)  # on the CPU: a mask on the device would make it wait
        self.rows.append(features[kept.to(features.device)])
        self.places.append(indices[kept])

    def reduced(self) -> tuple[Tensor]:
        """(M, width), on the CPU, the same on every process."""
        return (in_order(self.rows, self.places, self.device).cpu(),)


def precision_recall(
    reference: Tensor, samples: Tensor, device: torch.device | str = "cpu", half: bool = False
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of features (N, D) and (M, D), k = 3.

    Precision: the share of samples within the radius of at least one reference feature, its distance to
    its third neighbour in the reference. Recall: the same with the sets exchanged. Distances are
    computed in blocks on `device`, in float64 or, with `half`, in float16 like ADM's script.
    """
    if min(len(reference), len(samples)) <= NEIGHBOURS:
        raise InputError(
            f"precision and recall need more than {NEIGHBOURS} images per set: there are {len(samples)} "
            f"samples and {len(reference)} reference images; use more"
        )
    precision = covered(samples, reference, device, half)
    recall = covered(reference, samples, device, half)
    return precision, recall


def squared_distances(rows: Tensor, columns: Tensor, half: bool = False) -> Tensor:
    """(R, D) and (C, D) -> (R, C), in float64: rounding in float32 exceeds small distances.

    With `half`, everything is float16, or float32 for a block that overflows, as in ADM's script.
    """
    if not half:
        rows, columns = rows.double(), columns.double()
        norms = rows.square().sum(1, keepdim=True) + columns.square().sum(1)
        return norms.addmm_(rows, columns.T, alpha=-2).clamp_(min=0)
    for dtype in (torch.float16, torch.float32):
        a, b = rows.to(dtype), columns.to(dtype)
        norms_a, norms_b = a.square().sum(1, keepdim=True), b.square().sum(1)
        distances = (norms_a - 2 * (a @ b.T) + norms_b).clamp(min=0)
        if distances.isfinite().all():
            break
    return distances.float()


def radii(features: Tensor, device: torch.device | str, half: bool) -> Tensor:
    """Squared distance (N,) of each feature to its third neighbour besides itself."""
    result = []
    for rows in features.split(BLOCK):
        rows = rows.to(device)
        nearest = torch.empty(len(rows), 0, device=device)
        for columns in features.split(BLOCK):
            distances = squared_distances(rows, columns.to(device), half)
            nearest = torch.cat([nearest, distances], 1)
            nearest = nearest.topk(min(NEIGHBOURS + 1, nearest.shape[1]), largest=False).values
        result.append(nearest[:, NEIGHBOURS])
    return torch.cat(result)


def covered(points: Tensor, centres: Tensor, device: torch.device | str, half: bool) -> float:
    """Share of points (N, D) within the radius (`radii`) of at least one centre (M, D)."""
    limits, count = radii(centres, device, half), 0
    for rows in points.split(BLOCK):
        rows = rows.to(device)
        inside = torch.zeros(len(rows), dtype=torch.bool, device=device)
        for columns, limit in zip(centres.split(BLOCK), limits.split(BLOCK)):
            inside |= (squared_distances(rows, columns.to(device), half) <= limit).any(1)
        count += int(inside.sum().item())
    return count / len(points)


# ---------------------------------------------------------------------- the metrics
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
