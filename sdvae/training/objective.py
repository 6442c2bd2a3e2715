"""The objective: terms first, unweighted, then one line that weighs them.

LDM minimises, for an image x of C·H·W values and its reconstruction x̂ (ldm/modules/losses/contperceptual.py),

    Σ|x - x̂| + C·H·W · w_lpips · LPIPS(x, x̂) + w_kl · KL(q(z|x) || N(0, I)).

Everything here is that divided by C·H·W, so that the published weights keep their meaning and the values
do not change with resolution. It is the negative ELBO (Kingma & Welling 2014, eq. 3) with a Laplace
likelihood, a perceptual term added, and w_kl in the role of beta (Higgins et al. 2017). With `reconstruction: bce`,
no LPIPS and w_kl = 1 it is the negative ELBO itself, of a Bernoulli likelihood, in nats a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.metrics.perceptual import Perceptual
from sdvae.model import DiagonalGaussian
from sdvae.model.posterior import at_least_fp32
from sdvae.training.config import EquivarianceConfig, LossConfig, OptimizerConfig
from sdvae.tutorial.likelihood import bernoulli_nll, pictures

CHARBONNIER_EPS = 1e-3  # Lai et al. 2017, «LapSRN», section 3.3: sqrt(error² + eps²)


@dataclass(frozen=True)
class LossTerms:
    """Unweighted terms, each a scalar in fp32, averaged over the batch.

    reconstruction: mean absolute, squared or Charbonnier error a value. lpips: LPIPS an image, 0 when it is off.
    kl: nats an image divided by C·H·W. equivariance: reconstruction + lpips_weight · LPIPS of the transformed
    image. logvar: s, the log-variance of the likelihood, where it is learned. priced_kl: the KL that the objective
    counts, which free bits make larger. nelbo: nats an image at weight 1, where the likelihood is Bernoulli.
    """

    reconstruction: Tensor
    lpips: Tensor
    kl: Tensor
    equivariance: Tensor | None
    logvar: Tensor | None
    priced_kl: Tensor
    nelbo: Tensor | None

    def logged(self, perceptual: Perceptual | None) -> dict[str, Tensor]:
        """The terms under the names they have in logs: LPIPS under its trunk's, and only what is on."""
        named = {"reconstruction": self.reconstruction, "kl": self.kl}
        if perceptual is not None:
            named[perceptual.name] = self.lpips
        if self.equivariance is not None:
            named["equivariance"] = self.equivariance
        if self.logvar is not None:
            named["logvar"] = self.logvar
        if self.nelbo is not None:
            named["nelbo"] = self.nelbo
        return named

    def nll(self, config: LossConfig) -> Tensor:
        """What pulls on the reconstruction: everything but the KL term and the discriminator.

        With a learned s, LDM's likelihood: (reconstruction + w·LPIPS) / e^s + s.
        """
        nll = self.reconstruction + config.lpips_weight * self.lpips
        if self.equivariance is not None:
            nll = nll + config.equivariance.weight * self.equivariance
        return nll if self.logvar is None else nll * torch.exp(-self.logvar) + self.logvar

    def total(self, config: LossConfig, kl_weight: float) -> Tensor:
        return self.nll(config) + kl_weight * self.priced_kl


def loss_terms(
    images: Tensor,
    reconstruction: Tensor,
    posterior: DiagonalGaussian,
    config: LossConfig,
    perceptual: Perceptual | None,
    transformed: tuple[Tensor, Tensor] | None = None,
    logvar: Tensor | None = None,
) -> LossTerms:
    """The terms of one batch.

    Args:
        images, reconstruction: (B, C, H, W) in [-1, 1]; any float dtype, reduced in fp32.
        transformed: t(x) and D(t(z)), for the equivariance term.
        logvar: s, a scalar.
    """
    pixels, perceived = compare(images, reconstruction, config.reconstruction, perceptual)
    equivariance = None
    if transformed is not None:
        other_pixels, other_perceived = compare(*transformed, config.reconstruction, perceptual)
        equivariance = other_pixels + config.lpips_weight * other_perceived
    values = images[0].numel()
    kl = posterior.kl().mean() / values
    priced = free_bits_kl(posterior, config.free_bits).mean() / values if config.free_bits > 0 else kl
    nelbo = (pixels + kl).detach() * values if config.reconstruction == "bce" else None
    return LossTerms(pixels, perceived, kl, equivariance, logvar, priced, nelbo)


