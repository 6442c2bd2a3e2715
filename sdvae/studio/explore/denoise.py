"""Adding noise, and a blur, with which denoising by a round trip through the latents is compared."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

BLURS = tuple(0.3 * 1.25**i for i in range(12))  # std of the kernel in pixels: 0.3, 0.375, … 3.5


def add_noise(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Add white Gaussian noise, and clamp to the range of a picture file.

    Args:
        images: (N, C, H, W) in [-1, 1].
        sigma: standard deviation in levels of 0..255, as usual in the literature on denoising.
        generator: the generator of the noise.

    Returns:
        (N, C, H, W) in [-1, 1].
    """
    noise = torch.randn(images.shape, generator=generator)
    return (images + sigma / 127.5 * noise.to(images)).clamp(-1, 1)


def blur(images: Tensor, sigma: float) -> Tensor:
    """Blur with a Gaussian, (N, C, H, W) -> (N, C, H, W). Borders are mirrored.

    Args:
        images: images whose sides are longer than 3.5 sigma.
        sigma: standard deviation in pixels; the kernel ends at 3.5 sigma.
    """
    return gaussian_blur(images, 2 * [2 * math.ceil(3.5 * sigma) + 1], 2 * [sigma])
