"""How well a diffusion model can learn the latents of a VAE, estimated without training a large one.

Every figure of latents is one of *normalised* latents: a sample of each posterior, scaled as a diffusion model gets it
(`sdvae.latents.scaling`), and then each channel brought to a mean of 0 and a variance of 1 over the set. Only the
equivariance errors are of the posteriors' means, unscaled. docs/diffusability.md explains each figure.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sdvae.diffusion import probe
from sdvae.diffusion.probe import ProbeResult, run_probe
from sdvae.errors import InputError
from sdvae.latents.scaling import scaling_of
from sdvae.metrics import equivariance
from sdvae.metrics.equivariance import SCALES, TURNS, Transformed, encoder_errors, transform
from sdvae.metrics.geometry import nearest_neighbours, negentropy, slerp, two_nn
from sdvae.metrics.spectrum import SMALLEST_SPECTRUM, Spectra, channel_power, radial_power
from sdvae.model import AnyAutoencoder
from sdvae.noise import sample_seed
from sdvae.roundtrip import compute_device, encode_images

logger = logging.getLogger(__name__)

SMALLEST_SET = 10  # images: two of them are held out from the probe
FEW_IMAGES = 200  # with fewer, the warning says what the figures are worth


@dataclass(frozen=True)
class LatentImage:
    """What is kept of one image.

    Attributes:
        index: its place in the data.
        latents: (C, h, w) fp32 on the CPU, a sample of its posterior, scaled for a diffusion model.
        power: (R // 2,) float64, the image's `radial_power`.
        transformed: see `sdvae.metrics.equivariance.transform`.
    """

    index: int
    latents: Tensor
    power: Tensor
    transformed: dict[str, Transformed]


@dataclass(frozen=True)
class Diffusability:
    """The figures of one VAE.

    Attributes:
        per_image: index -> the figures of that image. Those of the probe are only of images that were held out.
        figures: the figures of the whole set.
        spectrum: of the latents.
        image_spectrum: of the images.
        entropy: (C,), the negentropy of each channel in nats.
        probe: None if no probe was trained.
    """

    per_image: dict[int, dict[str, float]]
    figures: dict[str, float]
    spectrum: Spectra
    image_spectrum: Spectra
    entropy: list[float]
    probe: ProbeResult | None

    def details(self) -> dict[str, Any]:
        """What is behind the figures, for JSON."""
        spectra = {"latents": self.spectrum, "images": self.image_spectrum}
        return {
            "spectra": {
                name: {
                    "frequency": spectrum.frequency.tolist(),
                    "power": spectrum.mean.tolist(),
                    "share_above": spectrum.share_above.tolist(),
                }
                for name, spectrum in spectra.items()
            },
            "negentropy_of_channels": self.entropy,
            "probe_levels": None if self.probe is None else [asdict(level) for level in self.probe.levels],
        }


def check_size(vae: AnyAutoencoder, name: str, resolution: int) -> None:
    """Refuse a resolution whose latents are too small, or cannot be halved twice.

    Raises:
        InputError: unless the normalised latents have a multiple of 4 rows, and at least SMALLEST_SPECTRUM.
    """
    pixels = vae.spatial_compression_ratio * max(scaling_of(vae).patch_size)  # a side of one normalised position
    multiple = max(probe.LATENT_MULTIPLE, equivariance.LATENT_MULTIPLE) * pixels
    smallest = SMALLEST_SPECTRUM * pixels
    if resolution % multiple or resolution < smallest:
        raise InputError(
            f"got resolution={resolution} with {name}, which has one latent for {pixels} x {pixels} pixels; "
            f"diffusability needs a multiple of {multiple} and at least {smallest}; set the resolution so"
        )


def check_count(images: int) -> None:
    """Refuse fewer images than SMALLEST_SET."""
    if images < SMALLEST_SET:
        raise InputError(
            f"got {images} images; diffusability needs at least {SMALLEST_SET}, and far more for a reliable value; "
            "choose more images"
        )


def warn_of_few(images: int) -> None:
    """Say what the figures of few images are worth."""
    if images < FEW_IMAGES:
        logger.warning(
            "diffusability of %d images: the probe learns little from so few, neighbours are far apart, and the "
            "intrinsic dimension comes out too low; need some hundreds",
            images,
        )


@torch.no_grad()
def collect(vae: AnyAutoencoder, batches: Iterable[dict[str, Any]], seed: int) -> list[LatentImage]:
    """Encode images, as they are and transformed.

    Args:
        vae: the VAE.
        batches: `image` (B, C, R, R) in [-1, 1] and `index`, their places in the data.
        seed: of the samples of the posteriors, which depend on it and on an image's place.
    """
    scaling, found = scaling_of(vae), []
    for batch in batches:
        x = batch["image"].to(compute_device(vae))
        posterior = encode_images(vae, x.to(vae.dtype)).to(torch.float32)
        seeds = [sample_seed(seed, 0, index, "evaluation") for index in batch["index"]]
        z = posterior.sample([torch.Generator().manual_seed(seed) for seed in seeds])
        of_images = (batch["index"], scaling.normalize(z).cpu(), radial_power(x), transform(vae, x, posterior.mean))
        found += [LatentImage(*image) for image in zip(*of_images, strict=True)]
    return found


def fault_of(images: list[LatentImage]) -> str | None:
    """What makes the figures impossible: latents that are not finite, or a channel that does not vary; else None."""
    latents = torch.stack([image.latents for image in images])
    if not latents.isfinite().all():
        return "its latents are not finite"
    still = (latents.amax(dim=(0, 2, 3)) == latents.amin(dim=(0, 2, 3))).nonzero().flatten().tolist()
    return f"channel {still[0]} of its latents is the same everywhere" if still else None


def measure(
    images: list[LatentImage], *, probe_steps: int, seed: int, device: torch.device, name: str
) -> Diffusability:
    """All figures but iFID.

    Args:
        images: of `collect`, in the order of the data, at least SMALLEST_SET.
        probe_steps: training steps of the probe; 0 leaves it out.
        seed: of the probe.
        device: where the probe is trained.
        name: of the VAE, for the progress bar.
    """
    latents = _normalised(images)
    spectrum, of_images = Spectra(channel_power(latents)), Spectra(torch.stack([image.power for image in images]))
    columns: dict[str, list[float]] = {"high_share": spectrum.high_share.tolist(), **_equivariance(images)}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    result = None
    if probe_steps:
        result = run_probe(latents, steps=probe_steps, seed=seed, device=device, name=name)
        for place, ratio, error in zip(result.held_out, result.ratio.tolist(), result.error.tolist(), strict=True):
            rows[place] |= {"probe_ratio": ratio, "probe_error": error}
    entropy = [negentropy(channel) for channel in latents.transpose(0, 1).flatten(1)]
    figures = {
        "spectrum_slope": spectrum.slope,
        "image_slope": of_images.slope,
        "image_high_share": float(of_images.high_share.mean()),
        "intrinsic_dimension": two_nn(latents.flatten(1)),
        "negentropy": sum(entropy) / len(entropy),
    }
    per_image = {image.index: row for image, row in zip(images, rows, strict=True)}
    return Diffusability(per_image, figures, spectrum, of_images, entropy, result)


def halfway(images: list[LatentImage]) -> Tensor:
    """The latents of which iFID decodes: halfway on the arc from each image's to those of its nearest neighbour.

    Xu et al. 2026, «Making Reconstruction FID Predictive of Diffusion Generation FID», arXiv 2603.05630. There the
    neighbours are searched in another, larger set; here in the same one.

    Returns:
        (N, C, h, w), scaled for a diffusion model.
    """
    latents = torch.stack([image.latents for image in images])
    return slerp(latents, latents[nearest_neighbours(latents)], 0.5)


def _normalised(images: list[LatentImage]) -> Tensor:
    """(N, C, h, w) fp32: each channel with a mean of 0 and a variance of 1."""
    latents = torch.stack([image.latents for image in images])
    variance, mean = torch.var_mean(latents.double(), dim=(0, 2, 3), keepdim=True, correction=0)
    return ((latents - mean) / variance.sqrt()).float()


def _equivariance(images: list[LatentImage]) -> dict[str, list[float]]:
    """The errors under each transformation, and their means over scales and over turns."""
    encoder = {name: encoder_errors([image.transformed[name] for image in images]) for name in SCALES | TURNS}
    decoder = {name: torch.tensor([image.transformed[name].decoder_loss for image in images]) for name in encoder}
    columns = {f"encoder_{name}_error": errors.tolist() for name, errors in encoder.items()}
    columns |= {f"decoder_{name}_loss": losses.tolist() for name, losses in decoder.items()}
    for group, names in (("scale", SCALES), ("turn", TURNS)):
        columns[f"encoder_{group}_error"] = torch.stack([encoder[name] for name in names]).mean(dim=0).tolist()
        columns[f"decoder_{group}_loss"] = torch.stack([decoder[name] for name in names]).mean(dim=0).tolist()
    return columns
