"""Radially averaged power spectra, of images and of latents.

Those of images and reconstructions show the scales at which a VAE loses or invents detail. Those of latents, beside the
images', show how much of the latents is fine detail, which a diffusion model learns last and worst (Skorokhodov et al.
2025, «Improving the Diffusability of Autoencoders», arXiv 2502.14831; Ning et al. 2026, «Spectrum Matching», arXiv
2603.14645).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SPECTRUM = 8  # rows and columns; with fewer there are not four frequencies to fit a slope to


def radial_power(images: Tensor) -> Tensor:
    """Power at 1, 2, …, N/2 cycles an image side, averaged over direction.

    This is the periodogram of the channels' mean under a Hann window (Welch 1967). Without the window, the jump from
    one border of the image to the opposite one would put a cross into the spectrum. The weighted mean is subtracted
    first, so that frequency zero does not leak into the first rings. Ring k averages the frequencies whose radius
    rounds to k.

    Args:
        images: (B, C, N, N), in any range. The power of white noise is its variance.

    Returns:
        (B, N // 2) float64, on the CPU.
    """
    grey = images.detach().cpu().double().mean(dim=1)  # (B, N, N); CPU first: MPS has no float64
    side = grey.shape[-1]
    hann = torch.hann_window(side, periodic=True, dtype=torch.float64)
    window = hann[:, None] * hann
    grey = grey - (grey * window).sum(dim=(1, 2), keepdim=True) / window.sum()
    power = torch.fft.fft2(grey * window).abs().square() / window.square().sum()  # (B, N, N)
    ring = _ring(side).flatten()  # (N²,)
    sums = torch.zeros(len(grey), int(ring.max()) + 1, dtype=torch.float64).index_add_(1, ring, power.flatten(1))
    return (sums / ring.bincount())[:, 1 : side // 2 + 1]


def channel_power(latents: Tensor) -> Tensor:
    """`radial_power` of each channel by itself, averaged over the channels: (B, C, N, N) -> (B, N // 2)."""
    count, channels = latents.shape[:2]
    return radial_power(latents.flatten(0, 1)[:, None]).view(count, channels, -1).mean(dim=1)


@dataclass(frozen=True)
class Spectra:
    """The spectra of a set of images, or of their latents.

    Frequencies are counted in parts of the highest that the grid holds along a side (half a cycle a grid cell), so that
    images and latents of other sizes compare.

    Attributes:
        power: (images, N // 2) float64, as from `radial_power`.
    """

    power: Tensor

    @property
    def mean(self) -> Tensor:
        """(N // 2,): the mean power over the images."""
        return self.power.mean(dim=0)

    @property
    def frequency(self) -> Tensor:
        """(N // 2,), above 0 and up to 1: the frequency of each entry."""
        rings = self.power.shape[1]
        return torch.arange(1, rings + 1, dtype=torch.float64) / rings

    @property
    def slope(self) -> float:
        """a of the power law P(f) ∝ f^a that is nearest to the mean power.

        The least-squares line of log P against log f, weighted by 1/f so that every octave counts the same. The first
        ring is left out: under the window, subtracting the mean takes a part of its power. White noise has 0 and
        photographs have about -2 (Field 1987; van der Schaaf & van Hateren 1996).
        """
        frequency = self.frequency[1:]
        x, y, weight = frequency.log(), self.mean[1:].log(), 1 / frequency
        x = x - (weight * x).sum() / weight.sum()
        return float((weight * x * y).sum() / (weight * x.square()).sum())

    @property
    def energy(self) -> Tensor:
        """(images, N // 2): power times the number of the frequencies in each ring, divided by the set's mean energy.

        The sum over rings is 1 in the mean over images.
        """
        rings = self.power.shape[1]
        energy = self.power * _ring(2 * rings).flatten().bincount()[1 : rings + 1]
        return energy / energy.sum(dim=1).mean()

    @property
    def share_above(self) -> Tensor:
        """(N // 2,): the share of the energy at frequencies above each entry of `frequency`; the last is 0."""
        energy = self.energy.mean(dim=0)
        return (1 - energy.cumsum(0)).clamp(min=0)

    @property
    def high_share(self) -> Tensor:
        """(images,): each image's energy above half the highest frequency, in parts of the set's mean energy.

        Its mean is the share of the energy in the finest octave: 0.74 for white noise.
        """
        return self.energy[:, self.frequency > 0.5].sum(dim=1)


def _ring(side: int) -> Tensor:
    """(N, N) int64: for each frequency of a two-dimensional transform its distance from zero, rounded."""
    frequency = torch.fft.fftfreq(side, d=1 / side, dtype=torch.float64)  # 0, 1, …, -1 cycles a side
    return torch.hypot(frequency[:, None], frequency).round().long()
