"""Statistics of one set of images, summed up by all processes of a job.

The processes share fixed batches of consecutive images, so their number changes only the order of float64
sums.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from data.identity import short_hash
from evaluation.features import FeatureNetwork
from evaluation.metrics import in_order, summed
from evaluation.set_metrics import METRICS, Part, Sums
from evaluation.sources import Images
from runtime.errors import InputError
from runtime.parts import batches_of
from runtime.processes import progress


@dataclass
class SetStatistics:
    """What a comparison needs of one set of images; None: unknown."""

    name: str
    images: Optional[int] = None
    size: Optional[tuple[int, int]] = None  # height, width
    hash: Optional[str] = None  # of the pixels in order, or of the moments
    duplicates: Optional[int] = None  # images that are a copy of an earlier one
    # The metrics' sums by `SetMetric.part`; a file or network may lack some.
    parts: dict[str, Part] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The set's identity, for the JSON result."""
        size = None if self.size is None else list(self.size)
        manifold = len(self.parts["manifold"][0]) if "manifold" in self.parts else None
        return {
            "path": self.name, "images": self.images, "size": size, "hash": self.hash,
            "duplicates": self.duplicates, "manifold_images": manifold,
        }  # fmt: skip


class Collector:
    """Collects a set of `images` images on this process: hashes of their pixels and, with a `network`, the
    metrics' sums over its features."""

    def __init__(
        self, name: str, images: int, size: tuple[int, int], network: Optional[FeatureNetwork]
    ):
        self.name, self.images, self.size, self.network = name, images, size, network
        self.device = torch.device((network or PartialState()).device or "cpu")
        # An empty first entry lets a process without images gather too.
        self.digests = [torch.empty(0, 16, dtype=torch.uint8)]
        self.places = [torch.empty(0).long()]
        self.non_finite = torch.zeros(1, dtype=torch.int64, device=self.device)  # images
        self.sums: dict[str, tuple[int, Sums]] = {}  # by part: the feature and its sums
        for metric in METRICS:
            width = 0 if network is None else network.widths[metric.feature]
            if width and metric.part not in self.sums:
                sums = metric.sums(width, images, self.device)
                self.sums[metric.part] = metric.feature, sums

    def add(self, first: int, images: Tensor, digests: Optional[np.ndarray] = None) -> None:
        """Add images `first`, `first` + 1, …: (B, 3, H, W), uint8; `digests` if known."""
        if digests is None:
            digests = digests_of(images.permute(0, 2, 3, 1).cpu().numpy())
        indices = torch.arange(first, first + len(images))
        self.digests.append(torch.from_numpy(digests))
        self.places.append(indices)
        if self.network is None:
            return
        features = self.network(images)
        self.non_finite += (~(features[0].isfinite().all(1) & features[1].isfinite().all(1))).sum()
        for feature, sums in self.sums.values():
            sums.add(features[feature], indices)

    def finish(self) -> SetStatistics:
        """The statistics of the whole set, on all processes, which call this together."""
        if self.network is not None and self.images < 2:
            raise InputError(f"{self.name} holds one image: a covariance needs 2 or more")
        non_finite = int(summed(self.non_finite).item())
        if self.network is not None and non_finite:
            raise InputError(
                f"{non_finite} of {self.images} images of {self.name} have features that are NaN "
                f"or infinite: fetch {self.network.file} again"
            )
        digests = in_order(self.digests, self.places, self.device).cpu().numpy()
        return SetStatistics(
            self.name,
            self.images,
            self.size,
            hash=short_hash(digests.tobytes()),
            duplicates=self.images - len(np.unique(digests, axis=0)),
            parts={part: sums.reduced() for part, (_, sums) in self.sums.items()},
        )


def digests_of(images: np.ndarray) -> np.ndarray:
    """(n, H, W, 3), uint8 -> digests of the images' pixels: (n, 16), uint8."""
    digests = [
        hashlib.blake2b(np.ascontiguousarray(x).data, digest_size=16).digest() for x in images
    ]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16).copy()


def measure(images: Images, network: FeatureNetwork, batch: int, workers: int) -> SetStatistics:
    """Statistics of a whole set; `workers` threads per process read ahead."""
    (count, height, width, _), processes = images.shape, PartialState()
    collector = Collector(images.name, count, (height, width), network)
    batches = batches_of(count, batch, processes.process_index, processes.num_processes)
    with progress(sum(map(len, batches)), "img", Path(images.name).name) as bar:
        for start, pixels, digests in read_ahead(images, batches, workers, network.device):
            collector.add(start, pixels, digests)
            bar.update(len(pixels))
    return collector.finish()


def read_ahead(
    images: Images, batches: list[range], workers: int, device: torch.device
) -> Iterator[tuple[int, Tensor, np.ndarray]]:
    """(start, (B, 3, H, W) uint8, digests) of each batch, in order, read ahead."""

    def load(batch: range) -> tuple[int, Tensor, np.ndarray]:
        array = images.read(batch.start, batch.stop)
        pixels = torch.from_numpy(array).permute(0, 3, 1, 2)
        pixels = pixels.pin_memory() if device.type == "cuda" else pixels
        return batch.start, pixels, digests_of(array)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        waiting = deque()
        for batch in batches:
            waiting.append(pool.submit(load, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
