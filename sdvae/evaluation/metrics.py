"""Figures of merit of a reconstruction, one an image, and moments of the latents."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from sdvae.errors import InputError
from sdvae.evaluation.perceptual import Perceptual
from sdvae.model import DiagonalGaussian

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016, «Importance weighted autoencoders», section 5: active units
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


class LatentMoments:
    """Mean and variance of the latents over images and positions, channel by channel, in float64.

    A latent element is N(mean, var) with its own mean and var, so over all elements, by the law of total
    variance, Var[z] = Var[mean] + E[var]: exact, with no sample drawn.

    Attributes:
        sums: (4, C) float64 on the CPU: count, Σ mean, Σ mean², Σ var. Sums of two sets of images add up,
            which is how processes merge theirs.
    """

    def __init__(self, channels: int):
        self.sums = torch.zeros(4, channels, dtype=torch.float64)

    def update(self, posterior: DiagonalGaussian) -> None:
        mean = posterior.mean.detach().cpu().double()  # in this order: MPS has no float64
        var = posterior.logvar.detach().cpu().double().exp()
        count = torch.full((mean.shape[1],), mean.numel() / mean.shape[1], dtype=torch.float64)
        over = (0, 2, 3)
        self.sums += torch.stack([count, mean.sum(over), mean.square().sum(over), var.sum(over)])

    @property
    def channel_mean(self) -> Tensor:
        """(C,) float64."""
        return self.sums[1] / self.sums[0]

    @property
    def channel_std(self) -> Tensor:
        """(C,) float64: standard deviation of sampled latents."""
        return (self.sums[2:].sum(0) / self.sums[0] - self.channel_mean.square()).clamp(min=0).sqrt()

    @property
    def mean(self) -> float:
        return float(self.sums[1].sum() / self.sums[0].sum())

    @property
    def std(self) -> float:
        """Over all channels together: 1/std is LDM's scaling factor (appendix G)."""
        return float((self.sums[2:].sum() / self.sums[0].sum() - self.mean**2).clamp(min=0).sqrt())

    def factors(self, with_shift: bool) -> tuple[float, float | None]:
        """scaling_factor = 1/std, and the mean as shift_factor, or None.

        Raises: InputError when there is no std: no image was read, or the latents are all the same.
        """
        if not 0 < self.std < math.inf:
            raise InputError(
                f"the latents' std is {self.std}, so they have no scaling factor; need images that can be read"
            )
        return 1.0 / self.std, self.mean if with_shift else None

    @property
    def active_channels(self) -> int:
        """Channels whose posterior mean varies over images and positions: Var[mean] > 0.01."""
        variance = self.sums[2] / self.sums[0] - self.channel_mean.square()
        return int((variance > ACTIVE_VARIANCE).sum())
