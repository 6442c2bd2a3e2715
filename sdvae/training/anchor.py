"""The encoder of the VAE that a run started from: what holds the latent space in its place while the encoder trains.

Diffusion models of the old VAE know its latents. When the encoder trains on, the penalty here keeps the new posterior q
near the old one, q₀, for the same image x, in one of two ways:

- mse: mean (z̄ - z̄₀)² over the elements of the latents, of the scaled means, whose variance is about 1;
- kl: KL(q(z|x) || q₀(z|x)), divided by the number of elements, which also holds the variances. Where q₀ is narrow, as
  with a KL weight of 1e-6, it weighs a move of the mean by 1/σ₀², so its weight is a thousand times smaller.

AlphaVAE (arXiv 2507.09308) has the second, beside the usual KL. With or without a penalty each validation reports the
first as `latent_shift`: 0.01 means that latents have moved by a tenth of their standard deviation.
"""

from __future__ import annotations

import copy

import torch
from accelerate import Accelerator
from torch import Tensor

from sdvae.latents.encoder import without_decoder
from sdvae.latents.scaling import scaling_of
from sdvae.model import ConvolutionalVAE, DiagonalGaussian
from sdvae.model.state import sha256_of_weights
from sdvae.roundtrip import encode_images


class Anchor:
    """A frozen copy of a VAE's encoder.

    Args:
        vae: the VAE before its first step, on the device on which it trains.
        accelerator: gives the precision.
    """

    def __init__(self, vae: ConvolutionalVAE, accelerator: Accelerator):
        self._vae: ConvolutionalVAE = copy.deepcopy(without_decoder(vae)).eval().requires_grad_(False)
        self._scaling = scaling_of(vae)
        self._autocast = accelerator.autocast

    def sha256(self) -> str:
        """A hash of the weights."""
        return sha256_of_weights(self._vae.state_dict())

    @torch.no_grad()
    def posterior(self, images: Tensor) -> DiagonalGaussian:
        """The posterior at the start of (B, C, H, W) images in [-1, 1], in the precision of the run."""
        with self._autocast():
            return encode_images(self._vae, images)

    def shift(self, images: Tensor, posterior: DiagonalGaussian) -> Tensor:
        """How far the mean has moved: the mean of (z̄ - z̄₀)² over the scaled latents of each image, (B,) in fp32.

        Args:
            images: (B, C, H, W) in [-1, 1].
            posterior: what the VAE makes of them now.
        """
        before, now = self.posterior(images).mean.float(), posterior.mean.float()
        apart = self._scaling.scaled(now) - self._scaling.scaled(before)
        return apart.square().mean(dim=(1, 2, 3))

    def penalty(self, images: Tensor, posterior: DiagonalGaussian, kind: str) -> Tensor:
        """The penalty, a scalar in fp32, averaged over the batch.

        Args:
            images: (B, C, H, W) in [-1, 1].
            posterior: what the VAE makes of them now, with gradients.
            kind: «mse» or «kl».
        """
        if kind == "mse":
            return self.shift(images, posterior).mean()
        return posterior.kl(self.posterior(images)).mean() / posterior.mean[0].numel()
