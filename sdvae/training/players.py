"""The two networks that learn, VAE (or student) and discriminator, each with its optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdvae.metrics.equivariance import Transformation
from sdvae.metrics.features import Features
from sdvae.model import Autoencoder, AutoencoderTiny, ConvolutionalVAE, DiagonalGaussian
from sdvae.roundtrip import decode_output, encode_images
from sdvae.training.config import DiscriminatorConfig, TrainConfig
from sdvae.training.discriminator import FeatureDiscriminator, LeCam, PatchDiscriminator
from sdvae.training.ema import WeightAverage, decay_of_half_life
from sdvae.training.objective import learning_rate_at
from sdvae.training.optimizer import build_optimizer
from sdvae.tutorial.adversary import LatentDiscriminator

FROZEN_PARTS = ("encoder.", "quant_conv.")  # the parts that latents depend on


class VAEOutput(NamedTuple):
    """The outputs of the VAE in a training step.

    They are a tuple of tensors, because accelerate converts such a tuple to fp32 after a forward pass under autocast.

    Attributes:
        reconstruction: (B, C, H, W), the decoder's output: images in [-1, 1], or logits. It is D(t(z)), of another
            height and width, in a step whose transformation comes alone.
        moments: (B, 2C_z, h, w), parameters of the posterior.
        transformed: D(t(z)); None without a transformation.
        logvar: s, the log-variance of the likelihood; None unless it is learned.
        projected: (B, D, h, w), the latents projected to features; None unless they are aligned.
    """

    reconstruction: Tensor
    moments: Tensor
    transformed: Tensor | None
    logvar: Tensor | None
    projected: Tensor | None

    @property
    def posterior(self) -> DiagonalGaussian:
        return DiagonalGaussian(self.moments)

    @property
    def nll_depends_on(self) -> list[Tensor]:
        """The outputs on which the objective without its KL term depends; the reconstruction is first."""
        return [x for x in (self.reconstruction, self.transformed, self.logvar) if x is not None]


class TrainingForward(nn.Module):
    """All computations of a step that have a gradient in the VAE, in one forward pass, which DDP and autocast wrap.

    Attributes:
        alone: whether in a step with a transformation only the transformed latents are decoded.
        logvar: s, the log-variance of the likelihood; None unless it is learned.
        projection: from latents to features of `feature_width` channels; None unless they are aligned.
    """

    def __init__(self, vae: ConvolutionalVAE, learn_logvar: bool, alone: bool, feature_width: int | None = None):
        super().__init__()
        self.vae, self.alone = vae, alone
        self.logvar = nn.Parameter(torch.zeros(())) if learn_logvar else None
        self.projection: nn.Conv2d | None = None
        if feature_width is not None:
            self.projection = nn.Conv2d(vae.config.latent_channels, feature_width, 1, bias=False)

    def forward(
        self,
        images: Tensor,
        generators: list[torch.Generator],
        transformation: Transformation | None,
        **conditioning: Tensor,
    ) -> VAEOutput:
        """Encode, sample, and decode the sample, its transformation, or both.

        Args:
            images: (B, C, H, W) in [-1, 1].
            generators: the generators of the posterior's noise, one for each image.
            transformation: the step's, for equivariance of the latents; None for none.
            conditioning: other inputs of `encode` and `decode`, such as labels.

        Returns:
            In a step with a transformation that comes `alone`, D(t(z)) is the reconstruction.
        """
        posterior = encode_images(self.vae, images, **conditioning)
        z = posterior.sample(generators)
        projected = None if self.projection is None else self.projection(z)
        transformed = None
        if transformation is not None:
            small = transformation(z, transformation.latent_size(z))
            transformed = self.vae.decode(small, **conditioning).sample
            if self.alone:
                return VAEOutput(transformed, posterior.parameters, None, self.logvar, projected)
        reconstruction = decode_output(self.vae, z, images.shape[2:], **conditioning)
        return VAEOutput(reconstruction, posterior.parameters, transformed, self.logvar, projected)


class StudentOutput(NamedTuple):
    """The outputs of a student in a training step.

    Attributes:
        reconstruction: (B, C, H, W), the image that its decoder makes of the teacher's latents, nominally in [-1, 1].
        latents: (B, C_z, h, w), the scaled latents that its encoder makes of the image.
    """

    reconstruction: Tensor
    latents: Tensor


class StudentForward(nn.Module):
    """All computations of a step that have a gradient in a student, in one forward pass.

    Its two halves learn independently: no gradient goes from the decoder to the encoder.
    """

    def __init__(self, student: AutoencoderTiny):
        super().__init__()
        self.vae = student

    def forward(self, images: Tensor, z: Tensor) -> StudentOutput:
        """Encode the images, and decode the teacher's latents.

        Args:
            images: (B, C, H, W) in [-1, 1].
            z: (B, C_z, h, w), scaled latents of the teacher.
        """
        latents = encode_images(self.vae, images).mode()
        return StudentOutput(decode_output(self.vae, z, images.shape[2:]), latents)


class Player:
    """A network that learns, with its optimizer.

    Attributes:
        network: the module itself.
        wrapped: the module under DDP and autocast, through which every forward pass of its own training goes.
        optimizer: over the parameters that train.
    """

    def __init__(self, network: nn.Module, wrapped: nn.Module, optimizer: torch.optim.Optimizer):
        self.network = network
        self.wrapped = wrapped
        self.optimizer = optimizer

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate

    def clip(self, scaler: Any, max_norm: float) -> Tensor:
        """Clip the gradients to a global norm, and return their norm before that."""
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self.trained, max_norm)

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Load the moments of an optimizer's state, and keep the settings of the present recipe."""
        groups = self.optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in groups]
        self.optimizer.load_state_dict(state)
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)


