"""`sdvae reconstruct`: encode and decode image files, and print the quality of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from sdvae.data import ImageError, ReadOptions, read_image, to_image, to_tensor
from sdvae.data.reading import Color
from sdvae.errors import InputError
from sdvae.io import printable, replacing
from sdvae.metrics import SMALLEST_SIDE
from sdvae.metrics.image import image_metrics
from sdvae.roundtrip import check_image_channels, round_trip
from sdvae.weights import load_autoencoder


def reconstruct_files(
    files: Sequence[str | Path],
    *,
    vae: str | None,
    subfolder: str | None,
    output: Path,
    max_side: int,
    color: Color = "srgb",
) -> list[Path]:
    """Write the reconstruction of each file to `output`/NAME.png, and print its PSNR and SSIM.

    The posterior's mode is decoded. All names are checked before the first image is read, and all images are read
    before the first one is written.

    Args:
        files: images.
        vae: a source for `load_autoencoder`; None is the VAE in this package.
        subfolder: folder inside the source that holds the VAE.
        output: folder for the reconstructions.
        max_side: a number of pixels; images with a longer side are shrunk to it.
        color: as in `ReadOptions`.

    Returns:
        The written files, in the order of `files`.

    Raises:
        InputError: for a file or VAE that cannot be read, two files that would be written to the same name, or a file
            that would be overwritten by its own reconstruction.
    """
    paths = [Path(file).expanduser() for file in files]
    targets = [output / f"{path.stem}.png" for path in paths]
    for path, target in zip(paths, targets, strict=True):
        if targets.count(target) > 1:
            raise InputError(f"two files would be written to {target}; need different names; reconstruct them apart")
        if target.exists() and path.exists() and target.samefile(path):
            raise InputError(f"{path} would be overwritten; choose another folder with --output")
    model = load_autoencoder(vae, subfolder=subfolder, dtype=torch.float32)
    check_image_channels(model, vae, alpha=True)
    reading = ReadOptions(channels=model.config.in_channels, min_side=SMALLEST_SIDE, color=color)
    images = [read_file(path, reading, max_side) for path in paths]
    output.mkdir(parents=True, exist_ok=True)
    for path, target, image in zip(paths, targets, images, strict=True):
        x = to_tensor(image)[None]
        trip = round_trip(model, x)
        (metrics,) = image_metrics(x, trip.reconstruction, trip.posterior, None)
        with replacing(target) as temporary:
            to_image(trip.reconstruction[0]).save(temporary, format="PNG")
        names = f"{printable(str(path))} -> {printable(str(target))}"
        print(f"{names}: {image.width}x{image.height}, {metrics['psnr']:.2f} dB, SSIM {metrics['ssim']:.3f}")
    return targets


def read_file(path: Path, reading: ReadOptions, max_side: int) -> Image.Image:
    """An image of at most `max_side` pixels a side, grey, RGB or RGBA.

    Raises:
        InputError: with the file's name, when it cannot be read or is too small.
    """
    try:
        image = read_image(path, reading)
    except ImageError as error:
        raise InputError(f"{path}: {error}; need an image file") from error
    if max(image.size) > max_side:
        scale = max_side / max(image.size)
        size = (max(SMALLEST_SIDE, round(image.width * scale)), max(SMALLEST_SIDE, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image
