"""The training objective: first its unweighted terms, then their weighted sum.

For an image x of C·H·W values and its reconstruction x̂, LDM minimises (ldm/modules/losses/contperceptual.py)

    Σ|x - x̂| + C·H·W · w_lpips · LPIPS(x, x̂) + w_kl · KL(q(z|x) || N(0, I)).

This module divides that by C·H·W, so that the published weights keep their meaning and the values do not depend on the
resolution. The objective is the negative ELBO (Kingma & Welling 2014, eq. 3) with a Laplace likelihood and a perceptual
term, and w_kl is the beta of Higgins et al. 2017. With `reconstruction: bce`, no LPIPS and w_kl = 1, it is exactly the
negative ELBO of a Bernoulli likelihood, in nats for each value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sdvae.alpha import colours
from sdvae.metrics.equivariance import Transformation
from sdvae.metrics.features import FeatureDistance, Features
from sdvae.metrics.image import ms_ssim, ssim
from sdvae.metrics.perceptual import Perceptual
from sdvae.model import DiagonalGaussian
from sdvae.roundtrip import bernoulli_mean
from sdvae.training.config import EquivarianceConfig, LossConfig, OptimizerConfig
from sdvae.tutorial.likelihood import bernoulli_error, free_bits_kl

CHARBONNIER_EPS = 1e-3  # Lai et al. 2017, «LapSRN», section 3.3: sqrt(error² + eps²)

# (images, decoder's output) -> mean over the batch. The output is the image, except with «bce», where it is logits.
RECONSTRUCTION_ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda images, output: (output - images).abs().mean(),
    "l2": lambda images, output: (output - images).square().mean(),
    "charbonnier": lambda images, output: ((output - images).square() + CHARBONNIER_EPS**2).sqrt().mean(),
    "ssim": lambda images, output: 1 - ssim(images, output).mean(),
    "ms_ssim": lambda images, output: 1 - ms_ssim(images, output).mean(),
    "bce": bernoulli_error,
}


@dataclass(frozen=True)
class Judges:
    """The frozen networks by which images and latents are judged. None is left out of the objective.

    Attributes:
        perceptual: LPIPS.
        features: the distance of another network's features.
        alignment: the vision transformer with whose features latents are aligned.
    """

    perceptual: Perceptual | None = None
    features: FeatureDistance | None = None
    alignment: Features | None = None


@dataclass(frozen=True)
class Comparison:
    """The terms that compare images with their reconstructions, each a scalar in fp32, averaged over the batch.

    Attributes:
        reconstruction: the weighted sum of the terms of `loss.reconstruction`.
        parts: those terms, unweighted, by their names.
        lpips: LPIPS of an image; 0 when it is off.
        features: the distance of an image's features; None when it is off.
    """

    reconstruction: Tensor
    parts: dict[str, Tensor]
    lpips: Tensor
    features: Tensor | None

    def total(self, config: LossConfig) -> Tensor:
        """Their weighted sum."""
        total = self.reconstruction + config.lpips_weight * self.lpips
        return total if self.features is None else total + config.features.weight * self.features

    def logged(self, judges: Judges, suffix: str = "") -> dict[str, Tensor]:
        """The terms that are on, by their names in the log. LPIPS and features are named after their networks."""
        named = {"reconstruction": self.reconstruction}
        if len(self.parts) > 1:
            named |= self.parts
        if judges.perceptual is not None:
            named[judges.perceptual.name] = self.lpips
        if judges.features is not None and self.features is not None:
            named[judges.features.name] = self.features
        return {f"{name}{suffix}": term for name, term in named.items()}


@dataclass(frozen=True)
class LossTerms:
    """Unweighted terms, each a scalar in fp32, averaged over the batch.

    Attributes:
        comparison: the terms that compare images with their reconstructions.
        kl: the KL of an image in nats, divided by C·H·W.
        kl_penalty: the same in the objective, where free bits may make it larger.
        equivariance: `comparison` of the transformed image, weighted and summed; None when it is off.
        logvar: s, the log-variance of the likelihood; None unless it is learned.
        nelbo: the negative ELBO of an image in nats, with a KL weight of 1; None unless the likelihood is Bernoulli.
    """

    comparison: Comparison
    kl: Tensor
    kl_penalty: Tensor
    equivariance: Tensor | None
    logvar: Tensor | None
    nelbo: Tensor | None

    def logged(self, judges: Judges) -> dict[str, Tensor]:
        """The terms that are on, under their names in the log."""
        named = self.comparison.logged(judges) | {"kl": self.kl}
        optional = {"equivariance": self.equivariance, "logvar": self.logvar, "nelbo": self.nelbo}
        return named | {name: term for name, term in optional.items() if term is not None}

    def nll(self, config: LossConfig) -> Tensor:
        """The objective without the KL term and the discriminator's.

        With a learned s it is LDM's negative log-likelihood, (reconstruction + w·LPIPS) / e^s + s.
        """
        nll = self.comparison.total(config)
        if self.equivariance is not None:
            nll = nll + config.equivariance.weight * self.equivariance
        return nll if self.logvar is None else nll * torch.exp(-self.logvar) + self.logvar

    def total(self, config: LossConfig, kl_weight: float) -> Tensor:
        """The objective without the discriminator's term."""
        return self.nll(config) + kl_weight * self.kl_penalty


