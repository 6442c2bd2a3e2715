"""Validation and latent statistics over all processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from sdvae.alpha import as_seen
from sdvae.alpha import colours as without_alpha
from sdvae.data import BadImages
from sdvae.errors import InputError
from sdvae.metrics.image import image_metrics, psnr
from sdvae.metrics.perceptual import Perceptual
from sdvae.model import AutoencoderTiny, ConvolutionalVAE, DiagonalGaussian
from sdvae.noise import posterior_generators, sample_seed
from sdvae.roundtrip import decode_images, encode_images, pad_to_multiple
from sdvae.statistics import LatentHealth, LatentMoments, LatentRGB, merged
from sdvae.training.anchor import Anchor
from sdvae.training.data import conditioning_of
from sdvae.training.distil import Teacher
from sdvae.tutorial.likelihood import elbo

if TYPE_CHECKING:
    from sdvae.metrics.fid import FrechetDistance  # which needs an extra


@dataclass(frozen=True)
class ValidationResult:
    """The results of a validation.

    Attributes:
        metrics: means over the validation images, and figures of their latents.
        health: statistics of their latents; None for a student, which has no posterior.
        per_image: the figures of each image, with its `index` and `name`.
        images: the first few images, (N, C, R, R) in [-1, 1], fp32 on the CPU.
        reconstructions: their reconstructions, the same shape.
        colours: sums for latent RGB factors, of the unscaled latents and the images.
        pictures: the teacher's reconstructions, the same shape; None unless a student was validated.
    """

    metrics: dict[str, float]
    health: LatentHealth | None
    per_image: list[dict[str, Any]]
    colours: LatentRGB
    images: Tensor
    reconstructions: Tensor
    pictures: Tensor | None = None


@dataclass(frozen=True)
class Distances:
    """The Fréchet distances of one validation.

    Attributes:
        wanted: `rfid` and `rfdd`, or those of them that are wanted.
        with_originals: whether the originals are counted too, which they are once for all validations.
    """

    wanted: Mapping[str, FrechetDistance] = field(default_factory=dict)
    with_originals: bool = True

    def add(self, images: Tensor, reconstruction: Tensor) -> None:
        """Count (B, C, H, W) images in [-1, 1] and their reconstructions."""
        for distance in self.wanted.values():
            if self.with_originals:
                distance.add(without_alpha(as_seen(images.float())), real=True)
            distance.add(without_alpha(as_seen(reconstruction.float())), real=False)

    def compute(self) -> dict[str, float]:
        """The distances over all processes."""
        return {name: distance.compute() for name, distance in self.wanted.items()}


@torch.no_grad()
def validate(
    vae: ConvolutionalVAE,
    batches: Iterable[dict[str, Any]],
    accelerator: Accelerator,
    perceptual: Perceptual | None,
    bad_images: BadImages,
    keep: int,
    seed: int = 0,
    *,
    full_precision: bool = False,
    anchor: Anchor | None = None,
    distances: Distances = Distances(),
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
        anchor: the encoder that the VAE started from. The metrics then include `latent_shift`.
        distances: Fréchet distances, which the metrics then include.

    Raises:
        InputError: when no image can be read, or when a figure is not finite.
    """
    health = LatentHealth(vae.config.latent_channels)
    colours = LatentRGB(vae.config.latent_channels, min(3, vae.config.in_channels))
    rows: list[dict[str, Any]] = []
    kept: list[tuple[int, list[Tensor]]] = []
    autocast = nullcontext if full_precision else accelerator.autocast
    for batch in readable(batches, bad_images):
        images = batch["image"].to(accelerator.device)
        conditioning = conditioning_of(batch)
        with autocast():
            posterior = encode_images(vae, images, **conditioning)
            reconstruction = decode_images(vae, posterior.mode(), images.shape[2:], **conditioning)
        distances.add(images, reconstruction)
        health.update(posterior)
        colours.update(posterior.mean, pad_to_multiple(without_alpha(as_seen(images)), vae.spatial_compression_ratio))
        figures: list[dict[str, float]] = [{} for _ in images]
        if anchor is not None:
            figures = [{"latent_shift": shift} for shift in anchor.shift(images, posterior).tolist()]
        if vae.likelihood == "bernoulli":
            seeds = [sample_seed(seed, 0, index, "validation") for index in batch["index"]]
            noise = posterior_generators(torch.tensor(seeds))
            with autocast():
                labels = conditioning.get("labels")
                bound = elbo(vae, images, labels, noise, posterior=posterior)
            terms = zip(bound.distortion.tolist(), bound.rate.tolist(), strict=True)
            for row, (d, r) in zip(figures, terms, strict=True):
                row |= {"nelbo": d + r, "distortion": d, "rate": r}
        for i, metrics in enumerate(image_metrics(images, reconstruction, posterior, perceptual)):
            rows.append({"index": batch["index"][i], "name": batch["name"][i], **figures[i], **metrics})
            if len(kept) < keep:
                kept.append((batch["index"][i], [images[i].float().cpu(), reconstruction[i].float().cpu()]))

    rows, metrics, pictures = _of_all_processes(rows, kept, keep)
    health, colours = merged(gather_object([health])), merged(gather_object([colours]))
    return ValidationResult({**metrics, **distances.compute(), **health.metrics()}, health, rows, colours, *pictures)


