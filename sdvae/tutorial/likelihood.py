"""The ELBO of a VAE with a Bernoulli likelihood, a tighter bound on log p(x), and pictures drawn from the prior.

With a Bernoulli likelihood (`loss.reconstruction: bce`) the decoder outputs the logit of each pixel's brightness.
Images are in [-1, 1] as everywhere. `probabilities` maps them to [0, 1], and the cross-entropy treats a grey value as
the probability of white, as tutorials on MNIST do. `sdvae.roundtrip.bernoulli_mean` maps logits to [-1, 1].

All figures are in nats for each image, summed over its values. If an image was padded for the encoder, only its own
pixels count, so MNIST's figures are sums over 28 · 28 pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sdvae.errors import InputError
from sdvae.model import ConvolutionalVAE, DiagonalGaussian
from sdvae.roundtrip import bernoulli_mean, compute_device, crop_to, decode_output, encode_images


def probabilities(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return (images + 1) / 2


def bernoulli_nll(images: Tensor, logits: Tensor) -> Tensor:
    """-log p(x|z) = -Σ x log p + (1 - x) log(1 - p), in nats (Kingma & Welling 2014, appendix C.1).

    Args:
        images: x, (B, C, H, W) in [-1, 1].
        logits: the logits of p, the same shape.

    Returns:
        (B,) in fp32 or wider.
    """
    targets = probabilities(images.to(torch.promote_types(images.dtype, torch.float32)))
    return F.binary_cross_entropy_with_logits(logits.to(targets), targets, reduction="none").sum(dim=(1, 2, 3))


def bernoulli_error(images: Tensor, logits: Tensor) -> Tensor:
    """The mean of `bernoulli_nll` over the batch, in nats for each value: a scalar."""
    return bernoulli_nll(images, logits).mean() / images[0].numel()


def free_bits_kl(posterior: DiagonalGaussian, nats: float) -> Tensor:
    """Σ_c max(λ, KL_c) for each image: a latent channel that costs less than λ nats counts as λ and has no gradient.

    Kingma et al. 2016, «Improving variational inference with inverse autoregressive flow», equation 15, with the KL of
    each image in place of the mean over the mini-batch, so that the gradient does not depend on how a batch is divided.

    Args:
        posterior: over (B, C, h, w).
        nats: λ.

    Returns:
        (B,), nats.
    """
    return posterior.kl_map().sum(dim=(2, 3)).clamp(min=nats).sum(dim=1)


@dataclass(frozen=True)
class Elbo:
    """The two terms of the negative ELBO of each image, in nats, with the names of Alemi et al. 2018.

    Attributes:
        distortion: -log p(x|z) for a z from the posterior, (B,).
        rate: KL(q(z|x) || p(z)), (B,).
    """

    distortion: Tensor
    rate: Tensor

    @property
    def nelbo(self) -> Tensor:
        """-ELBO = distortion + rate >= -log p(x): (B,)."""
        return self.distortion + self.rate


def elbo(
    vae: ConvolutionalVAE,
    images: Tensor,
    labels: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sample_posterior: bool = True,
    posterior: DiagonalGaussian | None = None,
) -> Elbo:
    """The ELBO of each image, estimated from one sample (Kingma & Welling 2014, equation 7 with L = 1).

    Args:
        vae: a VAE with a Bernoulli likelihood.
        images: (B, C, H, W) in [-1, 1].
        labels: (B,), for a conditional VAE; the ELBO is then a bound on log p(x|y).
        generator: the generator of the posterior's noise; a list has one for each image.
        sample_posterior: False takes z = μ, for which the result is not a bound. Many tutorials print it as their test
            loss, since their models sample only in training.
        posterior: the posterior of the images, if it is known already.
    """
    if posterior is None:
        posterior = encode_images(vae, images, labels)
    z = posterior.sample(generator) if sample_posterior else posterior.mode()
    logits = decode_output(vae, z, images.shape[2:], labels)
    return Elbo(bernoulli_nll(images, logits), posterior.kl())


def log_likelihood(
    vae: ConvolutionalVAE,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    samples: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The importance-weighted estimate of log p(x), in nats: in expectation a lower bound, tighter with more samples.

    log 1/K Σ_k p(x|z_k) p(z_k) / q(z_k|x) with z_k from q (Burda et al. 2016, equation 8); K = 1 is the ELBO.

    Args:
        vae: a VAE with a Bernoulli likelihood.
        images: (B, C, H, W) in [-1, 1].
        labels: (B,), for a conditional VAE.
        samples: K, at least 1.
        generator: the generator of the posterior's noise.

    Returns:
        (B,).
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
    vae: ConvolutionalVAE,
    count: int,
    side: int,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Pictures from z ~ N(0, I).

    Args:
        vae: a VAE with a Bernoulli likelihood.
        count: the number of pictures.
        side: side of the images that the VAE was trained on, in pixels.
        labels: (count,), for a conditional VAE: the classes to draw.
        generator: the generator that draws z.
        guidance: w in p(x|z, y)^w p(x|z)^(1 - w), for a VAE trained with data.label_dropout: above 1 it exaggerates
            what the label changes (Ho & Salimans 2022, equation 6, on the decoder's logits). 1 draws from p(x|z, y).

    Returns:
        (count, C, side, side) in [-1, 1].

    Raises:
        InputError: for guidance without labels.
    """
    if guidance != 1 and labels is None:
        raise InputError(
            f"got guidance={guidance} without labels; need labels for guidance; give them, or leave it out"
        )
    size = math.ceil(side / vae.spatial_compression_ratio)
    z = torch.randn(count, vae.config.latent_channels, size, size, generator=generator)
    z = z.to(compute_device(vae), vae.dtype)
    given = {} if labels is None else {"labels": labels}
    logits = vae.decode(z, **given).sample
    if guidance != 1:
        logits = torch.lerp(vae.decode(z).sample, logits, guidance)
    return bernoulli_mean(crop_to(logits, side, side))
