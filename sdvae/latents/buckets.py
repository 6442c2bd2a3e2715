"""The sizes to which images are cropped and resized: one square, or aspect-ratio buckets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdvae.data import cover_box
from sdvae.errors import InputError
from sdvae.latents.config import EncodeConfig

Size = tuple[int, int]  # height, width, in pixels

# Podell et al. 2023, «SDXL», appendix I: height x width, about 1024² pixels each. Each stands for both orientations.
SDXL_SIDE = 1024
SDXL_PORTRAITS: tuple[Size, ...] = (
    *((2048, 512), (1984, 512), (1920, 512), (1856, 512), (1792, 576), (1728, 576), (1664, 576)),
    *((1600, 640), (1536, 640), (1472, 704), (1408, 704), (1344, 704), (1344, 768), (1280, 768)),
    *((1216, 832), (1152, 832), (1152, 896), (1088, 896), (1088, 960), (1024, 960), (1024, 1024)),
)


@dataclass(frozen=True)
class Placement:
    """The size and the crop of one image. Pairs are (height, width) and (top, left), as in SDXL's conditioning."""

    target_size: Size
    crop_top_left: Size  # in pixels of the resized image


def bucket_sizes(config: EncodeConfig, resolution: int, multiple: int) -> tuple[Size, ...]:
    """All sizes to which images are cropped and resized.

    Args:
        config: the options.
        resolution: one of the resolutions, in pixels.
        multiple: the VAE's compression ratio, of which each side must be a multiple.

    Returns:
        (height, width) in pixels, in ascending order.

    Raises:
        InputError: when a side is not such a multiple.
    """
    if config.buckets == "none":
        sizes = {(resolution, resolution)}
        fix = f"choose resolution {max(multiple, resolution // multiple * multiple)}"
    elif config.buckets == "sdxl":
        both = {*SDXL_PORTRAITS, *((w, h) for h, w in SDXL_PORTRAITS)}
        scaled = {(h * resolution, w * resolution) for h, w in both}
        if any(h % SDXL_SIDE or w % SDXL_SIDE for h, w in scaled):
            step = SDXL_SIDE // 64
            raise InputError(f"got resolution={resolution} for SDXL's buckets; need a multiple of {step}")
        sizes = {(h // SDXL_SIDE, w // SDXL_SIDE) for h, w in scaled}
        fix = f"choose a resolution that is a multiple of {SDXL_SIDE // 64 * multiple}"
    else:
        sizes = _sizes_of_area(resolution, config.bucket_step, config.max_aspect)
        fix = f"choose a resolution and a bucket_step that are multiples of {multiple}"
    for height, width in sorted(sizes):
        if height % multiple or width % multiple:
            raise InputError(
                f"got images of {height} x {width}; need multiples of {multiple}, the VAE's compression ratio; {fix}"
            )
    return tuple(sorted(sizes))


def place(size: Size, sizes: Sequence[Size]) -> Placement:
    """The size with the nearest aspect ratio, and the place where `cover` cuts it out of the image.

    Ratios are compared by their logarithm, so that both orientations are treated alike.

    Args:
        size: (height, width) of the image.
        sizes: the sizes to choose from.
    """
    height, width = size
    aspect = math.log(width / height)
    target = min(sizes, key=lambda s: (abs(math.log(s[1] / s[0]) - aspect), -s[0] * s[1], s))
    left, top, right, bottom = cover_box((width, height), target[1], target[0])
    scale_y, scale_x = target[0] / (bottom - top), target[1] / (right - left)
    return Placement(target, (round(top * scale_y), round(left * scale_x)))


def _sizes_of_area(resolution: int, step: int, max_aspect: float) -> set[Size]:
    """The sizes of the area buckets.

    They are the square; for each smaller width the greatest height with at most the square's area; and the same sizes
    with width and height swapped.
    """
    if resolution % step:
        raise InputError(f"got resolution={resolution}, bucket_step={step}; need a resolution that the step divides")
    sizes = {(resolution, resolution)}
    for width in range(step, resolution + 1, step):
        height = resolution * resolution // width // step * step
        if height / width <= max_aspect:
            sizes |= {(height, width), (width, height)}
    return sizes
