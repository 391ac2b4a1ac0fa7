"""One set of images compared with another: what is measured of each, and the result with its terms.

Images are read in fixed batches of consecutive indices, shared by the job's processes, so that the
features, and the figures but for the order of float64 sums, are the same on any number of them.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather, pad_across_processes, reduce
from torch import Tensor
from tqdm import tqdm

from evaluation.features import INCEPTION_FILE, Inception
from evaluation.metrics import (
    IS_SPLIT,
    NEIGHBOURS,
    InceptionScore,
    Moments,
    frechet_distance_of_moments,
    precision_recall,
)
from evaluation.sources import Images, npz_images, npz_keys, npz_values, open_images
from runtime.errors import InputError
from runtime.files import whole_file

STANDARD = 50_000  # images of a published figure
MANIFOLD_IMAGES = 50_000  # at most so many, evenly spaced, describe a side's manifold
MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")  # ADM's names


@dataclass
class Side:
    """All that a comparison needs of one set of images; what a file does not tell is None."""

    name: str
    images: Optional[int] = None
    size: Optional[tuple[int, int]] = None  # height, width
    hash: Optional[str] = None  # of the pixels in order, or of the moments
    duplicates: Optional[int] = None  # images that are a copy of an earlier one
    moments: tuple[Tensor, ...] = ()  # mu, sigma of pool_3, mu_s, sigma_s of the spatial features
    manifold: Optional[Tensor] = None  # (M, 2048) float32 on the CPU, for precision and recall
    inception_score: Optional[tuple[float, float]] = None

    def about(self) -> dict[str, Any]:
        size = None if self.size is None else list(self.size)
        manifold = None if self.manifold is None else len(self.manifold)
        return {
            "path": self.name, "images": self.images, "size": size, "hash": self.hash,
            "duplicates": self.duplicates, "manifold_images": manifold,
        }  # fmt: skip


class Collector:
    """Sums up the features of one set, image by image in any order, on this process."""

    def __init__(self, name: str, images: int, size: tuple[int, int], inception: Inception):
        device, (pool, spatial, classes) = inception.device, inception.widths
        self.side = Side(name, images, size)
        self.inception = inception
        self.pool, self.spatial = Moments(pool, device), Moments(spatial, device)
        self.score = InceptionScore(images, classes, device)
        self.bad = torch.zeros(1, dtype=torch.int64, device=device)  # images of infinite features
        # With a first entry each, so that a process without images has tensors to gather too.
        self.kept = [torch.empty(0, pool, device=device)]
        self.digests = [torch.empty(0, 16, dtype=torch.uint8)]
        self.kept_at, self.digests_at = [torch.empty(0).long()], [torch.empty(0).long()]

    def add(self, first: int, images: Tensor, digests: Optional[np.ndarray] = None) -> None:
        """Images `first`, `first` + 1, … of the set: (B, 3, H, W), uint8; `digests` if known."""
        if digests is None:
            digests = digests_of(images.permute(0, 2, 3, 1).cpu().numpy())
        indices = torch.arange(first, first + len(images))
        pool, spatial, logits = self.inception(images)
        self.pool.add(pool)
        self.spatial.add(spatial)
        self.score.add(logits, indices.to(logits.device))
        self.bad += (~(pool.isfinite().all(1) & spatial.isfinite().all(1))).sum()
        self.digests.append(torch.from_numpy(digests))
        self.digests_at.append(indices)
        share = min(MANIFOLD_IMAGES, self.side.images)
        chosen = (indices + 1) * share // self.side.images > indices * share // self.side.images
        places = indices[chosen]  # on the CPU: a mask on the device would make it wait
        self.kept.append(pool[(places - first).to(pool.device)])
        self.kept_at.append(places)

    def finish(self) -> Side:
        """The whole set's side, the same on every process; all of them must call this."""
        side, device = self.side, self.inception.device
        if side.images < 2:
            raise InputError(f"{side.name} holds one image: a covariance needs 2 or more")
        bad = reduce(self.bad, "sum").item()
        if bad:
            raise InputError(
                f"{bad} of {side.images} images of {side.name} have features that are NaN or "
                f"infinite: fetch {INCEPTION_FILE} again"
            )
        digests = in_order(self.digests, self.digests_at, device).cpu().numpy()
        side.hash = hashlib.sha256(digests.tobytes()).hexdigest()[:16]
        side.duplicates = side.images - len(np.unique(digests, axis=0))
        side.manifold = in_order(self.kept, self.kept_at, device).cpu()
        side.moments = (*self.pool.reduced(), *self.spatial.reduced())
        side.inception_score = self.score.reduced()
        return side


def in_order(parts: list[Tensor], indices: list[Tensor], device: torch.device) -> Tensor:
    """Rows of all processes, sorted by their index in the set."""
    rows = torch.cat([part.to(device) for part in parts])
    places = torch.cat(indices).to(device)
    rows = gather(pad_across_processes(rows))
    places = gather(pad_across_processes(places, pad_index=-1))
    real = places >= 0
    return rows[real][places[real].argsort()]


