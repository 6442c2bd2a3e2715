"""The geometry of a set of latents: nearest neighbours, the way between them, intrinsic dimension, entropy."""

from __future__ import annotations

import math

import torch
from scipy.stats import differential_entropy
from torch import Tensor

from sdvae.errors import InputError

KEPT = 0.9  # share of the ratios that the fit of `two_nn` uses; Facco et al. 2017, «Methods»
SMALLEST_TWO_NN = 10  # points
SAME_ANGLE = 1e-6  # sine below which `slerp` is linear
CHUNK = 512  # rows of the matrix of distances that are held at a time


def nearest_neighbours(latents: Tensor) -> Tensor:
    """For each image the other one whose latents have the greatest cosine similarity.

    Args:
        latents: (N, C, h, w), scaled for a diffusion model.

    Returns:
        (N,) int64.

    Raises:
        InputError: for fewer than two images.
    """
    if len(latents) < 2:
        raise InputError(f"got {len(latents)} image; need at least 2 for a nearest neighbour; choose more images")
    unit = torch.nn.functional.normalize(latents.flatten(1).double(), dim=1)
    found = []
    for start in range(0, len(unit), CHUNK):
        similarity = unit[start : start + CHUNK] @ unit.T
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -math.inf
        found.append(similarity.argmax(dim=1))
    return torch.cat(found)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """The point at t, from 0 to 1, on the arc from each a to its b (Shoemake 1985); a straight line if it is flat.

    Args:
        a: (N, C, h, w).
        b: the same shape.
        t: 0 gives a, 1 gives b.
    """
    x, y = a.flatten(1), b.flatten(1)
    cosine = torch.nn.functional.cosine_similarity(x, y, dim=1)
    angle = cosine.clamp(-1, 1).acos()[:, None]
    flat = angle.sin() < SAME_ANGLE
    sine = angle.sin().where(~flat, 1.0)
    before = (((1 - t) * angle).sin() / sine).where(~flat, 1 - t)
    after = ((t * angle).sin() / sine).where(~flat, t)
    return (before * x + after * y).view_as(a)


def two_nn(points: Tensor) -> float:
    """Intrinsic dimension from the distances to the two nearest neighbours.

    Facco et al. 2017, «Estimating the intrinsic dimension of datasets by a minimal neighborhood information»: the ratio
    µ of the second distance to the first has the distribution F(µ) = 1 - µ^-d, so -log(1 - F) against log µ is a line
    through the origin with slope d. The largest tenth of the ratios is left out, as there. With few points a high
    dimension comes out too low.

    Args:
        points: (N, D), from at least SMALLEST_TWO_NN different points. Copies of a point count once.

    Raises:
        InputError: for fewer points.
    """
    points = torch.unique(points.double(), dim=0)
    if len(points) < SMALLEST_TWO_NN:
        raise InputError(
            f"got {len(points)} different latents; need at least {SMALLEST_TWO_NN} for their intrinsic dimension; "
            "choose more images"
        )
    points = points - points.mean(dim=0)
    squares = points.square().sum(dim=1)
    ratios = []
    for start in range(0, len(points), CHUNK):
        rows = points[start : start + CHUNK]
        distance = squares[start : start + CHUNK, None] + squares - 2 * rows @ points.T
        index = torch.arange(len(rows))
        distance[index, start + index] = math.inf
        first, second = distance.topk(2, dim=1, largest=False).values.clamp(min=torch.finfo(distance.dtype).tiny).T
        ratios.append(0.5 * (second / first).log())
    x = torch.cat(ratios).sort().values[: int(KEPT * len(points))]
    y = -torch.log1p(-torch.arange(1, len(x) + 1, dtype=torch.float64) / len(points))
    return float((x * y).sum() / x.square().sum())


def negentropy(values: Tensor) -> float:
    """How much less entropy values have than a Gaussian of their variance, in nats: 0 for a Gaussian, else more.

    ½ log(2πe·variance) minus the differential entropy, which is estimated from the gaps between every √N-th value in
    order (Vasicek 1976, «A test for normality based on sample entropy»).

    Args:
        values: (N,), not all equal.
    """
    values = values.double()
    gaussian = 0.5 * math.log(2 * math.pi * math.e * float(values.var(correction=0)))
    return gaussian - float(differential_entropy(values.numpy(), method="vasicek"))
