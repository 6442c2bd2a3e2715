"""The autoencoder. Knows nothing of files, data or training."""

from sdvae.model.autoencoder import AutoencoderForwardOutput, AutoencoderKL, Decoder, Encoder
from sdvae.model.conditional import ConditionalAutoencoderKL
from sdvae.model.padding import crop_to, pad_to_multiple
from sdvae.model.posterior import DiagonalGaussian

__all__ = [
    "AutoencoderForwardOutput",
    "AutoencoderKL",
    "ConditionalAutoencoderKL",
    "Decoder",
    "DiagonalGaussian",
    "Encoder",
    "crop_to",
    "pad_to_multiple",
]