def digests_of(images: np.ndarray) -> np.ndarray:
    """(n, H, W, 3), uint8 -> a 16-byte digest of every image's pixels: (n, 16), uint8."""
    digests = [hashlib.blake2b(np.ascontiguousarray(x), digest_size=16).digest() for x in images]
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16).copy()


def measure(
    images: Images, inception: Inception, processes: PartialState, batch: int, workers: int
) -> Side:
    """Features of a whole set, read ahead by `workers` threads a process."""
    count, height, width, _ = images.shape
    collector = Collector(images.name, count, (height, width), inception)
    starts = range(0, count, batch)[processes.process_index :: processes.num_processes]
    total = sum(min(batch, count - start) for start in starts)
    bar = tqdm(
        total=total, unit="img", desc=Path(images.name).name, disable=not processes.is_main_process
    )
    for start, pixels, digests in read_ahead(images, starts, batch, workers, inception.device):
        collector.add(start, pixels, digests)
        bar.update(len(pixels))
    bar.close()
    return collector.finish()


def read_ahead(
    images: Images, starts: range, batch: int, workers: int, device: torch.device
) -> Iterator[tuple[int, Tensor, np.ndarray]]:
    """(start, (B, 3, H, W) uint8, digests) of every batch, in turn, while the next ones are read."""

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


# ---------------------------------------------------------------------- references
def open_reference(
    path: str | Path, inception: Inception, processes: PartialState, batch: int, workers: int
) -> Side:
    """The reference's side: images, ADM's .npz, or a file of `save_side`.

    Moments that a file holds come first; ADM's describe another, larger set than its images do.
    """
    path = Path(path)
    keys = [] if path.is_dir() else npz_keys(path)
    if "mu" not in keys:
        return measure(open_images(path), inception, processes, batch, workers)
    stored = load_side(path, inception)
    if "arr_0" in keys:
        images = measure(npz_images(path), inception, processes, batch, workers)
        stored.manifold, stored.size = images.manifold, images.size
        stored.hash, stored.duplicates = f"{stored.hash} + {images.hash}", images.duplicates
    return stored


def load_side(path: Path, inception: Inception) -> Side:
    """Moments of an .npz, and what else `save_side` wrote there."""
    values = npz_values(path, [*MOMENTS, "features", "images", "size", "hash", "pool_3"])
    missing = [key for key in MOMENTS if key not in values]
    if missing:
        raise InputError(
            f"{path} lacks {', '.join(missing)}: give a file with {', '.join(MOMENTS)}"
        )
    pool, spatial, _ = inception.widths
    for key, width in zip(MOMENTS, (pool, pool, spatial, spatial)):
        wanted = (width, width) if "sigma" in key else (width,)
        if values[key].shape != wanted:
            raise InputError(
                f"{path}: {key} is of shape {values[key].shape}, not {wanted}: these are statistics "
                f"of other features; make them with --save_stats"
            )
        if values[key].dtype.kind != "f" or not np.isfinite(values[key]).all():
            raise InputError(f"{path}: {key} holds NaN or infinity; make it again")
    # ADM's files do not say; by convention they are of the published weights.
    features = str(values.get("features", inception.identity))
    if features != inception.identity:
        raise InputError(
            f"{path} holds statistics of other features ({features}, here {inception.identity}): make them "
            f"again with --save_stats"
        )
    moments = tuple(torch.from_numpy(values[key]).double() for key in MOMENTS)
    digest = hashlib.sha256(b"".join(values[key].tobytes() for key in MOMENTS)).hexdigest()[:16]
    try:
        return Side(
            str(path),
            int(values["images"]) if "images" in values else None,
            tuple(map(int, values["size"])) if "size" in values else None,
            str(values.get("hash", digest)),
            moments=moments,
            manifold=torch.from_numpy(values["pool_3"]) if "pool_3" in values else None,
        )
    except (TypeError, ValueError) as e:
        raise InputError(f"{path} is damaged ({e}): make it again with --save_stats") from e


def save_side(side: Side, path: str | Path, identity: str) -> None:
    """Write a side as a reference for later: whole or not at all."""
    arrays = {key: value.cpu().numpy() for key, value in zip(MOMENTS, side.moments)}
    with whole_file(path) as partial, open(partial, "wb") as file:
        np.savez(
            file, **arrays, features=np.array(identity), hash=np.array(side.hash),
            **optional(images=side.images, size=side.size, pool_3=side.manifold),
        )  # fmt: skip


def optional(**values: Any) -> dict[str, np.ndarray]:
    return {key: np.asarray(value) for key, value in values.items() if value is not None}


