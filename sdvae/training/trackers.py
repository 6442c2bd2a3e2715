"""Trackers that may fail without ending a run: a lost connection should cost curves and not the training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from sdvae.errors import one_line

logger = logging.getLogger(__name__)


class Trackers:
    """accelerate's trackers. One that raises is reported once, with its reason, and left out from then on.

    metrics.jsonl, which is ours, has every figure in any case.
    """

    def __init__(self, accelerator: Accelerator, project: str, config: dict[str, Any], first_step: int):
        if accelerator.log_with:
            # TensorBoard then hides what a run wrote after the checkpoint that it is continued from
            options = {"tensorboard": {"purge_step": first_step + 1}} if first_step else {}
            try:
                accelerator.init_trackers(project, config=config, init_kwargs=options)
            except Exception as error:
                logger.warning("trackers cannot start and are left out: %s", _reason(error))
        self._trackers = list(getattr(accelerator, "trackers", []))

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._each(lambda tracker: tracker.log(metrics, step=step))

    def log_image(self, name: str, image: Image.Image, step: int) -> None:
        """In every tracker that takes pictures."""

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


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
