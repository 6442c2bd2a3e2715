"""Images -> latents -> images, for images of any size. Only this module pads, crops, and maps output to images.

    images --pad--> encode --> posterior --mode or sample--> z --> decode --crop--> output --link--> images

It takes every kind of autoencoder (`sdvae.model.kinds`). One whose encoder predicts no variance, such as a student, has
a posterior that is a single point: `posterior.deterministic` is true, and mode and sample are the same.

A VAE works on images whose sides are multiples of its compression ratio, so images are padded before the encoder and
cropped after the decoder. What the decoder's output means depends on the VAE's `likelihood`. With «gaussian» (Stable
Diffusion's VAEs, and the Laplace likelihood of an L1 loss) it is the image; with «bernoulli» it is the logit of each
value's brightness. `link` maps either to an image.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.errors import InputError
from sdvae.model import AnyAutoencoder, DiagonalGaussian
from sdvae.model.convolutional import check_floating
from sdvae.model.kinds import class_name, has_posterior

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundTrip:
    """A batch of images, encoded and decoded again.

    Attributes:
        posterior: over the latents of the padded images, (B, c, ⌈H/f⌉, ⌈W/f⌉) with the compression ratio f; fp32.
        latents: (B, c, ⌈H/f⌉, ⌈W/f⌉) fp32, the decoded latents: the posterior's mode or a sample, unscaled. Those of a
            student are scaled already.
        reconstruction: (B, C, H, W) fp32, nominally in [-1, 1] and not clamped.
        encode_seconds: time in the encoder, including the wait for the device.
        decode_seconds: time in the decoder, including the wait for the device.
    """

    posterior: DiagonalGaussian
    latents: Tensor
    reconstruction: Tensor
    encode_seconds: float
    decode_seconds: float


@torch.no_grad()
def round_trip(
    vae: AnyAutoencoder,
    images: Tensor,
    *,
    latents: Literal["mode", "sample"] = "mode",
    generator: torch.Generator | list[torch.Generator] | None = None,
    labels: Tensor | None = None,
) -> RoundTrip:
    """Encode images and decode them again, without gradients, and measure how long both take.

    Args:
        vae: the VAE, which computes on its own device and in its own dtype.
        images: (B, C, H, W) float in [-1, 1], of any size, on any device.
        latents: whether to decode the posterior's mode or a sample.
        generator: the generator of the sample; a list has one for each image.
        labels: (B,) int64, for a VAE that takes class labels.

    Returns:
        Tensors in fp32 on the VAE's device.

    Raises:
        InputError: for images of integers, or whose number of channels is not the VAE's.
    """
    check_floating(images)  # before the conversion to the VAE's dtype, which would hide integers
    device = compute_device(vae)
    start = _now(device)
    posterior = encode_images(vae, images.to(device, vae.dtype), labels)
    posterior = posterior.to(torch.float32)
    z = posterior.mode() if latents == "mode" else posterior.sample(generator)
    middle = _now(device)
    output = decode_output(vae, z.to(vae.dtype), images.shape[2:], labels)
    reconstruction = link(vae, output.float())
    end = _now(device)
    return RoundTrip(posterior, z, reconstruction, middle - start, end - middle)


def compute_device(vae: AnyAutoencoder) -> torch.device:
    """The device that the VAE computes on, which takes its inputs.

    accelerate's offloading keeps the weights elsewhere, so that the VAE's own `device` is «meta» or the host.
    """
    hooks = (getattr(module, "_hf_hook", None) for module in vae.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    found = next((device for device in devices if device is not None), vae.device)
    return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)


def encode_images(vae: AnyAutoencoder, images: Tensor, labels: Tensor | None = None) -> DiagonalGaussian:
    """The posterior over the latents of images of any size, which are padded for the encoder.

    Args:
        vae: the VAE.
        images: (B, C, H, W) float in [-1, 1], on the VAE's device and in its dtype.
        labels: (B,) int64, for a VAE that takes class labels.

    Returns:
        A posterior over (B, c, ⌈H/f⌉, ⌈W/f⌉) with f the VAE's compression ratio; with gradients unless they are off.
    """
    encoded: Any = vae.encode(pad_to_multiple(images, vae.spatial_compression_ratio), **_given(labels))
    return encoded.latent_dist if hasattr(encoded, "latent_dist") else DiagonalGaussian.point(encoded.latents)


def decode_images(
    vae: AnyAutoencoder, z: Tensor, size: tuple[int, int] | torch.Size, labels: Tensor | None = None
) -> Tensor:
    """The images that latents decode to.

    Args:
        vae: the VAE.
        z: (B, c, h, w), unscaled, on the VAE's device and in its dtype.
        size: (height, width) of the images in pixels, at most f·h and f·w.
        labels: (B,) int64, for a VAE that takes class labels.

    Returns:
        (B, C, height, width), nominally in [-1, 1] and not clamped; with gradients unless they are off.
    """
    return link(vae, decode_output(vae, z, size, labels))


def decode_output(
    vae: AnyAutoencoder, z: Tensor, size: tuple[int, int] | torch.Size, labels: Tensor | None = None
) -> Tensor:
    """The decoder's output, cropped. `link` maps it to images, and a likelihood is computed from it.

    Arguments and shapes are those of `decode_images`.
    """
    height, width = size
    return crop_to(vae.decode(z, **_given(labels)).sample, height, width)


def link(vae: AnyAutoencoder, output: Tensor) -> Tensor:
    """Map the decoder's output to images in [-1, 1], according to the VAE's likelihood."""
    return bernoulli_mean(output) if vae.likelihood == "bernoulli" else output


def bernoulli_mean(logits: Tensor) -> Tensor:
    """The mean of a Bernoulli as an image: sigmoid(l) in [0, 1] is 2 sigmoid(l) - 1 = tanh(l / 2) in [-1, 1]."""
    return torch.tanh(logits / 2)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column until both sides are multiples of `multiple`.

    Unlike zeros, a repeated edge adds no contrast of its own.

    Args:
        images: (B, C, H, W).
        multiple: a number of pixels.

    Returns:
        (B, C, ⌈H/m⌉·m, ⌈W/m⌉·m), with the original in the top left corner: `crop_to(reconstruction, H, W)` undoes it.
    """
    height, width = images.shape[-2:]
    bottom, right = -height % multiple, -width % multiple
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def crop_to(images: Tensor, height: int, width: int) -> Tensor:
    """The top left `height` x `width` pixels. This undoes `pad_to_multiple`."""
    return images if images.shape[-2:] == (height, width) else images[..., :height, :width]


