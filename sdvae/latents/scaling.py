"""Scaling latents to what a diffusion model is trained on, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdvae.errors import InputError
from sdvae.model import AnyAutoencoder, AutoencoderKLFlux2
from sdvae.model.patches import PatchSize, patched, unpatched


@dataclass(frozen=True)
class LatentScaling:
    """normalize(z) = (patched(z) - shift) · scale, and its inverse.

    Patches are of one position, and `patched` changes nothing, except for FLUX.2's VAE. `scaled` and `unscaled` compute
    the same values in the layout of the encoder's latents, whose sides need not be multiples of the patch's.

    Attributes:
        shift: (C', 1, 1) fp32, or (1, 1, 1) if it is the same for all channels, with C' = C · p · q.
        scale: the same shape.
        patch_size: p and q, the height and width of a patch in positions; see `sdvae.model.patches`.
    """

    shift: Tensor
    scale: Tensor
    patch_size: PatchSize = (1, 1)

    def normalize(self, latents: Tensor) -> Tensor:
        """Scale latents (…, C, p·h, q·w) of the encoder for a diffusion model: (…, C·p·q, h, w)."""
        return patched(self.scaled(latents), self.patch_size)

    def denormalize(self, latents: Tensor) -> Tensor:
        """Scale latents (…, C·p·q, h, w) of a diffusion model for the decoder: (…, C, p·h, q·w)."""
        return self.unscaled(unpatched(latents, self.patch_size))

    def scaled(self, latents: Tensor) -> Tensor:
        """The values of `normalize` in their places among the latents (…, C, h, w)."""
        return (latents - self._spread(self.shift, latents)) * self._spread(self.scale, latents)

    def unscaled(self, latents: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return latents / self._spread(self.scale, latents) + self._spread(self.shift, latents)

    def _spread(self, values: Tensor, latents: Tensor) -> Tensor:
        """Shift or scale for each element of latents (…, C, h, w), in a shape that broadcasts to theirs."""
        if self.patch_size == (1, 1):
            return values.to(latents)
        (p, q), (height, width) = self.patch_size, latents.shape[-2:]
        tiles = unpatched(values, self.patch_size).repeat(1, -(-height // p), -(-width // q))
        return tiles[:, :height, :width].to(latents)

    @property
    def std(self) -> float:
        """The standard deviation of unscaled latents, as far as the scaling tells it: 1/scale, over all channels."""
        return float(self.scale.double().reciprocal().square().mean().sqrt())

    @property
    def formula(self) -> str:
        """Text such as «(z - shift_factor) * scaling_factor»."""
        if self.patch_size == (1, 1):
            return "(z - shift_factor) * scaling_factor"
        p, q = self.patch_size
        return f"(z - running mean) / sqrt(running variance + eps), by a batch norm over {p} x {q} patches of z"

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads, which JSON can hold. All digits of shift and scale are kept."""
        values = {"shift": self.shift.flatten().tolist(), "scale": self.scale.flatten().tolist()}
        return {"patch_size": list(self.patch_size), **values}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> LatentScaling:
        rows, columns = content["patch_size"]
        return cls(_column(content["shift"]), _column(content["scale"]), (rows, columns))


def identity_scaling() -> LatentScaling:
    return LatentScaling(_column([0.0]), _column([1.0]))


def scaling_of(vae: AnyAutoencoder) -> LatentScaling:
    """The scaling that diffusers' pipelines apply to the latents of a VAE: by its config, or its batch norm (FLUX.2).

    Raises:
        InputError: as `config_scaling` does.
    """
    if isinstance(vae, AutoencoderKLFlux2):
        return batch_norm_scaling(vae.bn.running_mean, vae.bn.running_var, vae.bn.eps, vae.patch_size)
    return config_scaling(vae.config)


def config_scaling(config: Mapping[str, Any]) -> LatentScaling:
    """The scaling that the keys of a VAE's config describe.

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


def batch_norm_scaling(mean: Any, variance: Any, eps: float, patch_size: PatchSize) -> LatentScaling:
    """The scaling of a batch norm without weights, in evaluation mode: (patched(z) - mean) / sqrt(variance + eps).

    Args:
        mean: (C·p·q,), the running mean.
        variance: (C·p·q,), the running variance.
        eps: what is added to the variance, inside the root.
        patch_size: p and q.
    """
    return LatentScaling(_column(mean), _column(variance).double().add(eps).rsqrt().float(), patch_size)


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
    return torch.as_tensor(values, dtype=torch.float32, device="cpu").detach().clone().reshape(-1, 1, 1)
