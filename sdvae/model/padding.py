"""Images whose sides are not multiples of the compression ratio: pad, then crop back."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.posterior import DiagonalGaussian


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until both sides are multiples of `multiple`.

    (B, C, H, W) -> (B, C, ⌈H/m⌉·m, ⌈W/m⌉·m). The original stands in the top left corner, so
    `crop_to(reconstruction, H, W)` undoes it. A repeated edge, unlike zeros, adds no new contrast.
    """
    height, width = images.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def crop_to(images: Tensor, height: int, width: int) -> Tensor:
    """The top left `height` x `width` pixels: undoes `pad_to_multiple`."""
    return images[..., :height, :width]


def encode_padded(vae: AutoencoderKL, images: Tensor, labels: Tensor | None = None) -> DiagonalGaussian:
    """The posterior over the latents of images (B, C, H, W) of any size, given labels (B,) where a VAE takes them."""
    given = {} if labels is None else {"labels": labels}
    return vae.encode(pad_to_multiple(images, vae.spatial_compression_ratio), **given).latent_dist


def decode_cropped(vae: AutoencoderKL, z: Tensor, like: Tensor, labels: Tensor | None = None) -> Tensor:
    """What the decoder makes of latents z of padded images, in the height and width of `like`."""
    given = {} if labels is None else {"labels": labels}
    image = vae.decode(z, **given).sample
    return image if image.shape[2:] == like.shape[2:] else crop_to(image, like.shape[2], like.shape[3])
