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
from sdvae.roundtrip import decode_images, decode_output, encode_images
from sdvae.statistics import LatentHealth, LatentMoments
from sdvae.tutorial.likelihood import bernoulli_nll


@dataclass(frozen=True)
class ValidationResult:
    """Means over the validation images, the state of their latents, and the first few images with their
    reconstructions (CPU, fp32)."""

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
    bernoulli_seed: int | None = None,
    *,
    full_precision: bool = False,
) -> ValidationResult:
    """Reconstruct each process's share of the images from the posterior's mode, and merge the figures.

    Args:
        batches: this process's part: `image` (B, C, R, R), `name`, `index`, the place in the whole set, and `bad`.
        bad_images: takes note of the images that could not be read.
        keep: how many images, from the first on, come back as tensors.
        bernoulli_seed: given for a VAE whose output is logits: then `nelbo`, `distortion` and `rate` are measured too,
            in nats an image, with one posterior sample keyed on this seed and the image.
        full_precision: without the accelerator's autocast, which one that was made for training in this process
            hands on to all later ones.

    Raises: InputError when no image can be read, or when a figure is not finite.
    """
    health = LatentHealth(vae.config.latent_channels)
    rows: list[dict[str, Any]] = []
    kept: list[tuple[int, Tensor, Tensor]] = []
    autocast = nullcontext if full_precision else accelerator.autocast
    for batch in readable(batches, bad_images):
        images = batch["image"].to(accelerator.device)
        labels = batch["label"].to(accelerator.device) if "label" in batch else None
        with autocast():
            posterior = encode_images(vae, images, labels)
            reconstruction = decode_images(vae, posterior.mode(), images.shape[2:], labels)
        health.update(posterior)
        figures: list[dict[str, float]] = [{} for _ in images]
        if bernoulli_seed is not None:
            seeds = [sample_seed(bernoulli_seed, 0, index, "validation") for index in batch["index"]]
            with autocast():
                z = posterior.sample(posterior_generators(torch.tensor(seeds)))
                distortion = bernoulli_nll(images, decode_output(vae, z, images.shape[2:], labels))
            for row, d, r in zip(figures, distortion.tolist(), posterior.kl().tolist(), strict=True):
                row |= {"nelbo": d + r, "distortion": d, "rate": r}
        for i, metrics in enumerate(image_metrics(images, reconstruction, posterior, perceptual)):
            rows.append({"index": batch["index"][i], "name": batch["name"][i], **figures[i], **metrics})
            if len(kept) < keep:
                kept.append((batch["index"][i], images[i].float().cpu(), reconstruction[i].float().cpu()))

    rows = sorted(gather_object(rows), key=lambda row: row["index"])
    kept = sorted(gather_object(kept), key=lambda entry: entry[0])[:keep]
    if not rows:
        raise InputError("no validation image can be read; give others with data.validation_source or …_names")
    health.sums = _sum_over_processes(health.sums, accelerator)
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
        labels = batch["label"].to(accelerator.device) if "label" in batch else None
        with accelerator.autocast():
            moments.update(encode_images(vae, batch["image"].to(accelerator.device), labels))
    moments.sums = _sum_over_processes(moments.sums, accelerator)
    return moments


def readable(batches: Iterable[dict[str, Any]], bad_images: BadImages) -> Iterator[dict[str, Any]]:
    """The batches less those in which no image could be read."""
    for batch in batches:
        bad_images.add(batch["bad"])
        if batch["name"]:
            yield batch


def _sum_over_processes(sums: Tensor, accelerator: Accelerator) -> Tensor:
    return torch.stack(gather_object([sums])).sum(dim=0) if accelerator.num_processes > 1 else sums
