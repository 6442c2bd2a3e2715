"""What every exploration needs: a VAE, the photographs that it draws, and the set that it measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sdvae.data import BadImages, EvaluationImages, center_crop, open_source, read_image, to_tensor
from sdvae.data.images import ImageError
from sdvae.errors import InputError
from sdvae.io import utf8
from sdvae.model import AutoencoderKL, DiagonalGaussian
from sdvae.runtime import accelerator_type
from sdvae.statistics import LatentCovariance, LatentMoments
from sdvae.studio.explore.prior import LatentSpectrum
from sdvae.studio.settings import Settings

SMALLEST_RESOLUTION = 32  # pixels: the widest blur that denoise tries has a radius of 13, and SD's latents are 4x4
MOST_SHOWN = 6  # photographs that an experiment draws


@dataclass(frozen=True)
class Finding:
    """A picture, the figures that go with it into a JSON file, and the same in words."""

    picture: Image.Image
    figures: dict[str, Any]
    lines: list[str] = field(default_factory=list)


class Photographs(NamedTuple):
    """names: one an image. images: (N, C, R, R) float in [-1, 1]."""

    names: list[str]
    images: Tensor


class Statistics(NamedTuple):
    """Sums over the measured set; `kl` is the mean KL(q(z|x) || N(0, I)) of a latent element, in nats."""

    names: list[str]
    moments: LatentMoments
    covariance: LatentCovariance
    spectrum: LatentSpectrum
    kl: float


class Study:
    """A VAE beside its photographs. Images go in one by one, so that what comes out does not depend on a batch.

    The photographs that are drawn are `settings.images`, by default the first of `settings.data`. What is measured
    is measured on the first `settings.count` readable images of `settings.data`. All are centre crops of
    R x R pixels, R = `settings.resolution`.

    Raises: InputError for settings that do not fit the VAE or each other.
    """

    def __init__(self, vae: AutoencoderKL, settings: Settings):
        ratio = vae.spatial_compression_ratio
        if settings.resolution < SMALLEST_RESOLUTION or settings.resolution % ratio:
            raise InputError(
                f"got resolution {settings.resolution}; need a multiple of {ratio}, {SMALLEST_RESOLUTION} or more"
            )
        if settings.count < 1 or settings.steps < 3:
            raise InputError(
                f"got count {settings.count} and steps {settings.steps}; need at least 1 image and 3 steps"
            )
        if not settings.sigmas or not all(0 < sigma <= 255 for sigma in settings.sigmas):
            raise InputError(f"got sigmas {list(settings.sigmas)}; need numbers in (0, 255], levels of 8 bits")
        if not 0 <= settings.seed < 2**32:
            raise InputError(f"got seed {settings.seed}; need a number from 0 to {2**32 - 1}")
        self.vae = vae.to(accelerator_type() or "cpu")  # type: ignore[arg-type]
        self.vae.enable_slicing()
        self.settings = settings
        self._opened: dict[str, EvaluationImages] = {}
        self._bad = BadImages()  # each is named once, however many passes there are

    @torch.inference_mode()
    def encode(self, images: Tensor) -> DiagonalGaussian:
        """(N, C, R, R) in [-1, 1] -> the posterior over (N, c, R/f, R/f), on the CPU."""
        posterior = self.vae.encode(images.to(self.vae.device)).latent_dist
        return DiagonalGaussian(posterior.parameters.cpu())

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, c, h, w) -> (N, C, f·h, f·w), clamped to [-1, 1] as a picture file would have it, on the CPU.

        Raises: InputError for values that no picture can hold.
        """
        images = self.vae.decode(latents.to(self.vae.device, self.vae.dtype)).sample.cpu()
        if not images.isfinite().all():
            raise InputError("the VAE decodes to NaN or infinite values; need finite ones; see sdvae fp16 audit")
        return images.clamp(-1, 1)

    def shown(self, count: int, needed: int = 1) -> Photographs:
        """Up to `count` photographs to draw.

        Raises: InputError where there are not even `needed`, or one that was named cannot be read.
        """
        names = self.settings.images[:count]
        found = [(utf8(name), self._named(name)) for name in names] or list(self.measured(most=count))
        if len(found) < needed:
            raise InputError(
                f"got {len(found)} image{'s' * (len(found) != 1)} to draw; need {needed}; name more with --images"
            )
        return Photographs([name for name, _ in found], torch.stack([image for _, image in found]))

    def check(self, needed: int) -> None:
        """Read what the experiments draw, and one of the anomalies, before any of them computes for minutes.

        Args: needed: photographs that one of them cannot do without.

        Raises: InputError as `shown` and `measured` do.
        """
        self.shown(MOST_SHOWN, needed)
        if self.settings.anomalies is not None:
            next(self.measured(self.settings.anomalies, most=1))

    def measured(self, source: str | None = None, most: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, (C, R, R)) of the first readable images.

        Args: source: by default `settings.data`. most: by default `settings.count`.

        Raises: InputError when none can be read.
        """
        source, most = source or self.settings.data, most or self.settings.count
        images = self._images(source)
        good = 0
        for index in range(len(images)):
            sample = images[index]
            if sample["image"] is None:
                self._bad.add([(sample["name"], str(sample["bad"]))])
                continue
            yield utf8(sample["name"]), sample["image"]
            good += 1
            if good == most:
                return
        if not good:
            raise InputError(f"none of the {len(images)} images in {source!r} can be read; need others with --data")

    @cached_property
    def statistics(self) -> Statistics:
        """One pass over the measured set."""
        channels, side = self.vae.config.latent_channels, self.settings.resolution // self.vae.spatial_compression_ratio
        names, kl = [], 0.0
        moments, covariance = LatentMoments(channels), LatentCovariance(channels)
        spectrum = LatentSpectrum(channels, side, side)
        for name, image in self.measured():
            posterior = self.encode(image[None])
            for sums in (moments, covariance, spectrum):
                sums.update(posterior)
            names.append(name)
            kl += float(posterior.kl_map().double().mean())
        return Statistics(names, moments, covariance, spectrum, kl / len(names))

    @property
    def _channels(self) -> int:
        return self.vae.config.in_channels

    def _images(self, source: str) -> EvaluationImages:
        if source not in self._opened:
            images = EvaluationImages(open_source(source), self.settings.resolution, self._channels, min_side=1)
            self._opened[source] = images
        return self._opened[source]

    def _named(self, name: str) -> Tensor:
        """An image file, or an image of the data set. (C, R, R)."""
        path = Path(name).expanduser()
        if path.is_file():
            try:
                image = read_image(path, channels=self._channels)
            except ImageError as error:
                raise InputError(f"{path}: {error}; need an image file") from error
            return to_tensor(center_crop(image, self.settings.resolution))
        images = self._images(self.settings.data)
        for index in range(len(images)):
            if images.source.name(index) == name:
                sample = images[index]
                if sample["image"] is None:
                    raise InputError(f"{name}: {sample['bad']}; need an image that can be read")
                return sample["image"]
        raise InputError(
            f"got {name!r} in --images; need an image file, or the name of an image in {self.settings.data!r}, "
            f"such as {images.source.name(0)!r}"
        )


def caption(name: str) -> str:
    """A name as it stands in a picture: without folder and extension."""
    return Path(name).stem


def contrast(images: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1] -> (N,): the standard deviation of an image's values, in levels of 0..255."""
    return 127.5 * images.flatten(1).std(dim=1, correction=0)


def rounded(values: Tensor | Sequence[float], digits: int = 4) -> list[float]:
    """For JSON files that people read."""
    return [round(float(value), digits) for value in values]
