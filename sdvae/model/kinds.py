"""The kinds of autoencoder that load, reconstruct, evaluate and encode.

`sdvae.roundtrip` is the one place where they differ: it turns the output of any kind's `encode` into a posterior. What
the rest of the package uses is common to all kinds: the keys `in_channels`, `out_channels` and `latent_channels` of
`.config`, `spatial_compression_ratio`, `likelihood`, and `decode(z).sample`. How latents are scaled for a diffusion
model differs too; `sdvae.latents.scaling` knows it.

An `Autoencoder` is one of this package's own classes, which everything here takes. `AnyAutoencoder` is also another
class of diffusers, in a `StockAutoencoder`: for measuring, reconstructing and encoding.
"""

from __future__ import annotations

from typing import TypeAlias

from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.convolutional import ConvolutionalVAE
from sdvae.model.flux2 import AutoencoderKLFlux2
from sdvae.model.stock import StockAutoencoder
from sdvae.model.tiny import AutoencoderTiny

Autoencoder: TypeAlias = ConvolutionalVAE | AutoencoderTiny
AnyAutoencoder: TypeAlias = Autoencoder | StockAutoencoder
KINDS: dict[str, type[Autoencoder]] = {
    kind.__name__: kind for kind in (AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny)
}


def has_posterior(vae: AnyAutoencoder) -> bool:
    """Whether the encoder predicts a distribution over latents, from which samples can be drawn, or only its mean."""
    return vae.use.has_posterior if isinstance(vae, StockAutoencoder) else not isinstance(vae, AutoencoderTiny)


def class_name(vae: AnyAutoencoder) -> str:
    """The name of the class, as config.json has it."""
    return vae.class_name if isinstance(vae, StockAutoencoder) else type(vae).__name__
