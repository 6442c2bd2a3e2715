"""Images with transparency, (B, 4, H, W): straight red, green, blue, and alpha, all in [-1, 1]; alpha 1 is opaque.

Straight means that colours are not multiplied by alpha, as in PNG files. What is transparent has a colour too, which
nobody sees, so images are compared as they are seen: over a background, beside their alpha. Every function here returns
images of other numbers of channels as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdvae.noise import generators_for

GREY = 0.0  # the background on which figures are measured, since neither white nor black things vanish on it
SQUARE = 8  # pixels, the side of the squares behind drawn images
LIGHT, DARK = 1.0, 0.6  # of these squares


def as_seen(images: Tensor, background: Tensor | float = GREY) -> Tensor:
    """Images as they are seen over a background, and their alpha.

    Args:
        images: (B, C, H, W). Only those of four channels change.
        background: a colour in [-1, 1], (B, 3, 1, 1) or a number, or images (3, H, W).

    Returns:
        (B, 4, H, W): alpha · colour + (1 - alpha) · background with alpha from 0 to 1, which is the «over» of Porter &
        Duff 1984; and alpha as it was. Values outside of [-1, 1] are not clamped, so that they have gradients.
    """
    if images.shape[1] != 4:
        return images
    opacity = (images[:, 3:] + 1) / 2
    return torch.cat([opacity * images[:, :3] + (1 - opacity) * background, images[:, 3:]], dim=1)


def colours(images: Tensor) -> Tensor:
    """(B, 4, H, W) -> (B, 3, H, W), without alpha."""
    return images[:, :3] if images.shape[1] == 4 else images


def random_backgrounds(images: Tensor, seeds: Tensor) -> Tensor | float:
    """A colour for each image, uniform in [-1, 1]³, which its seed alone determines.

    Args:
        images: (B, C, H, W), whose device and dtype the colours get.
        seeds: (B,) int64, such as those of the posterior's noise.

    Returns:
        (B, 3, 1, 1); a number if the images have no alpha.
    """
    if images.shape[1] != 4:
        return GREY
    drawn = torch.stack([torch.rand(3, generator=own) for own in generators_for(seeds, "background")])
    return (2 * drawn - 1)[:, :, None, None].to(images)


def drawn(images: Tensor) -> Tensor:
    """(B, 4, H, W) -> (B, 3, H, W) over a board of light and dark squares, clamped, as programs show transparency."""
    if images.shape[1] != 4:
        return images
    rows, columns = (torch.arange(side, device=images.device) // SQUARE for side in images.shape[2:])
    board = torch.where((rows[:, None] + columns) % 2 == 0, LIGHT, DARK).to(images)
    return colours(as_seen(images.clamp(-1, 1), board))
