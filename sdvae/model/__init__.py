"""The autoencoder, without any code for data or training."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdvae.model.autoencoder import AutoencoderKL
    from sdvae.model.blocks import Decoder, Encoder
    from sdvae.model.convolutional import AutoencoderForwardOutput, ConvolutionalVAE
    from sdvae.model.flux2 import AutoencoderKLFlux2
    from sdvae.model.kinds import AnyAutoencoder, Autoencoder
    from sdvae.model.posterior import DiagonalGaussian
    from sdvae.model.stock import StockAutoencoder
    from sdvae.model.tiny import AutoencoderTiny

__all__ = [
    "AnyAutoencoder",
    "Autoencoder",
    "AutoencoderForwardOutput",
    "AutoencoderKL",
    "AutoencoderKLFlux2",
    "AutoencoderTiny",
    "ConvolutionalVAE",
    "Decoder",
    "DiagonalGaussian",
    "Encoder",
    "StockAutoencoder",
]

# Imported on first use: recipes read sdvae.model.config, which does not need torch.
_HOMES = {
    "AnyAutoencoder": "kinds",
    "Autoencoder": "kinds",
    "AutoencoderForwardOutput": "convolutional",
    "AutoencoderKL": "autoencoder",
    "AutoencoderKLFlux2": "flux2",
    "AutoencoderTiny": "tiny",
    "ConvolutionalVAE": "convolutional",
    "Decoder": "blocks",
    "DiagonalGaussian": "posterior",
    "Encoder": "blocks",
    "StockAutoencoder": "stock",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"sdvae.model.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sdvae.model' has no attribute {name!r}")
