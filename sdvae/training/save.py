"""What a run draws and saves. Called on the main process only."""

from __future__ import annotations

import shutil

from PIL import Image

from sdvae.io import replacing
from sdvae.model import AutoencoderKL
from sdvae.pictures import latent_plot, reconstruction_grid, training_curves
from sdvae.training.config import TrainConfig
from sdvae.training.model_card import GRID_NAME, model_card
from sdvae.training.run_folder import RunFolder
from sdvae.training.validation import ValidationResult
from sdvae.weights.files import check_tensors

SMALLEST_TILE = 96  # pixels: room for a caption


def draw(result: ValidationResult, run: RunFolder, step: int) -> Image.Image:
    """Write the reconstruction grid and the latents of this step, and the curves so far; returns the grid."""
    grid = grid_of(result)
    grid.save(run.images / f"step-{step:08d}.png")
    latent_plot(result.health).save(run.images / f"latents-{step:08d}.png")
    training_curves(run.metrics, run.curves)
    return grid


def grid_of(result: ValidationResult) -> Image.Image:
    """The reconstruction grid; images as small as MNIST's in larger pixels."""
    times = -(-SMALLEST_TILE // result.images.shape[-1])
    larger = [
        x.repeat_interleave(times, 2).repeat_interleave(times, 3) for x in (result.images, result.reconstructions)
    ]
    return reconstruction_grid(*larger)


def save_model(
    run: RunFolder,
    vae: AutoencoderKL,
    config: TrainConfig,
    result: ValidationResult,
    factors: tuple[float, float | None],
    step: int,
    images_seen: int,
) -> None:
    """Write model/: weights, config.json, model card and grid; whole or not at all.

    Args: factors: scaling_factor and shift_factor.
    """
    check_tensors(vae.state_dict(), "the trained VAE")
    vae.register_to_config(scaling_factor=factors[0], shift_factor=factors[1])
    card = model_card(config, vae, result, step=step, images_seen=images_seen)
    with replacing(run.model) as folder:
        vae.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        grid_of(result).save(folder / GRID_NAME)


def keep_best(run: RunFolder) -> None:
    """Copy model/ to best_model/."""
    with replacing(run.best_model) as folder:
        shutil.copytree(run.model, folder)
