"""One optimizer step of both players, on the same images.

In each micro-batch the VAE reconstructs once. Its own loss goes back through a discriminator that is frozen, and the
discriminator's through a reconstruction (or latents) that is detached, so neither leaves gradients in the other. Then
all processes agree that every loss and gradient is finite, and both step, or neither does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from sdvae.data.dataset import Batch
from sdvae.metrics.perceptual import Perceptual
from sdvae.model import DiagonalGaussian
from sdvae.noise import posterior_generators
from sdvae.training.config import TrainConfig
from sdvae.training.discriminator import (
    LeCam,
    PatchDiscriminator,
    discriminator_learns_at,
    discriminator_loss,
    generator_loss,
    generator_weight_at,
    r1_penalty,
)
from sdvae.training.objective import LossTerms, kl_weight_at, loss_terms, transformation_at
from sdvae.training.players import Players, frozen
from sdvae.tutorial.adversary import LatentDiscriminator, prior_samples

ADAPTIVE_EPS = 1e-4  # LDM, ldm/modules/losses/contperceptual.py, calculate_adaptive_weight, in its units
ADAPTIVE_MAX = 1e4


@dataclass
class StepResult:
    """What one step did.

    Attributes:
        skipped: some process had a loss or gradient that is not finite, so nothing was learned.
        culprits: on this process, «term value» of what was not finite.
        indices: of this process's images in the data set.
        stop: some process was told to stop.
        values: scalars to be averaged into the log, each with its weight of one step or one micro-batch.
        state: scalars that hold for the whole step.
    """

    skipped: bool = False
    culprits: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    stop: bool = False
    values: list[dict[str, Tensor]] = field(default_factory=list)
    state: dict[str, float] = field(default_factory=dict)


def train_step(
    step: int,
    players: Players,
    batches: Iterator[Batch],
    config: TrainConfig,
    accelerator: Accelerator,
    perceptual: Perceptual | None,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    stop: Callable[[], bool] = lambda: False,
) -> StepResult:
    """Step `step`, counted from 0, on the next gradient_accumulation_steps batches.

    Args:
        batches: this process's micro-batches; `bad` images in them are the caller's business.
        waiting: entered while the next batch is awaited.
        stop: asked at the end of the step, whether this process was told to stop; all hear of it in the result.
    """
    result = StepResult()
    result.state = players.set_learning_rates(step, config)
    result.state["kl_weight"] = kl_weight_at(step, config.loss)
    learns = discriminator_learns_at(step, config.loss.discriminator)
    acting = [(name, player) for name, player in players if name != "discriminator" or learns]
    logits_seen: list[Tensor] = []

    micro_steps = config.gradient_accumulation_steps
    for micro_step in range(micro_steps):
        with waiting():
            batch = next(batches)
        result.indices += batch["index"].tolist()
        images = batch["image"].to(accelerator.device, non_blocking=True)
        if config.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        labels = batch["label"].to(accelerator.device, non_blocking=True) if "label" in batch else None
        last = micro_step == micro_steps - 1
        # DDP sums gradients over processes in the backward pass of the last micro-step only
        with nullcontext() if last else accelerator.no_sync(players.generator.wrapped):
            values, fake = generator_pass(
                step, players, images, batch["noise_seed"], config, accelerator, perceptual, labels
            )
        if learns and players.discriminator is not None:
            with nullcontext() if last else accelerator.no_sync(players.discriminator.wrapped):
                real = images
                if config.loss.discriminator.sees == "latents":
                    real = prior_samples(fake, batch["noise_seed"])
                more, logits = discriminator_pass(players, real, fake, config, accelerator)
            values |= more
            logits_seen.append(logits)
        result.values.append(values)

    scaler = accelerator.scaler
    norms = {}
    for name, player in acting:
        prefix = "" if name == "generator" else f"{name}_"
        norms[f"{prefix}grad_norm"] = player.clip(scaler, config.optimizer.grad_clip_norm)
    result.values.append(norms)

    mean_logits = torch.stack(logits_seen).mean(dim=0) if logits_seen else None
    agree(result, mean_logits, stop(), accelerator, players.lecam)
    if not result.skipped:
        for _, player in acting:
            player.step(scaler)
        players.ema.update(players.vae)
    for _, player in players:
        player.forget_gradients()
    if scaler is not None:
        scaler.update()
    return result


def generator_pass(
    step: int,
    players: Players,
    images: Tensor,
    noise_seeds: Tensor,
    config: TrainConfig,
    accelerator: Accelerator,
    perceptual: Perceptual | None,
    labels: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward and backward of the VAE. Returns scalars for the log, and what the discriminator sees, detached: the
    reconstruction, or the latents."""
    transformation = transformation_at(step, config.seed, config.loss.equivariance)
    reconstruction, moments, transformed, logvar = players.generator.wrapped(
        images, posterior_generators(noise_seeds), transformation, labels
    )
    pair = None
    if transformation is not None:
        pair = (transformation(images, transformed.shape[2:]), transformed)
    posterior = DiagonalGaussian(moments)
    terms = loss_terms(images, reconstruction, posterior, config.loss, perceptual, pair, logvar)
    kl_weight = kl_weight_at(step, config.loss)
    loss = terms.total(config.loss, kl_weight)
    values = {**terms.logged(perceptual)}

    of_latents = config.loss.discriminator.sees == "latents"
    fake = posterior.sample(posterior_generators(noise_seeds)) if of_latents else reconstruction
    gan_weight = generator_weight_at(step, config.loss.discriminator)
    if gan_weight > 0 and players.discriminator is not None and of_latents:
        with frozen(players.discriminator.network), accelerator.autocast():
            g = generator_loss(players.discriminator.network(fake))
        values |= {"generator": g, "gan_weight": g.new_tensor(gan_weight)}
        objective = loss = loss + gan_weight * g
    elif gan_weight > 0 and players.discriminator is not None:
        ends = [end for end in (reconstruction, transformed, logvar) if end is not None]
        g, pulls = adversarial_pull(ends, terms, gan_weight, players, config, accelerator)
        values |= {"generator": g, "gan_weight": pulls.weight}
        loss = loss.detach() + pulls.weight * g.detach()
        # its gradient at each end is the pull computed there
        objective = sum(
            ((end * pull).sum() for end, pull in zip(ends, pulls.at_ends, strict=True)), images.new_zeros(())
        )
        objective = objective + kl_weight * terms.priced_kl
    else:
        objective = loss
    accelerator.backward(objective / config.gradient_accumulation_steps)
    return {"loss": loss, **values}, fake.detach()


