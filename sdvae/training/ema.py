"""Exponential moving average of the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch

from sdvae.model import Autoencoder


def ema_decay_at(update: int, decay: float) -> float:
    """The decay of update n, counted from 0: min(decay, (1 + n) / (10 + n)), so that early weights are soon forgotten.

    TensorFlow's ExponentialMovingAverage with `num_updates` has the same formula.
    """
    return min(decay, (1 + update) / (10 + update))


def decay_of_half_life(half_life: float, images_per_step: int) -> float:
    """The decay d of one step after which weights that `half_life` images ago were the newest count half: d^n = 1/2.

    Args:
        half_life: in images, n · images_per_step.
        images_per_step: over all processes and micro-batches.
    """
    return 0.5 ** (images_per_step / half_life)


class WeightAverage:
    """ema <- d·ema + (1 - d)·weights after every step, with d = ema_decay_at(n).

    The average is kept in fp32 whatever autocast does: bf16 would round away an update of 1e-4 of the difference.

    Attributes:
        model: the average, a frozen copy in evaluation mode.
        updates: how many times the average was updated.
    """

    def __init__(self, model: Autoencoder, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: Autoencoder) -> None:
        step = 1.0 - ema_decay_at(self.updates, self.decay)
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, step)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of updates. The weights are not included; they are in `model`."""
        return {"ema_updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["ema_updates"]