def loss_terms(
    images: Tensor,
    output: Tensor,
    posterior: DiagonalGaussian,
    config: LossConfig,
    judges: Judges = Judges(),
    transformed: tuple[Tensor, Tensor] | None = None,
    logvar: Tensor | None = None,
) -> LossTerms:
    """The terms of one batch.

    Args:
        images: (B, C, H, W) in [-1, 1] and in any float dtype; sums are computed in fp32. Those with alpha are given
            as they are seen (`sdvae.alpha.as_seen`), and so is the output; LPIPS and features leave alpha out.
        output: the decoder's output for them, the same shape: reconstructions, or logits with «bce».
        posterior: the posterior of the latents that were decoded.
        config: the settings of the loss, which say what terms there are.
        judges: the networks of the perceptual terms; by default none.
        transformed: t(x) and D(t(z)), for the equivariance term.
        logvar: s, a scalar.
    """
    comparison = compare(images, output, config, judges)
    values = images[0].numel()
    kl = posterior.kl().mean() / values
    is_bernoulli = config.reconstruction == "bce"
    return LossTerms(
        comparison=comparison,
        kl=kl,
        kl_penalty=free_bits_kl(posterior, config.free_bits).mean() / values if config.free_bits > 0 else kl,
        equivariance=compare(*transformed, config, judges).total(config) if transformed is not None else None,
        logvar=logvar,
        nelbo=(comparison.reconstruction + kl).detach() * values if is_bernoulli else None,
    )


def compare(images: Tensor, output: Tensor, config: LossConfig, judges: Judges) -> Comparison:
    """The terms that compare images with the decoder's output, in fp32.

    Args:
        images: (B, C, H, W) in [-1, 1].
        output: the same shape; see `loss_terms`.
        config: the settings of the loss.
        judges: the networks of the perceptual terms.
    """
    images, output = images.float(), output.float()
    weights = config.reconstruction_terms
    parts = {name: RECONSTRUCTION_ERRORS[name](images, output) for name in weights}
    reconstruction = torch.stack([weight * parts[name] for name, weight in weights.items()]).sum()
    y, x = colours(bernoulli_mean(output) if "bce" in weights else output), colours(images)
    return Comparison(
        reconstruction=reconstruction,
        parts=parts,
        lpips=judges.perceptual(y, x).mean() if judges.perceptual is not None else images.new_zeros(()),
        features=judges.features(y, x).mean() if judges.features is not None else None,
    )


@dataclass(frozen=True)
class Outcome:
    """What the step needs of a forward pass of a VAE or of a student.

    The objective is `nll` + `rest`, and the discriminator's term.

    Attributes:
        nll: a scalar, the terms of the objective that depend on `outputs`.
        rest: a scalar, the other terms.
        outputs: the outputs on which `nll` depends; the decoder's is first.
        real: real inputs of the discriminator, without gradients.
        fake: fake inputs of the discriminator, with gradients.
        values: scalars for the log.
    """

    nll: Tensor
    rest: Tensor
    outputs: list[Tensor]
    real: Tensor
    fake: Tensor
    values: dict[str, Tensor]


def transformation_at(step: int, seed: int, config: EquivarianceConfig) -> Transformation | None:
    """The transformation of step `step`, if it has one: the same on every process and in all its micro-batches."""
    if not config.is_on:
        return None
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    which = int(torch.randint(len(config.scales), (), generator=generator))
    turns = int(torch.randint(4, (), generator=generator)) if config.rotations else 0
    if config.replaces and float(torch.rand((), generator=generator)) >= config.probability:
        return None
    return Transformation(config.scales[which], turns)


def kl_weight_at(step: int, config: LossConfig) -> float:
    """The KL weight of step `step` (counted from 0): a linear warm-up against posterior collapse.

    Bowman et al. 2016, «Generating sentences from a continuous space», section 3.
    """
    if step >= config.kl_warmup_steps:
        return config.kl_weight
    return config.kl_weight * (step + 1) / (config.kl_warmup_steps + 1)


def learning_rate_at(step: int, peak: float, config: OptimizerConfig, steps: int) -> float:
    """The learning rate of step `step` of `steps`, counted from 0: linear warm-up, then the schedule.

    It depends only on the step, so a run can be continued without the state of a scheduler.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        left = 0.5 * (1.0 + math.cos(math.pi * done))
    elif config.schedule == "wsd":
        first = max(config.warmup_steps, steps - round(config.decay_fraction * steps))  # the step before it falls
        left = 1.0 - math.sqrt(max(0, step - first) / max(1, steps - first))
    else:
        return peak
    return peak * (config.final_fraction + (1.0 - config.final_fraction) * left)
