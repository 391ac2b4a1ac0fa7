"""The endless, resumable order of training samples, reshuffled every epoch, and their random draws."""

from collections.abc import Iterator
from itertools import count

import numpy as np
from torch.utils.data import Sampler

from runtime.errors import InputError
from runtime.randomness import Stream, generator_for


class SampleOrder(Sampler):
    """Endless batches of (epoch, index) for one rank, from batch `start` on.

    All ranks share one endless sequence of samples; its epoch e is a permutation drawn from (seed, e).
    Batch m of all ranks is the m-th run of world·batch samples, of which each rank takes a contiguous share.
    So the samples of a step depend only on the global batch size.
    """

    def __init__(
        self, items: int, batch: int, seed: int, rank: int = 0, world: int = 1, start: int = 0
    ):
        if items < batch * world:
            raise InputError(
                f"{items} images are fewer than the {batch * world} that all ranks read at once: lower "
                f"training.per_gpu_batch_size or use more images"
            )
        self.items, self.batch, self.seed = items, batch, seed
        self.rank, self.world, self.start = rank, world, start
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def sample(self, position: int) -> tuple[int, int]:
        """The (epoch, index) at a position of the sequence."""
        epoch, place = divmod(position, self.items)
        if epoch != self._epoch:
            rng = generator_for(self.seed, Stream.ORDER, epoch)
            self._permutation = rng.permutation(self.items)
            self._epoch = epoch
        return epoch, int(self._permutation[place])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in count(self.start):
            first = (batch * self.world + self.rank) * self.batch
            yield [self.sample(first + i) for i in range(self.batch)]


class EpochDraws:
    """Which view an image shows in an epoch, and its label or, if its class is dropped, `no_class`.

    `labels` (N,) are those of all images. Both are pure functions of (seed, epoch, index). The stream of an epoch begins with uniforms
    u (N, 2): image i shows view ⌊views·u[i, 0]⌋ and drops its class if u[i, 1] < class_dropout. One
    stream per item would take several times as long as reading the image's codes.
    """

    def __init__(
        self, labels: np.ndarray, views: int, seed: int, class_dropout: float, no_class: int
    ):
        self.labels, self.views, self.seed = labels, views, seed
        self.class_dropout, self.no_class = class_dropout, no_class
        self._epoch = -1

    def of(self, epoch: int, index: int) -> tuple[int, int]:
        """(view, label); a dropped class has the label `no_class`."""
        if epoch != self._epoch:
            rng = generator_for(self.seed, Stream.VIEW, epoch)
            uniforms = rng.random((len(self.labels), 2), np.float32)
            self._view = (uniforms[:, 0] * self.views).astype(np.int32)
            self._dropped = uniforms[:, 1] < self.class_dropout
            self._epoch = epoch
        label = self.no_class if self._dropped[index] else self.labels[index]
        return int(self._view[index]), int(label)
