"""The task of `sdvae encode`: the VAE, the images and the output folder that its options name."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from sdvae.data import ImageError, ImageStream, ReadOptions, cover, open_source_or_stream, open_stream, read_image
from sdvae.errors import InputError
from sdvae.io import is_inside, utf8
from sdvae.latents.buckets import Placement, Size, bucket_sizes, place
from sdvae.latents.config import EncodeConfig
from sdvae.latents.encoder import MomentEncoder, PendingMoments, choose_device, choose_precision, encoder_identity
from sdvae.latents.folder import MANIFEST
from sdvae.latents.rows import posterior_values, row_bytes, to_bytes
from sdvae.latents.scaling import scaling_of
from sdvae.latents.shards import RangeShards, Shards, SourceImage, StreamShards, rows_per_shard
from sdvae.latents.writer import LatentWriter
from sdvae.model import DiagonalGaussian
from sdvae.model.kinds import class_name, has_posterior
from sdvae.noise import sample_seed
from sdvae.roundtrip import say_if_no_posterior
from sdvae.runtime import DTYPES
from sdvae.storage import open_storage
from sdvae.weights import load_autoencoder


@dataclass(frozen=True)
class DecodedImage:
    """An image as the encoder gets it, and its place in the original image."""

    pixels: np.ndarray  # (H, W, C) uint8
    sha256: str  # of the file
    original_size: Size
    exif_orientation: int
    placement: Placement


@dataclass(frozen=True)
class Crops:
    """What is cut out of the images for one resolution.

    Attributes:
        reading: how files are read; images that are too small for this resolution are refused.
        sizes: height and width of the crops, in pixels.
        row_bytes: bytes of the latents of an image.
    """

    reading: ReadOptions
    sizes: tuple[Size, ...]
    row_bytes: int


@dataclass(frozen=True)
class ImageReader:
    """How images are found and prepared for the encoder. It needs no VAE and can be sent to other processes.

    Attributes:
        crops: one for each resolution.
    """

    config: EncodeConfig
    crops: tuple[Crops, ...]

    def open_shards(self) -> Shards:
        """Open the source and divide it into shards.

        Raises:
            InputError: when the source does not fit the options.
        """
        config = self.config
        arguments: dict[str, Any] = {"split": config.split, "image_column": config.image_column}
        source = (open_stream if config.streaming else open_source_or_stream)(config.source, **arguments)
        if isinstance(source, ImageStream):
            if config.shard_rows is not None:
                raise InputError(
                    "got shard_rows for a stream, of which each file becomes a shard; leave shard_rows out"
                )
            return StreamShards(source, config.columns)
        rows = config.shard_rows or rows_per_shard(len(source), sum(crops.row_bytes for crops in self.crops))
        return RangeShards(source, config.columns, rows)

    def decode(self, image: SourceImage) -> list[DecodedImage | ImageError]:
        """Read and decode an image, and resize and crop it for each resolution.

        Returns:
            One for each resolution: what the encoder gets, or why the image cannot be used for that resolution.

        Raises:
            ImageError: when it cannot be used at all.
        """
        data = image.read()
        reading = self.crops[0].reading
        decoded = read_image(data, reading if len(self.crops) == 1 else replace(reading, min_side=1))
        sha256 = hashlib.sha256(data).hexdigest()
        return [self._crop(decoded, sha256, crops) for crops in self.crops]

    def _crop(self, decoded: Image, sha256: str, crops: Crops) -> DecodedImage | ImageError:
        size, orientation = (decoded.height, decoded.width), decoded.info["orientation"]
        try:
            crops.reading.check_side(*(size if orientation > 4 else decoded.size))  # width and height in the file
        except ImageError as error:
            return error
        placement = place(size, crops.sizes)
        height, width = placement.target_size
        pixels = np.asarray(cover(decoded, width, height))
        pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
        return DecodedImage(pixels, sha256, size, orientation, placement)


@dataclass(frozen=True)
class Target:
    """The data set of one resolution, which is written.

    Attributes:
        fingerprint: the settings and hashes that determine the rows, except for rounding.
    """

    crops: Crops
    folder: LatentWriter
    fingerprint: dict[str, Any]


class EncodeTask:
    """The VAE and the source of an encoding, opened, and the values that are stored for an image.

    Nothing is written before `begin`.

    Args:
        config: the options.

    Attributes:
        reader: what finds and prepares the images.
        shards: the shards of the source.
        encoder: the VAE's encoder.
        scaling: how pipelines scale its latents.
        patch_channels: the channels of scaled latents.
        targets: the data sets that are written, one for each resolution.

    Raises:
        InputError: when the VAE or the source does not fit the options.
    """

    def __init__(self, config: EncodeConfig):
        # in the file's own dtype, since the fingerprint hashes the weights in that dtype
        vae = load_autoencoder(config.vae, subfolder=config.subfolder, config=config.vae_config, dtype="file")
        if not has_posterior(vae):
            if config.store == "sample":
                raise InputError(f"got store=sample with {config.vae}, which predicts no variance; need store=mean")
            say_if_no_posterior(vae, config.vae, "the latents that it gives are stored alone, in the column mean")
            config = replace(config, store="mean")
        self.config = config
        self.device = choose_device(config.device)
        self.precision = choose_precision(config.precision, self.device)
        reading = ReadOptions(
            channels=vae.config.in_channels,
            background=config.background,
            min_side=config.min_side,
            max_pixels=config.max_pixels,
            color=config.color,
        )
        self.latent_channels = vae.config.latent_channels
        self.scaling = scaling_of(vae)
        patch = self.scaling.patch_size
        self.patch_channels = self.latent_channels * math.prod(patch)
        multiple = vae.spatial_compression_ratio * math.lcm(*patch)  # of pixels: whole patches of latents
        crops = []
        for resolution in config.outputs:
            sizes = bucket_sizes(config, resolution, multiple)
            bytes_of_a_row = row_bytes(sizes, vae.spatial_compression_ratio, self.latent_channels, config)
            crops.append(Crops(reading.for_crops(resolution), sizes, bytes_of_a_row))
        self.reader = ImageReader(config, tuple(crops))
        if is_inside(config.output, config.source):
            raise InputError(f"got output {config.output} inside the source {config.source}; choose another folder")
        self.shards = self.reader.open_shards()
        keys = {key: value for key, value in vae.config.items() if not key.startswith("_")}
        self.vae_config = {"_class_name": class_name(vae), **keys}
        made_by = {**encoder_identity(vae), "precision": self.precision}
        identity = self.shards.identity()
        self.targets = [
            Target(of_one, LatentWriter(output, config.part_numbers), self._fingerprint(made_by, identity, of_one))
            for of_one, output in zip(crops, config.outputs.values(), strict=True)
        ]
        self.encoder = MomentEncoder(vae, self.device, self.precision, config.mirror)

    def begin(self) -> None:
        """Start the data sets, or continue them.

        Raises:
            InputError: when a folder holds something else, or latents that were made with other options.
        """
        if len(self.targets) > 1 and open_storage(self.config.output).exists(MANIFEST):
            raise InputError(
                f"{self.config.output} holds the latents of one resolution; need a folder for several; choose another"
            )
        for target in self.targets:
            target.folder.begin(target.fingerprint, utf8(self.config.source), self.vae_config, self.scaling)

    @property
    def crops_in_all(self) -> int | None:
        """The number of images times that of resolutions; None if it is not known."""
        return None if self.shards.total is None else self.shards.total * len(self.targets)

    def crops_done(self) -> int:
        """Those of the shards that were done when this process last looked, as far as their number is known."""
        shards = range(len(self.shards))
        folders = [target.folder for target in self.targets]
        return sum((self.shards.count(shard) or 0) * sum(f.is_done(shard) for f in folders) for shard in shards)

    @torch.inference_mode()
    def stored_values(
        self, pending: PendingMoments, indices: list[int]
    ) -> tuple[list[dict[str, bytes] | None], Tensor]:
        """Wait for a batch and convert its moments to the stored values.

        Args:
            pending: the batch.
            indices: the place of each of its images in the source.

        Returns:
            For each image its columns of latents, or None if they are not finite even when computed in fp32; and the
            moments (B, 2·latent_channels, h, w) in fp32, without those of mirror images.
        """
        moments = pending.moments()  # (V, B, 2C, h, w)
        values: list[dict[str, bytes] | None] = []
        for i, index in enumerate(indices):
            columns = self._columns(moments[:, i], index)
            if columns is None:
                moments[:, i] = self.encoder.again(pending.pixels[i : i + 1])[:, 0]
                columns = self._columns(moments[:, i], index)
            values.append(columns)
        return values, moments[0]

    def posterior(self, moments: Tensor) -> DiagonalGaussian:
        """The posterior of which values are stored: without variance if only its mean is.

        Args:
            moments: (B, 2·latent_channels, h, w).
        """
        return DiagonalGaussian(moments, deterministic=self.config.store == "mean")

    def _columns(self, moments: Tensor, index: int) -> dict[str, bytes] | None:
        """The columns of latents of one image, or None if a value is not finite in the stored dtype.

        Args:
            moments: (V, 2·latent_channels, h, w), of the image and, with V = 2, of its mirror image.
            index: the image's place in the source.
        """
        dtype = DTYPES[self.config.dtype]
        columns: dict[str, Tensor] = {}
        for view, suffix in zip(moments, ("", "_mirrored"), strict=False):
            posterior = self.posterior(view[None])
            if self.config.store != "sample":
                columns |= posterior_values(posterior, dtype, suffix)
            else:
                seed = sample_seed(self.config.seed, 0, index, f"latents{suffix}")
                columns[f"sample{suffix}"] = posterior.sample(torch.Generator().manual_seed(seed)).to(dtype)
        if not all(values.isfinite().all() for values in columns.values()):
            return None
        return {name: to_bytes(values) for name, values in columns.items()}

    def _fingerprint(self, made_by: dict[str, Any], identity: dict[str, Any], crops: Crops) -> dict[str, Any]:
        # Batch size and number of threads only change rounding, so they are left out.
        config = self.config
        return {
            "vae": made_by,
            "stored": {
                "what": config.store,
                "dtype": config.dtype,
                "mirror": config.mirror,
                **({"seed": config.seed} if config.store == "sample" else {}),
            },
            "images": {
                "sizes": [list(size) for size in crops.sizes],
                "background": list(config.background),
                "min_side": crops.reading.min_side,
                "max_pixels": crops.reading.max_pixels,
                "color": crops.reading.color,
            },
            "source": {"split": config.split, "image_column": config.image_column, **identity},
            "shards": len(self.shards),
        }
