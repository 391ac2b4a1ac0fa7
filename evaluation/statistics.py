"""What is measured of one set of images, image by image in any order, on all processes of a job.

Images are read in fixed batches of consecutive indices that the processes share, so that the
features, and the figures up to the order of float64 sums, are the same on any number of them.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes
from torch import Tensor
from tqdm import tqdm

from evaluation.features import FeatureNetwork
from evaluation.metrics import InceptionScore, Moments, summed
from evaluation.sources import Images
from runtime.errors import InputError
from runtime.parts import share_of

MANIFOLD_IMAGES = 50_000  # more images than this are thinned evenly for precision and recall


@dataclass
class SetStatistics:
    """All that a comparison needs of one set of images; None is what a file does not tell."""

    name: str
    images: Optional[int] = None
    size: Optional[tuple[int, int]] = None  # height, width
    hash: Optional[str] = None  # of the pixels in order, or of the moments
    duplicates: Optional[int] = None  # images that are a copy of an earlier one
    # mu, sigma of the pooled features, then mu_s, sigma_s of the spatial ones, which a file or a
    # network may lack
    moments: tuple[Tensor, ...] = ()
    manifold: Optional[Tensor] = None  # (M, D) float32 on the CPU, for precision and recall
    inception_score: Optional[tuple[float, float]] = None  # mean, standard deviation

    def summary(self) -> dict[str, Any]:
        """What identifies the set, for the JSON result."""
        size = None if self.size is None else list(self.size)
        manifold = None if self.manifold is None else len(self.manifold)
        return {
            "path": self.name, "images": self.images, "size": size, "hash": self.hash,
            "duplicates": self.duplicates, "manifold_images": manifold,
        }  # fmt: skip


class PixelCollector:
    """Identifies one set of `images` images by their pixels, without any network."""

    def __init__(self, name: str, images: int, size: tuple[int, int], device: torch.device):
        self.name, self.images, self.size, self.device = name, images, size, device
        # The lists start with an empty entry, so that a process without images can gather too.
        self.digests = [torch.empty(0, 16, dtype=torch.uint8)]
        self.places = [torch.empty(0).long()]

    def add(self, first: int, images: Tensor, digests: Optional[np.ndarray] = None) -> None:
        """Images `first`, `first` + 1, … of the set: (B, 3, H, W), uint8; `digests` if known."""
        if digests is None:
            digests = digests_of(images.permute(0, 2, 3, 1).cpu().numpy())
        self.digests.append(torch.from_numpy(digests))
        self.places.append(torch.arange(first, first + len(images)))

    def finish(self) -> SetStatistics:
        """Name, hash and copies of the whole set; all processes must call this."""
        digests = in_order(self.digests, self.places, self.device).cpu().numpy()
        return SetStatistics(
            self.name,
            self.images,
            self.size,
            hash=hashlib.sha256(digests.tobytes()).hexdigest()[:16],
            duplicates=self.images - len(np.unique(digests, axis=0)),
        )


class Collector:
    """Sums up the features of one set of `images` images, on this process."""

    def __init__(self, name: str, images: int, size: tuple[int, int], network: FeatureNetwork):
        device, (pool, spatial, classes) = network.device, network.widths
        self.name, self.images, self.network = name, images, network
        self.pixels = PixelCollector(name, images, size, device)
        self.pool, self.spatial = Moments(pool, device), Moments(spatial, device)
        self.score = InceptionScore(images, classes, device)
        self.non_finite = torch.zeros(1, dtype=torch.int64, device=device)  # images
        # As in PixelCollector, an empty entry for a process without images.
        self.manifold = [torch.empty(0, pool, device=device)]
        self.manifold_places = [torch.empty(0).long()]

    def add(self, first: int, images: Tensor, digests: Optional[np.ndarray] = None) -> None:
        """Images `first`, `first` + 1, … of the set: (B, 3, H, W), uint8; `digests` if known."""
        self.pixels.add(first, images, digests)
        indices = torch.arange(first, first + len(images))
        pool, spatial, logits = self.network(images)
        self.pool.add(pool)
        if spatial.shape[1]:
            self.spatial.add(spatial)
        if logits.shape[1]:
            self.score.add(logits, indices.to(logits.device))
        self.non_finite += (~(pool.isfinite().all(1) & spatial.isfinite().all(1))).sum()
        share = min(MANIFOLD_IMAGES, self.images)
        chosen = (indices + 1) * share // self.images > indices * share // self.images
        places = indices[chosen]  # on the CPU: a mask on the device would make it wait
        self.manifold.append(pool[(places - first).to(pool.device)])
        self.manifold_places.append(places)

    def finish(self) -> SetStatistics:
        """The statistics of the whole set, the same on every process; all of them must call this."""
        device = self.network.device
        if self.images < 2:
            raise InputError(f"{self.name} holds one image: a covariance needs 2 or more")
        non_finite = int(summed(self.non_finite).item())
        if non_finite:
            raise InputError(
                f"{non_finite} of {self.images} images of {self.name} have features that are NaN "
                f"or infinite: fetch {self.network.file} again"
            )
        moments = self.pool.reduced()
        _, spatial, classes = self.network.widths
        if spatial:
            moments += self.spatial.reduced()
        return replace(
            self.pixels.finish(),
            moments=moments,
            manifold=in_order(self.manifold, self.manifold_places, device).cpu(),
            inception_score=self.score.reduced() if classes else None,
        )


def collector_of(
    name: str,
    images: int,
    size: tuple[int, int],
    network: Optional[FeatureNetwork],
    device: torch.device,
) -> Collector | PixelCollector:
    """A collector of the network's features; without a network, of pixels alone."""
    if network is None:
        return PixelCollector(name, images, size, device)
    return Collector(name, images, size, network)


