"""What a run draws and saves. Called on the main process only."""

from __future__ import annotations

import shutil

from PIL import Image

from sdvae.evaluation import latent_figure, reconstruction_grid, training_curves
from sdvae.model import AutoencoderKL
from sdvae.training.config import TrainConfig
from sdvae.training.model_card import GRID_NAME, model_card
from sdvae.training.run_folder import RunFolder
from sdvae.training.validation import ValidationResult
from sdvae.weights.files import check_tensors, replacing


def draw(result: ValidationResult, run: RunFolder, step: int) -> Image.Image:
    """Write the reconstruction grid and the latents of this step, and the curves so far; returns the grid."""
    grid = reconstruction_grid(result.images, result.reconstructions)
    grid.save(run.images / f"step-{step:08d}.png")
    latent_figure(result.health).save(run.images / f"latents-{step:08d}.png")
    training_curves(run.metrics, run.curves)
    return grid


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
        reconstruction_grid(result.images, result.reconstructions).save(folder / GRID_NAME)


def keep_best(run: RunFolder) -> None:
    """Copy model/ to best_model/."""
    with replacing(run.best_model) as folder:
        shutil.copytree(run.model, folder)
