"""Validation and latent statistics over all processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from sdvae.data import BadImages
from sdvae.errors import InputError
from sdvae.metrics.image import image_metrics
from sdvae.metrics.perceptual import Perceptual
from sdvae.model import AutoencoderKL
from sdvae.noise import posterior_generators, sample_seed
from sdvae.roundtrip import decode_images, encode_images
from sdvae.statistics import LatentHealth, LatentMoments, merged
from sdvae.training.data import conditioning_of
from sdvae.tutorial.likelihood import elbo


@dataclass(frozen=True)
class ValidationResult:
    """The results of a validation.

    Attributes:
        metrics: means over the validation images, and figures of their latents.
        health: statistics of their latents.
        per_image: the figures of each image, with its `index` and `name`.
        images: the first few images, (N, C, R, R) in [-1, 1], fp32 on the CPU.
        reconstructions: their reconstructions, the same shape.
    """

    metrics: dict[str, float]
    health: LatentHealth
    per_image: list[dict[str, Any]]
    images: Tensor
    reconstructions: Tensor


@torch.no_grad()
def validate(
    vae: AutoencoderKL,
    batches: Iterable[dict[str, Any]],
    accelerator: Accelerator,
    perceptual: Perceptual | None,
    bad_images: BadImages,
    keep: int,
    seed: int = 0,
    *,
    full_precision: bool = False,
) -> ValidationResult:
    """Reconstruct each process's share of the images from the posterior's mode, and average over all processes.

    Args:
        vae: the VAE on the accelerator's device.
        batches: this process's share: `image` (B, C, R, R), `name`, `index`, the place in the whole set, and `bad`.
        accelerator: the run's Accelerator.
        perceptual: LPIPS; None leaves it out.
        bad_images: images that cannot be read are added to it.
        keep: the number of first images that are returned as tensors.
        seed: the seed of the posterior sample from which the ELBO of a VAE with a Bernoulli likelihood is estimated.
            The metrics of such a VAE include `nelbo`, `distortion` and `rate`, in nats for each image.
        full_precision: whether to compute without autocast, whatever the accelerator's precision is. (All
            Accelerators of a process share one precision, so an earlier training could have set it.)

    Raises:
        InputError: when no image can be read, or when a figure is not finite.
    """
    health = LatentHealth(vae.config.latent_channels)
    rows: list[dict[str, Any]] = []
    kept: list[tuple[int, Tensor, Tensor]] = []
    autocast = nullcontext if full_precision else accelerator.autocast
    for batch in readable(batches, bad_images):
        images = batch["image"].to(accelerator.device)
        conditioning = conditioning_of(batch)
        with autocast():
            posterior = encode_images(vae, images, **conditioning)
            reconstruction = decode_images(vae, posterior.mode(), images.shape[2:], **conditioning)
        health.update(posterior)
        figures: list[dict[str, float]] = [{} for _ in images]
        if vae.likelihood == "bernoulli":
            seeds = [sample_seed(seed, 0, index, "validation") for index in batch["index"]]
            noise = posterior_generators(torch.tensor(seeds))
            with autocast():
                labels = conditioning.get("labels")
                bound = elbo(vae, images, labels, noise, posterior=posterior)
            terms = zip(bound.distortion.tolist(), bound.rate.tolist(), strict=True)
            figures = [{"nelbo": d + r, "distortion": d, "rate": r} for d, r in terms]
        for i, metrics in enumerate(image_metrics(images, reconstruction, posterior, perceptual)):
            rows.append({"index": batch["index"][i], "name": batch["name"][i], **figures[i], **metrics})
            if len(kept) < keep:
                kept.append((batch["index"][i], images[i].float().cpu(), reconstruction[i].float().cpu()))

    rows = sorted(gather_object(rows), key=lambda row: row["index"])
    kept = sorted(gather_object(kept), key=lambda entry: entry[0])[:keep]
    if not rows:
        raise InputError("no validation image can be read; give others with data.validation_source or …_names")
    health = merged(gather_object([health]))
    names = [name for name in rows[0] if name not in ("index", "name")]
    metrics = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    broken = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise InputError(f"the run has diverged: validation gives {', '.join(broken)}; lower optimizer.learning_rate")
    return ValidationResult(
        metrics={**metrics, **health.metrics()},
        health=health,
        per_image=rows,
        images=torch.stack([entry[1] for entry in kept]),
        reconstructions=torch.stack([entry[2] for entry in kept]),
    )


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKL, batches: Iterable[dict[str, Any]], accelerator: Accelerator, bad_images: BadImages
) -> LatentMoments:
    """Moments of the latents over every process's share of the images."""
    moments = LatentMoments(vae.config.latent_channels)
    for batch in readable(batches, bad_images):
        conditioning = conditioning_of(batch)
        with accelerator.autocast():
            moments.update(encode_images(vae, batch["image"].to(accelerator.device), **conditioning))
    return merged(gather_object([moments]))


def readable(batches: Iterable[dict[str, Any]], bad_images: BadImages) -> Iterator[dict[str, Any]]:
    """The batches in which at least one image could be read. All bad images are added to `bad_images`."""
    for batch in batches:
        bad_images.add(batch["bad"])
        if batch["name"]:
            yield batch