@torch.no_grad()
def validate_student(
    student: AutoencoderTiny,
    teacher: Teacher,
    batches: Iterable[dict[str, Any]],
    accelerator: Accelerator,
    perceptual: Perceptual | None,
    bad_images: BadImages,
    keep: int,
    distances: Distances = Distances(),
) -> ValidationResult:
    """Compare a student with the images and with its teacher, on each process's share, and average over all processes.

    Arguments and errors are those of `validate`.

    Returns:
        The metrics are
        - `psnr`, `ssim` and the perceptual distance of what the student decodes from the mode of the teacher's
          posterior, compared with the images; with `_to_teacher` compared with what the teacher decodes from it;
        - `teacher_psnr` and so on: what the teacher decodes, compared with the images;
        - `psnr_round_trip`: what the student decodes from its own encoder's latents, compared with the images;
        - `latents`: the mean squared error of its encoder's latents, which are scaled.
    """
    colours = LatentRGB(student.config.latent_channels, student.config.in_channels)
    rows: list[dict[str, Any]] = []
    kept: list[tuple[int, list[Tensor]]] = []
    for batch in readable(batches, bad_images):
        images = batch["image"].to(accelerator.device)
        lesson = teacher.lesson(images)
        assert lesson.picture is not None
        colours.update(lesson.mode, pad_to_multiple(images, student.spatial_compression_ratio))
        with accelerator.autocast():
            posterior = encode_images(student, images)
            reconstruction = decode_images(student, lesson.z, images.shape[2:])
            round_trip = decode_images(student, posterior.mode(), images.shape[2:])
        distances.add(images, reconstruction)
        of_student = image_metrics(images, reconstruction, posterior, perceptual)
        of_teacher = image_metrics(images, lesson.picture, posterior, perceptual)
        between = image_metrics(lesson.picture.clamp(-1, 1), reconstruction, posterior, perceptual)
        psnr_round_trip = psnr(images, round_trip).tolist()
        errors = (posterior.mode().float() - lesson.mode).square().mean(dim=(1, 2, 3)).tolist()
        for i in range(len(images)):
            row: dict[str, Any] = {"index": batch["index"][i], "name": batch["name"][i], **of_student[i]}
            row |= {f"{name}_to_teacher": value for name, value in between[i].items()}
            row |= {f"teacher_{name}": value for name, value in of_teacher[i].items()}
            rows.append({**row, "psnr_round_trip": psnr_round_trip[i], "latents": errors[i]})
            if len(kept) < keep:
                tiles = [tensor[i].float().cpu() for tensor in (images, reconstruction, lesson.picture)]
                kept.append((batch["index"][i], tiles))
    rows, metrics, pictures = _of_all_processes(rows, kept, keep)
    return ValidationResult({**metrics, **distances.compute()}, None, rows, merged(gather_object([colours])), *pictures)


def _of_all_processes(
    rows: list[dict[str, Any]], kept: list[tuple[int, list[Tensor]]], keep: int
) -> tuple[list[dict[str, Any]], dict[str, float], list[Tensor]]:
    """The figures of all images in order, their means, and the first `keep` images of each kind.

    Args:
        rows: this process's figures of each image, with its `index` and `name`.
        kept: for some images of this process its index, and pictures of it, (C, R, R) each.
        keep: how many images are returned as tensors.

    Raises:
        InputError: when no image could be read, or when a figure is not finite.
    """
    rows = sorted(gather_object(rows), key=lambda row: row["index"])
    kept = sorted(gather_object(kept), key=lambda entry: entry[0])[:keep]
    if not rows:
        raise InputError("no validation image can be read; give others with data.validation_source or …_names")
    names = [name for name in rows[0] if name not in ("index", "name")]
    metrics = {name: sum(row[name] for row in rows) / len(rows) for name in names}
    broken = [f"{name} {value}" for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise InputError(f"the run has diverged: validation gives {', '.join(broken)}; lower optimizer.learning_rate")
    return rows, metrics, [torch.stack(tiles) for tiles in zip(*(tiles for _, tiles in kept), strict=True)]


@torch.no_grad()
def measure_latents(
    vae: ConvolutionalVAE, batches: Iterable[dict[str, Any]], accelerator: Accelerator, bad_images: BadImages
) -> LatentMoments:
    """Moments of the channels of patches of the latents, over every process's share of the images.

    A last row or column that does not fill a patch is left out. Patches are of one position unless there is a batch
    norm, and then their channels are those of the latents.
    """
    p, q = vae.patch_size
    moments = LatentMoments(vae.config.latent_channels * p * q)
    for batch in readable(batches, bad_images):
        conditioning = conditioning_of(batch)
        with accelerator.autocast():
            posterior = encode_images(vae, batch["image"].to(accelerator.device), **conditioning)
        height, width = posterior.mean.shape[2:]
        whole = posterior.parameters[:, :, : height // p * p, : width // q * q]
        moments.update(DiagonalGaussian(whole).patched((p, q)))
    return merged(gather_object([moments]))


def readable(batches: Iterable[dict[str, Any]], bad_images: BadImages) -> Iterator[dict[str, Any]]:
    """The batches in which at least one image could be read. All bad images are added to `bad_images`."""
    for batch in batches:
        bad_images.add(batch["bad"])
        if batch["name"]:
            yield batch
