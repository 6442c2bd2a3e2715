"""A small diffusion model of latents: network, noise, loss, training.

The probe (`sdvae.diffusion.probe`) and `scripts/latent_diffusion.py` train this one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn import functional as F

NO_CLASS = 1000  # the label that DiTPipeline uses for the unconditional half of guidance
DROP_LABEL = 0.1  # probability of NO_CLASS in training; Ho & Salimans 2022, «Classifier-free guidance», section 4
WARM_UP = 100  # steps, but not more than a tenth of the training

Batch = tuple[Tensor, Tensor | None]  # (B, C, h, w) scaled latents, and (B,) labels if the model takes classes


def new_denoiser(latent_channels: int, latent_side: int, widths: Sequence[int], classes: bool = False) -> UNet2DModel:
    """A UNet with attention at its coarsest level: v(z_t, t[, class]), (B, C, h, w) -> (B, C, h, w).

    Args:
        latent_channels: C.
        latent_side: h and w, a multiple of 2^(levels - 1).
        widths: the channels of each level.
        classes: whether it takes labels, from 0 to NO_CLASS.
    """
    plain = len(widths) - 1
    return UNet2DModel(
        sample_size=latent_side,
        in_channels=latent_channels,
        out_channels=latent_channels,
        layers_per_block=1,
        block_out_channels=tuple(widths),
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        attention_head_dim=min(32, widths[-1]),
        norm_num_groups=min(16, widths[0]),
        num_class_embeds=NO_CLASS + 1 if classes else None,
    )


def new_scheduler() -> DDIMScheduler:
    """z_t = sqrt(ᾱ_t) z + sqrt(1 - ᾱ_t) ε, t = 0 … 999, with the cosine ᾱ of Nichol & Dhariwal 2021, equation 17.

    The model predicts v = sqrt(ᾱ_t) ε - sqrt(1 - ᾱ_t) z (Salimans & Ho 2022, appendix D), which depends on
    z even at the highest noise. Sampling is DDIM (Song et al. 2021), from the last t downwards (Lin et al. 2024, 3.3).
    """
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def denoising_loss(
    model: nn.Module,
    scheduler: Any,
    z: Tensor,
    labels: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """E |v - v_θ(z_t, t, class)|² with uniform t: Ho et al. 2020, equation 14, with v instead of ε.

    Args:
        model: v(z_t, t, class), called as a UNet2DModel.
        scheduler: that of `new_scheduler`; mypy does not see a scheduler's attributes.
        z: (B, C, h, w) scaled latents.
        labels: (B,), for a model with classes; each is replaced by NO_CLASS with probability DROP_LABEL.
        generator: of t, the noise and the dropped labels, on the CPU; None uses torch's own.

    Returns:
        The mean over all elements, a scalar.
    """
    t = torch.randint(scheduler.config.num_train_timesteps, (len(z),), generator=generator).to(z.device)
    noise = torch.randn(z.shape, generator=generator).to(z)
    if labels is not None:
        dropped = torch.rand(labels.shape, generator=generator) < DROP_LABEL
        labels = labels.masked_fill(dropped.to(labels.device), NO_CLASS)
    predicted = model(scheduler.add_noise(z, noise, t), timestep=t, class_labels=labels).sample
    return F.mse_loss(predicted, scheduler.get_velocity(z, noise, t))


def train(
    model: nn.Module,
    scheduler: Any,
    batches: Iterable[Batch],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    generator: torch.Generator | None = None,
) -> Iterator[float]:
    """Train with AdamW, a linear warm-up and a cosine schedule to zero.

    Args:
        model: as for `denoising_loss`; left in evaluation mode after the last step.
        scheduler: that of `new_scheduler`.
        batches: at least `steps` of them, on the model's device.
        steps: number of steps.
        learning_rate: the highest one.
        generator: see `denoising_loss`.

    Yields:
        The loss of each step, after it.
    """
    length = min(WARM_UP, max(1, steps // 10))
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / length, total_iters=length)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    schedule = torch.optim.lr_scheduler.ChainedScheduler([warm_up, cosine])
    model.train()
    for _, (z, labels) in zip(range(steps), batches, strict=False):
        loss = denoising_loss(model, scheduler, z, labels, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
    model.eval()
