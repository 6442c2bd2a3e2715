"""The order of samples: it depends on the seed only, not on the number of processes or workers.

A position counts the samples of the whole run, over all processes. With n images, position p is in epoch p // n, and is
place p % n of that epoch's permutation. All randomness of a sample follows from (seed, epoch, index), so a run can be
continued from a position without saved random state, even with another number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from sdvae.errors import InputError

_CACHED_EPOCHS = 2  # a batch at the border of two epochs needs both


class SampleKey(NamedTuple):
    """The `index`-th image of the data set, as seen in `epoch`.

    Its crop has a side of `resolution` pixels; None stands for that of the data set.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which is not needed
    resolution: int | None = None


class SampleOrder:
    """An endless order of samples: each epoch is a permutation of all samples, which follows from (seed, epoch).

    Args:
        num_samples: images in the data set.
        seed: 0 .. 2^32 - 1.

    Raises:
        InputError: for an empty data set, or another seed.
    """

    def __init__(self, num_samples: int, seed: int):
        if num_samples < 1:
            raise InputError(f"the data set has {num_samples} images; need at least 1")
        if not 0 <= seed < 2**32:
            raise InputError(f"seed is {seed}; need a number from 0 to {2**32 - 1}")
        self.num_samples = num_samples
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}

    def at(self, position: int) -> SampleKey:
        """The sample at a position, counted from 0 over the whole run."""
        epoch, offset = divmod(position, self.num_samples)
        return SampleKey(epoch, int(self._permutation(epoch)[offset]))

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, epoch])))
            while len(self._permutations) >= _CACHED_EPOCHS:
                del self._permutations[next(iter(self._permutations))]
            self._permutations[epoch] = generator.permutation(self.num_samples)
        return self._permutations[epoch]


class ShardedBatches(Sampler[list[SampleKey]]):
    """The batches of one process, as lists of keys: a `batch_sampler` for a DataLoader.

    The m-th batches of all processes together cover the positions [start + m·G, start + (m+1)·G) with
    G = batch_size · world_size; each rank takes a contiguous part of them. A batch may span two epochs, so no sample is
    dropped or repeated, and 1 process with B samples sees the same samples in each step as 2 with B/2 or 4 with B/4.

    Args:
        order: the same in all processes.
        batch_size: samples in each batch of this process.
        rank: the rank of this process.
        world_size: the number of processes.
        start: the first position; to continue a run, the number of samples that all processes together have used.
        num_batches: how many batches to yield.
        resolution_of: the side in pixels of the crops of the m-th batch, counted from 0; None stands for that of the
            data set.

    Raises:
        InputError: for numbers that are out of range.
    """

    def __init__(
        self,
        order: SampleOrder,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        *,
        num_batches: int,
        resolution_of: Callable[[int], int] | None = None,
    ):
        if batch_size < 1 or not 0 <= rank < world_size or start < 0 or num_batches < 0:
            raise InputError(
                f"batches of {batch_size}, rank {rank} of {world_size}, {num_batches} from position {start} on;"
                " need batch_size >= 1, 0 <= rank < world_size, and no negative counts"
            )
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self.num_batches = num_batches
        self.resolution_of = resolution_of

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for batch in range(self.num_batches):
            first = self.start + (batch * self.world_size + self.rank) * self.batch_size
            keys = [self.order.at(position) for position in range(first, first + self.batch_size)]
            if self.resolution_of is not None:
                side = self.resolution_of(batch)
                keys = [key._replace(resolution=side) for key in keys]
            yield keys
