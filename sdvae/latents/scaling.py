"""Scaling latents to what a diffusion model is trained on, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdvae.errors import InputError


@dataclass(frozen=True)
class LatentScaling:
    """normalize(z) = (z - shift) · scale, and its inverse.

    Attributes:
        shift: (C, 1, 1) fp32, or (1, 1, 1) if it is the same for all channels.
        scale: the same shape.
    """

    shift: Tensor
    scale: Tensor

    def normalize(self, latents: Tensor) -> Tensor:
        """Scale latents (…, C, h, w) of the encoder for a diffusion model."""
        return (latents - self.shift.to(latents)) * self.scale.to(latents)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Scale latents (…, C, h, w) of a diffusion model for the decoder."""
        return latents / self.scale.to(latents) + self.shift.to(latents)


def identity_scaling() -> LatentScaling:
    return LatentScaling(_column([0.0]), _column([1.0]))


def scaling_of(config: Mapping[str, Any]) -> LatentScaling:
    """The scaling that diffusers' pipelines apply to the latents of a VAE.

    It is (z - shift_factor) · scaling_factor (SD, SD3, Flux). If the config has latents_mean and latents_std, it is
    (z - latents_mean) · scaling_factor / latents_std (StableDiffusionXLPipeline).

    Args:
        config: the VAE's config.

    Raises:
        InputError: when scaling_factor is missing, 0 or not finite.
    """
    factor = config.get("scaling_factor")
    if not factor or not math.isfinite(factor):
        raise InputError(f"got scaling_factor {factor}; need a number other than 0; choose another scaling")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return LatentScaling(_column(mean), factor / _column(std))
    return LatentScaling(_column([config.get("shift_factor") or 0.0]), _column([factor]))


def channel_scaling(statistics: Mapping[str, Any]) -> LatentScaling:
    """Scale each channel to mean 0 and standard deviation 1.

    Args:
        statistics: latents_mean and latents_std, each with a number for each channel.

    Raises:
        InputError: when a channel does not vary.
    """
    std = _column(statistics["latents_std"])
    if not (std > 0).all():
        raise InputError(
            f"got latents_std {statistics['latents_std']}; need channels that vary; choose another scaling"
        )
    return LatentScaling(_column(statistics["latents_mean"]), 1.0 / std)


def _column(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
