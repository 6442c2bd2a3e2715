"""Images to tensors and back, and the crops and colour changes of training and evaluation."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from PIL.Image import Resampling, Transpose
from torch import Tensor

from sdvae.data.reading import MODES
from sdvae.errors import InputError

# Pillow antialiases when it shrinks. Bicubic rings less than Lanczos, and an autoencoder learns to draw rings.
RESAMPLING = Resampling.BICUBIC


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an "RGB", "L" or "RGBA" image to a contiguous (C, H, W) float32 tensor; 0 becomes -1, 255 becomes 1."""
    pixels = torch.from_numpy(np.array(image))  # (H, W, C) or (H, W) uint8
    pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_image(tensor: Tensor) -> Image.Image:
    """Convert a tensor to an "L", "RGB" or "RGBA" image.

    Args:
        tensor: (C, H, W) float in [-1, 1], C in {1, 3, 4}. Values outside are clamped.

    Returns:
        The image, each value rounded to the nearest of 0..255.

    Raises:
        InputError: for another shape, or NaN, which has no colour.
    """
    if tensor.ndim != 3 or tensor.shape[0] not in MODES:
        raise InputError(f"image tensor has shape {tuple(tensor.shape)}; need (C, H, W) with C 1, 3 or 4")
    tensor = tensor.detach().float().cpu()
    if tensor.isnan().any():
        raise InputError("image tensor holds NaN; need numbers, look for what overflowed before this point")
    pixels = tensor.add(1.0).mul_(127.5).clamp_(0.0, 255.0).round_().to(torch.uint8)
    pixels = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Cut out the largest centred square and resize it to size x size with antialiasing, as evaluation does.

    This is the same as resizing the short side to `size` and cropping the middle, except that both axes are scaled by
    exactly the same factor. An image whose short side is `size` already keeps its pixels.
    """
    return cover(image, size, size)


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre crop of ADM (Dhariwal & Nichol 2021), with which ImageNet figures at 256x256 are published.

    A box filter halves the image while its short side is at least twice `size`; then the short side is resized to
    `size` (bicubic) and the middle is cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Cut out the largest centred part of this aspect ratio and resize it to width x height with antialiasing."""
    return image.resize((width, height), RESAMPLING, box=cover_box(image.size, width, height))


def cover_box(size: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """The part that `cover` cuts out.

    Args:
        size: (width, height) of the image.
        width: width of the result, in pixels.
        height: height of the result, in pixels.

    Returns:
        (left, top, right, bottom) in whole pixels of the image.
    """
    w, h = size
    box_w = min(w, max(1, round(h * width / height)))
    box_h = min(h, max(1, round(w * height / width)))
    left, top = (w - box_w) // 2, (h - box_h) // 2
    return left, top, left + box_w, top + box_h


def random_crop(
    image: Image.Image,
    size: int,
    generator: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    flip: float = 0.5,
    native: float = 0.0,
) -> Image.Image:
    """Cut out a random square, resize it to size x size with antialiasing, and perhaps mirror it.

    Args:
        image: "RGB", "L" or "RGBA". Pillow resizes colours multiplied by alpha, so hidden ones do not spread.
        size: side of the result, in pixels.
        generator: the random generator; four numbers are drawn from it, and a fifth if `native` is above 0.
        scale: the range of the square's side as a fraction of the short side, from which it is drawn uniformly. The
            side is at least `size` pixels if the image has them, so that nothing is enlarged. All places in the image
            are equally likely.
        flip: the probability of a left-right mirror image.
        native: the probability that the square has `size` pixels, so that nothing is resized (unless the image is
            smaller).

    Returns:
        An image of the same mode.
    """
    width, height = image.size
    short = min(width, height)
    u_side, u_left, u_top, u_flip = generator.random(4)
    side = round(short * (scale[0] + (scale[1] - scale[0]) * u_side))
    if native > 0 and generator.random() < native:
        side = size
    side = min(max(side, size, 1), short)
    left, top = int(u_left * (width - side + 1)), int(u_top * (height - side + 1))
    crop = image.resize((size, size), RESAMPLING, box=(left, top, left + side, top + side))
    return crop.transpose(Transpose.FLIP_LEFT_RIGHT) if u_flip < flip else crop


def color_jitter(image: Tensor, strength: float, generator: np.random.Generator) -> Tensor:
    """Change brightness, contrast and saturation at random, and sometimes the order of the colours. Alpha stays.

    With values in [0, 1], brightness multiplies them, contrast multiplies their distance from the mean luma, and
    saturation their distance from each pixel's luma. Each factor is uniform in 1 ± `strength`. Then the channels get a
    random order with probability `strength`, and the result is clamped.

    torchvision's `adjust_brightness`, `adjust_contrast` and `adjust_saturation` clamp after each step and weigh luma
    differently. With them pixels, and so the losses of training, would be different.

    Args:
        image: (C, H, W) float in [-1, 1], C in {1, 3, 4}; grey has no saturation and no order of channels.
        strength: a number in [0, 1]; 0 returns the image itself.
        generator: the random generator; four numbers and a permutation are drawn, or nothing if `strength` is 0.

    Returns:
        A new (C, H, W) tensor in [-1, 1].

    Raises:
        InputError: when `strength` is outside [0, 1].
    """
    if not 0.0 <= strength <= 1.0:
        raise InputError(f"color jitter has strength {strength}; need a number in [0, 1]")
    if strength == 0.0:
        return image
    brightness, contrast, saturation = 1.0 + strength * (2.0 * generator.random(3) - 1.0)
    permute = generator.random() < strength
    order = generator.permutation(3)

    x = (image[:3] + 1.0).mul_(0.5 * brightness)
    mean = _luma(x).mean()
    x = (x - mean).mul_(contrast).add_(mean)
    if len(x) == 3:
        luma = _luma(x)
        x = (x - luma).mul_(saturation).add_(luma)
        if permute:
            x = x[torch.from_numpy(order)]
    return torch.cat([x.mul_(2.0).sub_(1.0).clamp_(-1.0, 1.0), image[3:]])


def _luma(x: Tensor) -> Tensor:
    """The luma (1, H, W) of (3, H, W) or (1, H, W), with the weights of ITU-R 601-2, as in Pillow's "L"."""
    return x if len(x) == 1 else 0.299 * x[:1] + 0.587 * x[1:2] + 0.114 * x[2:]
