"""Figures of merit of a reconstruction, one an image, and moments of the latents."""

from __future__ import annotations

import math

from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from sdvae.metrics.perceptual import Perceptual
from sdvae.model import DiagonalGaussian

SSIM_SIGMA = 1.5  # of the Gaussian window, in pixels; Wang et al. 2004, section III.B
SSIM_RADIUS = 5  # the window has 11x11 pixels
PEAK_PSNR = 100.0  # dB; stands for an exact reconstruction, whose PSNR is infinite


def image_metrics(
    images: Tensor, reconstruction: Tensor, posterior: DiagonalGaussian, perceptual: Perceptual | None
) -> list[dict[str, float]]:
    """PSNR, SSIM, LPIPS and KL of each image.

    Args:
        images, reconstruction: (B, C, H, W) in [-1, 1]; the reconstruction is clamped to that range first.
        perceptual: None leaves LPIPS out.

    Returns: for each image `psnr` in dB, `ssim` (over the 11x11 windows that lie inside the image, Wang et al.
        2004, which is skimage's and not torchmetrics' mean: that one counts a mirrored border), the perceptual
        distance under its own name, and `kl` in nats divided by C·H·W.
    """
    images, reconstruction = images.float(), reconstruction.float().clamp(-1, 1)
    x, y = (images + 1) / 2, (reconstruction + 1) / 2
    _, ssim_map = structural_similarity_index_measure(
        y, x, sigma=SSIM_SIGMA, data_range=1.0, reduction="none", return_full_image=True
    )
    inside = ssim_map[..., SSIM_RADIUS:-SSIM_RADIUS, SSIM_RADIUS:-SSIM_RADIUS]
    columns = {
        "psnr": psnr(images, reconstruction),
        "ssim": inside.mean(dim=(1, 2, 3)),
        "kl": posterior.kl() / images[0].numel(),
    }
    if perceptual is not None:
        columns[perceptual.name] = perceptual(reconstruction, images)
    values = {name: column.tolist() for name, column in columns.items()}
    return [{name: column[i] for name, column in values.items()} for i in range(len(images))]


def image_figures(
    images: Tensor, reconstruction: Tensor, posterior: DiagonalGaussian, perceptual: Perceptual | None
) -> list[dict[str, float]]:
    """What a person wants to know of each image: as `image_metrics`, with the KL in `kl_nats` an image and
    `bits_per_pixel`, and the colour bias, `bias_0`, …: the mean of reconstruction - image of each channel, in levels
    of 8 bits.
    """
    nats = posterior.kl()  # (B,)
    bits = nats / math.log(2) / (images.shape[2] * images.shape[3])
    bias = 127.5 * (reconstruction.clamp(-1, 1) - images).mean(dim=(2, 3))  # (B, C)
    rows = []
    for i, row in enumerate(image_metrics(images, reconstruction, posterior, perceptual)):
        row = {key: value for key, value in row.items() if key != "kl"}  # that is a value's, as in the objective
        row |= {"kl_nats": float(nats[i]), "bits_per_pixel": float(bits[i])}
        rows.append(row | {f"bias_{channel}": float(value) for channel, value in enumerate(bias[i])})
    return rows


def psnr(images: Tensor, reconstruction: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, at most PEAK_PSNR: (B,) in dB.

    Args: images, reconstruction: (B, C, H, W) in [-1, 1]; the reconstruction is clamped to that range first.
    """
    x, y = (images.float() + 1) / 2, (reconstruction.float().clamp(-1, 1) + 1) / 2
    ratio = peak_signal_noise_ratio(y, x, data_range=1.0, dim=(1, 2, 3), reduction="none")
    return ratio.clamp(max=PEAK_PSNR)