def free_bits_kl(posterior: DiagonalGaussian, nats: float) -> Tensor:
    """Σ_c max(λ, KL_c) of each image: below λ nats a latent channel costs the same, and has no pull to the prior.

    Kingma et al. 2016, «Improving variational inference with inverse autoregressive flow», equation 15, with each
    image's own KL in the place of the mini-batch's mean: so the gradient does not depend on how a batch is divided.

    Returns: (B,), nats.
    """
    return posterior.kl_map().sum(dim=(2, 3)).clamp(min=nats).sum(dim=1)


def compare(images: Tensor, reconstruction: Tensor, kind: str, perceptual: Perceptual | None) -> tuple[Tensor, Tensor]:
    """Mean pixel error and mean LPIPS (0 when it is off) of a batch, in fp32.

    Args: reconstruction: in [-1, 1]; with «bce», logits.
    """
    images, reconstruction = images.float(), reconstruction.float()
    error = reconstruction - images
    if kind == "bce":
        pixels = bernoulli_nll(images, reconstruction).mean() / images[0].numel()
        reconstruction = pictures(reconstruction)
    elif kind == "l1":
        pixels = error.abs().mean()
    elif kind == "l2":
        pixels = error.square().mean()
    else:
        pixels = (error.square() + CHARBONNIER_EPS**2).sqrt().mean()
    lpips = images.new_zeros(()) if perceptual is None else perceptual(reconstruction, images).mean()
    return pixels, lpips


@dataclass(frozen=True)
class Transformation:
    """What equivariance compares: shrink by `scale`, after rotating by `quarter_turns` · 90 degrees."""

    scale: float
    quarter_turns: int

    def __call__(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, C, H, W) images or latents -> (B, C, *size), filtered against aliasing, which is computed in fp32."""
        x = torch.rot90(x, self.quarter_turns, dims=(2, 3))
        if x.shape[2:] == size:
            return x
        return F.interpolate(at_least_fp32(x), size=size, mode="bilinear", antialias=True, align_corners=False)

    def latent_size(self, latents: Tensor) -> tuple[int, int]:
        """Height and width of the transformed latents; at least one position."""
        height, width = latents.shape[2:]
        if self.quarter_turns % 2:
            height, width = width, height
        return max(1, round(height * self.scale)), max(1, round(width * self.scale))


def transformation_at(step: int, seed: int, config: EquivarianceConfig) -> Transformation | None:
    """The transformation of step `step`: the same on every process and in every micro-batch of the step."""
    if config.weight == 0:
        return None
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    which = int(torch.randint(len(config.scales), (), generator=generator))
    turns = int(torch.randint(4, (), generator=generator))
    return Transformation(config.scales[which], turns if config.rotations else 0)


def kl_weight_at(step: int, config: LossConfig) -> float:
    """The KL weight of step `step` (counted from 0): a linear warm-up against posterior collapse.

    Bowman et al. 2016, «Generating sentences from a continuous space», section 3.
    """
    if step >= config.kl_warmup_steps:
        return config.kl_weight
    return config.kl_weight * (step + 1) / (config.kl_warmup_steps + 1)


def learning_rate_at(step: int, peak: float, config: OptimizerConfig, steps: int) -> float:
    """The learning rate of step `step` of `steps`, counted from 0: linear warm-up, then constant or a half cosine.

    A function of the step alone, so a continued run needs no schedule's state.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return peak
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * done))
