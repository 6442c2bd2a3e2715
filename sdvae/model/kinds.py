"""The kinds of autoencoder that load, reconstruct, evaluate and encode.

`sdvae.roundtrip` is the one place where they differ: it turns the output of any kind's `encode` into a posterior. What
the rest of the package uses is common to all kinds: the keys `in_channels`, `out_channels`, `latent_channels`,
`scaling_factor` and `shift_factor` of `.config`, `spatial_compression_ratio`, `likelihood`, and `decode(z).sample`.
"""

from __future__ import annotations

from typing import TypeAlias

from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.tiny import AutoencoderTiny

Autoencoder: TypeAlias = AutoencoderKL | AutoencoderTiny
KINDS: dict[str, type[Autoencoder]] = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny)}


def has_posterior(vae: Autoencoder) -> bool:
    """Whether the encoder predicts a distribution over latents, from which samples can be drawn, or only its mean."""
    return not isinstance(vae, AutoencoderTiny)
