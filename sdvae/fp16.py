"""`sdvae fp16`: see what overflows, and mend it."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from torch import Tensor

from sdvae.data import EvaluationImages, open_source
from sdvae.errors import InputError
from sdvae.model import AutoencoderKL
from sdvae.model.fp16 import FP16_MAX, audit, fix
from sdvae.weights import load_vae, save_vae


def audit_vae(vae: str, subfolder: str | None, source: str, count: int, resolution: int, *, layers: int) -> None:
    """Print the layers with the largest values on some photographs.

    Args: source, count, resolution: of the photographs; centre crops.

    Raises: InputError for a VAE or photographs that cannot be read.
    """
    model = load_vae(vae, subfolder=subfolder, dtype=torch.float32)
    images = calibration_images(model, source, count, resolution)
    _print_largest(audit(model, images), layers)


def fix_vae(vae: str, subfolder: str | None, target: Path, source: str, count: int, resolution: int) -> None:
    """Rescale a VAE for fp16, write it as a diffusers folder, and print what was done and what it cost.

    Raises: InputError as above, and when a rescaling cannot help.
    """
    model = load_vae(vae, subfolder=subfolder, dtype=torch.float32)
    images = calibration_images(model, source, count, resolution)
    _print_largest(audit(model, images), 5)
    wanted = [_image(model, x) for x in images]
    done = fix(model, images)
    same = all(torch.equal(_image(model, x), y) for x, y in zip(images, wanted, strict=True))
    save_vae(model, target)
    loaded = load_vae(target)
    change = max(float((_image(loaded, x) - y).abs().max()) for x, y in zip(images, wanted, strict=True))
    print(f"wrote {target}: {len(done.scales)} rescalings" + ("; nothing had to be done" if not done.scales else ""))
    for name, scale in done.scales.items():
        print(f"  {name:48} x {scale:g}")
    print(f"in fp32 the images are {'the same to the bit' if same else 'NOT the same'} with eps scaled as well")
    print(
        f"with eps of 1e-6, as the folder has it, a pixel changes by {change:.1e} at most (of -1 to 1); a norm's "
        f"output by {100 * done.eps_bound:.2g} % at most; {100 * done.subnormal:.2g} % more weights are subnormal"
    )
    _print_largest(audit(loaded, images), 5)


def calibration_images(vae: AutoencoderKL, source: str, count: int, resolution: int) -> list[Tensor]:
    """(1, C, R, R) each. Raises: InputError when none can be read."""
    if count < 1 or resolution < 1 or resolution % vae.spatial_compression_ratio:
        raise InputError(
            f"got count={count}, resolution={resolution}; need at least one image, and a multiple of "
            f"{vae.spatial_compression_ratio}"
        )
    opened = open_source(source)
    samples = EvaluationImages(opened, resolution, vae.config.in_channels, min_side=1)
    readable = (x[None] for i in range(len(samples)) if (x := samples[i]["image"]) is not None)
    images = list(itertools.islice(readable, count))
    if not images:
        raise InputError(f"none of the {len(opened)} images in {source!r} can be read; choose others with --images")
    return images


@torch.no_grad()
def _image(vae: AutoencoderKL, x: Tensor) -> Tensor:
    return vae(x).sample


def _print_largest(values: dict[str, float], layers: int) -> None:
    over = sum(not value <= FP16_MAX for value in values.values())
    print(f"{over} of {len(values)} layers go beyond fp16's {FP16_MAX:.0f}; the largest:")
    for name, value in sorted(values.items(), key=lambda item: -item[1])[:layers]:
        print(f"  {name:48} {value:10.4g}  {value / FP16_MAX:8.2%}")
