"""A student of a VAE: what it learns from, and its objective. `sdvae distil` trains one.

    images --teacher's encoder--> posterior --sample or mode--> z --teacher's decoder--> pictures
    images --student's encoder--> latents, compared with the posterior's mode
                                  z --student's decoder--> reconstructions, compared with images and pictures

This is knowledge distillation (Hinton et al. 2015), with the networks of TAESD. All latents that the student sees are
scaled as diffusion models see them (`sdvae.latents.scaling`); those of FLUX.2's kind in the encoder's layout, without
patches. The two halves of the student learn at the same time and
independently: its decoder learns from the teacher's latents, never from its own encoder's, so that it fits what a
diffusion model generates, and both halves can be used alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.latents.scaling import scaling_of
from sdvae.model import AutoencoderTiny, ConvolutionalVAE, DiagonalGaussian
from sdvae.model.state import sha256_of_weights
from sdvae.noise import posterior_generators
from sdvae.roundtrip import decode_images, encode_images
from sdvae.training.config import DistilConfig, TrainConfig
from sdvae.training.initialise import initialise_student
from sdvae.training.objective import Judges, Outcome, compare


class Lesson(NamedTuple):
    """What a teacher makes of a batch of images, without gradients.

    Attributes:
        mode: (B, C_z, h, w) fp32, the scaled mode of the posterior.
        z: (B, C_z, h, w) fp32, the scaled latents that the student decodes: a sample or the mode.
        picture: (B, C, H, W) fp32, the teacher's image of z, nominally in [-1, 1]; None if it was not asked for.
    """

    mode: Tensor
    z: Tensor
    picture: Tensor | None


class Teacher:
    """The VAE that a student learns from, frozen.

    Attributes:
        vae: the VAE.
        scaling: maps its latents to those of diffusion models.
    """

    def __init__(self, vae: ConvolutionalVAE, accelerator: Accelerator):
        self.vae = vae.eval().requires_grad_(False)
        self.scaling = scaling_of(vae)
        self._autocast = accelerator.autocast

    @torch.no_grad()
    def lesson(
        self,
        images: Tensor,
        generators: list[torch.Generator] | None = None,
        moments: Tensor | None = None,
        *,
        with_picture: bool = True,
    ) -> Lesson:
        """Encode and decode images, in the precision of the run.

        Args:
            images: (B, C, H, W) in [-1, 1].
            generators: the generators of the posterior's noise, one for each image; None takes the posterior's mode.
            moments: (B, 2·C_z, h, w), the parameters of the images' posteriors, if they are encoded already. Then the
                encoder does not run.
            with_picture: whether to decode.
        """
        with self._autocast():
            if moments is None:
                posterior = encode_images(self.vae, images)
            else:
                posterior = DiagonalGaussian(moments.to(images.device, non_blocking=True))
            z = posterior.mode() if generators is None else posterior.sample(generators)
            picture = decode_images(self.vae, z, images.shape[2:]).float() if with_picture else None
        scaled, mode = self.scaling.scaled(z.float()), self.scaling.scaled(posterior.mode().float())
        return Lesson(mode, scaled, picture)

    def sha256(self) -> str:
        """A hash of the weights, and of the factors that scale the latents."""
        factors = {"shift": self.scaling.shift, "scale": self.scaling.scale}
        return sha256_of_weights(self.vae.state_dict() | factors)


class StudentObjective:
    """The objective of a student for a batch of images.

    With x the images, p the teacher's pictures, x̂ the decoder's output, w = distil.teacher_weight and d(a, b) =
    reconstruction error + lpips_weight · LPIPS + features.weight · features, it is

        (1 - w) · d(x, x̂) + w · d(p, x̂) + latent_weight · mean (latents - mode)² [+ GAN].

    Args:
        config: the recipe.
        wrapped: the student's forward pass, under DDP and autocast.
        teacher: the teacher.
        judges: the networks of the perceptual terms.
    """

    def __init__(self, config: TrainConfig, wrapped: nn.Module, teacher: Teacher, judges: Judges):
        self.config = config
        self.wrapped = wrapped
        self.teacher = teacher
        self.judges = judges

    def __call__(self, step: int, images: Tensor, noise_seeds: Tensor, moments: Tensor | None = None) -> Outcome:
        """The forward passes of teacher and student.

        Args:
            step: not used, since no weight here depends on it.
            images: (B, C, H, W) in [-1, 1].
            noise_seeds: (B,) int64, the seeds of the posterior's noise.
            moments: (B, 2·C_z, h, w), the parameters of the teacher's posteriors, if the images are encoded already.
        """
        settings, loss = self.config.distil, self.config.loss
        generators = posterior_generators(noise_seeds) if settings.latents == "sample" else None
        lesson = self.teacher.lesson(images, generators, moments, with_picture=settings.teacher_weight > 0)
        output = self.wrapped(images, lesson.z)
        nll = images.new_zeros((), dtype=torch.float32)
        values: dict[str, Tensor] = {}
        targets = [(1 - settings.teacher_weight, images, ""), (settings.teacher_weight, lesson.picture, "_to_teacher")]
        for weight, target, suffix in targets:
            if weight > 0 and target is not None:
                comparison = compare(target, output.reconstruction, loss, self.judges)
                nll = nll + weight * comparison.total(loss)
                values |= comparison.logged(self.judges, suffix)
        real = lesson.picture if settings.teacher_weight == 1 and lesson.picture is not None else images
        latent_error = (output.latents.float() - lesson.mode).square().mean()
        return Outcome(
            nll=nll,
            rest=settings.latent_weight * latent_error,
            outputs=[output.reconstruction],
            real=real,
            fake=output.reconstruction,
            values={**values, "latents": latent_error},
        )


def build_student(config: DistilConfig, teacher: ConvolutionalVAE) -> AutoencoderTiny:
    """A student with new weights, for the images and the latents of a teacher.

    Raises:
        InputError: when the compression ratio is not the teacher's.
    """
    levels, ratio = len(config.encoder_blocks), teacher.spatial_compression_ratio
    if 2 ** (levels - 1) != ratio:
        raise InputError(
            f"got distil.encoder_blocks and distil.decoder_blocks with {levels} levels, which compress by "
            f"{2 ** (levels - 1)}; need {ratio.bit_length()} levels, since {config.teacher} compresses by {ratio}"
        )
    student = AutoencoderTiny(
        in_channels=teacher.config.in_channels,
        out_channels=teacher.config.out_channels,
        latent_channels=teacher.config.latent_channels,
        encoder_block_out_channels=(config.encoder_width,) * levels,
        decoder_block_out_channels=(config.decoder_width,) * levels,
        num_encoder_blocks=config.encoder_blocks,
        num_decoder_blocks=config.decoder_blocks,
        use_midblock_gn=config.use_midblock_gn,
    )
    initialise_student(student)
    return student
