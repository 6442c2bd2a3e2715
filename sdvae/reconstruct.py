"""Photographs through a VAE and back, with the figures of each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from sdvae.data.images import ImageError, read_image, to_image, to_tensor
from sdvae.errors import InputError
from sdvae.io import replacing
from sdvae.metrics.image import image_metrics
from sdvae.model import AutoencoderKL
from sdvae.roundtrip import crop_to, pad_to_multiple
from sdvae.weights import load_vae

SMALLEST_SIDE = 16  # pixels: SSIM's window has 11


def reconstruct_files(
    files: Sequence[str | Path], *, vae: str | None, subfolder: str | None, output: Path, max_side: int
) -> list[Path]:
    """Write NAME.png of the reconstruction of each file into `output`, and print its figures.

    The latents are the posterior's mode. All names are checked before the first image is read, and every image is
    read before the first is written.

    Args:
        vae: whatever `load_vae` reads; None takes the VAE of this package.
        max_side: pixels; images with a longer side are shrunk to it.

    Raises: InputError when a file cannot be read, or two would have the same name.
    """
    paths = [Path(file).expanduser() for file in files]
    targets = [output / f"{path.stem}.png" for path in paths]
    for path, target in zip(paths, targets, strict=True):
        if targets.count(target) > 1:
            raise InputError(f"two files would be written to {target}; need different names; do them one by one")
        if target.exists() and path.exists() and target.samefile(path):
            raise InputError(f"{path} would be written over; choose another folder with --output")
    model = load_vae(vae, subfolder=subfolder, dtype=torch.float32)
    images = [read_file(path, model.config.in_channels, max_side) for path in paths]
    output.mkdir(parents=True, exist_ok=True)
    for path, target, image in zip(paths, targets, images, strict=True):
        picture, figures = reconstruct(model, image)
        with replacing(target) as temporary:
            picture.save(temporary, format="PNG")
        print(f"{path} -> {target}: {image.width}x{image.height}, {figures['psnr']:.2f} dB, SSIM {figures['ssim']:.3f}")
    return targets


def read_file(path: Path, channels: int, max_side: int) -> Image.Image:
    """Raises: InputError with the file's name."""
    try:
        image = read_image(path.read_bytes(), channels=channels, min_side=SMALLEST_SIDE)
    except (ImageError, OSError) as error:
        raise InputError(f"{path}: {error}; need an image file") from error
    if max(image.size) > max_side:
        scale = max_side / max(image.size)
        size = (max(SMALLEST_SIDE, round(image.width * scale)), max(SMALLEST_SIDE, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return image


def check_image_channels(vae: AutoencoderKL, source: str | None) -> None:
    """Raises: InputError for a VAE whose images are neither grey nor RGB, or go out as others than they came in."""
    channels = (vae.config.in_channels, vae.config.out_channels)
    if channels not in ((1, 1), (3, 3)):
        raise InputError(f"got {source} with {channels} image channels; need 1 (grey) or 3 (RGB) in and out")


@torch.inference_mode()
def reconstruct(vae: AutoencoderKL, image: Image.Image) -> tuple[Image.Image, dict[str, float]]:
    """The picture that comes back from the posterior's mode, of the same size, with its psnr and ssim."""
    x = to_tensor(image)[None]
    posterior = vae.encode(pad_to_multiple(x, vae.spatial_compression_ratio)).latent_dist
    y = crop_to(vae.decode(posterior.mode()).sample, x.shape[2], x.shape[3])
    (figures,) = image_metrics(x, y, posterior, None)
    return to_image(y[0]), figures
