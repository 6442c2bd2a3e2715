"""Random numbers that depend only on a seed and a sample, and not on batches, workers or processes."""

from __future__ import annotations

import zlib

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


def posterior_generators(noise_seeds: Tensor) -> list[torch.Generator]:
    """One CPU generator for each image, so that its posterior noise does not depend on its batch.

    Args:
        noise_seeds: (B,) int64.
    """
    return [torch.Generator().manual_seed(seed) for seed in noise_seeds.tolist()]
