"""One set of images compared with another: the metrics, and all that their values depend on."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import torch
from accelerate import PartialState

from evaluation.dinov2 import DINOv2
from evaluation.features import FeatureNetwork, Inception
from evaluation.references import check_sizes, open_reference
from evaluation.set_metrics import METRICS, named
from evaluation.sources import Images
from evaluation.statistics import SetStatistics, measure
from runtime.errors import InputError
from runtime.processes import device_name

FEATURES = ("inception", "dinov2")  # names of the feature spaces
STANDARD_COUNT = 50_000  # images of a published figure


def open_network(name: str, device: torch.device, weights: Path) -> FeatureNetwork:
    """The network of a feature space (`FEATURES`), with its file from the folder `weights`."""
    return DINOv2(device, weights) if name == "dinov2" else Inception(device, weights)


@dataclass
class Evaluator:
    """A reference, its network and its processes, to compare any number of sample sets with.

    `half_manifold` computes precision and recall in float16, as ADM's own script does.
    """

    network: FeatureNetwork
    processes: PartialState
    reference: SetStatistics
    batch: int
    workers: int
    half_manifold: bool = False

    @classmethod
    def open(
        cls,
        reference: str | Path,
        processes: PartialState,
        weights: Path,
        batch: int = 64,
        workers: int = 8,
        size: Optional[tuple[int, int]] = None,
        crop: Optional[int] = None,
        half_manifold: bool = False,
        network: Optional[FeatureNetwork] = None,
    ) -> "Evaluator":
        """Read or measure the reference; `weights` is the folder of Inception's file.

        Without a `network` the features are Inception's.

        `size` is the samples' (height, width), if already known; `crop` is the side of the centre crops
        of the reference's images (`references.open_reference`).
        """
        if network is None:
            assert processes.device is not None  # accelerate's type hint allows it
            network = Inception(processes.device, weights)
        side = open_reference(reference, network, processes, batch, workers, size, crop)
        return cls(network, processes, side, batch, workers, half_manifold)

    def evaluate(
        self, images: Images, expected: int, allow_partial: bool = False
    ) -> dict[str, Any]:
        """The result of a set of samples that should be `expected` many; empty but on rank 0."""
        check_count(images.shape[0], expected, images.name, allow_partial)
        if self.reference.size is not None:
            check_sizes(self.reference.name, self.reference.size, images.shape[1:3])
        samples = measure(images, self.network, self.processes, self.batch, self.workers)
        return self.result(samples, expected)

    def result(self, samples: SetStatistics, expected: int) -> dict[str, Any]:
        """Metrics, and all that defines them, on the main process; empty elsewhere."""
        if not self.processes.is_main_process:
            return {}
        metrics = compare(samples, self.reference, self.network.device, self.half_manifold)
        return {
            "metrics": {named(name, self.network.name): x for name, x in metrics.items()},
            "protocol": protocol(self.network, samples, self.reference, self.half_manifold),
            "images_asked": expected,
            "partial": samples.images is not None and samples.images < expected,
            "samples": samples.summary(),
            "reference": self.reference.summary(),
            **conditions(self.network, self.batch, self.network.device),
            "warnings": [
                *warnings_of(self.network, self.reference, samples),
                *same_set(samples, self.reference),
            ],
        }


def check_count(count: int, expected: int, name: str, allow_partial: bool) -> None:
    """Refuse a set with more or fewer images than expected."""
    if count > expected:
        raise InputError(
            f"{name} holds {count} images, {expected} are expected: pass --num_samples {count}"
        )
    if count < expected and not allow_partial:
        raise InputError(
            f"{name} is incomplete: {count} of {expected} images; complete it, pass --num_samples "
            f"{count} if these are all, or --allow_partial"
        )


def compare(
    samples: SetStatistics, reference: SetStatistics, device: torch.device, half: bool = False
) -> dict[str, Optional[float]]:
    """The figures of all metrics (`METRICS`) that the samples' network has the features for.

    None where the reference does not hold enough. `half`: distances of manifolds in float16.
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


def protocol(
    network: Optional[FeatureNetwork],
    samples: SetStatistics,
    reference: SetStatistics,
    half_manifold: bool = False,
) -> dict[str, Any]:
    """The terms that two comparable results share."""
    return {
        "network": None if network is None else network.identity,
        "resize": None if network is None else network.resize,
        "images": samples.images,
        "image_size": None if samples.size is None else list(samples.size),
        "reference": reference.hash,
        "distances": "float16" if half_manifold else "float64",  # of precision and recall
    }


def conditions(
    network: Optional[FeatureNetwork], batch: int, device: torch.device
) -> dict[str, Any]:
    """Everything else that a result depends on."""
    packages = [] if network is None else [network.package]
    return {
        "features": None if network is None else features_of(network),
        "precision": {"network": "float32 without TF32", "statistics": "float64"},
        "batch_size": batch,
        "device": device_name(device),
        "versions": {name: version(name) for name in ("torch", *packages, "numpy", "pillow")},
    }


def features_of(network: FeatureNetwork) -> dict[str, Any]:
    """The network's weights, and which of its features each metric uses."""
    features = {
        metric.names[0]: (
            f"{network.features[metric.feature]} ({network.widths[metric.feature]}){metric.terms}"
        )
        for metric in METRICS
        if network.widths[metric.feature]
    }
    return {"network": network.identity, "weights_published": network.published, **features}


def same_set(samples: SetStatistics, reference: SetStatistics) -> list[str]:
    """A warning where both sets are the same images in the same order."""
    if samples.hash is None or samples.hash != reference.hash:
        return []
    return [
        f"{samples.name} and {reference.name} are the same images: is this the reference itself?"
    ]


def warnings_of(network: Optional[FeatureNetwork], *sides: SetStatistics) -> list[str]:
    """Reasons to doubt the figures, one line each."""
    warnings = []
    for side in sides:
        if side.duplicates:
            warnings.append(f"{side.duplicates} images of {side.name} are copies of others in it")
        if network is not None and side.images and side.images < network.widths[0]:
            warnings.append(
                f"{side.name} holds {side.images} images, fewer than the {network.widths[0]} "
                f"features: Fréchet distances are biased upwards"
            )
    if network is not None and network.published is False:
        warnings.append(
            f"{network.file} is not the published file: figures compare with its own only"
        )
    return warnings
