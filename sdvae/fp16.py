"""`sdvae fp16`: find the layers of a VAE that overflow in fp16, and rescale them."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor

from sdvae.data import EvaluationImages, ReadOptions, open_source
from sdvae.data.reading import Color
from sdvae.errors import InputError
from sdvae.model import ConvolutionalVAE
from sdvae.model.fp16 import FP16_MAX, audit, fix
from sdvae.roundtrip import pad_to_multiple, round_trip
from sdvae.weights import load_kl, save_vae

LAYERS_AFTER_FIX = 5  # number of layers with the largest values that are printed before and after a fix


def audit_vae(
    vae: str, subfolder: str | None, source: str, count: int, resolution: int, color: Color, *, layers: int
) -> None:
    """Print the layers with the largest values on some images.

    Args:
        vae: a source for `load_vae`.
        subfolder: folder inside the source that holds the VAE.
        source: images, as `open_source` takes them.
        count: how many images, at most.
        resolution: side of the centre crops in pixels.
        color: as in `ReadOptions`.
        layers: how many layers to print.

    Raises:
        InputError: for a VAE or images that cannot be read.
    """
    model = load_kl(vae, subfolder=subfolder, dtype=torch.float32)
    _print_largest(audit(model, calibration_images(model, source, count, resolution, color)), layers)


def fix_vae(
    vae: str, subfolder: str | None, target: Path, source: str, count: int, resolution: int, color: Color
) -> None:
    """Rescale a VAE for fp16, write it as a diffusers folder, and print the rescalings and their effect.

    Args:
        vae: a source for `load_vae`.
        subfolder: folder inside the source that holds the VAE.
        target: the folder to write.
        source: images, as `open_source` takes them.
        count: how many images, at most.
        resolution: side of the centre crops in pixels.
        color: as in `ReadOptions`.

    Raises:
        InputError: for a VAE or images that cannot be read, or when no rescaling can help.
    """
    model = load_kl(vae, subfolder=subfolder, dtype=torch.float32)
    images = calibration_images(model, source, count, resolution, color)
    _print_largest(audit(model, images), LAYERS_AFTER_FIX)
    before = [round_trip(model, x).reconstruction for x in images]
    done = fix(model, images)
    same = all(torch.equal(round_trip(model, x).reconstruction, y) for x, y in zip(images, before, strict=True))
    save_vae(model, target)
    loaded = load_kl(target)
    after = [round_trip(loaded, x).reconstruction for x in images]
    change = max(float((x - y).abs().max()) for x, y in zip(after, before, strict=True))
    print(f"wrote {target}: {len(done.scales)} rescalings" + ("" if done.scales else "; nothing had to be done"))
    for name, scale in done.scales.items():
        print(f"  {name:48} x {scale:g}")
    print(f"in fp32 the images are {'the same to the bit' if same else 'NOT the same'} if eps is scaled too")
    print(
        f"with an eps of 1e-6, as loaded from the folder, a pixel changes by at most {change:.1e} (of -1 to 1), and "
        f"the output of a norm by at most {100 * done.eps_bound:.2g} %; {100 * done.subnormal:.2g} % more weights are "
        "subnormal in fp16"
    )
    _print_largest(audit(loaded, images), LAYERS_AFTER_FIX)


def calibration_images(
    vae: ConvolutionalVAE, source: str, count: int, resolution: int, color: Color = "srgb"
) -> list[Tensor]:
    """The first readable images, padded to a multiple of the VAE's compression ratio.

    Returns:
        (1, C, ⌈R/f⌉·f, ⌈R/f⌉·f) each, in [-1, 1].

    Raises:
        InputError: when no image can be read, or for a count or resolution below 1.
    """
    if count < 1 or resolution < 1:
        raise InputError(f"got count={count}, resolution={resolution}; need at least one image of at least one pixel")
    opened = open_source(source)
    samples = EvaluationImages(
        opened, resolution, ReadOptions(channels=vae.config.in_channels, min_side=1, color=color)
    )
    readable = (x[None] for i in range(len(samples)) if (x := samples[i]["image"]) is not None)
    images = [pad_to_multiple(x, vae.spatial_compression_ratio) for x in itertools.islice(readable, count)]
    if not images:
        raise InputError(f"none of the {len(opened)} images in {source!r} can be read; choose others with --images")
    return images


def _print_largest(values: dict[str, float], layers: int) -> None:
    over = sum(not value <= FP16_MAX for value in values.values())  # `not <=` so that NaN counts
    print(f"{over} of {len(values)} layers go beyond fp16's {FP16_MAX:.0f}; the largest:")
    for name, value in sorted(values.items(), key=lambda item: -item[1])[:layers]:
        print(f"  {name:48} {value:10.4g}  {value / FP16_MAX:8.2%}")
