"""Distributions to draw latents from when there is no photograph.

A tutorial's VAE can be sampled from its prior N(0, I): its KL term has a weight of 1, which keeps the distribution of
the latents of all images, the aggregate posterior q(z) = E_x q(z|x), close to the prior. Stable Diffusion's VAE has a
weight of 1e-6. Its q(z) is wider than the prior and its positions depend on each other, so its decoder was not trained
on anything like a sample from the prior. By Hoffman & Johnson 2016, «ELBO surgery», the KL of the ELBO is
I(x; z) + KL(q(z) || p(z)), so latents with much information about their image have a large KL.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdvae.errors import InputError
from sdvae.model import DiagonalGaussian
from sdvae.statistics import LatentMoments


def sample_moments(moments: LatentMoments, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Samples of N(mean_c, std_c²), independent at each position, with the mean and std of the data's latents.

    Args:
        moments: the moments of the latents of C channels.
        size: (N, h, w).
        generator: the generator of the samples.

    Returns:
        (N, C, h, w) float32.
    """
    count, height, width = size
    noise = torch.randn(count, len(moments.channel_std), height, width, generator=generator)
    return moments.channel_mean.float()[:, None, None] + moments.channel_std.float()[:, None, None] * noise


def gaussian_kl(moments: LatentMoments) -> Tensor:
    """KL(N(mean_c, std_c²) || N(0, 1)) of each channel in nats, (C,): ½ (mean² + std² - 1 - log std²).

    It is a lower bound of KL(q(z) || p(z)) for each element: of all distributions with this mean and variance the
    Gaussian is the closest to N(0, 1), and dependence between elements only increases the KL.
    """
    variance = moments.channel_std.square()
    return 0.5 * (moments.channel_mean.square() + variance - 1 - variance.log())


class LatentSpectrum:
    """Mean and cross-spectral density of latents of one size: how channels vary together at each frequency.

    S(f) = E[ẑ(f) ẑ(f)ᴴ] / (4·h·w), a C×C matrix for each frequency f of the Fourier transform ẑ of z - mean. For
    stationary latents it determines the covariance between any two channels at any distance (the Wiener-Khinchin
    theorem). The transform treats an image as periodic, so z is mirrored to (2h, 2w) first; otherwise the left and
    right borders of a photograph would form an edge that does not exist. Mirroring makes S real and both diagonal
    directions equally frequent. It also makes neighbours a little more similar, since one pair in h is a latent beside
    its own mirror image. The posterior's variance is white noise, which adds to the diagonal.

    Args:
        channels: C of the latents.
        height: h of the latents.
        width: w of the latents.

    Attributes:
        sums: (2h, w + 1, C, C) float64, Σ ẑ ẑᴴ over images. All attributes are on the CPU.
        mean_sum: (C,) float64, Σ z over images and positions.
        noise_sum: (C,) float64, Σ var over images and positions.
        count: number of images.
    """

    def __init__(self, channels: int, height: int, width: int):
        self.size = (height, width)
        self.sums = torch.zeros(2 * height, width + 1, channels, channels, dtype=torch.float64)
        self.mean_sum = torch.zeros(channels, dtype=torch.float64)
        self.noise_sum = torch.zeros(channels, dtype=torch.float64)
        self.count = 0

    def update(self, posterior: DiagonalGaussian) -> None:
        """Add the posteriors of a batch.

        Raises:
            InputError: for latents of another size.
        """
        z = posterior.mean.detach().cpu().double()
        if z.shape[2:] != self.size:
            raise InputError(
                f"got latents of {tuple(z.shape[2:])}; need {self.size}, as before; crop all images to one size"
            )
        mirrored = torch.cat([z, z.flip(3)], dim=3)
        transform = torch.fft.rfft2(torch.cat([mirrored, mirrored.flip(2)], dim=2))  # (B, C, 2h, w + 1)
        self.sums += torch.einsum("bcxy,bdxy->xycd", transform, transform.conj()).real
        self.mean_sum += z.sum(dim=(0, 2, 3))
        self.noise_sum += posterior.logvar.detach().cpu().double().exp().sum(dim=(0, 2, 3))
        self.count += len(z)

    @property
    def mean(self) -> Tensor:
        """(C,) float64."""
        return self.mean_sum / (self.count * math.prod(self.size))

    @property
    def density(self) -> Tensor:
        """S(f): (2h, w + 1, C, C) float64, symmetric; its mean over all 2h·2w frequencies is the covariance."""
        positions = math.prod(self.size)
        density = self.sums / (self.count * 4 * positions)
        density[0, 0] -= 4 * positions * torch.outer(self.mean, self.mean)  # a constant has frequency zero only
        return density + torch.diag(self.noise_sum / (self.count * positions))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Gaussian fields with this mean and spectrum: white noise filtered with S(f)^½, cropped to (h, w).

        Args:
            count: the number of samples.
            generator: the generator of the noise.

        Returns:
            (count, C, h, w) float32.
        """
        height, width = self.size
        power, vectors = torch.linalg.eigh(self.density)
        root = (vectors * power.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
        noise = torch.randn(count, len(self.mean), 2 * height, 2 * width, generator=generator, dtype=torch.float64)
        coloured = torch.einsum("xycd,bdxy->bcxy", root.to(torch.complex128), torch.fft.rfft2(noise))
        field = torch.fft.irfft2(coloured, s=noise.shape[2:])[..., :height, :width]
        return (field + self.mean[:, None, None]).float()


def neighbour_correlation(z: Tensor) -> float:
    """Correlation of a latent with its right and lower neighbours, averaged over channels.

    It is 0 for white noise and close to 1 for smooth fields. Each channel's mean over all images and positions is
    subtracted first.

    Args:
        z: (N, C, h, w).

    Raises:
        InputError: for latents with a single row or column.
    """
    if min(z.shape[2:]) < 2:
        raise InputError(f"got latents of {tuple(z.shape[2:])}; need at least 2 positions a side; raise the resolution")
    z = z.double() - z.double().mean(dim=(0, 2, 3), keepdim=True)
    over = (0, 2, 3)
    right, below = (z[..., 1:] * z[..., :-1]).mean(over), (z[..., 1:, :] * z[..., :-1, :]).mean(over)
    return float((0.5 * (right + below) / z.square().mean(over)).mean())