def check_image_channels(vae: AnyAutoencoder, source: str | None, *, alpha: bool = False) -> None:
    """Refuse a VAE whose images cannot be read from files or drawn.

    Args:
        vae: the VAE.
        source: the VAE's name, for the message.
        alpha: whether images with alpha can be.

    Raises:
        InputError: unless the VAE takes and gives grey images, or RGB images, or RGBA images where they can be used.
    """
    channels = (vae.config.in_channels, vae.config.out_channels)
    if channels not in ((1, 1), (3, 3), (4, 4))[: 3 if alpha else 2]:
        need = "1 (grey), 3 (RGB) or 4 (RGBA)" if alpha else "1 (grey) or 3 (RGB)"
        raise InputError(f"got {source} with {channels} image channels; need {need} in and out")


def say_if_no_posterior(vae: AnyAutoencoder, name: object, consequence: str) -> None:
    """Log that a VAE's encoder predicts no variance, and what follows from that.

    Args:
        vae: the VAE.
        name: its name, for the message.
        consequence: the rest of the sentence.
    """
    if not has_posterior(vae):
        logger.warning("%s is an %s, whose encoder predicts no variance: %s", name, class_name(vae), consequence)


def _given(labels: Tensor | None) -> dict[str, Tensor]:
    return {} if labels is None else {"labels": labels}


def _now(device: torch.device) -> float:
    """The time in seconds, once the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
