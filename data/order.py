"""The order of training samples: endless, reshuffled every epoch, and resumable at any batch."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from modeling.errors import InputError
from training.randomness import generator_for


class SampleOrder(Sampler):
    """Batches of (epoch, index) for one rank, from batch `start` on, for ever.

    All ranks walk one endless line of samples in which epoch e is a permutation drawn from
    (seed, e). Global batch m is the line's next world·batch samples, of which this rank takes its
    contiguous share; so the samples of a step depend on the global batch size alone.
    """

    def __init__(
        self, items: int, batch: int, seed: int, rank: int = 0, world: int = 1, start: int = 0
    ):
        if items < batch * world:
            raise InputError(
                f"{items} images are fewer than one global batch of {batch * world}: lower "
                f"training.per_gpu_batch_size or give more images"
            )
        self.items, self.batch, self.seed = items, batch, seed
        self.rank, self.world, self.start = rank, world, start
        self._epoch, self._permutation = -1, np.empty(0, np.int64)

    def sample(self, position: int) -> tuple[int, int]:
        """The (epoch, index) at a position of the line."""
        epoch, place = divmod(position, self.items)
        if epoch != self._epoch:
            self._permutation = generator_for(self.seed, epoch).permutation(self.items)
            self._epoch = epoch
        return epoch, int(self._permutation[place])

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch = self.start
        while True:
            first = (batch * self.world + self.rank) * self.batch
            yield [self.sample(first + i) for i in range(self.batch)]
            batch += 1
