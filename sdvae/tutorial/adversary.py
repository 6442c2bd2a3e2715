"""The adversarial autoencoder's second player (Makhzani et al. 2016): it tells latents from draws of the prior."""

from __future__ import annotations

from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from sdvae.noise import posterior_generators

SLOPE = 0.2  # of the leaky ReLUs


class LatentDiscriminator(nn.Module):
    """All latents of an image -> `layers` of `width` units -> one logit: above zero means «from the prior».

    (B, C_z, h, w) -> (B, 1).
    """

    def __init__(self, latents: int, layers: int = 3, width: int = 64):
        super().__init__()
        blocks: list[nn.Module] = [nn.Flatten()]
        for before in [latents, *[width] * (layers - 1)]:
            blocks += [nn.Linear(before, width), nn.LeakyReLU(SLOPE)]
        self.layers = nn.Sequential(*blocks, nn.Linear(width, 1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents)


def prior_samples(like: Tensor, noise_seeds: Tensor) -> Tensor:
    """z ~ N(0, I) in the shape of `like`, (B, C_z, h, w); each image has its own, other than its posterior's noise."""
    return randn_tensor(like.shape, posterior_generators(~noise_seeds), like.device, like.dtype)
