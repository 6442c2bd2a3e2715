"""Exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch

from sdvae.model import AutoencoderKL


def ema_decay_at(update: int, decay: float) -> float:
    """Decay of update `update`, counted from 0: early weights are soon forgotten.

    min(decay, (1 + n) / (10 + n)), TensorFlow's ExponentialMovingAverage with num_updates.
    """
    return min(decay, (1 + update) / (10 + update))


class WeightAverage:
    """ema <- d·ema + (1 - d)·weights after every step, with d = ema_decay_at(n): in the weights' own fp32.

    In bf16 an update of 1e-4 of the difference would be rounded away, so this never follows autocast.

    Attributes:
        model: the average: a frozen copy in evaluation mode.
        updates: how many it has had.
    """

    def __init__(self, model: AutoencoderKL, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, model: AutoencoderKL) -> None:
        step = 1.0 - ema_decay_at(self.updates, self.decay)
        for average, weight in zip(self.model.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, step)
        self.updates += 1
