"""The autoencoder. Knows nothing of files, data or training."""

from sdvae.model.autoencoder import AutoencoderForwardOutput, AutoencoderKL, Decoder, Encoder
from sdvae.model.posterior import DiagonalGaussian

__all__ = ["AutoencoderForwardOutput", "AutoencoderKL", "Decoder", "DiagonalGaussian", "Encoder"]
