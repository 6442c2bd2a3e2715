"""Does the way through the latents take noise away? Beside what a blur does."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

BLURS = tuple(0.3 * 1.25**i for i in range(12))  # pixels, std of the kernel: 0.3, 0.375, … 3.5


def add_noise(images: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """White Gaussian noise, clamped to the range that a picture file can hold.

    Args: images: (N, C, H, W) in [-1, 1]. sigma: its standard deviation in levels of 0..255, as the literature on
        denoising has it.
    """
    noise = torch.randn(images.shape, generator=generator)
    return (images + sigma / 127.5 * noise.to(images)).clamp(-1, 1)


def blur(images: Tensor, sigma: float) -> Tensor:
    """(N, C, H, W) -> the same, by a Gaussian of `sigma` pixels, cut off at 3.5 of them; the border is mirrored."""
    return gaussian_blur(images, 2 * [2 * math.ceil(3.5 * sigma) + 1], 2 * [sigma])
