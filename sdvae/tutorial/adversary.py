"""The adversarial autoencoder's discriminator (Makhzani et al. 2016), which tells latents from draws of the prior."""

from __future__ import annotations

from torch import Tensor, nn

from sdvae.model import DiagonalGaussian
from sdvae.model.posterior import noise_like
from sdvae.noise import posterior_generators

SLOPE = 0.2  # slope of the leaky ReLUs below zero


class LatentDiscriminator(nn.Module):
    """An MLP with `layers` hidden layers of `width` units over all latents of an image.

    (B, C_z, h, w) -> (B, 1), a logit that is above zero for latents that seem to be drawn from the prior.
    """

    def __init__(self, latents: int, layers: int = 3, width: int = 64):
        super().__init__()
        blocks: list[nn.Module] = [nn.Flatten()]
        for before in [latents, *[width] * (layers - 1)]:
            blocks += [nn.Linear(before, width), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*blocks, nn.Linear(width, 1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents)


def posterior_and_prior_samples(posterior: DiagonalGaussian, noise_seeds: Tensor) -> tuple[Tensor, Tensor]:
    """The inputs of the discriminator: samples of the posterior, with gradients, and as many samples of the prior.

    Args:
        posterior: over (B, C_z, h, w).
        noise_seeds: (B,) int64, the seeds of the posterior's noise; they give the same samples in all other code.
    """
    z = posterior.sample(posterior_generators(noise_seeds))
    return z, prior_samples(z, noise_seeds)


def prior_samples(like: Tensor, noise_seeds: Tensor) -> Tensor:
    """z ~ N(0, I) in the shape of `like`, (B, C_z, h, w), from noise that is independent of the posterior's.

    Args:
        like: a tensor of the shape, device and dtype that the result gets.
        noise_seeds: (B,) int64, one for each image.
    """
    return noise_like(like, posterior_generators(~noise_seeds))
