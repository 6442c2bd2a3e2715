"""Where in the image, and along which channels, the latents vary."""

from __future__ import annotations

import torch
from torch import Tensor

from sdvae.evaluation.metrics import LatentMoments
from sdvae.model import DiagonalGaussian

HISTOGRAM_RANGE = (-5.0, 5.0)  # of scaled latents, in std of N(0, 1)
HISTOGRAM_BINS = 100


class LatentMaps:
    """Sums over images of posteriors of one size, in float64; beside `LatentHealth`, which has no positions.

    Args:
        shape: (C, h, w) of the latents.
        scaling_factor, shift_factor: of the VAE's configuration: (z - shift) · scaling is what a diffusion model sees.

    Attributes:
        images: how many.
        histogram: (C, HISTOGRAM_BINS) int64, of scaled samples.
        outside: (C,) int64, samples beyond HISTOGRAM_RANGE.
    """

    def __init__(self, shape: tuple[int, int, int], scaling_factor: float, shift_factor: float | None):
        channels, height, width = shape
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor or 0.0
        self.images = 0
        self.histogram = torch.zeros(channels, HISTOGRAM_BINS, dtype=torch.int64)
        self.outside = torch.zeros(channels, dtype=torch.int64)
        self._kl = torch.zeros(height, width, dtype=torch.float64)
        self._sums = torch.zeros(3, channels, height, width, dtype=torch.float64)  # Σ mean, Σ mean², Σ var
        self._products = torch.zeros(channels, channels, dtype=torch.float64)  # Σ mean meanᵀ

    def update(self, posterior: DiagonalGaussian, generator: torch.Generator) -> None:
        """Add a batch. Args: generator: of the samples that the histogram counts."""
        posterior = DiagonalGaussian(posterior.parameters.detach().cpu().double())
        mean, var = posterior.mean, posterior.var
        self.images += len(mean)
        self._kl += posterior.kl_map().sum(dim=(0, 1))
        self._sums += torch.stack([mean.sum(0), mean.square().sum(0), var.sum(0)])
        self._products += torch.einsum("bchw,bdhw->cd", mean, mean)
        scaled = self.scaled(posterior.sample(generator)).transpose(0, 1).flatten(1)  # (C, B·h·w)
        self.histogram += torch.stack([torch.histc(c, HISTOGRAM_BINS, *HISTOGRAM_RANGE).long() for c in scaled])
        low, high = HISTOGRAM_RANGE
        self.outside += ((scaled < low) | (scaled > high)).sum(dim=1)

    def scaled(self, z: Tensor) -> Tensor:
        """Latents as a diffusion model sees them."""
        return (z - self.shift_factor) * self.scaling_factor

    def kl(self) -> Tensor:
        """(h, w): nats at each position, summed over channels; the mean over images."""
        return self._kl / self.images

    def std(self, moments: LatentMoments) -> Tensor:
        """(h, w): standard deviation of scaled latents at each position, over images and channels.

        About the mean of each channel, which is that of all positions, so that a place that is always brighter
        than the rest counts as one that varies.

        Args: moments: over the same images.
        """
        mean, square, var = self._sums / self.images  # (C, h, w) each
        centre = moments.channel_mean[:, None, None]
        variance = (square - 2 * centre * mean + centre.square() + var).mean(dim=0)
        return self.scaling_factor * variance.clamp(min=0).sqrt()

    def covariance(self, moments: LatentMoments) -> Tensor:
        """(C, C): of unscaled latents over images and positions; its diagonal is the square of their channel_std.

        By the law of total covariance, Cov[mean] + diag(E[var]): an element's noise is its own.
        """
        count = moments.sums[0, 0]
        mean = moments.channel_mean
        return self._products / count - mean[:, None] * mean + torch.diag(moments.sums[3] / count)

    def correlation(self, moments: LatentMoments) -> Tensor:
        """(C, C) in [-1, 1]; NaN along a channel that does not vary."""
        std = moments.channel_std
        return self.covariance(moments) / (std[:, None] * std)
