"""Reconstruction errors as a sign of defects in an image.

An autoencoder that was trained only on flawless parts cannot reconstruct a scratch, so the difference shows the scratch
(Bergmann et al. 2019, «Improving Unsupervised Defect Segmentation by Applying Structural Similarity to Autoencoders»).
This needs an autoencoder whose training images are all alike. A VAE for Stable Diffusion is trained to reconstruct
anything, including defects.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.errors import InputError
from sdvae.model import DiagonalGaussian

DEFECTS = ("scratch", "speckle", "patch")
WINDOW = 8  # pixels a side of the local error: one position of f8 latents
PATCHES = 8  # places to choose from for a copied patch
ERROR_RANGE = (1e-12, 4.0)  # the range of squared errors of values in [-1, 1]
ERROR_BINS = 4096


def error_map(images: Tensor, reconstructions: Tensor) -> Tensor:
    """The squared error, averaged over channels.

    Args:
        images: (N, C, H, W) in [-1, 1].
        reconstructions: the same shape.

    Returns:
        (N, H, W).
    """
    return (images - reconstructions).square().mean(dim=1)


def anomaly_scores(images: Tensor, reconstructions: Tensor, posterior: DiagonalGaussian) -> dict[str, Tensor]:
    """Three scores of each image, which are higher for images that are unlike the VAE's training images.

    Args:
        images: (N, C, H, W) in [-1, 1].
        reconstructions: the same shape.
        posterior: the posterior of the images.

    Returns:
        (N,) each: `mse`, the mean squared error; `local`, the largest mean squared error in any 8×8 pixels, which
        finds small defects in large images; and `kl`, KL(q(z|x) || N(0, I)) in nats divided by C·H·W, which depends
        on the encoder only.
    """
    errors = error_map(images, reconstructions)
    window = min(WINDOW, *errors.shape[1:])
    return {
        "mse": errors.mean(dim=(1, 2)),
        "local": F.avg_pool2d(errors[:, None], window, stride=1).amax(dim=(1, 2, 3)),
        "kl": posterior.kl() / images[0].numel(),
    }


def auroc(normal: Tensor, anomalous: Tensor) -> float:
    """The probability that an anomaly scores higher than a normal image, a tie counted as half.

    Args:
        normal: (N,) scores, of any scale.
        anomalous: (M,) scores.

    Raises:
        InputError: when one of them is empty, or a score is not finite.
    """
    scores = torch.cat([normal.flatten(), anomalous.flatten()]).double()
    if not normal.numel() or not anomalous.numel() or not scores.isfinite().all():
        raise InputError(
            f"got {normal.numel()} normal and {anomalous.numel()} anomalous scores, or some not finite; "
            "need one of each, all finite"
        )
    levels, ranks = scores.unique(return_inverse=True)  # equal scores have equal ranks
    counts = (group.bincount(minlength=len(levels)) for group in ranks.split([normal.numel(), anomalous.numel()]))
    return auroc_of_counts(*counts)


def count_errors(errors: Tensor) -> Tensor:
    """A histogram of values of `error_map`, for `auroc_of_counts`.

    It needs much less memory than the errors of all pixels of many images, and histograms can be added. Its bins are
    equally wide in the logarithm of the error; each covers 0.7 % of an error. The outermost bins also hold the errors
    outside ERROR_RANGE. torchmetrics' binned AUROC compares every pixel with every threshold, which is far slower.

    Args:
        errors: a tensor of any shape.

    Returns:
        (ERROR_BINS,) int64.
    """
    low, high = (math.log(end) for end in ERROR_RANGE)
    places = (errors.flatten().double().log() - low) / (high - low) * ERROR_BINS  # -inf for an error of 0
    return places.clamp(0, ERROR_BINS - 1).long().bincount(minlength=ERROR_BINS)


def auroc_of_counts(normal: Tensor, anomalous: Tensor) -> float:
    """`auroc` from two histograms with the same bins, neither of them empty; values in a bin count as equal."""
    normal, anomalous = normal.double(), anomalous.double()
    below = normal.cumsum(0) - normal / 2
    return float((anomalous * below).sum() / (normal.sum() * anomalous.sum()))


def add_defect(image: Tensor, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Give an image a defect at a random place.

    A «scratch» is a straight line, a third of the side long and 1/128 of it thick (2 pixels at 256), in black or white,
    whichever differs more from the image. A «speckle» is a square, a tenth of the side wide, of random values. A
    «patch» is a square, a quarter of the side wide, copied from elsewhere in the image (CutPaste, Li et al. 2021): of
    eight places the one that differs most from what it covers, since black sky pasted on black sky is not a defect.

    Args:
        image: (C, H, W) in [-1, 1].
        kind: one of DEFECTS.
        generator: the generator of the place and the values.

    Returns:
        The image, and (H, W) bool: where a value changed.

    Raises:
        InputError: for another kind.
    """
    if kind not in DEFECTS:
        raise InputError(f"got defect {kind!r}; need one of {', '.join(DEFECTS)}")
    _, height, width = image.shape
    side = min(height, width)

    def place(size: int) -> tuple[slice, slice]:
        top = int(torch.randint(height - size + 1, (), generator=generator))
        left = int(torch.randint(width - size + 1, (), generator=generator))
        return slice(top, top + size), slice(left, left + size)

    damaged = image.clone()
    if kind == "scratch":
        line = _line(height, width, max(1.0, side / 128), generator)
        colour = -1.0 if float(image[:, line].mean()) > 0 else 1.0
        damaged[:, line] = colour
    elif kind == "speckle":
        rows, columns = place(max(2, side // 10))
        noise = torch.rand(damaged[:, rows, columns].shape, generator=generator)
        damaged[:, rows, columns] = 2 * noise.to(image) - 1
    else:
        size = max(2, side // 4)
        rows, columns = place(size)
        covered = image[:, rows, columns]
        others = [image[:, y, x] for y, x in (place(size) for _ in range(PATCHES))]
        damaged[:, rows, columns] = max(others, key=lambda other: float((other - covered).square().sum()))
    return damaged, (damaged != image).any(dim=0)


def _line(height: int, width: int, thickness: float, generator: torch.Generator) -> Tensor:
    """(H, W) bool: a stroke as long as a third of the shorter side, at a random place and angle."""
    length = min(height, width) / 3
    angle, u, v = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    direction = torch.tensor([torch.pi * angle], dtype=torch.float64)
    dy, dx = float(direction.sin()), float(direction.cos())  # dy >= 0
    top = u * (height - 1 - length * dy)
    left = v * (width - 1 - length * abs(dx)) + (length * -dx if dx < 0 else 0.0)
    y = torch.arange(height, dtype=torch.float64)[:, None] - top
    x = torch.arange(width, dtype=torch.float64)[None] - left
    along, across = y * dy + x * dx, x * dy - y * dx
    return (along >= 0) & (along <= length) & (across.abs() <= max(thickness / 2, 0.75))  # 0.75: no gaps
