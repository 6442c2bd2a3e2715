"""Images whose sides are not multiples of the compression ratio: pad, then crop back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until both sides are multiples of `multiple`.

    (B, C, H, W) -> (B, C, ⌈H/m⌉·m, ⌈W/m⌉·m). The original stands in the top left corner, so
    `crop_to(reconstruction, H, W)` undoes it. A repeated edge, unlike zeros, adds no new contrast.
    """
    height, width = images.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def crop_to(images: Tensor, height: int, width: int) -> Tensor:
    """The top left `height` x `width` pixels: undoes `pad_to_multiple`."""
    return images[..., :height, :width]