# ---------------------------------------------------------------------- results
def compare(samples: Side, reference: Side, device: torch.device) -> dict[str, Any]:
    """FID, sFID, IS, precision and recall; None where the reference does not tell enough."""
    if samples.size and reference.size and samples.size != reference.size:
        a, b = (f"{side.size[1]}x{side.size[0]}" for side in (samples, reference))
        raise InputError(
            f"{samples.name} is of {a} pixels, {reference.name} of {b}: compare images of one size"
        )
    ours, theirs = ([m.to(device) for m in side.moments] for side in (samples, reference))
    metrics: dict[str, Any] = {
        "FID": frechet_distance_of_moments(*ours[:2], *theirs[:2]),
        "sFID": frechet_distance_of_moments(*ours[2:], *theirs[2:]),
        "IS": samples.inception_score[0],
        "IS_std": samples.inception_score[1],
        "precision": None,
        "recall": None,
    }
    if reference.manifold is not None:
        found = precision_recall(reference.manifold, samples.manifold, device)
        metrics["precision"], metrics["recall"] = found
    return metrics


def terms(inception: Inception, batch: int) -> dict[str, Any]:
    """What a figure depends on besides the images."""
    device, (pool, spatial, classes) = inception.device, inception.widths
    return {
        "features": {
            "network": inception.identity,
            "weights_published": inception.published,
            "FID": f"pool_3 ({pool})",
            "sFID": f"first 7 channels of mixed_6/conv ({spatial})",
            "IS": f"logits without bias ({classes}), splits of {IS_SPLIT} in file order",
            "precision_recall": f"pool_3, k = {NEIGHBOURS}",
        },
        "precision": {"network": "float32 without TF32", "statistics": "float64"},
        "batch_size": batch,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "versions": {
            name: version(name) for name in ("torch", "torch-fidelity", "numpy", "pillow")
        },
    }


def check_count(count: int, asked: int, name: str, allow_partial: bool) -> None:
    """Refuse a set that is not the one asked for."""
    if count > asked:
        raise InputError(
            f"{name} holds {count} images, {asked} are asked for: give --num_samples {count}"
        )
    if count < asked and not allow_partial:
        raise InputError(
            f"{name} is incomplete: {count} of {asked} images; finish it, give --num_samples "
            f"{count} if that is all, or --allow_partial"
        )


@dataclass
class Evaluator:
    """A reference at hand, to compare any number of sample sets with."""

    inception: Inception
    processes: PartialState
    reference: Side
    batch: int
    workers: int

    @classmethod
    def open(
        cls, reference: str, processes: PartialState, batch: int = 64, workers: int = 8
    ) -> "Evaluator":
        inception = Inception(processes.device)
        side = open_reference(reference, inception, processes, batch, workers)
        return cls(inception, processes, side, batch, workers)

    def evaluate(self, images: Images, asked: int, allow_partial: bool = False) -> dict[str, Any]:
        """The result of a whole set of samples; empty but on the main process."""
        check_count(images.shape[0], asked, images.name, allow_partial)
        side = measure(images, self.inception, self.processes, self.batch, self.workers)
        return self.result(side, asked)

    def result(self, samples: Side, asked: int) -> dict[str, Any]:
        """Metrics, and all that defines them, on the main process; empty elsewhere."""
        if not self.processes.is_main_process:
            return {}
        metrics = compare(samples, self.reference, self.inception.device)
        return {
            "metrics": {"gFID": metrics.pop("FID"), **metrics},
            "images_asked": asked,
            "partial": samples.images < asked,
            "samples": samples.about(),
            "reference": self.reference.about(),
            **terms(self.inception, self.batch),
            "warnings": warnings_of(self.inception, self.reference, samples),
        }


def warnings_of(inception: Inception, *sides: Side) -> list[str]:
    found = []
    for side in sides:
        if side.duplicates:
            found.append(f"{side.duplicates} images of {side.name} are copies of others in it")
        if side.images and side.images < inception.widths[0]:
            found.append(
                f"{side.name} holds {side.images} images, fewer than the {inception.widths[0]} "
                f"features: FID is biased upwards"
            )
    if not inception.published:
        found.append(
            f"{INCEPTION_FILE} is not the published file: figures compare with its own only"
        )
    return found


def show(result: dict[str, Any]) -> None:
    """Warnings, a table and, as the last line, JSON; an empty result (other processes) is silent."""
    if not result:
        return
    for warning in result["warnings"]:
        tqdm.write(f"warning: {warning}")
    samples, reference = result["samples"], result["reference"]
    rows = [
        ("samples", described(samples)),
        ("reference", described(reference)),
        *((name, shown(value)) for name, value in result["metrics"].items()),
    ]
    if result["partial"]:
        rows.insert(0, ("PARTIAL", f"{samples['images']} of {result['images_asked']} images"))
    width = max(len(name) for name, _ in rows)
    tqdm.write("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    tqdm.write(json.dumps(result, ensure_ascii=False))


def described(side: dict[str, Any]) -> str:
    count = f"{side['images']} images" if side["images"] else "statistics"
    return f"{side['path']}: {count}, {side['hash']}"


def shown(value: Optional[float]) -> str:
    return "not known: the reference holds no images" if value is None else f"{value:.4f}"