def in_order(parts: list[Tensor], indices: list[Tensor], device: torch.device) -> Tensor:
    """Rows of all processes, sorted by their index in the set."""
    rows = torch.cat([part.to(device) for part in parts])
    places = torch.cat(indices).to(device)
    rows = gather(pad_across_processes(rows))
    places = gather(pad_across_processes(places, pad_index=-1))
    assert isinstance(rows, Tensor) and isinstance(places, Tensor)
    present = places >= 0
    return rows[present][places[present].argsort()]


def digests_of(images: np.ndarray) -> np.ndarray:
    """(n, H, W, 3), uint8 -> a 16-byte digest of every image's pixels: (n, 16), uint8."""
    digests = [
        hashlib.blake2b(np.ascontiguousarray(x).data, digest_size=16).digest() for x in images
    ]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16).copy()


def measure(
    images: Images, network: FeatureNetwork, processes: PartialState, batch: int, workers: int
) -> SetStatistics:
    """Statistics of a whole set, which `workers` threads per process read ahead."""
    count, height, width, _ = images.shape
    collector = Collector(images.name, count, (height, width), network)
    starts = share_of(range(0, count, batch), processes.process_index, processes.num_processes)
    total = sum(min(batch, count - start) for start in starts)
    bar = tqdm(
        total=total,
        unit="img",
        desc=Path(images.name).name,
        disable=None if processes.is_main_process else True,
    )
    for start, pixels, digests in read_ahead(images, starts, batch, workers, network.device):
        collector.add(start, pixels, digests)
        bar.update(len(pixels))
    bar.close()
    return collector.finish()


def read_ahead(
    images: Images, starts: range, batch: int, workers: int, device: torch.device
) -> Iterator[tuple[int, Tensor, np.ndarray]]:
    """(start, (B, 3, H, W) uint8, digests) per batch, in order, while the next ones are read."""

    def load(start: int) -> tuple[int, Tensor, np.ndarray]:
        array = images.read(start, min(start + batch, images.shape[0]))
        pixels = torch.from_numpy(array).permute(0, 3, 1, 2)
        return start, pixels.pin_memory() if device.type == "cuda" else pixels, digests_of(array)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        waiting = deque()
        for start in starts:
            waiting.append(pool.submit(load, start))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
