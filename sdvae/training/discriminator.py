"""The discriminator and its losses.

A PatchGAN (Isola et al. 2017, «pix2pix», section 3.2.2 and appendix 6.1.2) scores overlapping patches as real or
reconstructed; with three strided layers, a patch has 70x70 pixels. LDM and VQGAN train their decoders against it.

A discriminator of latents (sdvae/tutorial/adversary.py) has the same losses, with samples of the prior as real inputs
and samples of the posterior as fake ones. When it cannot tell them apart, q(z) = E_x[q(z|x)] is the prior. The KL term
pulls the posterior of each image to the prior; the adversarial autoencoder pulls only the average of all posteriors
(Makhzani et al. 2016, section 2).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.alpha import colours
from sdvae.metrics.features import Features
from sdvae.training.config import DiscriminatorConfig

INIT_STD = 0.02  # DCGAN (Radford et al. 2016, section 3); pix2pix and LDM use it too
SLOPE = 0.2  # slope of the leaky ReLUs below zero
MAX_WIDENING = 8  # width of the widest layer divided by that of the first
GROUP_WIDTH = 16  # channels in each group of the norm
LECAM_DECAY = 0.999  # Tseng et al. 2021, section 3.2: moving averages of the scores


class Blur(nn.Conv2d):
    """Blur each channel with the filter [1, 2, 1] / 4 along both sides, and keep every second value.

    Zhang 2019, «Making Convolutional Networks Shift-Invariant Again», section 3.2. (B, C, H, W) -> (B, C, ⌈H/2⌉, ⌈W/2⌉)
    """

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, 2, 1, groups=channels, bias=False, padding_mode="reflect")
        binomial = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.weight.data = (binomial[:, None] * binomial).expand(channels, 1, 3, 3).clone()
        self.weight.requires_grad_(False)


class PatchDiscriminator(nn.Module):
    """4x4 convolutions: `layers` of stride 2, one of stride 1, and one to a single channel.

    (B, C, H, W) in [-1, 1] -> (B, 1, h, w) logits, which are above zero for patches that seem real. With 3 layers,
    h = H/8 - 2.
    """

    def __init__(
        self, in_channels: int, layers: int = 3, width: int = 64, norm: str = "group", downsampling: str = "stride"
    ):
        super().__init__()
        stride = 1 if downsampling == "blur" else 2
        widths = [width * min(2**i, MAX_WIDENING) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride, padding=1), nn.LeakyReLU(SLOPE)]
        if downsampling == "blur":
            blocks.append(Blur(width))
        for i, (before, after) in enumerate(pairwise(widths)):
            is_last = i == layers - 1
            blocks.append(nn.Conv2d(before, after, 4, 1 if is_last else stride, padding=1, bias=norm == "none"))
            if downsampling == "blur" and not is_last:
                blocks.append(Blur(after))
            if norm == "group":
                blocks.append(nn.GroupNorm(max(after // GROUP_WIDTH, 1), after))
            blocks.append(nn.LeakyReLU(SLOPE))
        blocks.append(nn.Conv2d(widths[-1], 1, 4, stride=1, padding=1))
        self.layers = nn.Sequential(*blocks)
        for module in self.layers:
            if type(module) is nn.Conv2d:
                nn.init.normal_(module.weight, std=INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class FeatureDiscriminator(nn.Module):
    """Light heads that score each position of the feature maps of a frozen network.

    Sauer et al. 2021, «Projected GANs Converge Faster» (arXiv 2111.01007); with DINO's features Sauer et al. 2023,
    «StyleGAN-T», and autoencoders since (RAE, SoftVQ). (B, C, H, W) in [-1, 1] -> (B, N) logits, those of all maps.

    The frozen network is no submodule, so it is not in the optimizer and not in checkpoints.

    Args:
        features: the frozen network.
        width: channels of each head.
    """

    def __init__(self, features: Features, width: int):
        super().__init__()
        self._features = (features,)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 1),
                nn.GroupNorm(max(width // GROUP_WIDTH, 1), width),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(width, width, 3, padding=1),
                nn.LeakyReLU(SLOPE),
                nn.Conv2d(width, 1, 1),
            )
            for channels in features.widths
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def layers(self, images: Tensor) -> Tensor:
        maps = self._features[0](colours(images))
        return torch.cat([head(x).flatten(1) for head, x in zip(self.heads, maps, strict=True)], dim=1)

    def _apply(self, fn: Any, recurse: bool = True) -> FeatureDiscriminator:
        self._features[0]._apply(fn)  # to the same device and memory format
        return super()._apply(fn, recurse)


def generator_loss(fake_logits: Tensor) -> Tensor:
    """g = -E[D(x̂)], or -E[D(z)] for latents. As in LDM, it is the same for both kinds of discriminator loss."""
    return -fake_logits.float().mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, kind: str) -> Tensor:
    """Half the sum of the losses on real and on fake inputs, as in LDM.

    hinge: ½ E[max(0, 1 - D(x))] + ½ E[max(0, 1 + D(x̂))]; vanilla: ½ E[-log σ(D(x))] + ½ E[-log σ(-D(x̂))].
    """
    real, fake = real_logits.float(), fake_logits.float()
    if kind == "hinge":
        return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def r1_penalty(real_logits: Tensor, images: Tensor) -> Tensor:
    """E[|∇_x Σ D(x)|²], the mean over images (Mescheder et al. 2018, eq. 9).

    Args:
        real_logits: D(x).
        images: x, (B, C, H, W), which must require gradients.
    """
    (gradient,) = torch.autograd.grad(real_logits.float().sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def consistency_penalty(changed_logits: Tensor, logits: Tensor) -> Tensor:
    """The mean over images of (D(T(x)) - D(x))², with D the mean score of an image's patches.

    Zhao et al. 2021, «Improved Consistency Regularization for GANs», equation 4 (balanced consistency regularisation).
    The mean is taken first, because a shift of the image moves its patches.

    Args:
        changed_logits: the scores of changed images, (B, …).
        logits: the scores of the images, (B, …).
    """
    changed, plain = (x.float().flatten(1).mean(1) for x in (changed_logits, logits))
    return (changed - plain).square().mean()


class LeCam:
    """A penalty on the distance of real scores from the average fake score, and of fake from the average real score.

    Tseng et al. 2021, eq. 3 and 4:

    E[(D(x) - a_fake)²] + E[(D(x̂) - a_real)²].

    Attributes:
        averages: a_real and a_fake, moving averages of the scores; None before the first update.
    """

    def __init__(self) -> None:
        self.averages: tuple[float, float] | None = None

    def penalty(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """The penalty, a scalar in fp32; zero before the first update."""
        if self.averages is None:
            return real_logits.new_zeros((), dtype=torch.float32)
        real_average, fake_average = self.averages
        return (real_logits.float() - fake_average).square().mean() + (
            fake_logits.float() - real_average
        ).square().mean()

    def update(self, real_mean: float, fake_mean: float) -> None:
        """Update the averages with the means of a step's logits over all processes."""
        if self.averages is None:
            self.averages = (real_mean, fake_mean)
        else:
            means = zip(self.averages, (real_mean, fake_mean), strict=True)
            real, fake = (LECAM_DECAY * a + (1 - LECAM_DECAY) * b for a, b in means)
            self.averages = (real, fake)

    def state_dict(self) -> dict[str, Any]:
        return {"lecam": self.averages}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages = tuple(state["lecam"]) if state["lecam"] is not None else None


def generator_weight_at(step: int, config: DiscriminatorConfig) -> float:
    """The weight of the adversarial term in step `step`, counted from 0: zero, a linear ramp, then `weight`."""
    since = step - config.generator_start_step
    if config.weight == 0 or since < 0:
        return 0.0
    return config.weight * min(1.0, (since + 1) / (config.ramp_steps + 1))


def discriminator_learns_at(step: int, config: DiscriminatorConfig) -> bool:
    """Whether the discriminator learns in step `step`, counted from 0."""
    return config.weight > 0 and step >= config.start_step
