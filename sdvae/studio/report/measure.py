"""All measurements of the report, in one pass over the images with one batch in memory at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdvae.alpha import as_seen, colours, drawn
from sdvae.data import BadImages
from sdvae.errors import InputError
from sdvae.io import printable
from sdvae.latents.scaling import scaling_of
from sdvae.metrics.image import image_figures
from sdvae.metrics.perceptual import Perceptual
from sdvae.metrics.spectrum import radial_power
from sdvae.model import AnyAutoencoder
from sdvae.roundtrip import compute_device, round_trip
from sdvae.statistics import LatentHealth, LatentMaps
from sdvae.studio.report.gallery import Gallery

BATCH_SIZE = 4  # images
FIRST = 4  # images that are also shown with their latents, repeated round trips and half precision
SAMPLE_SEED = 0  # seed of the latents that the histograms count


@dataclass(frozen=True)
class Measured:
    """The measurements of one VAE on some images.

    Attributes:
        gallery: the pictures to show.
        sums: the sum over the images of each figure of `image_figures`.
        health: statistics of the posteriors.
        maps: statistics of the posteriors by position.
        originals: (N // 2,) mean power of the images at 1, 2, …, N/2 cycles a side; see `radial_power`.
        reconstructions: the same for their reconstructions.
        first: the first images, at most (FIRST, C, R, R), in [-1, 1], on the CPU.
        first_latents: (FIRST, c, h, w), the scaled modes of their posteriors.
    """

    gallery: Gallery
    sums: dict[str, float]
    health: LatentHealth
    maps: LatentMaps
    originals: Tensor
    reconstructions: Tensor
    first: Tensor
    first_latents: Tensor

    @property
    def images(self) -> int:
        """The number of images that were measured."""
        return self.gallery.images

    def mean(self, key: str) -> float:
        """The mean of one figure over the images."""
        return self.sums[key] / self.images


@torch.inference_mode()
def measure(
    vae: AnyAutoencoder,
    batches: Iterable[dict[str, Any]],
    perceptual: Perceptual | None,
    bad_images: BadImages,
) -> Measured:
    """Reconstruct every image from its posterior's mode, and measure the reconstructions and the latents.

    Args:
        vae: a VAE in fp32.
        batches: `image` (B, C, R, R) in [-1, 1], `name`, and `bad`, the images that could not be read.
        perceptual: LPIPS, on the VAE's device; None leaves it out.
        bad_images: receives the images that could not be read.

    Raises:
        InputError: when no image can be read, or a reconstruction is not finite.
    """
    gallery = Gallery("psnr" if perceptual is None else perceptual.name)
    sums: dict[str, float] = defaultdict(float)
    spectra = torch.zeros(())  # (2, N // 2) from the first batch on
    first: list[Tensor] = []
    first_latents: list[Tensor] = []
    health = LatentHealth(vae.config.latent_channels)
    maps: LatentMaps | None = None
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    for batch in batches:
        bad_images.add(batch["bad"])
        if not batch["name"]:
            continue
        x = batch["image"].to(compute_device(vae))
        trip = round_trip(vae, x)
        if not trip.reconstruction.isfinite().all():
            raise InputError(
                f"the reconstruction of {printable(batch['name'][0])} or of the {len(x) - 1} after it is not finite in "
                "fp32; need finite images; take an earlier checkpoint"
            )
        y, posterior = trip.reconstruction.clamp(-1, 1), trip.posterior
        if maps is None:
            _, *shape = trip.latents.shape
            maps = LatentMaps((shape[0], shape[1], shape[2]), scaling_of(vae).scaled)
        health.update(posterior)
        maps.update(posterior, generator)
        spectra = spectra + torch.stack([radial_power(colours(as_seen(images))) for images in (x, y)]).sum(dim=1)
        pictures = zip(drawn(x), drawn(y), strict=True)
        for i, figures in enumerate(image_figures(x, y, posterior, perceptual)):
            gallery.add(printable(batch["name"][i]), *next(pictures), figures)
            for key, value in figures.items():
                sums[key] += value
            if len(first) < FIRST:
                first.append(x[i].cpu())
                first_latents.append(maps.scaled(trip.latents[i]).cpu())
    if maps is None:
        raise InputError(f"none of the {len(bad_images)} images can be read; see the warnings; choose others by --data")
    originals, reconstructions = spectra / gallery.images
    return Measured(
        gallery, sums, health, maps, originals, reconstructions, torch.stack(first), torch.stack(first_latents)
    )
