"""Random numbers that depend only on a seed and a sample, and not on batches, workers or processes."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sample_seed(seed: int, epoch: int, index: int, purpose: str) -> int:
    """A seed for one purpose of one sample, the same on any machine.

    Args:
        seed: the seed of the run.
        epoch: the sample's epoch.
        index: the sample's place in the data set.
        purpose: what the numbers are for: «augment», «posterior», …

    Returns:
        A number of 63 bits, which `torch.Generator.manual_seed` and int64 tensors can hold.
    """
    # crc32, because Python's own hash of a string differs from process to process
    sequence = np.random.SeedSequence([seed, epoch, index, zlib.crc32(purpose.encode())])
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def sample_seeds(seed: int, epochs: Sequence[int], indices: Sequence[int], purpose: str) -> list[int]:
    """The `sample_seed` of several samples, computed for all of them together, at a small part of the time.

    It repeats the arithmetic of `numpy.random.SeedSequence` for a pool of four 32-bit words (M. E. O'Neill, «Developing
    a seed_seq alternative», 2015), whose results NumPy guarantees not to change.

    Args:
        seed: the seed of the run.
        epochs: the epoch of each sample.
        indices: the place of each sample in the data set.
        purpose: as for `sample_seed`.
    """
    if max([seed, *epochs, *indices], default=0) >= 2**32:  # such a number has two words
        return [sample_seed(seed, *key, purpose) for key in zip(epochs, indices, strict=True)]
    pool = np.zeros((4, len(indices)), np.uint32)
    pool[0], pool[1], pool[2], pool[3] = seed, epochs, indices, zlib.crc32(purpose.encode())
    constants = _powers(0x43B0D7E5, 0x931E8875, 17)
    pool = _hashed(pool, constants[:5])
    for source in range(4):
        others = [row for row in range(4) if row != source]
        hashed = _hashed(pool[source], constants[4 + 3 * source : 8 + 3 * source])
        mixed: np.ndarray = np.uint32(0xCA01F9DD) * pool[others] - np.uint32(0x4973F715) * hashed
        pool[others] = mixed ^ (mixed >> np.uint32(16))
    low, high = _hashed(pool[:2], _powers(0x8B51F9DD, 0x58F38DED, 3)).astype(np.uint64)
    return ((low | high << np.uint64(32)) >> np.uint64(1)).tolist()


def _powers(start: int, factor: int, count: int) -> np.ndarray:
    """(count, 1): start, start · factor, start · factor², …, modulo 2^32."""
    return np.array([[start * pow(factor, power, 2**32) % 2**32] for power in range(count)], np.uint32)


def _hashed(words: np.ndarray, constants: np.ndarray) -> np.ndarray:
    """Hash n rows of words with n + 1 constants, of which each row takes two successive ones."""
    mixed = (words ^ constants[:-1]) * constants[1:]
    return mixed ^ (mixed >> np.uint32(16))


def posterior_generators(noise_seeds: Tensor) -> list[torch.Generator]:
    """One CPU generator for each image, so that its posterior noise does not depend on its batch.

    Args:
        noise_seeds: (B,) int64.
    """
    return [torch.Generator().manual_seed(seed) for seed in noise_seeds.tolist()]


def generators_for(seeds: Tensor, purpose: str) -> list[torch.Generator]:
    """One CPU generator for each image, whose numbers are independent of those for other purposes.

    Args:
        seeds: (B,) int64, such as those of the posterior's noise.
        purpose: what the numbers are for, as for `sample_seed`.
    """
    return [torch.Generator().manual_seed(sample_seed(seed, 0, 0, purpose)) for seed in seeds.tolist()]
