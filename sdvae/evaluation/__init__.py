"""Measuring a VAE and drawing what it does."""

from sdvae.evaluation.figures import reconstruction_grid, training_curves
from sdvae.evaluation.metrics import LatentMoments, image_metrics
from sdvae.evaluation.perceptual import Perceptual, load_perceptual

__all__ = [
    "LatentMoments",
    "Perceptual",
    "image_metrics",
    "load_perceptual",
    "reconstruction_grid",
    "training_curves",
]
