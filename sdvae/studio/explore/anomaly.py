"""Reconstruction errors as a sign that something is wrong with an image.

An autoencoder that has only ever seen good parts cannot draw a scratch, so the scratch stays in the difference
(Bergmann et al. 2019, «Improving Unsupervised Defect Segmentation by Applying Structural Similarity to
Autoencoders», is the usual form). It takes an autoencoder with a narrow view of the world. A VAE for Stable Diffusion
is made to reconstruct anything, defects included.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from sdvae.errors import InputError
from sdvae.model import DiagonalGaussian

DEFECTS = ("scratch", "speckle", "patch")
WINDOW = 8  # pixels a side of the local error: one position of f8 latents
PATCHES = 8  # places to copy from
ERROR_RANGE = (1e-12, 4.0)  # of squared errors of values in [-1, 1]
ERROR_BINS = 4096


def error_map(images: Tensor, reconstructions: Tensor) -> Tensor:
    """(N, C, H, W) twice, in [-1, 1] -> (N, H, W): the squared error, its mean over the colours."""
    return (images - reconstructions).square().mean(dim=1)


def anomaly_scores(images: Tensor, reconstructions: Tensor, posterior: DiagonalGaussian) -> dict[str, Tensor]:
    """Three scores of each image, (N,) each; the higher, the stranger.

    mse: the mean squared error. local: the largest mean over any 8×8 pixels, which a small defect does not have to
    share with a large image. kl: KL(q(z|x) || N(0, I)) in nats divided by C·H·W, what the encoder alone says.
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

    Args: normal, anomalous: (N,) and (M,) scores of any scale: torchmetrics takes what leaves [0, 1] for logits and
        rounds it together by a sigmoid, so it is given their ranks.

    Raises: InputError when one of them is empty, or a score is not finite.
    """
    scores = torch.cat([normal.flatten(), anomalous.flatten()]).double()
    if not normal.numel() or not anomalous.numel() or not scores.isfinite().all():
        raise InputError(
            f"got {normal.numel()} normal and {anomalous.numel()} anomalous scores, or some not finite; "
            "need one of each, all finite"
        )
    levels, ranks = scores.unique(return_inverse=True)  # equal scores keep equal ranks
    labels = torch.cat([torch.zeros(normal.numel()), torch.ones(anomalous.numel())]).long()
    return float(binary_auroc(ranks.double() / max(1, len(levels) - 1), labels))


def count_errors(errors: Tensor) -> Tensor:
    """Values of `error_map`, in any shape -> (ERROR_BINS,) int64: how many are in each bin.

    The bins are of one width in the error's logarithm, 0.7 % of an error; those outside ERROR_RANGE are in the
    outermost. Unlike the errors of all pixels of many images, counts do not grow.
    """
    low, high = (math.log(end) for end in ERROR_RANGE)
    places = (errors.flatten().double().log() - low) / (high - low) * ERROR_BINS  # -inf of an exact pixel
    return places.clamp(0, ERROR_BINS - 1).long().bincount(minlength=ERROR_BINS)


def auroc_of_counts(normal: Tensor, anomalous: Tensor) -> float:
    """`auroc` of values that are counted in bins, neither all zero; those of one bin are equal."""
    normal, anomalous = normal.double(), anomalous.double()
    below = normal.cumsum(0) - normal / 2
    return float((anomalous * below).sum() / (normal.sum() * anomalous.sum()))


def add_defect(image: Tensor, kind: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An image with something wrong in it.

    scratch: a straight line as long as a third of the side and as thick as 1/128 of it (2 pixels at 256), black or
    white, whichever is farther from the image. speckle: a square of a tenth of the side in which each value is drawn
    at random. patch: a square of a quarter of the side, copied from elsewhere in the image (CutPaste, Li et al.
    2021), from that of eight places which is least like what it covers: a black sky on a black sky would be no defect.

    Args: image: (C, H, W) in [-1, 1]. kind: one of DEFECTS.

    Returns: the image, and (H, W) bool, where a value changed.
    Raises: InputError for another kind.
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
    """(H, W) bool: a stroke of a third of the shorter side, anywhere inside, in any direction."""
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
