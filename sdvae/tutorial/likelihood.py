"""The ELBO of a VAE with a Bernoulli likelihood, a tighter bound on log p(x), and pictures drawn from the prior.

This is the one place that says what the decoder's output means when `loss.reconstruction` is «bce»: the logit of each
pixel's brightness. Images stay in [-1, 1] as everywhere; `probabilities` takes them to [0, 1], where the cross-entropy
counts a grey value as the probability of white, as the tutorials on MNIST do, and `pictures` takes logits to [-1, 1].

All figures are in nats an image, summed over its values. An image that was padded for the encoder is compared over its
own pixels only, so MNIST's figures are over 28 · 28 of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.errors import InputError
from sdvae.model import AutoencoderKL, DiagonalGaussian
from sdvae.roundtrip import crop_to, decode_output, encode_images


def probabilities(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return (images + 1) / 2


def pictures(logits: Tensor) -> Tensor:
    """Logits -> [-1, 1]: the Bernoulli's mean, 2 sigmoid(l) - 1 = tanh(l / 2)."""
    return torch.tanh(logits / 2)


def bernoulli_nll(images: Tensor, logits: Tensor) -> Tensor:
    """-log p(x|z) = -Σ x log p + (1 - x) log(1 - p), in nats (Kingma & Welling 2014, appendix C.1).

    Args: images: (B, C, H, W) in [-1, 1]. logits: of p, in the same shape.

    Returns: (B,) in fp32 or wider.
    """
    targets = probabilities(images.to(torch.promote_types(images.dtype, torch.float32)))
    return F.binary_cross_entropy_with_logits(logits.to(targets), targets, reduction="none").sum(dim=(1, 2, 3))


@dataclass(frozen=True)
class Elbo:
    """The two terms of the negative ELBO of each image, in nats, (B,) each.

    distortion: -log p(x|z) for a z from the posterior. rate: KL(q(z|x) || p(z)). (Alemi et al. 2018 name them so.)
    """

    distortion: Tensor
    rate: Tensor

    @property
    def nelbo(self) -> Tensor:
        """-ELBO = distortion + rate >= -log p(x): (B,)."""
        return self.distortion + self.rate


def elbo(
    vae: AutoencoderKL,
    images: Tensor,
    labels: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sample_posterior: bool = True,
) -> Elbo:
    """One sample's estimate of the ELBO of each image (Kingma & Welling 2014, equation 7 with L = 1).

    Args:
        images: (B, C, H, W) in [-1, 1].
        labels: (B,), of a conditional VAE: then all is given the label, log p(x|y) >= …
        generator: of the posterior's noise; a list has one for each image.
        sample_posterior: False takes z = μ instead: what tutorials print as the test loss, since their models sample
            in training only. It bounds nothing.
    """
    posterior = encode_images(vae, images, labels)
    z = posterior.sample(generator) if sample_posterior else posterior.mode()
    logits = decode_output(vae, z, images.shape[2:], labels)
    return Elbo(bernoulli_nll(images, logits), posterior.kl())


def log_likelihood(
    vae: AutoencoderKL,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    samples: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The importance-weighted estimate of log p(x), in nats: a lower bound in expectation, tighter with each sample.

    log 1/K Σ_k p(x|z_k) p(z_k) / q(z_k|x) with z_k from q (Burda et al. 2016, equation 8); K = 1 is the ELBO.

    Args: as of `elbo`; samples: K, at least 1.

    Returns: (B,).
    """
    posterior = encode_images(vae, images, labels)
    prior = DiagonalGaussian(torch.zeros_like(posterior.parameters))
    log_weights = []
    for _ in range(samples):
        z = posterior.sample(generator)
        nll = bernoulli_nll(images, decode_output(vae, z, images.shape[2:], labels))
        log_weights.append(posterior.nll(z) - prior.nll(z) - nll)
    return torch.logsumexp(torch.stack(log_weights), dim=0) - math.log(samples)


def draw_from_prior(
    vae: AutoencoderKL,
    count: int,
    side: int,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Pictures from z ~ N(0, I), not from any image: (count, C, side, side) in [-1, 1].

    Args:
        side: pixels, of the images that the VAE was trained on.
        labels: (count,), of a conditional VAE: what to draw.
        guidance: w, which exaggerates what the label changes in p(x|z, y)^w p(x|z)^(1 - w), for a VAE trained with
            data.label_dropout: Ho & Salimans 2022, equation 6, on the decoder's logits. 1 draws from p(x|z, y).

    Raises: InputError for guidance without labels.
    """
    if guidance != 1 and labels is None:
        raise InputError(f"got guidance={guidance} without labels; need labels to be guided by, or leave it out")
    size = math.ceil(side / vae.spatial_compression_ratio)
    z = torch.randn(count, vae.config.latent_channels, size, size, generator=generator).to(vae.device, vae.dtype)
    given = {} if labels is None else {"labels": labels}
    logits = vae.decode(z, **given).sample
    if guidance != 1:
        logits = torch.lerp(vae.decode(z).sample, logits, guidance)
    return pictures(crop_to(logits, side, side))
