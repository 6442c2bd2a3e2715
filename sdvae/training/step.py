"""One optimizer step of the VAE (or a student) and its discriminator, on the same images: `TrainStep.__call__`.

The discriminator is frozen during the backward pass of the VAE's loss, and its own input, the reconstruction (or the
latents), is detached, so neither network gets gradients from the other's loss. All processes share whether every loss
and gradient is finite. If so, both networks step; otherwise neither does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdvae.alpha import as_seen, random_backgrounds
from sdvae.data.dataset import Batch
from sdvae.model import ConvolutionalVAE
from sdvae.noise import posterior_generators
from sdvae.training.adversarial import adaptively_weighted
from sdvae.training.alignment import alignment_penalty, balanced_weight, features_at_latents
from sdvae.training.anchor import Anchor
from sdvae.training.augment import augmented
from sdvae.training.config import TrainConfig
from sdvae.training.data import conditioning_of
from sdvae.training.discriminator import (
    FeatureDiscriminator,
    PatchDiscriminator,
    consistency_penalty,
    discriminator_learns_at,
    discriminator_loss,
    generator_loss,
    generator_weight_at,
    r1_penalty,
)
from sdvae.training.distil import StudentObjective, Teacher
from sdvae.training.objective import Judges, Outcome, kl_weight_at, loss_terms, transformation_at
from sdvae.training.players import Player, Players, VAEOutput, frozen
from sdvae.tutorial.adversary import LatentDiscriminator, posterior_and_prior_samples


@dataclass
class StepResult:
    """The result of one step.

    Attributes:
        skipped: whether some process had a loss or gradient that is not finite, so that no network stepped.
        culprits: the term and the value of each number on this process that was not finite.
        indices: the places of this process's images in the data set.
        stop: whether some process was told to stop.
        values: scalars to be averaged into the log: a dict for each micro-batch, and one for the step.
        state: scalars that hold for the whole step.
    """

    skipped: bool = False
    culprits: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    stop: bool = False
    values: list[dict[str, float]] = field(default_factory=list)
    state: dict[str, float] = field(default_factory=dict)


class TrainStep:
    """The step of a run with these networks. It is called with the step's number and the batches.

    Args:
        config: the recipe.
        players: the networks and their optimizers.
        judges: the networks of the perceptual terms.
        accelerator: the run's Accelerator.
        teacher: the VAE that a student learns from; None when a VAE learns.
        anchor: the encoder of the VAE that is fine-tuned, before its first step; None if none trains on.
    """

    def __init__(
        self,
        config: TrainConfig,
        players: Players,
        judges: Judges,
        accelerator: Accelerator,
        teacher: Teacher | None = None,
        anchor: Anchor | None = None,
    ):
        self.config = config
        self.players = players
        self.judges = judges
        self.anchor = anchor
        self.accelerator = accelerator
        self._outcome: Callable[..., Outcome] = self._vae_outcome
        if teacher is not None:
            self._outcome = StudentObjective(config, players.generator.wrapped, teacher, judges)

    def __call__(
        self,
        step: int,
        batches: Iterator[Batch],
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
        stop: Callable[[], bool] = lambda: False,
    ) -> StepResult:
        """Do step `step`, counted from 0, on the next gradient_accumulation_steps batches.

        Args:
            step: the number of the step, on which learning rates, weights and transformation depend.
            batches: this process's micro-batches. Their `bad` images are not counted here.
            waiting: a context that is entered while waiting for the next batch.
            stop: a function that says, at the end of the step, whether this process was told to stop. All processes
                get this in their result.
        """
        config, players, device = self.config, self.players, self.accelerator.device
        result = StepResult(state=players.set_learning_rates(step, config))
        if config.distil.teacher is None:
            result.state["kl_weight"] = kl_weight_at(step, config.loss)
        learns = discriminator_learns_at(step, config.loss.discriminator)
        values: list[dict[str, Tensor]] = []
        logits: list[Tensor] = []

        for left in reversed(range(config.gradient_accumulation_steps)):
            with waiting():
                batch = next(batches)
            result.indices += batch["index"].tolist()
            images = batch["image"].to(device, non_blocking=True)
            if config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with self._gradients_of(players.generator, last=left == 0):
                terms, real, fake = self.generator_pass(step, images, batch["noise_seed"], **conditioning_of(batch))
            if learns and players.discriminator is not None:
                with self._gradients_of(players.discriminator, last=left == 0):
                    more, mean_logits = self.discriminator_pass(real, fake, batch["noise_seed"])
                terms |= more
                logits.append(mean_logits)
            values.append(terms)

        learners = {"": players.generator}  # by their prefix in the log
        if learns and players.discriminator is not None:
            learners["discriminator_"] = players.discriminator
        scaler, largest = self.accelerator.scaler, config.optimizer.grad_clip_norm
        values.append({f"{prefix}grad_norm": player.clip(scaler, largest) for prefix, player in learners.items()})
        real_and_fake = self._agree(result, values, logits, stop())
        if not result.skipped:
            for player in learners.values():
                player.optimizer.step()  # not through the scaler, which would wait to find again what `_agree` found
            if real_and_fake is not None:
                players.lecam.update(*real_and_fake)
            players.ema.update(players.vae)
        for _, player in players:
            player.optimizer.zero_grad()
        if scaler is not None:
            scaler.update()
        return result

    def generator_pass(
        self, step: int, images: Tensor, noise_seeds: Tensor, **conditioning: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Forward and backward pass of the VAE or the student.

        Args:
            step: counted from 0.
            images: (B, C, H, W) in [-1, 1], on the accelerator's device.
            noise_seeds: (B,) int64, the seeds of the posterior's noise.
            conditioning: other inputs of the VAE, as `conditioning_of` returns them.

        Returns:
            Scalars for the log, and the real and the fake inputs of the discriminator, without gradients.
        """
        config, players = self.config.loss, self.players
        outcome = self._outcome(step, images, noise_seeds, **conditioning)
        nll, values = outcome.nll, outcome.values
        loss = objective = nll + outcome.rest
        weight = generator_weight_at(step, config.discriminator)
        if weight > 0 and players.discriminator is not None:
            with frozen(players.discriminator.network), self.accelerator.autocast():
                seen = augmented(outcome.fake, config.discriminator.augment, noise_seeds, "generator")
                g = generator_loss(players.discriminator.network(seen))
            gan_weight = g.new_full((), weight)
            if config.discriminator.adaptive and config.discriminator.sees == "images":
                last_layer = players.vae.decoder.conv_out.weight
                nll_and_gan, gan_weight = adaptively_weighted(
                    outcome.outputs, nll, g, weight, last_layer, self.accelerator
                )
                loss, objective = loss.detach() + gan_weight * g.detach(), nll_and_gan + outcome.rest
            else:
                loss = objective = loss + gan_weight * g
            values |= {"generator": g, "gan_weight": gan_weight}
        self.accelerator.backward(objective / self.config.gradient_accumulation_steps)
        return {"loss": loss, **values}, outcome.real, outcome.fake.detach()

    def _vae_outcome(self, step: int, images: Tensor, noise_seeds: Tensor, **conditioning: Tensor) -> Outcome:
        """The forward pass of the VAE, with the arguments of `generator_pass`."""
        config, players = self.config.loss, self.players
        transformation = transformation_at(step, self.config.seed, config.equivariance)
        output: VAEOutput = players.generator.wrapped(
            images, posterior_generators(noise_seeds), transformation, **conditioning
        )
        # images with alpha are compared, and shown to the discriminator, as they are seen over random colours
        background = random_backgrounds(images, noise_seeds)
        real, seen = as_seen(images, background), as_seen(output.reconstruction, background)
        pair = None
        if transformation is not None and config.equivariance.replaces:
            real = transformation(real, seen.shape[2:])
        elif transformation is not None and output.transformed is not None:
            transformed = as_seen(output.transformed, background)
            pair = (transformation(real, transformed.shape[2:]), transformed)
        terms = loss_terms(real, seen, output.posterior, config, self.judges, pair, output.logvar)
        values = terms.logged(self.judges)
        if seen.shape[1] == 4:
            values["alpha"] = (seen[:, 3] - real[:, 3]).abs().mean()
        nll = terms.nll(config)
        of_latents, more = self._latent_terms(images, output, nll)
        # not `seen` again, since the gradients of both terms are computed one after the other (`adaptively_weighted`)
        fake = as_seen(output.reconstruction, background)
        if config.discriminator.sees == "latents":
            fake, real = posterior_and_prior_samples(output.posterior, noise_seeds)
        return Outcome(
            nll=nll,
            rest=kl_weight_at(step, config) * terms.kl_penalty + of_latents,
            outputs=output.nll_depends_on,
            real=real,
            fake=fake,
            values=values | more,
        )

    def _latent_terms(self, images: Tensor, output: VAEOutput, nll: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the penalties on the latents besides the KL, and scalars for the log.

        Args:
            images: (B, C, H, W) in [-1, 1].
            output: what the VAE makes of them.
            nll: the reconstruction loss, which balances the weight of the alignment.
        """
        tune, settings = self.config.fine_tune, self.config.loss.alignment
        total, values = nll.new_zeros(()), {}
        if tune.anchor_weight > 0 and self.anchor is not None:
            values["anchor"] = self.anchor.penalty(images, output.posterior, tune.anchor)
            total = total + tune.anchor_weight * values["anchor"]
        if self.judges.alignment is not None and output.projected is not None:
            height, width = output.projected.shape[2:]
            features = features_at_latents(self.judges.alignment, images, (height, width))
            values["alignment"] = penalty = alignment_penalty(output.projected, features, settings)
            weight = nll.new_full((), settings.weight)
            if settings.adaptive:
                assert isinstance(self.players.vae, ConvolutionalVAE)
                last_layer = self.players.vae.encoder.conv_out.weight
                weight = balanced_weight(nll, penalty, settings.weight, last_layer, self.accelerator)
                values["alignment_weight"] = weight
            total = total + weight * penalty
        return total, values

    def discriminator_pass(
        self, real_inputs: Tensor, fake_inputs: Tensor, noise_seeds: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Forward and backward pass of the discriminator.

        Args:
            real_inputs: images, or samples of the prior.
            fake_inputs: their reconstructions, or samples of the posterior; the same shape, without gradients.
            noise_seeds: (B,) int64, from which the augmentation is drawn.

        Returns:
            Scalars for the log, and the mean logits of real and fake, (2,) fp32.
        """
        player, settings = self.players.discriminator, self.config.loss.discriminator
        assert player is not None
        assert isinstance(player.network, PatchDiscriminator | FeatureDiscriminator | LatentDiscriminator)
        unchanged = [real_inputs, fake_inputs] if settings.consistency_weight > 0 else []
        real_inputs = augmented(real_inputs, settings.augment, noise_seeds, "real")
        fake_inputs = augmented(fake_inputs, settings.augment, noise_seeds, "fake")
        seen = [real_inputs, fake_inputs, *unchanged]
        real, fake, *plain = player.wrapped(torch.cat(seen)).chunk(len(seen))
        loss = discriminator_loss(real, fake, settings.loss)
        values = {"discriminator": loss, "real_logits": real.mean(), "fake_logits": fake.mean()}
        values |= {"real_accuracy": (real > 0).float().mean(), "fake_accuracy": (fake < 0).float().mean()}
        if plain:
            penalty = consistency_penalty(real, plain[0]) + consistency_penalty(fake, plain[1])
            loss = loss + settings.consistency_weight * penalty
            values["consistency"] = penalty
        if settings.r1_weight > 0:
            # In fp32, since a squared gradient exceeds the range of half precision. This calls `layers`, because
            # accelerate has put autocast into `forward`. Only this kind of attention can be differentiated twice.
            with torch.autocast(real_inputs.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
                inputs = real_inputs.float().requires_grad_(True)
                penalty = r1_penalty(player.network.layers(inputs), inputs)
            loss = loss + settings.r1_weight * penalty
            values["r1"] = penalty
        if settings.lecam_weight > 0:
            penalty = self.players.lecam.penalty(real, fake)
            loss = loss + settings.lecam_weight * penalty
            values["lecam"] = penalty
        self.accelerator.backward(loss / self.config.gradient_accumulation_steps)
        return values, torch.stack([real.mean(), fake.mean()]).detach().float()

    def _gradients_of(self, player: Player, last: bool) -> AbstractContextManager[None]:
        """A context for a backward pass, in which DDP averages gradients only for the last micro-batch of the step."""
        return nullcontext() if last else self.accelerator.no_sync(player.wrapped)

    def _agree(
        self, result: StepResult, values: list[dict[str, Tensor]], logits: list[Tensor], stop: bool
    ) -> tuple[float, float] | None:
        """Decide for all processes, by one small sum over them, whether to skip the step and whether to stop.

        Args:
            result: the step's result; its `values`, `skipped`, `culprits` and `stop` are set here.
            values: the step's scalars.
            logits: mean logits of each micro-batch, (2,) each; empty unless the discriminator learns.
            stop: whether this process was told to stop.

        Returns:
            The mean logits of real and fake over all processes, or None unless the discriminator learns.
        """
        here = torch.stack([value.detach().float() for scalars in values for value in scalars.values()])
        broken = (~torch.isfinite(here)).any().float()
        mean_logits = torch.stack(logits).mean(dim=0) if logits else here.new_zeros(2)
        shared = torch.cat([broken[None], here.new_full((1,), float(stop)), mean_logits])
        processes = self.accelerator.num_processes
        if processes > 1:
            shared = self.accelerator.reduce(shared, reduction="sum")
        *scalars, bad, stops, real, fake = torch.cat([here, shared]).tolist()  # the step's one wait for the device
        numbers = iter(scalars)
        result.values = [{name: next(numbers) for name in named} for named in values]
        result.skipped, result.stop = bad > 0, stops > 0
        if result.skipped:
            pairs = [pair for named in result.values for pair in named.items()]
            result.culprits = sorted({f"{name} {value}" for name, value in pairs if not math.isfinite(value)})
        return (real / processes, fake / processes) if logits else None
