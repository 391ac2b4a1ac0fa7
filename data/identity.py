"""Short hashes that identify a data set, to compare it with that of a resumed run or of validation."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # reading a cache needs no images
    from data.images import ImagePath

THREADS, CHUNK = 16, 1000  # network file systems respond slowly


def short_hash(content: bytes) -> str:
    """16 hex digits."""
    return hashlib.sha256(content).hexdigest()[:16]


def hash_of_texts(texts: Iterable[str]) -> str:
    """`short_hash` of texts, in their order."""
    return short_hash("\n".join(texts).encode(errors="surrogateescape"))


def hash_of_sizes(paths: Sequence["ImagePath"]) -> str:
    return short_hash(sizes_and_times(paths)[:, 0].tobytes())


def hash_of_names(paths: Sequence["ImagePath"]) -> str:
    """Of the names without their common prefix, so that all may move together."""
    names = list(map(str, paths))
    start = len(os.path.commonprefix([min(names), max(names)]))  # noqa: RUF071 - of all
    return hash_of_texts(name[start:] for name in names)


def sizes_and_times(paths: Sequence["ImagePath"]) -> np.ndarray:
    """`size_and_time` of every image: (N, 2), int64."""
    with ThreadPool(THREADS) as pool:
        found = pool.map(size_and_time, paths, CHUNK)
    return np.array(found, np.int64).reshape(-1, 2)


def size_and_time(path: "ImagePath") -> tuple[int, int]:
    """Size in bytes and modification time in seconds of an image; -1 for a missing file."""
    if not isinstance(path, (str, Path)):  # in a tar
        return int(path.tar.sizes[path.number]), path.tar.stamp[1] // 10**9
    try:
        status = os.stat(path)
    except OSError:  # a broken link, which its reader reports
        return -1, -1
    return status.st_size, int(status.st_mtime)  # not all file systems keep fractions
