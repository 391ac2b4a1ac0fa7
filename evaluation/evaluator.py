"""Compares two sets of images: the metrics, and everything that their values depend on."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import PartialState

from evaluation.features import DINOv2, FeatureNetwork, Inception
from evaluation.metrics import METRICS, NEIGHBOURS, named
from evaluation.sources import Images
from evaluation.statistics import SetStatistics, measure, open_reference
from runtime.errors import InputError
from runtime.processes import device_name
from runtime.published import WEIGHTS

NETWORKS = {"inception": Inception, "dinov2": DINOv2}  # of the feature spaces


class Evaluator:
    """Compares any number of sample sets with one reference."""

    def __init__(
        self,
        reference: str | Path,
        batch: int = 64,
        workers: int = 8,
        size: Optional[tuple[int, int]] = None,
        crop: Optional[int] = None,
        half_manifold: bool = False,
        network: Optional[FeatureNetwork] = None,
    ):
        """Read or measure the reference; all processes call this together.

        `size` is the (height, width) of the samples, if known; `crop` the side of the centre crops of the
        reference's images (`statistics.open_reference`). `half_manifold` computes precision and recall in
        float16, like ADM's script. Without a `network`, Inception's published weights are used.
        """
        self.network = network or NETWORKS["inception"](PartialState().device or "cpu", WEIGHTS)
        self.half_manifold, self.batch, self.workers = half_manifold, batch, workers
        self.reference = open_reference(reference, self.network, batch, workers, size, crop)
        manifold = self.reference.parts.get("manifold")
        if manifold and len(manifold[0]) <= NEIGHBOURS:  # now, not after sampling
            raise InputError(
                f"{self.reference.name} holds {len(manifold[0])} images: precision and recall need more than "
                f"{NEIGHBOURS}; use a larger reference"
            )

    def evaluate(self, images: Images, expected: int) -> dict[str, Any]:
        """The result for a set of samples, `expected` if it is whole; empty except on rank 0."""
        return self.result(measure(images, self.network, self.batch, self.workers), expected)

    def result(self, samples: SetStatistics, expected: int) -> dict[str, Any]:
        """Metrics, and everything that defines them, on the main process; empty elsewhere."""
        if not PartialState().is_main_process:
            return {}
        network, reference, half = self.network, self.reference, self.half_manifold
        figures = compare(samples, reference, network.device, half)
        metrics = {named(name, network.name): x for name, x in figures.items()}
        result = describe_result(metrics, network, samples, reference, expected, self.batch, half)
        if samples.hash == reference.hash:
            result["warnings"].append(
                f"{samples.name} and {reference.name} are the same images: is this the reference itself?"
            )
        return result


def compare(
    samples: SetStatistics, reference: SetStatistics, device: torch.device, half: bool = False
) -> dict[str, Optional[float]]:
    """The figures of all metrics (`METRICS`) whose features the samples have.

    None if the reference lacks what a metric needs. `half`: distances of manifolds in float16.
    """
    figures: dict[str, Optional[float]] = {}
    for metric in METRICS:
        ours, theirs = (side.parts.get(metric.part) for side in (samples, reference))
        if ours is None:
            continue
        values: tuple[Optional[float], ...] = (None,) * len(metric.names)
        if theirs is not None or not metric.compares:
            values = metric.figures(ours, theirs or (), device, half)
        figures |= zip(metric.names, values)
    return figures


def describe_result(
    metrics: dict[str, Optional[float]],
    network: Optional[FeatureNetwork],
    samples: SetStatistics,
    reference: SetStatistics,
    expected: int,
    batch: int,
    half_manifold: bool = False,
) -> dict[str, Any]:
    """Metrics with everything that they depend on; results of one "protocol" are comparable."""
    packages = [] if network is None else [network.package]
    return {
        "metrics": metrics,
        "protocol": {
            "network": None if network is None else network.identity,
            "resize": None if network is None else network.resize,
            "images": samples.images,
            "image_size": samples.size,
            "reference": reference.hash,
            "distances": "float16" if half_manifold else "float64",  # of precision and recall
        },
        "images_asked": expected,
        "partial": samples.images is not None and samples.images < expected,
        "samples": samples.summary(),
        "reference": reference.summary(),
        "features": None if network is None else features_of(network),
        "precision": {"network": "float32 without TF32", "statistics": "float64"},
        "batch_size": batch,
        "device": device_name(torch.device(PartialState().device or "cpu")),
        "versions": {name: version(name) for name in ("torch", *packages, "numpy", "pillow")},
        "warnings": warnings_of(network, reference, samples),
    }


def features_of(network: FeatureNetwork) -> dict[str, Any]:
    """The network's weights and, by metric, its features."""
    features = {
        metric.names[0]: (
            f"{network.features[metric.feature]} ({network.widths[metric.feature]}){metric.terms}"
        )
        for metric in METRICS
        if network.widths[metric.feature]
    }
    return {"network": network.identity, "weights_published": network.published, **features}


def warnings_of(network: Optional[FeatureNetwork], *sides: SetStatistics) -> list[str]:
    """Reasons to doubt the figures, one line each."""
    warnings = []
    for side in sides:
        if side.duplicates:
            warnings.append(f"{side.duplicates} images of {side.name} are copies of others in it")
        if network is not None and side.images is None and "spatial" not in side.parts:
            warnings.append(
                f"{side.name} does not say how its images were resized: pytorch-fid and clean-fid resize "
                f"differently from ADM, which shifts the FID; make it with --save_stats"
            )
        if network is not None and side.images and side.images < network.widths[0]:
            warnings.append(
                f"{side.name} holds {side.images} images, fewer than the {network.widths[0]} "
                f"features: Fréchet distances are biased upwards"
            )
    if network is not None and network.published is False:
        warnings.append(
            f"{network.file} is not the published file: compare its figures only with others made with it"
        )
    return warnings
