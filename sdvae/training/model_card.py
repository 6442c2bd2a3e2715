"""The README.md beside the saved weights."""

from __future__ import annotations

from pathlib import Path

import sdvae
from sdvae.evaluation.figures import AMPLIFICATION
from sdvae.model import AutoencoderKL
from sdvae.training.config import TrainConfig
from sdvae.training.run_folder import to_yaml
from sdvae.training.validation import ValidationResult

GRID_NAME = "reconstructions.png"

CARD = """---
library_name: diffusers
tags:
- vae
- autoencoder-kl
- sdvae
---

# {title}

An image VAE that compresses {factor}x{factor} pixels to one position of {latent_channels} latent channels
({parameters:.2f} M parameters), trained with sdvae {version}. Any program that takes diffusers'
`AutoencoderKL` loads this folder:

```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("path/to/this/folder")
```

![original, reconstruction, {amplification} times their difference]({grid})

## Figures

After {steps} steps over {images_seen} image crops; means over {count} held-out images of `{validation_source}` at
{resolution}x{resolution} pixels (resize, centre crop), reconstructed from the posterior's mode with the
EMA weights.

| metric | value |
|---|---|
{table}
{perceptual_note}
`scaling_factor` {scaling_factor:.5f} is {origin_of_factor}{shift_note}.

## Data

Trained on `{source}`{started_from}.

## Recipe

```yaml
{recipe}```
"""

RANDOM_NOTE = """
`{name}` was computed with a randomly initialised trunk, because no ImageNet weights could be had: it compares
with no published LPIPS.
"""


def model_card(
    config: TrainConfig, vae: AutoencoderKL, result: ValidationResult, *, step: int, images_seen: int
) -> str:
    """Markdown with the figures, the data and the whole recipe."""
    data = config.data
    random_names = [name for name in result.metrics if name.endswith("_random")]
    shift = vae.config.shift_factor
    return CARD.format(
        title=run_title(config),
        factor=vae.spatial_compression_ratio,
        latent_channels=vae.config.latent_channels,
        parameters=sum(p.numel() for p in vae.parameters()) / 1e6,
        version=sdvae.__version__,
        amplification=AMPLIFICATION,
        grid=GRID_NAME,
        steps=step,
        images_seen=images_seen,
        count=len(result.per_image),
        validation_source=data.validation_source or data.source,
        resolution=data.evaluation_resolution,
        table="\n".join(
            f"| {name} | {value if isinstance(value, int) else format(value, '#.4g')} |"
            for name, value in result.metrics.items()
            if not name.startswith("channel_kl")
        ),
        perceptual_note="".join(RANDOM_NOTE.format(name=name) for name in random_names),
        scaling_factor=vae.config.scaling_factor,
        shift_note="" if shift is None else f"; `shift_factor` {shift:.5f} is their mean",
        source=data.source,
        started_from=describe_start(config),
        origin_of_factor="that of the VAE it started from, whose latents it keeps"
        if config.fine_tune.freeze_encoder
        else "1/std of the latents of the training images",
        recipe=to_yaml(config),
    )


def describe_start(config: TrainConfig) -> str:
    """«, starting from `stabilityai/sd-vae-ft-mse` with its encoder frozen», or nothing."""
    if config.fine_tune.source is None:
        return ""
    frozen = " with its encoder frozen" if config.fine_tune.freeze_encoder else ""
    return f", starting from `{config.fine_tune.source}`{frozen}"


def run_title(config: TrainConfig) -> str:
    """The run folder's name, with its latent shape: «quickstart: an f8, 4-channel VAE»."""
    name = Path(config.output_dir).resolve().name
    return f"{name}: an f{config.model.compression_ratio}, {config.model.latent_channels}-channel image VAE"