@dataclass(frozen=True)
class Pulls:
    """Gradients of the objective, less the KL term, where the VAE's graph ends, and the GAN's weight in them."""

    at_ends: list[Tensor]
    weight: Tensor


def adversarial_pull(
    ends: list[Tensor],
    terms: LossTerms,
    gan_weight: float,
    players: Players,
    config: TrainConfig,
    accelerator: Accelerator,
) -> tuple[Tensor, Pulls]:
    """The GAN's term g and the gradients of nll + weight · g at the reconstruction and the other outputs.

    LDM weighs g by |∇nll| / |∇g| at the decoder's last layer (Esser et al. 2021, eq. 7), which takes two backward
    passes through LPIPS and the discriminator beside the real one. Both gradients at the reconstruction tell all:
    the last layer's follow from them by one small product, and the real pass starts from their weighted sum.

    The last layer's gradients are averaged over processes before their norms are taken, so that the weight is that
    of the whole batch. LDM's bound of 1e4 holds for its sums over C·H·W; here all is divided by that.
    """
    assert players.discriminator is not None
    reconstruction = ends[0]
    with frozen(players.discriminator.network), accelerator.autocast():
        g = generator_loss(players.discriminator.network(reconstruction))
    scale = 1.0 if accelerator.scaler is None else accelerator.scaler.get_scale()  # or fp16 loses small gradients
    pulls = [pull / scale for pull in torch.autograd.grad(terms.nll(config.loss) * scale, ends)]
    (push,) = torch.autograd.grad(g * scale, reconstruction)
    push = push / scale

    weight = torch.tensor(gan_weight, device=reconstruction.device)
    if config.loss.discriminator.adaptive:
        last_layer = players.vae.decoder.conv_out.weight
        gradients = [
            torch.autograd.grad(reconstruction, last_layer, grad_outputs=pull * scale, retain_graph=True)[0] / scale
            for pull in (pulls[0], push)
        ]
        of_nll, of_g = accelerator.reduce(torch.stack(gradients), reduction="mean").flatten(1).norm(dim=1)
        values = reconstruction[0].numel()
        adaptive = (values * of_nll / (of_g + ADAPTIVE_EPS)).clamp(max=ADAPTIVE_MAX) / values
        weight = weight * adaptive
    return g, Pulls([pulls[0] + weight * push, *pulls[1:]], weight)


