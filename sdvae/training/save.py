"""What a run draws and saves. Called on the main process only."""

from __future__ import annotations

import logging
import math

from PIL import Image

from sdvae.errors import InputError
from sdvae.evaluation import LatentMoments, reconstruction_grid, training_curves
from sdvae.model import AutoencoderKL
from sdvae.training.config import TrainConfig
from sdvae.training.model_card import GRID_NAME, model_card
from sdvae.training.run_folder import RunFolder
from sdvae.training.validation import ValidationResult
from sdvae.weights.files import check_tensors, replacing

logger = logging.getLogger(__name__)


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
    step: int,
    images_seen: int,
) -> None:
    """Write model/: weights, config.json with the measured factors, model card and grid; whole or not at all."""
    check_tensors(vae.state_dict(), "the trained VAE")
    if not 0 < moments.std < math.inf:
        raise InputError(
            f"the latents' std is {moments.std}, so they have no scaling factor; need a training image that can be read"
        )
    if moments.active_channels == 0:
        logger.warning("posterior collapse: no latent channel depends on the image; lower loss.kl_weight")
    shift = moments.mean if config.model.measure_shift else None
    vae.register_to_config(scaling_factor=1.0 / moments.std, shift_factor=shift)
    card = model_card(config, vae, result, step=step, images_seen=images_seen)
    with replacing(run.model) as folder:
        vae.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        reconstruction_grid(result.images, result.reconstructions).save(folder / GRID_NAME)
