"""PSNR, SSIM, LPIPS and KL of single images."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from sdvae.alpha import as_seen, colours
from sdvae.model import DiagonalGaussian

if TYPE_CHECKING:
    from sdvae.metrics.perceptual import Perceptual

SSIM_SIGMA = 1.5  # of the Gaussian window, in pixels; Wang et al. 2004, section III.B
SSIM_RADIUS = 5  # the window has 11x11 pixels
PEAK_PSNR = 100.0  # dB; stands for an exact reconstruction, whose PSNR is infinite


def image_metrics(
    images: Tensor, reconstruction: Tensor, posterior: DiagonalGaussian, perceptual: Perceptual | None
) -> list[dict[str, float]]:
    """PSNR, SSIM, LPIPS and KL of each image.

    Args:
        images: (B, C, H, W) in [-1, 1]. With alpha (C = 4), colours are compared as seen over grey (`sdvae.alpha`).
        reconstruction: the same shape; clamped to [-1, 1] first.
        posterior: the posterior of the images.
        perceptual: LPIPS; None leaves it out.

    Returns:
        For each image: `psnr` in dB, `ssim`, the perceptual distance under `perceptual.name`, `psnr_alpha` if there is
        alpha, and `kl` in nats divided by C·H·W, which is left out if the posterior has no variance.
    """
    values = images[0].numel()
    seen, seen_again = as_seen(images.float()), as_seen(reconstruction.float().clamp(-1, 1))
    images, reconstruction = colours(seen), colours(seen_again)
    columns = {"psnr": psnr(images, reconstruction), "ssim": ssim(images, reconstruction)}
    if seen.shape[1] == 4:
        columns["psnr_alpha"] = psnr(seen[:, 3:], seen_again[:, 3:])
    if not posterior.deterministic:
        columns["kl"] = posterior.kl() / values
    if perceptual is not None:
        columns[perceptual.name] = perceptual(reconstruction, images)
    rows = torch.stack(list(columns.values()), dim=1).tolist()  # at once, since each read waits for the device
    return [dict(zip(columns, row, strict=True)) for row in rows]


def image_figures(
    images: Tensor, reconstruction: Tensor, posterior: DiagonalGaussian, perceptual: Perceptual | None
) -> list[dict[str, float]]:
    """The figures of `image_metrics` in the units of reports, with the bias of each colour.

    Args:
        images: (B, C, H, W) in [-1, 1].
        reconstruction: the same shape; clamped to [-1, 1] first.
        posterior: the posterior of the images.
        perceptual: LPIPS; None leaves it out.

    Returns:
        For each image: `psnr`, `ssim` and the perceptual distance as in `image_metrics`; the KL, if there is one, as
        `kl_nats`, in nats for the whole image, and as `bits_per_pixel`; and `bias_0`, `bias_1`, …, the mean of
        reconstruction - image in each channel, in 8-bit levels.
    """
    _, channels, height, width = images.shape
    bias = 127.5 * (as_seen(reconstruction.clamp(-1, 1)) - as_seen(images)).mean(dim=(2, 3))  # (B, C)
    figures = image_metrics(images, reconstruction, posterior, perceptual)
    for of_image, of_channels in zip(figures, bias.tolist(), strict=True):
        if "kl" in of_image:
            nats = of_image.pop("kl") * channels * height * width
            of_image |= {"kl_nats": nats, "bits_per_pixel": nats / math.log(2) / (height * width)}
        of_image |= {f"bias_{channel}": value for channel, value in enumerate(of_channels)}
    return figures


def ssim(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Structural similarity of each image, with a gradient: the mean over the 11x11 windows that lie inside it.

    Wang et al. 2004, «Image quality assessment», as in scikit-image. torchmetrics' own mean also counts windows over a
    mirrored border.

    Args:
        images: (B, C, H, W) in [-1, 1], in fp32.
        reconstruction: the same shape.

    Returns:
        (B,), 1 for the same image.
    """
    x, y = (images + 1) / 2, (reconstruction + 1) / 2
    _, ssim_map = structural_similarity_index_measure(
        y, x, sigma=SSIM_SIGMA, data_range=1.0, reduction="none", return_full_image=True
    )
    return ssim_map[..., SSIM_RADIUS:-SSIM_RADIUS, SSIM_RADIUS:-SSIM_RADIUS].mean(dim=(1, 2, 3))


def ms_ssim(images: Tensor, reconstruction: Tensor) -> Tensor:
    """SSIM at five sizes (Wang et al. 2003, «Multi-scale structural similarity»), with a gradient.

    A factor f of the published product can be negative, and has no real power then; (1 + f) / 2 takes its place, as
    torchmetrics proposes for training (`normalize="simple"`).

    Args:
        images: (B, C, H, W) in [-1, 1], in fp32, with sides of SMALLEST_MS_SSIM_SIDE pixels or more.
        reconstruction: the same shape.

    Returns:
        (B,), 1 for the same image.
    """
    x, y = (images + 1) / 2, (reconstruction + 1) / 2
    return multiscale_structural_similarity_index_measure(
        y, x, sigma=SSIM_SIGMA, data_range=1.0, reduction="none", normalize="simple"
    )


def psnr(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image.

    Args:
        images: (B, C, H, W) in [-1, 1].
        reconstruction: the same shape; clamped to [-1, 1] first.

    Returns:
        (B,) in dB, at most PEAK_PSNR.
    """
    x, y = (images.float() + 1) / 2, (reconstruction.float().clamp(-1, 1) + 1) / 2
    ratio = peak_signal_noise_ratio(y, x, data_range=1.0, dim=(1, 2, 3), reduction="none")
    return ratio.clamp(max=PEAK_PSNR)
