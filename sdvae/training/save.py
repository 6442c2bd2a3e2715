"""What a run draws and saves. Called on the main process only."""

from __future__ import annotations

from PIL import Image

from sdvae.errors import InputError
from sdvae.evaluation import LatentMoments, reconstruction_grid, training_curves
from sdvae.model import AutoencoderKL
from sdvae.training.config import TrainConfig
from sdvae.training.model_card import GRID_NAME, model_card
from sdvae.training.run_folder import RunFolder
from sdvae.training.validation import ValidationResult
from sdvae.weights.files import check_tensors, replacing


def draw(result: ValidationResult, run: RunFolder, step: int) -> Image.Image:
    """Write the reconstruction grid of this step and the training curves so far; returns the grid."""
    grid = reconstruction_grid(result.images, result.reconstructions)
    grid.save(run.images / f"step-{step:08d}.png")
    training_curves(run.metrics, run.curves)
    return grid


def save_model(
    run: RunFolder,
    vae: AutoencoderKL,
    config: TrainConfig,
    result: ValidationResult,
    moments: LatentMoments,
    images_seen: int,
) -> None:
    """Write model/: weights, config.json with the measured factors, model card and grid; whole or not at all."""
    check_tensors(vae.state_dict(), "the trained VAE")
    if not moments.std > 0:
        raise InputError(
            "the latents do not vary (posterior collapse), so they have no scaling factor; lower kl_weight"
        )
    shift = moments.mean if config.model.measure_shift else None
    vae.register_to_config(scaling_factor=1.0 / moments.std, shift_factor=shift)
    card = model_card(config, vae, result, images_seen=images_seen)
    with replacing(run.model) as folder:
        vae.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        reconstruction_grid(result.images, result.reconstructions).save(folder / GRID_NAME)
