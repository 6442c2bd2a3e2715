"""How well latents follow their image when it is shrunk, turned or mirrored.

For a transformation τ of images and latents, an encoder E and a decoder D:

- the encoder's error is ||E(τx) - τE(x)||², in parts of the variance of E(τx) (Kouzelis et al. 2025, «EQ-VAE», arXiv
  2502.09509);
- the decoder's loss is how much farther D(τE(x)) is from τx than D(E(τx)) is, in dB of PSNR. «EQ-VAE» and «scale
  equivariance» (Skorokhodov et al. 2025, arXiv 2502.14831) train the first to be near τx.

An autoencoder without regularisation follows none of them well. Both papers find that a fine-tuning that lowers these
errors lets a diffusion model learn faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.metrics.image import psnr
from sdvae.model import AnyAutoencoder
from sdvae.model.posterior import at_least_fp32
from sdvae.roundtrip import decode_images, encode_images


@dataclass(frozen=True)
class Transformation:
    """A transformation of images and latents: mirror, rotate by `quarter_turns` · 90 degrees, then shrink by `scale`.

    Attributes:
        scale: above 0 and up to 1.
        quarter_turns: counterclockwise.
        mirror: whether left and right are swapped.
    """

    scale: float = 1.0
    quarter_turns: int = 0
    mirror: bool = False

    def __call__(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """(B, C, H, W) images or latents -> (B, C, *size), with an antialiasing filter, computed in fp32 or wider."""
        x = torch.rot90(x.flip(3) if self.mirror else x, self.quarter_turns, dims=(2, 3))
        if x.shape[2:] == size:
            return x
        return F.interpolate(at_least_fp32(x), size=size, mode="bilinear", antialias=True, align_corners=False)

    def latent_size(self, latents: Tensor) -> tuple[int, int]:
        """Height and width of the transformed latents, at least 1 each."""
        height, width = latents.shape[2:]
        if self.quarter_turns % 2:
            height, width = width, height
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))


SCALES = {"half": Transformation(scale=1 / 2), "quarter": Transformation(scale=1 / 4)}
TURNS = {"rotated": Transformation(quarter_turns=1), "mirrored": Transformation(mirror=True)}
LATENT_MULTIPLE = 4  # rows and columns of latents: a quarter of them must be a whole number


@dataclass(frozen=True)
class Transformed:
    """One image under one transformation τ.

    Attributes:
        error: Σ (E(τx) - τE(x))² over the elements of the latents, of which E is the posterior's mean.
        square: Σ E(τx)².
        total: (C,) float64, Σ E(τx) over positions.
        positions: number of positions of the latents.
        decoder_loss: PSNR of D(E(τx)) minus that of D(τE(x)), both against τx, in dB.
    """

    error: float
    square: float
    total: Tensor
    positions: int
    decoder_loss: float


@torch.no_grad()
def transform(vae: AnyAutoencoder, images: Tensor, latents: Tensor) -> list[dict[str, Transformed]]:
    """Encode and decode images under each transformation of SCALES and TURNS.

    Args:
        vae: the VAE.
        images: (B, C, R, R) in [-1, 1], with R a multiple of LATENT_MULTIPLE times the VAE's compression ratio.
        latents: (B, c, r, r), the means of their posteriors, unscaled.

    Returns:
        For each image the `Transformed` of each transformation.
    """
    rows: list[dict[str, Transformed]] = [{} for _ in images]
    factor = vae.spatial_compression_ratio
    for name, transformation in (SCALES | TURNS).items():
        wanted = transformation(latents.float(), size := transformation.latent_size(latents))
        x = transformation(images.float(), (size[0] * factor, size[1] * factor))
        found = encode_images(vae, x.to(vae.dtype)).mean.float()
        apart = (found - wanted).double().square().sum(dim=(1, 2, 3)).tolist()
        square = found.double().square().sum(dim=(1, 2, 3)).tolist()
        total = found.double().sum(dim=(2, 3)).cpu()
        near, far = (psnr(x, decode_images(vae, z.to(vae.dtype), x.shape[2:]).float()) for z in (found, wanted))
        for i, loss in enumerate((near - far).tolist()):
            rows[i][name] = Transformed(apart[i], square[i], total[i], size[0] * size[1], loss)
    return rows


def encoder_errors(transformed: Sequence[Transformed]) -> Tensor:
    """Of each image, the squared error of its latents in parts of the mean variance of the set's.

    The variance is that about the mean of each channel over all images, so a constant that is added to the latents, or
    a factor of all channels, changes nothing. The mean over images is 0 if E(τx) = τE(x), 1 if τE(x) predicts E(τx) no
    better than the channels' means do, and 2 if the two have the same variance and are independent.

    Args:
        transformed: of all images, under one transformation.

    Returns:
        (images,) float64.
    """
    positions = sum(image.positions for image in transformed)
    total = torch.stack([image.total for image in transformed]).sum(dim=0)  # (C,)
    variance = sum(image.square for image in transformed) - float(total.square().sum()) / positions
    errors = torch.tensor([image.error for image in transformed], dtype=torch.float64)
    return errors / (variance / len(transformed))
