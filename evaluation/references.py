"""Reference statistics: from images, from other projects' files, or from our own."""

from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

from data.identity import short_hash
from data.tars import is_tar
from evaluation.features import FeatureNetwork
from evaluation.sources import npz_images, npz_keys, open_images
from evaluation.statistics import SetStatistics, measure
from runtime.errors import InputError
from runtime.files import read_npz, whole_file

MOMENTS = ("mu", "sigma", "mu_s", "sigma_s")  # ADM's names; other projects have the first two
# The parts of `SetStatistics` by their names in files.
STORED = {"pool": MOMENTS[:2], "spatial": MOMENTS[2:], "manifold": ("pool_3",)}


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
    see `sources.open_images`.
    """
    path = Path(path)
    keys = [] if path.is_dir() or is_tar(path) else npz_keys(path)
    # Without a name the moments are Inception's; another network can use only the images.
    unnamed = "features" not in keys and network.name != "inception"
    if crop is not None and keys:
        raise InputError(f"{path} is not a folder: --crop takes the images of a folder or tar")
    if "mu" not in keys or ("arr_0" in keys and unnamed):
        images = open_images(path, crop)
        check_sizes(images.name, images.shape[1:3], size)
        return measure(images, network, batch, workers)
    stored = load_statistics(path, network)
    if stored.size is not None:
        check_sizes(stored.name, stored.size, size)
    if "arr_0" in keys:
        images = npz_images(path)
        check_sizes(images.name, images.shape[1:3], size)
        side = measure(images, network, batch, workers)
        stored.parts["manifold"], stored.size = side.parts["manifold"], side.size
        stored.hash, stored.duplicates = f"{stored.hash} + {side.hash}", side.duplicates
    return stored


def check_sizes(name: str, size: tuple[int, int], samples: Optional[tuple[int, int]]) -> None:
    """Refuse a reference whose size (height, width) differs from that of the samples, if known."""
    if samples is not None and size != samples:
        raise InputError(
            f"the samples have {samples[1]}x{samples[0]} pixels, {name} has {size[1]}x{size[0]}: "
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
        "mu": (pool,), "sigma": (pool, pool), "mu_s": (spatial,), "sigma_s": (spatial, spatial)
    }  # fmt: skip
    if "pool_3" in values:
        shapes["pool_3"] = (*values["pool_3"].shape[:1], pool)
    for key, shape in shapes.items():
        value = values.get(key, np.zeros(shape))
        if value.shape != shape or value.dtype.kind != "f" or not np.isfinite(value).all():
            raise InputError(
                f"{path}: {key} holds {value.dtype} {value.shape}, not finite floats {shape}, so these are statistics "
                f"of other features, or damaged: make them again with --save_stats"
            )
    digest = short_hash(b"".join(values[key].tobytes() for key in keys))
    try:
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
    except (TypeError, ValueError, IndexError) as e:
        raise InputError(f"{path} is damaged ({e}): make it again with --save_stats") from e


def save_statistics(side: SetStatistics, path: str | Path, identity: str) -> None:
    """Write statistics of the features `identity` as a later reference, whole or not at all."""
    arrays: dict[str, Any] = {
        key: value.cpu().numpy()
        for part, names in STORED.items()
        for key, value in zip(names, side.parts.get(part, ()))
    }
    arrays |= {"features": np.array(identity), "hash": np.array(side.hash)}
    for key, value in (("images", side.images), ("size", side.size)):
        if value is not None:
            arrays[key] = np.asarray(value)
    with whole_file(path, shared=True) as partial, open(partial, "wb") as file:
        np.savez(file, **arrays)
