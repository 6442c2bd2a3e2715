"""What to decode when there is no photograph: three distributions to draw latents from.

A tutorial's VAE is sampled from its prior N(0, I), because its KL term has a weight of one and holds the latents of
all images together, the aggregate posterior q(z) = E_x q(z|x), near to it. Stable Diffusion's has a weight of 1e-6:
q(z) is wider than the prior and its positions depend on each other, and samples from the prior are in no place that
the decoder has seen. Hoffman & Johnson 2016, «ELBO surgery»: the KL of the ELBO is I(x; z) + KL(q(z) || p(z)), so a
latent that says much of its image has to pay for it in either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdvae.errors import InputError
from sdvae.model import DiagonalGaussian
from sdvae.statistics import LatentMoments


def sample_moments(moments: LatentMoments, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """N(mean_c, std_c²) at each position on its own: the scale of the data's latents and nothing else of them.

    Args: moments: of C channels. size: (N, h, w).

    Returns: (N, C, h, w) float32.
    """
    count, height, width = size
    noise = torch.randn(count, len(moments.channel_std), height, width, generator=generator)
    return moments.channel_mean.float()[:, None, None] + moments.channel_std.float()[:, None, None] * noise


def gaussian_kl(moments: LatentMoments) -> Tensor:
    """KL(N(mean_c, std_c²) || N(0, 1)) of each channel in nats, (C,): ½ (mean² + std² - 1 - log std²).

    A lower bound of KL(q(z) || p(z)) for each element, whatever else q(z) is like: of all distributions with this mean
    and variance the Gaussian is the nearest to N(0, 1), and elements that know of each other are farther from it.
    """
    variance = moments.channel_std.square()
    return 0.5 * (moments.channel_mean.square() + variance - 1 - variance.log())


class LatentSpectrum:
    """Mean and cross-spectral density of latents of one size: which channels vary together, at which frequencies.

    S(f) = E[ẑ(f) ẑ(f)ᴴ] / (4·h·w), a C×C matrix for each frequency f of the Fourier transform ẑ of z - mean. It holds
    the covariance between any two channels at any distance, of latents that are alike everywhere (the Wiener-Khinchin
    theorem). The transform takes an image for periodic, so z is mirrored first, to (2h, 2w): its borders then meet
    their own likes, where a photograph's left and right would meet in an edge that is not there. Mirrored images make
    S real, one diagonal direction as frequent as the other, and neighbours a little more alike, since one pair in h
    is a latent beside itself. The posterior's variance is white, and adds to the diagonal.

    Args: channels, height, width: C, h, w of the latents.

    Attributes:
        sums: (2h, w + 1, C, C) float64: Σ ẑ ẑᴴ over images. mean_sum, noise_sum: (C,) float64, Σ z and Σ var over
            images and positions. count: of images. All on the CPU.
    """

    def __init__(self, channels: int, height: int, width: int):
        self.size = (height, width)
        self.sums = torch.zeros(2 * height, width + 1, channels, channels, dtype=torch.float64)
        self.mean_sum = torch.zeros(channels, dtype=torch.float64)
        self.noise_sum = torch.zeros(channels, dtype=torch.float64)
        self.count = 0

    def update(self, posterior: DiagonalGaussian) -> None:
        """Raises: InputError for latents of another size."""
        z = posterior.mean.detach().cpu().double()
        if z.shape[2:] != self.size:
            raise InputError(f"got latents of {tuple(z.shape[2:])}; need {self.size}, as those before; crop alike")
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
        density[0, 0] -= 4 * positions * torch.outer(self.mean, self.mean)  # a constant has frequency zero alone
        return density + torch.diag(self.noise_sum / (self.count * positions))

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Gaussian fields with this mean and spectrum: white noise through the filter S(f)^½, cut to h·w.

        Returns: (count, C, h, w) float32.
        """
        height, width = self.size
        power, vectors = torch.linalg.eigh(self.density)
        root = (vectors * power.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT
        noise = torch.randn(count, len(self.mean), 2 * height, 2 * width, generator=generator, dtype=torch.float64)
        coloured = torch.einsum("xycd,bdxy->bcxy", root.to(torch.complex128), torch.fft.rfft2(noise))
        field = torch.fft.irfft2(coloured, s=noise.shape[2:])[..., :height, :width]
        return (field + self.mean[:, None, None]).float()


def neighbour_correlation(z: Tensor) -> float:
    """Correlation of a latent with the next one to the right or below: (N, C, h, w), the mean over channels.

    Each channel less its mean over all images and positions. 0 for white noise, near 1 for smooth fields.
    Raises: InputError for latents of a single position, which have no neighbours.
    """
    if min(z.shape[2:]) < 2:
        raise InputError(f"got latents of {tuple(z.shape[2:])}; need at least 2 positions a side; raise the resolution")
    z = z.double() - z.double().mean(dim=(0, 2, 3), keepdim=True)
    over = (0, 2, 3)
    right, below = (z[..., 1:] * z[..., :-1]).mean(over), (z[..., 1:, :] * z[..., :-1, :]).mean(over)
    return float((0.5 * (right + below) / z.square().mean(over)).mean())
