"""A part of the training images that covers all classes (`experiment.max_train_examples`)."""

from bisect import bisect_right
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from data.images import ImagePath


def evenly_spaced(items: int, count: int) -> np.ndarray:
    """`count` different indices below `items`, in order: the middles of equal ranges."""
    return (2 * np.arange(count) + 1) * items // (2 * count)


def spread_over_classes(labels: np.ndarray, count: int) -> np.ndarray:
    """Sorted indices (count,) of a sample of images with labels (N,); all if N <= count.

    Each class contributes equally, or all it has, evenly spaced within the class. With fewer images
    than classes, evenly spaced classes contribute one each. The choice is deterministic.
    """
    if count >= len(labels):
        return np.arange(len(labels))
    order = np.argsort(labels, kind="stable")  # class by class, each in its own order
    sizes = np.unique(labels, return_counts=True)[1]
    classes = zip(np.split(order, np.cumsum(sizes)[:-1]), equal_shares(sizes, count))
    chosen = [images[evenly_spaced(len(images), share)] for images, share in classes]
    return np.sort(np.concatenate(chosen))


def equal_shares(sizes: np.ndarray, count: int) -> np.ndarray:
    """Numbers of images per class (C,) with sum `count`, at most `sizes` (C,) each."""
    # The highest level that all classes together can reach, as far as they have images.
    levels = range(sizes.max() + 1)
    level = bisect_right(levels, count, key=lambda level: np.minimum(sizes, level).sum()) - 1
    shares, larger = np.minimum(sizes, level), np.flatnonzero(sizes > level)
    shares[larger[evenly_spaced(len(larger), count - shares.sum())]] += 1
    return shares


class KeyedSubset(Dataset):
    """Item (epoch, i) is item (epoch, `indices[i]`) of `dataset`, with the same random draws."""

    def __init__(self, dataset: Any, indices: np.ndarray):
        self.dataset, self.indices = dataset, indices

    @property
    def paths(self) -> list[ImagePath]:
        """Paths of these images, if `dataset` has paths."""
        return [self.dataset.paths[i] for i in self.indices]

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, i = key
        return self.dataset[epoch, int(self.indices[i])]
