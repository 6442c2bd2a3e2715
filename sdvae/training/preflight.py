"""What looks wrong before the first step: each finding is one line with its numbers and a remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from sdvae.errors import InputError
from sdvae.metrics import SMALLEST_LPIPS_SIDE
from sdvae.metrics.image import image_metrics
from sdvae.metrics.perceptual import Perceptual
from sdvae.model import AutoencoderKL
from sdvae.noise import posterior_generators
from sdvae.roundtrip import decode_images, decode_output, encode_images
from sdvae.training.config import TrainConfig
from sdvae.training.discriminator import smallest_side
from sdvae.training.objective import loss_terms

LARGE = 20e6  # parameters; a VAE as large as SD's has 84 million
LARGE_LEARNING_RATE = 1e-3  # LDM: 4.5e-6 for each image of a step, 1.1e-4 at its batch of 24
FEW_IMAGES = 1_000
FEW_VALIDATION_IMAGES = 8
SMALLEST_LATENT_STD, LARGEST_LATENT_STD = 1e-3, 1e3
RECOGNISABLE_PSNR = 15.0  # dB; kl-f8 has 23.4 on COCO
PROBED_IMAGES = 4


def check_recipe(
    config: TrainConfig, *, images_per_step: int, train_images: int, validation_images: int, parameters: int
) -> list[str]:
    """Findings that need no forward pass.

    Raises: InputError where the run could not work at all.
    """
    findings = []
    gan = config.loss.discriminator
    if gan.weight > 0:
        side = smallest_side(gan.layers)
        if gan.sees == "images" and config.data.resolution < side:
            raise InputError(
                f"got data.resolution={config.data.resolution} with loss.discriminator.layers={gan.layers}; need "
                f"crops of {side} pixels or more for one patch; take fewer layers"
            )
        if gan.generator_start_step >= config.steps:
            findings.append(
                f"the discriminator reaches the VAE in step {gan.generator_start_step + 1}, after the last, "
                f"{config.steps}: it never acts; lower loss.discriminator.start_step"
            )
        elif gan.generator_start_step + gan.ramp_steps >= config.steps:
            findings.append(
                f"the discriminator's ramp ends in step {gan.generator_start_step + gan.ramp_steps + 1}, after the "
                f"last, {config.steps}: its weight never reaches {gan.weight}; shorten loss.discriminator.ramp_steps"
            )
    equivariance = config.loss.equivariance
    shrunk = config.data.resolution * min(equivariance.scales)
    if equivariance.weight > 0 and config.loss.lpips_weight > 0 and shrunk < SMALLEST_LPIPS_SIDE:
        raise InputError(
            f"got loss.equivariance.scales={list(equivariance.scales)} on crops of {config.data.resolution}; need "
            f"images of {SMALLEST_LPIPS_SIDE} pixels or more for LPIPS; take larger factors or crops"
        )
    rate = config.optimizer.learning_rate
    if parameters > LARGE and rate > LARGE_LEARNING_RATE:
        findings.append(
            f"optimizer.learning_rate={rate:g} is high for {parameters / 1e6:.0f} M parameters, "
            f"{rate / (4.5e-6 * images_per_step):.0f} times LDM's 4.5e-6 an image of the step; it is used as it "
            "stands here: was it multiplied by batch or processes already?"
        )
    if train_images < images_per_step:
        findings.append(
            f"a step takes {images_per_step} images and there are {train_images}: each is in every step more than "
            "once; lower batch_size, or give more images"
        )
    elif parameters > LARGE and train_images < FEW_IMAGES and config.fine_tune.source is None:
        findings.append(
            f"{train_images} images are few for {parameters / 1e6:.0f} M new parameters: expect overfitting; "
            "fine-tune a published VAE (fine_tune.source), or take a smaller model"
        )
    if validation_images < FEW_VALIDATION_IMAGES:
        findings.append(
            f"{validation_images} validation images: their mean says little; raise data.validation_count where you can"
        )
    seen = config.steps * images_per_step / train_images
    if seen < 1:
        findings.append(f"the run ends when it has seen {seen:.0%} of the images; raise steps")
    if config.loss.kl_warmup_steps >= config.steps:
        findings.append(
            f"loss.kl_warmup_steps={config.loss.kl_warmup_steps} in {config.steps} steps: the KL term never has its "
            "full weight"
        )
    return findings


@torch.no_grad()
def probe(
    vae: AutoencoderKL,
    images: Tensor,
    noise_seeds: Tensor,
    config: TrainConfig,
    perceptual: Perceptual | None,
    labels: Tensor | None = None,
) -> list[str]:
    """Findings from one forward pass over training images (B, C, H, W) in [-1, 1], with labels (B,) if there are."""
    images = images[:PROBED_IMAGES]
    labels = None if labels is None else labels[:PROBED_IMAGES]
    posterior = encode_images(vae, images, labels)
    z = posterior.sample(posterior_generators(noise_seeds[:PROBED_IMAGES]))
    reconstruction = decode_output(vae, z, images.shape[2:], labels)
    terms = loss_terms(images, reconstruction, posterior, config.loss, perceptual)
    findings = []
    std = float(posterior.mean.std())
    if not torch.isfinite(reconstruction).all():
        findings.append("the first reconstruction is not finite: the weights or the precision are wrong")
    if not SMALLEST_LATENT_STD < std < LARGEST_LATENT_STD:
        what = "exploding" if std > 1 else "collapsing"
        findings.append(f"{what} latents: their std is {std:.3g} before the first step; check the starting weights")
    pull, kl = float(terms.nll(config.loss)), config.loss.kl_weight * float(terms.kl)
    if kl > pull:
        findings.append(
            f"the weighed KL term, {kl:.3g}, is more than all of the reconstruction, {pull:.3g}: the posterior will "
            "collapse; loss.kl_weight multiplies nats an image (LDM: 1e-6), as a beta near 1 would not"
        )
    if config.fine_tune.source is not None:
        rows = image_metrics(images, decode_images(vae, posterior.mode(), images.shape[2:], labels), posterior, None)
        psnr = sum(row["psnr"] for row in rows) / len(rows)
        if psnr < RECOGNISABLE_PSNR:
            findings.append(
                f"{config.fine_tune.source} reconstructs the first images at {psnr:.1f} dB only: is it the right VAE?"
            )
    return findings
