"""Differentiable augmentation of what a discriminator sees, so that it does not learn a small data set by heart.

Zhao et al. 2020, «Differentiable Augmentation for Data-Efficient GAN Training» (arXiv 2006.10738), section 3 and
appendix: real and fake images are changed at random before they are scored, and gradients reach the decoder through
the change. Each image is changed by itself, from a seed of its own, so that the result does not depend on its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.noise import generators_for

SHIFT = 1 / 8  # the largest shift along a side, as a part of it
CUTOUT = 1 / 2  # the side of the square that is cut out, as a part of the image's


def augmented(images: Tensor, kinds: Sequence[str], noise_seeds: Tensor, draw: str) -> Tensor:
    """Images, each changed at random.

    Args:
        images: (B, C, H, W) in [-1, 1].
        kinds: what to do, in this order: «color» (brightness, saturation, contrast; not of alpha), «translation» (a
            shift, with zeros behind it), «cutout» (zeros in a square).
        noise_seeds: (B,) int64, one seed for each image.
        draw: «generator», «real» or «fake», the three times that an image is changed in a step; the same seed gives
            other numbers for each.

    Returns:
        The same shape and dtype; the images themselves if `kinds` is empty.
    """
    if not kinds:
        return images
    generators = generators_for(noise_seeds, f"augment {draw}")
    changes = {"color": _color, "translation": _translation, "cutout": _cutout}
    for kind in kinds:
        images = changes[kind](images, generators)
    return images


def _color(images: Tensor, generators: list[torch.Generator]) -> Tensor:
    drawn = torch.stack([torch.rand(3, generator=generator) for generator in generators])
    brightness, saturation, contrast = drawn.to(images, non_blocking=True)[:, :, None, None, None].unbind(1)
    colours, alpha = images[:, :3], images[:, 3:]
    colours = colours + (brightness - 0.5)
    grey = colours.mean(1, keepdim=True)
    colours = (colours - grey) * (2 * saturation) + grey
    mean = colours.mean((1, 2, 3), keepdim=True)
    return torch.cat([(colours - mean) * (contrast + 0.5) + mean, alpha], dim=1)


def _translation(images: Tensor, generators: list[torch.Generator]) -> Tensor:
    height, width = images.shape[2:]
    furthest = [int(side * SHIFT + 0.5) for side in (height, width)]
    shifted = []
    for image, generator in zip(images, generators, strict=True):
        down, right = (_integer(-most, most, generator) for most in furthest)
        # padding by a negative number cuts away
        shifted.append(F.pad(image, (right, -right, down, -down)))
    return torch.stack(shifted)


def _cutout(images: Tensor, generators: list[torch.Generator]) -> Tensor:
    height, width = images.shape[2:]
    kept = torch.ones(len(images), 1, height, width)
    for mask, generator in zip(kept, generators, strict=True):
        rows, columns = (_hole(side, generator) for side in (height, width))
        mask[:, rows, columns] = 0
    return images * kept.to(images, non_blocking=True)


def _hole(side: int, generator: torch.Generator) -> slice:
    """The part of a side that is cut out. Its centre may be anywhere, so that less than CUTOUT may be inside."""
    size = int(side * CUTOUT + 0.5)
    start = _integer(0, side - 1 + (1 - size % 2), generator) - size // 2
    return slice(max(0, start), max(0, start + size))


def _integer(low: int, high: int, generator: torch.Generator) -> int:
    """A random integer of low … high."""
    return int(torch.randint(low, high + 1, (), generator=generator))
