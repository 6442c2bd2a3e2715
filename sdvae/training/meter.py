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

    def count_images(self, images: int) -> None:
        """Count `images` of all processes together."""
        self._images += images

    def add(self, **values: Tensor) -> None:
        """Take scalar values into their averages."""
        for name, value in values.items():
            value = value.detach().to(torch.float32, copy=True)  # a parameter's value would change under the sum
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def state(self) -> dict[str, list[float]]:
        """{name: [sum, count]} on this process since the last reset: what a checkpoint between two lines must hold."""
        return {name: [self._sums[name].item(), self._counts[name]] for name in self._sums}

    def restore(self, state: dict[str, list[float]], device: torch.device) -> None:
        """Continue from a `state`, exactly: an fp32 sum is a float64 without loss."""
        self.reset()
        self._sums = {name: torch.tensor(total, device=device) for name, (total, _) in state.items()}
        self._counts = {name: int(count) for name, (_, count) in state.items()}

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
        """Means since the last reset, over all processes; empty where nothing was added. Every process must call it."""
        if not self._sums:
            return {}
        means = torch.stack([self._sums[name] / self._counts[name] for name in self._sums])
        means = accelerator.reduce(means, reduction="mean")
        return dict(zip(self._sums, means.tolist(), strict=True))

    def rates(self) -> dict[str, float]:
        """images_per_second of all processes together, and the share of time this one waited for data."""
        seconds = time.perf_counter() - self._start - self._paused
        return {"images_per_second": self._images / seconds, "data_wait_fraction": self._waited / seconds}
