"""Averages and rates between two lines of the log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Sums what each step reports, on the device, and reads the sums only when a line is due."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._images = 0
        self._waited = 0.0
        self._paused = 0.0
        self._start = time.perf_counter()

    def add(self, images: int = 0, **values: Tensor) -> None:
        """Count `images` of all processes together, and take scalar values into their averages."""
        self._images += images
        for name, value in values.items():
            value = value.detach().float()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here is no training."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def averages(self, accelerator: Accelerator) -> dict[str, float]:
        """Means since the last reset, over all processes. Every process must call it."""
        means = torch.stack([self._sums[name] / self._counts[name] for name in self._sums])
        means = accelerator.reduce(means, reduction="mean")
        return dict(zip(self._sums, means.tolist(), strict=True))

    def rates(self) -> dict[str, float]:
        """images_per_second of all processes together, and the share of time this one waited for data."""
        seconds = time.perf_counter() - self._start - self._paused
        return {"images_per_second": self._images / seconds, "data_wait_fraction": self._waited / seconds}
