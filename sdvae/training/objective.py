"""The objective: terms first, unweighted, then one line that weighs them.

LDM minimises, for an image x of C·H·W values and its reconstruction x̂ (ldm/modules/losses/contperceptual.py),

    Σ|x - x̂| + C·H·W · w_lpips · LPIPS(x, x̂) + w_kl · KL(q(z|x) || N(0, I)).

Everything here is that divided by C·H·W, so that the published weights keep their meaning and the values
do not change with resolution. It is the negative ELBO (Kingma & Welling 2014, eq. 3) with a Laplace
likelihood, a perceptual term added, and w_kl in the role of beta (Higgins et al. 2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdvae.evaluation.perceptual import Perceptual
from sdvae.model import DiagonalGaussian
from sdvae.training.config import LossConfig


@dataclass(frozen=True)
class LossTerms:
    """Unweighted terms, each a scalar in fp32, averaged over the batch.

    reconstruction: mean absolute or squared error a value. lpips: LPIPS an image, 0 when it is off.
    kl: nats an image divided by C·H·W.
    """

    reconstruction: Tensor
    lpips: Tensor
    kl: Tensor

    def logged(self, perceptual: Perceptual | None) -> dict[str, Tensor]:
        """The terms under the names they have in logs: LPIPS under its trunk's, and only when it is on."""
        named = {"reconstruction": self.reconstruction, "kl": self.kl}
        return named if perceptual is None else {**named, perceptual.name: self.lpips}

    def total(self, config: LossConfig, kl_weight: float) -> Tensor:
        return self.reconstruction + config.lpips_weight * self.lpips + kl_weight * self.kl


def loss_terms(
    images: Tensor,
    reconstruction: Tensor,
    posterior: DiagonalGaussian,
    config: LossConfig,
    perceptual: Perceptual | None,
) -> LossTerms:
    """Args: images, reconstruction: (B, C, H, W) in [-1, 1]; any float dtype, reduced in fp32."""
    images, reconstruction = images.float(), reconstruction.float()
    error = reconstruction - images
    return LossTerms(
        reconstruction=error.abs().mean() if config.reconstruction == "l1" else error.square().mean(),
        lpips=images.new_zeros(()) if perceptual is None else perceptual(reconstruction, images).mean(),
        kl=posterior.kl().mean() / images[0].numel(),
    )


def kl_weight_at(step: int, config: LossConfig) -> float:
    """The KL weight of step `step` (counted from 0): a linear warm-up against posterior collapse.

    Bowman et al. 2016, «Generating sentences from a continuous space», section 3.
    """
    if step >= config.kl_warmup_steps:
        return config.kl_weight
    return config.kl_weight * (step + 1) / (config.kl_warmup_steps + 1)


def posterior_generators(noise_seeds: Tensor) -> list[torch.Generator]:
    """One CPU generator for each image, so that its posterior noise does not depend on its batch.

    Args: noise_seeds: (B,) int64.
    """
    return [torch.Generator().manual_seed(seed) for seed in noise_seeds.tolist()]
