"""Checks before the first step. Each finding is one line with its numbers and, where there is one, a remedy.

config.py checks the recipe on its own. `check_main_is_newest` compares the checkpoints that the processes see,
`check_recipe` the recipe with the VAE, the data and LPIPS's trunk. `probe` runs the VAE on the first images, and
`probe_teacher` the VAE that a student learns from.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from sdvae.alpha import as_seen, colours, random_backgrounds
from sdvae.errors import InputError
from sdvae.metrics.image import psnr
from sdvae.model import ConvolutionalVAE
from sdvae.noise import posterior_generators
from sdvae.roundtrip import decode_images, decode_output, encode_images
from sdvae.training.checkpoint import checkpoint_name, newest_step
from sdvae.training.config import DataConfig, TrainConfig
from sdvae.training.distil import Teacher
from sdvae.training.objective import Judges, loss_terms
from sdvae.training.processes import place
from sdvae.training.run_folder import RunFolder

LARGE = 20e6  # parameters; a VAE as large as SD's has 84 million
LARGE_LEARNING_RATE = 1e-3  # LDM takes 4.5e-6 times the images in a step: 1.1e-4 for its batch of 24
FEW_IMAGES = 1_000
FEW_FOR_FRECHET = 5_000  # images; the bias of FID falls with 1/n, and covariances have 2,048 rows
FEW_VALIDATION_IMAGES = 8
SCALED_LATENT_STD = (0.5, 2.0)  # diffusion models expect 1; the student's decoder bends latents near 3 and beyond
SMALLEST_LATENT_STD, LARGEST_LATENT_STD = 1e-3, 1e3
RECOGNISABLE_PSNR = 15.0  # dB; LDM's kl-f8 reaches 23.4 dB on COCO
PROBED_IMAGES = 4


def check_main_is_newest(run: RunFolder, accelerator: Accelerator) -> None:
    """Check that the main process sees the newest checkpoint, since the run continues from what it sees.

    A launcher that was told no rank may make another machine the main one, which would start from step 0.

    Raises:
        InputError: on every process, when another sees a newer one.
    """
    everyone = gather_object([(newest_step(run.checkpoints), place(accelerator))])
    (main_step, main), (step, where) = everyone[0], max(everyone)
    if step > main_step:
        raise InputError(
            f"{where} has {checkpoint_name(step)} in its output_dir, and {main}, from which the run continues, has "
            f"{checkpoint_name(main_step) if main_step >= 0 else 'none'}; give rank 0 to the machine whose run this is "
            "(--node_rank 0 or --machine_rank 0), or remove that folder"
        )


def check_recipe(
    config: TrainConfig,
    *,
    images_per_step: int,
    train_images: int,
    validation_images: int,
    parameters: int,
    compression_ratio: int,
    perceptual: str | None,
) -> list[str]:
    """Findings that need no forward pass.

    Args:
        config: the recipe.
        images_per_step: images in a step of all processes together.
        train_images: the number of training images.
        validation_images: the number of validation images.
        parameters: the number of the VAE's parameters.
        compression_ratio: the VAE's compression ratio; the VAE may be one that is fine-tuned.
        perceptual: LPIPS's name in the log; None if the loss has no LPIPS.

    Raises:
        InputError: when the run cannot work at all.
    """
    metrics = ["psnr", "ssim"] + ([perceptual] if perceptual is not None else [])
    metrics += ["nelbo"] if config.loss.reconstruction == "bce" else []
    wanted = [name for name, on in (("rfid", config.validation.fid), ("rfdd", config.validation.fdd)) if on]
    metrics += wanted
    metrics += ["psnr_to_teacher", "psnr_round_trip"] if config.distil.teacher is not None else []
    if config.checkpoint.best_metric not in metrics:
        raise InputError(
            f"got checkpoint.best_metric={config.checkpoint.best_metric!r}; need one of {', '.join(metrics)}"
        )
    sides = [("training crops", side) for side in config.data.training_resolutions]
    for what, side in [*sides, ("validation crops", config.data.evaluation_resolution)]:
        if side % compression_ratio and not config.data.pad:
            raise InputError(
                f"got {what} of {side} pixels; need a multiple of {compression_ratio}, the compression ratio of "
                f"{config.fine_tune.source or config.distil.student}"
            )
    findings = []
    gan = config.loss.discriminator
    if gan.weight > 0:
        if gan.generator_start_step >= config.steps:
            findings.append(
                f"the discriminator acts on the VAE from step {gan.generator_start_step + 1}, after the last step, "
                f"{config.steps}: it never acts; lower loss.discriminator.start_step"
            )
        elif gan.generator_start_step + gan.ramp_steps >= config.steps:
            findings.append(
                f"the discriminator's ramp ends in step {gan.generator_start_step + gan.ramp_steps + 1}, after the "
                f"last step, {config.steps}: its weight never reaches {gan.weight}; lower loss.discriminator.ramp_steps"
            )
    rate = config.optimizer.learning_rate
    if parameters > LARGE and rate > LARGE_LEARNING_RATE:
        findings.append(
            f"optimizer.learning_rate={rate:g} is high for {parameters / 1e6:.0f} M parameters, "
            f"{rate / (4.5e-6 * images_per_step):.0f} times LDM's rate of 4.5e-6 for each image in a step; it is used "
            "as given, not multiplied by the batch or the number of processes; lower it if that was not meant"
        )
    if train_images < images_per_step:
        findings.append(
            f"a step takes {images_per_step} images and there are only {train_images}: a step has some image more than "
            "once; lower batch_size, or give more images"
        )
    elif parameters > LARGE and train_images < FEW_IMAGES and config.fine_tune.source is None:
        findings.append(
            f"{train_images} images are few for {parameters / 1e6:.0f} M new parameters: expect overfitting; "
            "fine-tune a published VAE (fine_tune.source), or take a smaller model"
        )
    if wanted and validation_images < 2:
        raise InputError(
            f"got validation.{wanted[0][1:]}=true with {validation_images} validation image; need two or more, and "
            "thousands for a reliable value; raise data.validation_count"
        )
    if wanted and validation_images < FEW_FOR_FRECHET:
        findings.append(
            f"{' and '.join(wanted)} of {validation_images} images are biased upwards: they compare only runs on the "
            "same images"
        )
    if validation_images < FEW_VALIDATION_IMAGES:
        findings.append(
            f"there are only {validation_images} validation images, so their mean is uncertain; raise "
            "data.validation_count if you can"
        )
    if config.model.in_channels == 4 and config.data.background != DataConfig.background:
        findings.append("data.background is not used: this VAE's images keep their alpha")
    seen = config.steps * images_per_step
    if seen < train_images:
        findings.append(f"the run ends after {seen} of the {train_images} images; raise steps to use them all")
    if config.loss.kl_warmup_steps >= config.steps:
        findings.append(
            f"loss.kl_warmup_steps={config.loss.kl_warmup_steps} in a run of {config.steps} steps: the KL term never "
            "has its full weight; lower it, or raise steps"
        )
    return findings


@torch.no_grad()
def probe(
    vae: ConvolutionalVAE,
    images: Tensor,
    noise_seeds: Tensor,
    config: TrainConfig,
    judges: Judges,
    **conditioning: Tensor,
) -> list[str]:
    """Findings from one forward pass.

    Args:
        vae: the VAE before its first step.
        images: (B, C, H, W) in [-1, 1], some training images; PROBED_IMAGES are enough.
        noise_seeds: (B,) int64.
        config: the recipe.
        judges: the networks of the perceptual terms.
        conditioning: other inputs of the VAE, such as labels.
    """
    posterior = encode_images(vae, images, **conditioning)
    z = posterior.sample(posterior_generators(noise_seeds))
    output = decode_output(vae, z, images.shape[2:], **conditioning)
    background = random_backgrounds(images, noise_seeds)
    terms = loss_terms(as_seen(images, background), as_seen(output, background), posterior, config.loss, judges)
    findings = []
    std = float(posterior.mean.std())
    if not torch.isfinite(output).all():
        findings.append("the first reconstruction is not finite: the weights or the precision are wrong")
    if not SMALLEST_LATENT_STD < std < LARGEST_LATENT_STD:
        what = "exploding" if std > 1 else "collapsing"
        findings.append(f"{what} latents: their std is {std:.3g} before the first step; check the starting weights")
    nll, kl = float(terms.nll(config.loss)), config.loss.kl_weight * float(terms.kl)
    if kl > nll:
        findings.append(
            f"the weighted KL term, {kl:.3g}, is larger than the reconstruction term, {nll:.3g}: the posterior will "
            "collapse; lower loss.kl_weight, which multiplies nats for a whole image (LDM: 1e-6) and is not a beta "
            "near 1"
        )
    if config.fine_tune.source is not None:
        reconstruction = decode_images(vae, posterior.mode(), images.shape[2:], **conditioning)
        findings += unlike_images(images, reconstruction, config.fine_tune.source)
    return findings


def probe_teacher(teacher: Teacher, images: Tensor, config: TrainConfig, moments: Tensor | None = None) -> list[str]:
    """Findings from one forward pass of the VAE that a student learns from.

    Args:
        teacher: the teacher.
        images: (B, C, H, W) in [-1, 1], some training images; PROBED_IMAGES are enough.
        config: the recipe.
        moments: the parameters of their posteriors, if they are encoded already.
    """
    lesson = teacher.lesson(images, moments=moments)
    assert lesson.picture is not None
    std, (low, high) = float(lesson.mode.std()), SCALED_LATENT_STD
    findings = unlike_images(images, lesson.picture, config.distil.teacher)
    if not low <= std <= high:
        findings.append(
            f"the scaled latents of {config.distil.teacher} have std {std:.3g} on the first images, and diffusion "
            "models expect 1: is its scaling_factor right? give a config.json that has it with distil.config"
        )
    return findings


def unlike_images(images: Tensor, reconstruction: Tensor, source: str | None) -> list[str]:
    """A finding if a VAE that was read from `source` does not reconstruct images, (B, C, H, W) in [-1, 1]."""
    mean_db = float(psnr(colours(images), colours(reconstruction)).mean())  # a widened VAE does not know alpha yet
    if mean_db >= RECOGNISABLE_PSNR:
        return []
    return [f"{source} reconstructs the first images at only {mean_db:.1f} dB: is it the right VAE?"]
