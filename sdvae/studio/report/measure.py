"""One pass over the images: all that the report says of them, one batch in memory at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sdvae.data import BadImages
from sdvae.errors import InputError
from sdvae.metrics.image import image_figures
from sdvae.metrics.perceptual import Perceptual
from sdvae.model import AutoencoderKL
from sdvae.statistics import LatentHealth, LatentMaps
from sdvae.studio.report.gallery import Gallery
from sdvae.studio.report.spectra import radial_power

BATCH_SIZE = 4  # images
FIRST = 4  # images that are also looked at closely: latents, round trips, half precision
SAMPLE_SEED = 0  # of the latents that the histograms count


@dataclass(frozen=True)
class Measured:
    """What one VAE does to some images.

    Attributes:
        gallery: the pictures to show.
        sums: of each of `image_figures`, over the images.
        originals, reconstructions: (N // 2,) mean power at 1, 2, …, N/2 cycles a side; see `radial_power`.
        first: (FIRST, C, R, R) at most, in [-1, 1], on the CPU.
        first_latents: (FIRST, C, h, w) their posteriors' modes, scaled.
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
        return self.gallery.images

    def mean(self, key: str) -> float:
        """Of one figure over the images."""
        return self.sums[key] / self.images


@torch.inference_mode()
def measure(
    vae: AutoencoderKL,
    batches: Iterable[dict[str, Any]],
    perceptual: Perceptual | None,
    device: torch.device,
    bad_images: BadImages,
) -> Measured:
    """Reconstruct every image from its posterior's mode.

    Args:
        vae: in fp32, on the device.
        batches: `image` (B, C, R, R) in [-1, 1], `name`, and `bad`, of which `bad_images` takes note.

    Raises: InputError when no image can be read, or a reconstruction is not finite.
    """
    gallery = Gallery("psnr" if perceptual is None else perceptual.name)
    sums: dict[str, float] = defaultdict(float)
    spectra = torch.zeros(())  # (2, N // 2) with the first batch
    first: list[Tensor] = []
    first_latents: list[Tensor] = []
    health = LatentHealth(vae.config.latent_channels)
    maps: LatentMaps | None = None
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    for batch in batches:
        bad_images.add(batch["bad"])
        if not batch["name"]:
            continue
        x = batch["image"].to(device)
        output = vae(x)
        y, posterior = output.sample.clamp(-1, 1), output.posterior
        if not output.sample.isfinite().all():
            raise InputError(
                f"the reconstruction of {batch['name'][0]} or of the {len(x) - 1} after it is not finite in fp32; "
                "need finite images; take an earlier checkpoint"
            )
        if maps is None:
            shape = tuple(posterior.mean.shape[1:])
            maps = LatentMaps(shape, vae.config.scaling_factor, vae.config.shift_factor)
        health.update(posterior)
        maps.update(posterior, generator)
        spectra = spectra + torch.stack([radial_power(x), radial_power(y)]).sum(dim=1)
        for i, figures in enumerate(image_figures(x, y, posterior, perceptual)):
            gallery.add(batch["name"][i], x[i], y[i], figures)
            for key, value in figures.items():
                sums[key] += value
            if len(first) < FIRST:
                first.append(x[i].cpu())
                first_latents.append(maps.scaled(posterior.mode()[i]).cpu())
    if maps is None:
        raise InputError(f"none of the {len(bad_images)} images can be read; see the warnings; choose others by --data")
    originals, reconstructions = spectra / gallery.images
    return Measured(
        gallery, sums, health, maps, originals, reconstructions, torch.stack(first), torch.stack(first_latents)
    )