class Players:
    """The VAE or student, the moving average of its weights, and the discriminator, if there is one.

    Args:
        vae: the VAE or student on the accelerator's device. Parameters that do not train must be frozen already, since
            DDP expects a gradient from all others.
        config: the recipe.
        accelerator: wraps the networks.
        features: the frozen network of a discriminator that has one.
        feature_width: channels of the features with which latents are aligned, if they are.
    """

    def __init__(
        self,
        vae: Autoencoder,
        config: TrainConfig,
        accelerator: Accelerator,
        features: Features | None = None,
        feature_width: int | None = None,
    ):
        self.vae = vae
        decay, half_life = config.optimizer.ema_decay, config.optimizer.ema_half_life
        if half_life is not None:
            decay = decay_of_half_life(half_life, config.images_per_step(accelerator.num_processes))
        self.ema = WeightAverage(vae, decay)  # copies the VAE, so this comes before wrapping it
        if config.compile:
            assert isinstance(vae, ConvolutionalVAE)  # a recipe that compiles a student is refused
            # block by block, because the adaptive weight needs the gradient of conv_out before the backward pass
            for block in (vae.encoder, vae.decoder.mid_block, *vae.decoder.up_blocks):
                block.compile()
        forward = forward_of(vae, config, feature_width).to(accelerator.device)
        optimizer = build_optimizer(forward, config.optimizer, config.optimizer.betas)
        self.generator = Player(forward, accelerator.prepare(forward), optimizer)

        self.discriminator: Player | None = None
        self.lecam = LeCam()
        settings = config.loss.discriminator
        if settings.weight > 0:
            network = build_discriminator(vae, settings, config.data.training_resolutions[0], features)
            network.to(accelerator.device)
            if config.channels_last:
                network.to(memory_format=torch.channels_last)
            alike = config.optimizer if config.optimizer.kind != "muon" else replace(config.optimizer, kind="adamw")
            optimizer = build_optimizer(network, alike, settings.betas)
            self.discriminator = Player(network, accelerator.prepare(network), optimizer)

    def __iter__(self) -> Iterator[tuple[str, Player]]:
        yield "generator", self.generator
        if self.discriminator is not None:
            yield "discriminator", self.discriminator

    def set_learning_rates(self, step: int, config: TrainConfig) -> dict[str, float]:
        """Set the learning rates of step `step`, counted from 0, and return them under their names in the log."""
        optimizer, settings = config.optimizer, config.loss.discriminator
        rates = {"learning_rate": learning_rate_at(step, optimizer.learning_rate, optimizer, config.steps)}
        self.generator.set_learning_rate(rates["learning_rate"])
        if self.discriminator is not None:
            # the VAE's schedule, after a separate warm-up
            peak = settings.learning_rate or optimizer.learning_rate
            warmup = min(1.0, max(0, step - settings.start_step + 1) / (optimizer.warmup_steps + 1))
            rate = warmup * learning_rate_at(max(step, optimizer.warmup_steps), peak, optimizer, config.steps)
            rates["discriminator_learning_rate"] = rate
            self.discriminator.set_learning_rate(rate)
        return rates


def forward_of(vae: Autoencoder, config: TrainConfig, feature_width: int | None = None) -> nn.Module:
    """The forward pass that a step of the VAE or student needs."""
    if isinstance(vae, ConvolutionalVAE):
        alone = config.loss.equivariance.replaces
        return TrainingForward(vae, config.loss.learn_logvar, alone, feature_width)
    assert isinstance(vae, AutoencoderTiny)
    return StudentForward(vae)


def build_discriminator(
    vae: Autoencoder, settings: DiscriminatorConfig, resolution: int, features: Features | None = None
) -> nn.Module:
    """A discriminator for the images or the latents of a VAE.

    Args:
        vae: gives the number of channels.
        settings: the kind and the size of the discriminator.
        resolution: side in pixels of the training crops.
        features: the frozen network, if it has one.
    """
    if features is not None:
        return FeatureDiscriminator(features, settings.width)
    if settings.sees == "images":
        shape = (settings.layers, settings.width, settings.norm, settings.downsampling)
        return PatchDiscriminator(vae.config.in_channels, *shape)
    side = math.ceil(resolution / vae.spatial_compression_ratio)
    return LatentDiscriminator(vae.config.latent_channels * side**2, settings.layers, settings.width)


def freeze_encoder(vae: ConvolutionalVAE) -> None:
    """Train only the decoder and post_quant_conv, so that the latents do not change."""
    for name, parameter in vae.named_parameters():
        if name.startswith(FROZEN_PARTS):
            parameter.requires_grad_(False)


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """A context in which gradients pass through `network` to its input, and its parameters get none."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
