"""Images -> latents -> images, for images of any size: the one place where that is written down.

    images --pad--> encode --> posterior --mode or sample--> z --> decode --crop--> output --link--> images

A VAE works on sides that are multiples of its compression ratio, so images are padded before the encoder and cropped
after the decoder. What the decoder's output means is the VAE's `likelihood`: «gaussian» VAEs (all of Stable
Diffusion's family; the Laplace likelihood of an L1 loss counts as one) give the image itself, «bernoulli» VAEs the
logit of each value's brightness. `link` turns either into an image.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.errors import InputError
from sdvae.model import AutoencoderKL, DiagonalGaussian


@dataclass(frozen=True)
class RoundTrip:
    """What a VAE makes of a batch of images.

    Attributes:
        posterior: over the latents of the padded images, (B, c, ⌈H/f⌉, ⌈W/f⌉), in fp32.
        latents: (B, c, ⌈H/f⌉, ⌈W/f⌉) fp32, what was decoded: the mode or a sample of the posterior, unscaled.
        reconstruction: (B, C, H, W) fp32, nominally in [-1, 1] and not clamped.
        encode_seconds: that the encoder took, with the wait for the device.
        decode_seconds: the same of the decoder.
    """

    posterior: DiagonalGaussian
    latents: Tensor
    reconstruction: Tensor
    encode_seconds: float
    decode_seconds: float


@torch.no_grad()
def round_trip(
    vae: AutoencoderKL,
    images: Tensor,
    *,
    latents: Literal["mode", "sample"] = "mode",
    generator: torch.Generator | list[torch.Generator] | None = None,
    labels: Tensor | None = None,
) -> RoundTrip:
    """Encode images, decode them again, and time both. Without gradients.

    Args:
        vae: computes on its device and in its dtype; what comes back is in fp32 on that device.
        images: (B, C, H, W) float in [-1, 1], of any size.
        latents: decode the posterior's mode, or a sample of it.
        generator: of that sample; a list has one for each image.
        labels: (B,) int64, for a VAE that is given classes.

    Raises:
        InputError: for images of another number of channels than the VAE's.
    """
    start = _now(vae.device)
    posterior = encode_images(vae, images.to(vae.device, vae.dtype), labels)
    posterior = DiagonalGaussian(posterior.parameters.float())
    z = posterior.mode() if latents == "mode" else posterior.sample(generator)
    middle = _now(vae.device)
    reconstruction = decode_images(vae, z.to(vae.dtype), images.shape[2:], labels).float()
    end = _now(vae.device)
    return RoundTrip(posterior, z, reconstruction, middle - start, end - middle)


def encode_images(vae: AutoencoderKL, images: Tensor, labels: Tensor | None = None) -> DiagonalGaussian:
    """The posterior over the latents of images of any size, which are padded for the encoder.

    Args:
        images: (B, C, H, W) float in [-1, 1], on the VAE's device.
        labels: (B,) int64, for a VAE that is given classes.

    Returns:
        A posterior over (B, c, ⌈H/f⌉, ⌈W/f⌉) with f the VAE's compression ratio; with gradients where they are on.
    """
    return vae.encode(pad_to_multiple(images, vae.spatial_compression_ratio), **_given(labels)).latent_dist


def decode_images(vae: AutoencoderKL, z: Tensor, size: Any, labels: Tensor | None = None) -> Tensor:
    """The images that latents decode to.

    Args:
        z: (B, c, h, w), unscaled.
        size: (height, width) of the images in pixels, at most those that the decoder gives.
        labels: (B,) int64, for a VAE that is given classes.

    Returns:
        (B, C, height, width), nominally in [-1, 1] and not clamped; with gradients where they are on.
    """
    return link(vae, decode_output(vae, z, size, labels))


def decode_output(vae: AutoencoderKL, z: Tensor, size: Any, labels: Tensor | None = None) -> Tensor:
    """As `decode_images`, before the link: what a likelihood is computed from."""
    return crop_to(vae.decode(z, **_given(labels)).sample, *size)


def link(vae: AutoencoderKL, output: Tensor) -> Tensor:
    """The decoder's output as images in [-1, 1], by the VAE's likelihood."""
    return bernoulli_mean(output) if vae.likelihood == "bernoulli" else output


def bernoulli_mean(logits: Tensor) -> Tensor:
    """The mean of a Bernoulli as an image: sigmoid(l) in [0, 1] is 2 sigmoid(l) - 1 = tanh(l / 2) in [-1, 1]."""
    return torch.tanh(logits / 2)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until both sides are multiples of `multiple`.

    A repeated edge, unlike zeros, adds no new contrast.

    Args:
        images: (B, C, H, W).
        multiple: pixels.

    Returns:
        (B, C, ⌈H/m⌉·m, ⌈W/m⌉·m), with the original in the top left corner: `crop_to(reconstruction, H, W)` undoes it.
    """
    height, width = images.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def crop_to(images: Tensor, height: int, width: int) -> Tensor:
    """The top left `height` x `width` pixels: undoes `pad_to_multiple`."""
    return images if images.shape[-2:] == (height, width) else images[..., :height, :width]


def check_image_channels(vae: AutoencoderKL, source: str | None) -> None:
    """Refuse a VAE whose images nothing here can read or draw.

    Args:
        source: the VAE's name in the message.

    Raises:
        InputError: for a VAE whose images are neither grey nor RGB, or go out as others than they came in.
    """
    channels = (vae.config.in_channels, vae.config.out_channels)
    if channels not in ((1, 1), (3, 3)):
        raise InputError(f"got {source} with {channels} image channels; need 1 (grey) or 3 (RGB) in and out")


def _given(labels: Tensor | None) -> dict[str, Tensor]:
    return {} if labels is None else {"labels": labels}


def _now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
