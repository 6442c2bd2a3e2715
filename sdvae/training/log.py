"""The log of a run: averages over steps, metrics.jsonl, trackers, and the progress bar."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from tqdm.auto import tqdm

from sdvae.errors import one_line
from sdvae.io import flatten, utf8
from sdvae.training.config import TrainConfig
from sdvae.training.run_folder import RunFolder, plain

logger = logging.getLogger(__name__)


class Meter:
    """Averages of the values that steps have reported since the last line of the log, and the speed of these steps."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, np.float32] = {}  # in fp32, like the terms
        self._counts: dict[str, int] = {}
        self._images = 0
        self._waited = 0.0
        self._paused = 0.0
        self._start = time.perf_counter()

    def count_images(self, images: int) -> None:
        """Count `images` of all processes together."""
        self._images += images

    def add(self, values: dict[str, float]) -> None:
        """Add scalar values to their averages."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, np.float32(0)) + np.float32(value)
            self._counts[name] = self._counts.get(name, 0) + 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context whose time counts as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time does not count as training."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def averages(self) -> dict[str, float]:
        """Means over all processes; empty if nothing was added. Every process must call it."""
        if not self._sums:
            return {}
        means = [self._sums[name] / np.float32(self._counts[name]) for name in self._sums]
        stacked = torch.tensor(means, dtype=torch.float32)
        if self._accelerator.num_processes > 1:  # one process alone need not wait for its device
            stacked = self._accelerator.reduce(stacked.to(self._accelerator.device), reduction="mean")
        return dict(zip(self._sums, stacked.tolist(), strict=True))

    def rates(self) -> dict[str, float]:
        """images_per_second of all processes together, and the share of time that this process waited for data."""
        seconds = time.perf_counter() - self._start - self._paused
        return {"images_per_second": self._images / seconds, "data_wait_fraction": self._waited / seconds}

    def sums(self) -> dict[str, list[float]]:
        """{name: [sum, count]} on this process."""
        return {name: [float(self._sums[name]), self._counts[name]] for name in self._sums}

    def restore(self, sums: dict[str, list[float]]) -> None:
        """Continue from `sums`, which is exact since float64 holds every fp32 number. Times and images start at 0."""
        self.reset()
        self._sums = {name: np.float32(total) for name, (total, _) in sums.items()}
        self._counts = {name: int(count) for name, (_, count) in sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """The sums of all processes. Every process must call it."""
        return {"meters": gather_object([self.sums()])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load this process's sums, unless the number of processes has changed."""
        if len(state["meters"]) == self._accelerator.num_processes:
            self.restore(state["meters"][self._accelerator.process_index])


class RunLog:
    """metrics.jsonl and accelerate's trackers.

    A tracker cannot end a run: if one raises an exception, this is logged once and the tracker is no longer used.
    """

    def __init__(self, run: RunFolder, config: TrainConfig, accelerator: Accelerator, first_step: int):
        self._run = run if accelerator.is_main_process else None
        if accelerator.log_with:
            flat = flatten(plain(config))
            # trackers take numbers and strings
            recipe = {key: value if isinstance(value, int | float) else utf8(str(value)) for key, value in flat.items()}
            # a continued run writes the steps after its checkpoint again; TensorBoard hides their first version
            options = {"tensorboard": {"purge_step": first_step + 1}} if first_step else {}
            try:
                accelerator.init_trackers(run.TRACKER, config=recipe, init_kwargs=options)
            except Exception as error:
                logger.warning("trackers cannot start and are left out: %s", _reason(error))
        self._trackers = list(getattr(accelerator, "trackers", []))

    def report(self, kind: str, metrics: dict[str, float], step: int) -> None:
        """Write one line of metrics, each under the name `kind/name`."""
        named = {f"{kind}/{name}": value for name, value in metrics.items()}
        if self._run is not None:
            self._run.log({"step": step, **named})
        self._each(lambda tracker: tracker.log(named, step=step))

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Log a picture with every tracker that accepts pictures."""

        def log(tracker: Any) -> None:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: np.asarray(image)[None]}, step=step, **layout)

        self._each(log)

    def finish(self) -> None:
        self._each(lambda tracker: tracker.finish())

    def _each(self, action: Callable[[Any], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:
                logger.warning("tracker %s failed and is left out from now on: %s", tracker.name, _reason(error))
                self._trackers.remove(tracker)


def progress_bar(done: int, steps: int, show: bool) -> tqdm:
    """A bar of the steps done, with the time left. If the output is a file, it gets a line every 30 seconds."""
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    settings: dict[str, Any] = {"unit": "step", "disable": not show, "dynamic_ncols": True, "mininterval": seconds}
    return tqdm(total=steps, initial=done, desc="train", **settings)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
