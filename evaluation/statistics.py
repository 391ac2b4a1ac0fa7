"""Statistics of one set of images: summed up by all processes of a job, or read from a file.

The processes share fixed batches of consecutive images, so their number changes only the order of float64
sums. A file is another project's, or one of `save_statistics`.
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
from data.tars import is_tar
from evaluation.features import FeatureNetwork
from evaluation.metrics import METRICS, Part, Sums, in_order, summed
from evaluation.sources import Images, npz_keys, open_images
from runtime.errors import InputError
from runtime.files import read_npz, whole_file
from runtime.parts import batches_of
from runtime.processes import progress

MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")  # ADM's names; other projects have the first two
# The parts of `SetStatistics` by their names in files.
STORED = {"pool": MOMENTS[:2], "spatial": MOMENTS[2:], "manifold": ("pool_3",)}


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
        manifold = len(self.parts["manifold"][0]) if "manifold" in self.parts else None
        return {
            "path": self.name, "images": self.images, "size": self.size, "hash": self.hash,
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
            if width:
                self.sums[metric.part] = metric.feature, metric.sums(width, images, self.device)

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


# ---------------------------------------------------------------------- references
def open_reference(
    path: str | Path,
    network: FeatureNetwork,
    batch: int,
    workers: int,
    size: Optional[tuple[int, int]] = None,
    crop: Optional[int] = None,
) -> SetStatistics:
    """Statistics of images, of another project's .npz, or of a file of `save_statistics`.

    Stored moments take precedence: in ADM's files they describe a larger set than the images beside
    them. Raises InputError if the reference is not of `size` (height, width), the samples' size. `crop`:
    see `open_images`.
    """
    path = Path(path)
    keys = [] if path.is_dir() or is_tar(path) else npz_keys(path)
    if crop is not None and keys:
        raise InputError(f"{path} is not a folder: --crop takes the images of a folder or tar")
    # Without a name the moments are Inception's; another network can use only the images.
    unfit = "arr_0" in keys and "features" not in keys and network.name != "inception"
    stored = load_statistics(path, network) if "mu" in keys and not unfit else None
    if stored is not None and "arr_0" not in keys:
        check_sizes(path, stored.size, size)
        return stored
    images = open_images(path, crop)
    check_sizes(path, images.shape[1:3], size)
    side = measure(images, network, batch, workers)
    if stored is None:
        return side
    stored.parts["manifold"], stored.size = side.parts["manifold"], side.size
    stored.hash, stored.duplicates = f"{stored.hash} + {side.hash}", side.duplicates
    return stored


def check_sizes(
    path: Path, size: Optional[tuple[int, int]], samples: Optional[tuple[int, int]]
) -> None:
    """Refuse a reference whose size (height, width) differs from that of the samples, if both are known."""
    if size is not None and samples is not None and size != samples:
        raise InputError(
            f"the samples have {samples[1]}x{samples[0]} pixels, {path} has {size[1]}x{size[0]}: "
            f"compare images of one size (evaluate.py --reference DIR --crop SIZE --save_stats FILE.npz "
            f"makes a reference of centre crops)"
        )


def load_statistics(path: Path, network: FeatureNetwork) -> SetStatistics:
    """The statistics in an .npz of `save_statistics`, ADM or pytorch-fid (mu and sigma alone)."""
    known = (*MOMENTS, "features", "images", "size", "hash", "pool_3")
    names = [name for name in npz_keys(path) if name in known]
    values = dict(zip(names, read_npz(path, "make or copy it again", *names)))
    keys = MOMENTS if {"mu_s", "sigma_s"} & values.keys() else MOMENTS[:2]
    missing = [key for key in keys if key not in values]
    if missing:
        raise InputError(f"{path} lacks {', '.join(missing)}: use a file with {', '.join(keys)}")
    # Other projects' files do not name features; by convention they are Inception's.
    convention = network.identity if network.name == "inception" else "inception"
    features = str(values.get("features", convention))
    if features != network.identity:
        raise InputError(
            f"{path} holds statistics of other features ({features}, here {network.identity}): "
            f"make them again with --save_stats"
        )
    pool, spatial, _ = network.widths
    shapes = {
        "mu": (pool,), "sigma": (pool, pool), "mu_s": (spatial,), "sigma_s": (spatial, spatial),
        "images": (), "size": (2,),
    }  # fmt: skip
    if "pool_3" in values:
        shapes["pool_3"] = (*values["pool_3"].shape[:1], pool)
    for key in sorted(shapes.keys() & values.keys()):
        value, shape, kinds = values[key], shapes[key], "iu" if key in ("images", "size") else "f"
        if value.shape != shape or value.dtype.kind not in kinds or not np.isfinite(value).all():
            wanted = "integers" if kinds == "iu" else "finite floats"
            raise InputError(
                f"{path}: {key} holds {value.dtype} {value.shape}, not {wanted} {shape}: it is damaged or holds "
                f"statistics of other features; make it again with --save_stats"
            )
    digest = short_hash(b"".join(values[key].tobytes() for key in keys))
    size = values.get("size")
    return SetStatistics(
        str(path),
        int(values["images"]) if "images" in values else None,
        None if size is None else (int(size[0]), int(size[1])),
        str(values.get("hash", digest)),
        parts={
            part: tuple(map(torch.from_numpy, (values[key] for key in names)))
            for part, names in STORED.items()
            if names[0] in values
        },
    )


def save_statistics(side: SetStatistics, path: str | Path, identity: str) -> None:
    """Write statistics of the features `identity` as a later reference, whole or not at all."""
    arrays: dict[str, Any] = {
        key: value.cpu().numpy()
        for part, names in STORED.items()
        for key, value in zip(names, side.parts.get(part, ()))
    }
    facts = {"features": identity, "hash": side.hash, "images": side.images, "size": side.size}
    arrays |= {key: value for key, value in facts.items() if value is not None}
    with whole_file(path, shared=True) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)
