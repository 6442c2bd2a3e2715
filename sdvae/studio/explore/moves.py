"""Moves in latent space: between two points, along a channel, and by a difference.

In tutorials on digits, the latent of an image is a single vector. Here the latents are a small picture, (c, H/8, W/8),
and the decoder is nearly local. So latents halfway between those of two photographs decode to both at once, much like
a cross-fade of pixels, and not to an object between the two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdvae.errors import InputError

OPPOSITE = 1e-5  # radians from 180 degrees; the direction of fp32 latents is precise to about 1e-7


def lerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """(1 - t) a + t b, the straight line.

    Args:
        a: a tensor of any shape.
        b: the same shape.
        t: (T,); 0 gives a, 1 gives b.

    Returns:
        (T, …).
    """
    t = t.to(a).view(-1, *[1] * a.ndim)
    return (1 - t) * a + t * b


def slerp(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """sin((1 - t) θ) / sin θ · a  +  sin(t θ) / sin θ · b, the arc of a circle around the origin.

    θ is the angle between a and b as flat vectors (Shoemake 1985, «Animating rotation with quaternion curves», for unit
    vectors; if the lengths differ, the length changes smoothly too). Samples of N(0, I) in many dimensions all have
    nearly the same length, and points on the straight line between two of them are shorter, by a factor of √2 halfway.
    The latents of a photograph are not such a sample.

    Args:
        a: a tensor of any shape; the result is computed in float64.
        b: the same shape.
        t: (T,); 0 gives a, 1 gives b.

    Returns:
        (T, …) in the dtype of a. Parallel vectors give the straight line, which is the limit.

    Raises:
        InputError: for zero vectors, vectors that are not finite, and opposite vectors, which have no single arc.
    """
    x, y, s = a.double().flatten(), b.double().flatten(), t.double()
    angle = angle_between(a, b)
    if angle > math.pi - OPPOSITE:
        raise InputError("got opposite vectors; need two that are not, for one arc between them; use lerp")
    if angle == 0:
        return lerp(a.double(), b.double(), s).to(a)
    weights = torch.stack([torch.sin((1 - s) * angle), torch.sin(s * angle)], dim=1) / math.sin(angle)  # (T, 2)
    return (weights @ torch.stack([x, y])).view(-1, *a.shape).to(a)


def angle_between(a: Tensor, b: Tensor) -> float:
    """The angle in radians, 0 … π.

    It is 2 atan2(|u - v|, |u + v|) of the unit vectors, which is precise for small angles, unlike acos(u · v).

    Raises:
        InputError: for a vector of zeros, or one with values that are not finite.
    """
    x, y = a.double().flatten(), b.double().flatten()
    lengths = float(x.norm()), float(y.norm())
    if not all(0 < length < math.inf for length in lengths):
        raise InputError(f"got vectors of lengths {lengths[0]:g} and {lengths[1]:g}; need finite ones, not 0; use lerp")
    u, v = x / lengths[0], y / lengths[1]
    return 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))


def analogy(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a - b + c: the difference of a and b, added to c (Mikolov et al. 2013 for words; Radford et al. 2016 for faces).

    Each position is computed separately, so the result is meaningful only for images that are aligned.

    Args:
        a: (…, C, h, w).
        b: the same shape.
        c: the same shape.
    """
    return a - b + c


def mean_analogy(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """c + mean(a) - mean(b), with each channel's mean over all positions. It changes colours and keeps objects."""
    over = (-2, -1)
    return c + a.mean(over, keepdim=True) - b.mean(over, keepdim=True)


def traverse(z: Tensor, std: Tensor, reach: Tensor) -> Tensor:
    """z + k · std_c · e_c: channel c moved by k of its standard deviations, by the same amount at every position.

    Higgins et al. 2017, «beta-VAE», traverse a latent dimension, which is one number of an image. Here a channel is
    traversed, and a move that is the same at every position keeps the content of the picture.

    Args:
        z: (C, h, w).
        std: (C,), such as LatentMoments.channel_std.
        reach: (K,), the values of k.

    Returns:
        (C, K, C, h, w): whole latents for each channel and each k.
    """
    channels = z.shape[0]
    moves = torch.einsum("c,k,cd->ckd", std.to(z), reach.to(z), torch.eye(channels).to(z))
    return z + moves[..., None, None]
