"""Measuring a VAE and drawing what it does."""

from sdvae.evaluation.figures import latent_figure, reconstruction_grid, tile_grid, training_curves
from sdvae.evaluation.health import LatentHealth
from sdvae.evaluation.metrics import LatentMoments, image_metrics
from sdvae.evaluation.perceptual import Perceptual, load_perceptual

__all__ = [
    "LatentHealth",
    "LatentMoments",
    "Perceptual",
    "image_metrics",
    "latent_figure",
    "load_perceptual",
    "reconstruction_grid",
    "tile_grid",
    "training_curves",
]
