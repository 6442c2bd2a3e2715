"""Repeat the training of the VAE inside this package, from a folder of photographs.

    python scripts/train_embedded.py path/to/photographs [--validation FOLDER] [--output runs/embedded]
        [--perceptual WEIGHTS] [--install] [any recipe override, for both parts]

Trains configs/small_f8c4.yaml, then configs/small_f8c4_gan.yaml from the resulting VAE; the same command continues an
interrupted run. Converts the result to fp16 and measures those weights on the validation photographs. With --install
it is copied into sdvae/pretrained/ if it reaches 23 dB. The VAE there was trained on 1,203 photographs of at least 256
pixels and measured on 200 others, with an ImageNet SqueezeNet for LPIPS (uniform heads).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from sdvae import AutoencoderKL, load_vae, save_vae, train
from sdvae.cli import parse_train_config
from sdvae.data import BadImages, center_crop, open_source, read_image, to_tensor
from sdvae.errors import InputError, exit_code
from sdvae.io import replacing
from sdvae.metrics.perceptual import Perceptual, load_perceptual
from sdvae.pictures import reconstruction_grid
from sdvae.training.config import TrainConfig
from sdvae.training.data import evaluation_batches, open_sources
from sdvae.training.validation import validate
from sdvae.weights.load import PACKAGED_VAE

ROOT = Path(__file__).parents[1]
MIN_PSNR = 23.0  # dB on held-out photographs at 256x256; worse weights are not installed
MAX_BYTES = 8_000_000
SHOWN = ("astronaut", "chelsea", "coffee", "rocket")

CARD = """---
library_name: diffusers
license: apache-2.0
tags:
- vae
- autoencoder-kl
- sdvae
---

# small_f8c4: a small image VAE for trying things out

{parameters:.2f} M parameters in fp16, 8x8 pixels to one position of 4 latent channels; a diffusers `AutoencoderKL`.
It comes with sdvae, so that every command works before anything is downloaded. It is not Stable Diffusion's latent
space, and far from its quality: for pictures you keep, take a published VAE or train your own.

## Figures

Means over {images} held-out photographs, short side resized to 256 pixels, centre crop, posterior mode, these fp16
weights computed in fp32.

| metric | value |
|---|---|
{table}

{perceptual}

## Data

{train_images} photographs (ImageNet samples and BSDS500, short side 288 to 321 pixels); none of them is in the package.

## Recipe

`configs/small_f8c4.yaml`: {steps_1} steps of {batch_1} crops of {resolution_1} pixels from new weights, with L2 + LPIPS
+ KL and Muon. Then `configs/small_f8c4_gan.yaml`: {steps_2} steps of {batch_2} crops of {resolution_2} pixels, with a
PatchGAN. `scripts/train_embedded.py FOLDER` repeats it.

`scaling_factor` {scaling_factor:.5f} is 1/std of the training latents.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", help="folder to train on")
    parser.add_argument(
        "--validation", help="folder to measure on; default: 200 photographs held out of the first folder"
    )
    parser.add_argument("--output", default="runs/embedded", help="folder of both runs")
    parser.add_argument("--perceptual", help="local weights of SqueezeNet 1.1; default: torchvision's download")
    parser.add_argument("--install", action="store_true", help="put the result into the package")
    arguments, overrides = parser.parse_known_args()
    first, second = (recipe(arguments, part, overrides) for part in ("small_f8c4", "small_f8c4_gan"))
    train(first)
    model = train(second)

    shipped = Path(arguments.output) / "shipped"
    vae = load_vae(model, dtype=torch.float16)
    figures, perceptual = measure(shipped_weights=vae, config=second)
    save_vae(vae, shipped)
    (shipped / "README.md").write_text(card(vae, figures, perceptual, first, second), encoding="utf-8")
    size = sum(path.stat().st_size for path in shipped.iterdir())
    print(json.dumps({**figures, "bytes": size}, indent=2))
    grid(vae).save(Path(arguments.output) / "grid.png")
    if arguments.install:
        if figures["psnr"] < MIN_PSNR or size > MAX_BYTES:
            raise InputError(
                f"got {figures['psnr']:.2f} dB in {size} bytes; need {MIN_PSNR} dB in {MAX_BYTES}; train longer"
            )
        with replacing(PACKAGED_VAE) as folder:
            shutil.copytree(shipped, folder)
        print(f"installed in {PACKAGED_VAE}")


def recipe(arguments: argparse.Namespace, name: str, overrides: list[str]) -> TrainConfig:
    given = ["--config", str(ROOT / "configs" / f"{name}.yaml"), "--data.source", arguments.photographs]
    given += ["--output_dir", f"{arguments.output}/{name}"]
    if arguments.validation:
        given += ["--data.validation_source", arguments.validation]
    if arguments.perceptual:
        given += ["--loss.perceptual.weights", arguments.perceptual, "--loss.perceptual.heads", "uniform"]
    if name == "small_f8c4_gan":
        given += ["--fine_tune.source", f"{arguments.output}/small_f8c4/model"]
    return parse_train_config([*given, *overrides])


def measure(shipped_weights: AutoencoderKL, config: TrainConfig) -> tuple[dict[str, float], Perceptual]:
    """Means over the validation images, computed in fp32 with the weights as rounded to fp16."""
    settings = config.loss.perceptual
    perceptual = load_perceptual(settings.net, settings.weights, settings.heads, settings.allow_random)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    vae = shipped_weights.float().to(accelerator.device)
    _, validation = open_sources(config.data, config.seed)
    batches = evaluation_batches(validation, config, accelerator)
    perceptual.to(accelerator.device)
    measured = validate(vae, batches, accelerator, perceptual, BadImages(), keep=1, full_precision=True)
    vae.half().cpu()
    figures = {name: measured.metrics[name] for name in ("psnr", "ssim", "kl", perceptual.name)}
    return figures | {"images": len(measured.per_image)}, perceptual


@torch.inference_mode()
def grid(vae: AutoencoderKL) -> Image.Image:
    """Photographs of scikit-image, which are not trained on, beside their reconstructions by the shipped weights."""
    source = open_source("skimage")
    names = [source.name(i) for i in range(len(source))]
    images = torch.stack([to_tensor(center_crop(read_image(source.read(names.index(name))), 256)) for name in SHOWN])
    vae.float()
    reconstruction = vae(images).sample
    vae.half()
    return reconstruction_grid(images, reconstruction)


def card(
    vae: AutoencoderKL, figures: dict[str, float], perceptual: Perceptual, first: TrainConfig, second: TrainConfig
) -> str:
    note = f"`{perceptual.name}`: LPIPS with an ImageNet SqueezeNet 1.1"
    if perceptual.name.endswith("_uniform"):
        note += " whose features all count the same; it compares with no published LPIPS."
    train_images, _ = open_sources(second.data, second.seed)
    return CARD.format(
        parameters=sum(p.numel() for p in vae.parameters()) / 1e6,
        images=figures["images"],
        table="\n".join(f"| {name} | {value:#.4g} |" for name, value in figures.items() if name != "images"),
        perceptual=note,
        train_images=f"{len(train_images):,}",
        scaling_factor=vae.config.scaling_factor,
        **{f"steps_{i}": config.steps for i, config in ((1, first), (2, second))},
        **{f"batch_{i}": config.batch_size for i, config in ((1, first), (2, second))},
        **{f"resolution_{i}": config.data.resolution for i, config in ((1, first), (2, second))},
    )


if __name__ == "__main__":
    sys.exit(exit_code("train_embedded", main))