def discriminator_pass(
    players: Players, real_inputs: Tensor, fake_inputs: Tensor, config: TrainConfig, accelerator: Accelerator
) -> tuple[dict[str, Tensor], Tensor]:
    """Forward and backward of the discriminator. Returns scalars for the log, and the mean logits (real, fake).

    Args:
        real_inputs: images, or draws of the prior.
        fake_inputs: their reconstructions, or samples of the posterior; detached.
    """
    player = players.discriminator
    assert player is not None
    assert isinstance(player.network, PatchDiscriminator | LatentDiscriminator)
    settings = config.loss.discriminator
    real, fake = player.wrapped(torch.cat([real_inputs, fake_inputs])).chunk(2)
    loss = discriminator_loss(real, fake, settings.loss)
    values = {"discriminator": loss, "real_logits": real.mean(), "fake_logits": fake.mean()}
    if settings.r1_weight > 0:
        # a squared gradient leaves half precision's range
        with torch.autocast(real_inputs.device.type, enabled=False):
            inputs = real_inputs.float().requires_grad_(True)
            penalty = r1_penalty(player.network.layers(inputs), inputs)  # accelerate put autocast into `forward`
        loss = loss + settings.r1_weight * penalty
        values["r1"] = penalty
    if settings.lecam_weight > 0:
        penalty = players.lecam.penalty(real, fake)
        loss = loss + settings.lecam_weight * penalty
        values["lecam"] = penalty
    accelerator.backward(loss / config.gradient_accumulation_steps)
    return values, torch.stack([real.mean(), fake.mean()]).detach().float()


def agree(result: StepResult, mean_logits: Tensor | None, stop: bool, accelerator: Accelerator, lecam: LeCam) -> None:
    """One small sum over all processes, after which all know the same: skip or not, stop or not, mean logits.

    Args: mean_logits: (2,), real and fake, where the discriminator learns.
    """
    named = [pair for values in result.values for pair in values.items()]
    here = torch.stack([value.detach().float() for _, value in named])
    broken = (~torch.isfinite(here)).any().float()
    logits = here.new_zeros(2) if mean_logits is None else mean_logits
    shared = torch.cat([broken[None], here.new_tensor([float(stop)]), logits])
    if accelerator.num_processes > 1:
        shared = accelerator.reduce(shared, reduction="sum")
    *scalars, bad, stops, real, fake = torch.cat([here, shared]).tolist()  # the step's one wait for the device
    result.skipped, result.stop = bad > 0, stops > 0
    if result.skipped:
        names = [name for name, _ in named]
        pairs = zip(names, scalars, strict=True)
        result.culprits = sorted({f"{name} {value}" for name, value in pairs if not math.isfinite(value)})
    elif mean_logits is not None:
        lecam.update(real / accelerator.num_processes, fake / accelerator.num_processes)
