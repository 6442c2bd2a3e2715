"""The inputs of all experiments: a VAE, the photographs that are drawn, and the images that are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from sdvae.data import BadImages, EvaluationImages, ReadOptions, center_crop, open_source, read_image, to_tensor
from sdvae.data.images import ImageError
from sdvae.errors import InputError
from sdvae.io import printable, utf8
from sdvae.metrics import SMALLEST_SIDE
from sdvae.model import ConvolutionalVAE, DiagonalGaussian
from sdvae.roundtrip import decode_images, encode_images
from sdvae.runtime import accelerator_type
from sdvae.statistics import LatentCovariance, LatentMoments
from sdvae.studio.explore.prior import LatentSpectrum
from sdvae.studio.settings import Settings

MOST_SHOWN = 6  # photographs that an experiment draws


@dataclass(frozen=True)
class Finding:
    """The result of an experiment.

    Attributes:
        picture: the picture.
        figures: numbers for the JSON file.
        lines: text with the main numbers, which is printed.
    """

    picture: Image.Image
    figures: dict[str, Any]
    lines: list[str] = field(default_factory=list)


class Statistics(NamedTuple):
    """Statistics of the posteriors of the measured images.

    Attributes:
        names: the names of the images.
        moments: mean and variance of each channel.
        covariance: the covariance between channels.
        spectrum: the covariance between positions.
        kl: mean of KL(q(z|x) || N(0, I)) over images and latent elements, in nats.
    """

    names: list[str]
    moments: LatentMoments
    covariance: LatentCovariance
    spectrum: LatentSpectrum
    kl: float


class Study:
    """A VAE and the images of the experiments.

    The VAE computes one image at a time, so that results do not depend on batches.

    The photographs that are drawn are `settings.images`, by default the first of `settings.data`. Measurements are made
    on the first `settings.count` readable images of `settings.data`. All are centre crops of R x R pixels,
    R = `settings.resolution`.

    Args:
        vae: a VAE in fp32, which is moved to the accelerator, if there is one.
        settings: the settings of the experiments.

    Raises:
        InputError: for settings out of range.
    """

    def __init__(self, vae: ConvolutionalVAE, settings: Settings):
        if settings.resolution < SMALLEST_SIDE:
            raise InputError(f"got resolution {settings.resolution}; need {SMALLEST_SIDE} or more")
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
        self._bad = BadImages()  # warns of each unreadable image only once, in several passes over the images

    @torch.inference_mode()
    def encode(self, images: Tensor) -> DiagonalGaussian:
        """(N, C, R, R) in [-1, 1] -> the posterior over (N, c, ⌈R/f⌉, ⌈R/f⌉), on the CPU."""
        return encode_images(self.vae, images.to(self.vae.device)).to("cpu")

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """(N, c, ⌈R/f⌉, ⌈R/f⌉) -> (N, C, R, R), clamped to [-1, 1] as in a picture file, on the CPU.

        Raises:
            InputError: for images with values that are not finite.
        """
        size = (self.settings.resolution, self.settings.resolution)
        images = decode_images(self.vae, latents.to(self.vae.device, self.vae.dtype), size).cpu()
        if not images.isfinite().all():
            raise InputError("the VAE decodes to NaN or infinite values; need finite ones; see sdvae fp16 audit")
        return images.clamp(-1, 1)

    def shown(self, count: int, needed: int = 1) -> tuple[list[str], Tensor]:
        """The names of up to N = `count` photographs to draw, and their pixels, (N, C, R, R) in [-1, 1].

        Raises:
            InputError: when there are fewer than `needed`, or one of `settings.images` cannot be read.
        """
        names = self.settings.images[:count]
        found = [(utf8(name), self._named(name)) for name in names] or list(self.measured(most=count))
        if len(found) < needed:
            raise InputError(
                f"got {len(found)} image{'s' * (len(found) != 1)} to draw; need {needed}; name more with --images"
            )
        return [name for name, _ in found], torch.stack([image for _, image in found])

    def check(self, needed: int) -> None:
        """Read the photographs to draw and the first abnormal image, to find faults before minutes of computation.

        Args:
            needed: the least number of photographs that the experiments need.

        Raises:
            InputError: as `shown` and `measured` do.
        """
        self.shown(MOST_SHOWN, needed)
        if self.settings.anomalies is not None:
            next(self.measured(self.settings.anomalies, most=1))

    def measured(self, source: str | None = None, most: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, (C, R, R)) of the first readable images.

        Args:
            source: a source for `open_source`; by default `settings.data`.
            most: the largest number of images; by default `settings.count`.

        Raises:
            InputError: when none can be read.
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
        """The statistics of the measured images, from one pass over them."""
        channels = self.vae.config.latent_channels
        side = -(-self.settings.resolution // self.vae.spatial_compression_ratio)
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
    def _reading(self) -> ReadOptions:
        return ReadOptions(channels=self.vae.config.in_channels, min_side=1, color=self.settings.color)

    def _images(self, source: str) -> EvaluationImages:
        if source not in self._opened:
            self._opened[source] = EvaluationImages(open_source(source), self.settings.resolution, self._reading)
        return self._opened[source]

    def _named(self, name: str) -> Tensor:
        """(C, R, R): the image in a file, or the image of `settings.data` that has this name.

        Raises:
            InputError: when there is no such image, or it cannot be read.
        """
        path = Path(name).expanduser()
        if path.is_file():
            try:
                image = read_image(path, self._reading)
            except ImageError as error:
                raise InputError(f"{printable(name)}: {error}; need an image file") from error
            return to_tensor(center_crop(image, self.settings.resolution))
        images = self._images(self.settings.data)
        for index in range(len(images)):
            if name in (images.source.name(index), utf8(images.source.name(index))):
                sample = images[index]
                if sample["image"] is None:
                    raise InputError(f"{printable(name)}: {sample['bad']}; need an image that can be read")
                return sample["image"]
        raise InputError(
            f"got {name!r} in --images; need an image file, or the name of an image in {self.settings.data!r}, "
            f"such as {utf8(images.source.name(0))!r}"
        )


def caption(name: str) -> str:
    """An image's name without folder and extension, for a picture."""
    return printable(Path(name).stem)


def contrast(images: Tensor) -> Tensor:
    """(N, C, H, W) in [-1, 1] -> (N,): the standard deviation of an image's values, in levels of 0..255."""
    return 127.5 * images.flatten(1).std(dim=1, correction=0)


def rounded(values: Tensor | Sequence[float], digits: int = 4) -> list[float]:
    """Numbers for a JSON file, with a few decimal places."""
    return [round(float(value), digits) for value in values]
