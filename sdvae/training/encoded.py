"""Training images whose latents are in a data set that `sdvae encode` wrote: a student's teacher need not encode them.

An image is cut and resized as `sdvae encode` does, and a crop of it is cut out of image and latents at the same place,
which is a multiple of the compression ratio. The latents are those of the whole image, as a diffusion model sees them.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from sdvae.data import ImageError, ImageSource, TrainingImages, cover, read_image, to_tensor
from sdvae.data.dataset import Crop
from sdvae.errors import InputError
from sdvae.io import printable, utf8
from sdvae.latents.dataset import LatentDataset
from sdvae.latents.encoder import encoder_identity
from sdvae.latents.folder import LatentFolder
from sdvae.model import ConvolutionalVAE
from sdvae.training.config import DataConfig, TrainConfig


class EncodedImages(TrainingImages):
    """Random crops of images with their posteriors, indexed by `SampleKey`. A sample depends on its key and the seed.

    Args:
        source: the images. Each must have a row, or a reason why it has none; rows of other images are not used.
        latents: the data set of their latents; rows are found by the images' names.
        resolution: R, the side of the crops, in pixels: a multiple of the compression ratio, and at most the side of
            the encoded images.
        flip: probability of a mirror image, if mirror images were encoded; else there are none.
        others: the other arguments of `TrainingImages`.

    Attributes:
        digest: a digest of the data set of latents.

    Raises:
        InputError: when images were not encoded, or when two rows have the same name.
    """

    def __init__(self, source: ImageSource, latents: LatentDataset, *, resolution: int, flip: float, **others: Any):
        self.has_mirrors = latents.has_mirrors
        super().__init__(source, resolution=resolution, flip=flip if self.has_mirrors else 0.0, **others)
        self.digest: str = latents.identity["data"]
        self._latents = latents
        self._rows, self._skipped = _rows_of(source, latents)

    def _read(self, index: int) -> Image.Image:
        """The image at an index as it was encoded: upright, cut and resized.

        Raises:
            ImageError: when it has no latents, or is not the image that was encoded.
        """
        if self._rows[index] < 0:
            raise ImageError(f"has no latents: {self._skipped[index]}")
        data = self.source.read(index)
        sha256, (height, width) = self._latents.origin(int(self._rows[index]))
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ImageError("changed since its latents were made")
        return cover(read_image(data, self.reading), width, height)

    def _crop(self, image: Image.Image, index: int, resolution: int, generator: np.random.Generator) -> Crop:
        u_left, u_top, u_flip = generator.random(3)
        mirrored = bool(u_flip < self.flip)
        moments = self._latents.posterior(int(self._rows[index]), mirrored=mirrored).parameters[0]
        height, width = moments.shape[1:]
        ratio = image.height // height
        side = resolution // ratio
        # where the latents are scaled by patches (FLUX.2), a crop has whole ones
        rows, columns = self._latents.scaling.patch_size
        top = rows * int(u_top * ((height - side) // rows + 1))
        left = columns * int(u_left * ((width - side) // columns + 1))
        whole = image.transpose(Transpose.FLIP_LEFT_RIGHT) if mirrored else image
        pixels = whole.crop((ratio * left, ratio * top, ratio * (left + side), ratio * (top + side)))
        return Crop(image=to_tensor(pixels), moments=moments[:, top : top + side, left : left + side])


def check_latents(config: TrainConfig, teacher: ConvolutionalVAE) -> None:
    """Check that distil.latents_folder holds what the teacher would compute from the recipe's images.

    Args:
        config: the recipe.
        teacher: the teacher, in the dtype of its file.

    Raises:
        InputError: when the data set is not finished, is another VAE's, or was made of other images or to other sizes.
    """
    where, data = config.distil.latents_folder, config.data
    assert where is not None
    folder = LatentFolder(where)
    folder.open(finished=True)
    made = folder.manifest["fingerprint"]
    got = f"got distil.latents_folder={where}"
    identity = encoder_identity(teacher)
    if {key: made["vae"].get(key, value) for key, value in identity.items()} != identity:
        raise InputError(
            f"{got}, which was made by another VAE (encoder {made['vae']['encoder_sha256'][:12]}…); need the latents "
            f"of {config.distil.teacher} (encoder {identity['encoder_sha256'][:12]}…); encode with that --vae"
        )
    needed = {"sample": ("moments",), "mode": ("moments", "mean")}[config.distil.latents]
    if made["stored"]["what"] not in needed:
        raise InputError(
            f"{got} with store={made['stored']['what']}; distil.latents={config.distil.latents} needs "
            f"{' or '.join(needed)}; encode again with --store moments"
        )
    # data sets that were begun before the option `color` have raw colours
    for key, theirs in (("background", made["images"]["background"]), ("color", made["images"].get("color", "raw"))):
        ours = getattr(data, key)
        if (list(ours) if key == "background" else ours) != theirs:
            raise InputError(f"{got}, made with {key}={theirs}, and data.{key}={ours}; need the same; set data.{key}")
    ratio, smallest = teacher.spatial_compression_ratio, min(min(size) for size in made["images"]["sizes"])
    for side in data.training_resolutions:
        if side % ratio or side > smallest:
            raise InputError(
                f"{got}, whose images have sides from {smallest} pixels on, and training crops of {side}; need a "
                f"multiple of {ratio}, at most {smallest}; set data.resolution, or encode to another --resolution"
            )


def encoded_findings(config: TrainConfig, images: EncodedImages) -> list[str]:
    """What the recipe asks of the crops and encoded images cannot have: a line each."""
    data, where = config.data, config.distil.latents_folder
    findings = []
    unused = {"crop_scale": list(data.crop_scale), "native_crop": data.native_crop}
    for key, value in unused.items():
        if getattr(data, key) != getattr(DataConfig, key):
            findings.append(
                f"data.{key}={value} is not used with distil.latents_folder: crops are cut out of the images as they "
                "were encoded"
            )
    if data.flip > 0 and not images.has_mirrors:
        findings.append(
            f"{where} has no mirror images, so no image is flipped (data.flip={data.flip:g}); encode with --mirror "
            "true if that matters"
        )
    return findings


def _rows_of(source: ImageSource, latents: LatentDataset) -> tuple[np.ndarray, dict[int, str]]:
    """The row of each image, (N,) int64 with -1 for none, and for these the reason by the image's index.

    Raises:
        InputError: when an image has neither a row nor a reason, or when two rows have the same name.
    """
    row_of = {name: row for row, name in enumerate(latents.names())}
    if len(row_of) < len(latents):
        raise InputError(
            f"got distil.latents_folder={latents.where} with {len(latents)} rows and only {len(row_of)} names of "
            "images; need a name of its own for each, to find an image's row"
        )
    skipped = latents.skipped()
    rows = np.full(len(source), -1, dtype=np.int64)
    reasons: dict[int, str] = {}
    missing: list[str] = []
    for index in range(len(source)):
        name = utf8(source.name(index))
        if name in row_of:
            rows[index] = row_of[name]
        elif name in skipped:
            reasons[index] = skipped[name]
        else:
            missing.append(source.name(index))
    if missing:
        raise InputError(
            f"got distil.latents_folder={latents.where} without {len(missing)} of the {len(source)} training images, "
            f"such as {printable(missing[0])}; need the latents of these images; encode data.source"
        )
    return rows, reasons
