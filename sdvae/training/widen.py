"""`sdvae widen`: a VAE with more latent channels, image channels or width, that starts as the VAE it was made from.

The old channels come first in every layer, and nothing leads from a new channel to an old one, so what the VAE computed
before it computes now: its latents are the first of the new ones, and the images are the same. The new weights are
those of a new VAE (`sdvae.training.initialise`) except where that would change the old channels, and learn from the
first steps on. It is the surgery of Net2Net (Chen et al. 2016), of SD's inpainting UNets, and, for alpha, of AlphaVAE
(arXiv 2507.09308).

Group norm mixes the channels of a group, so new channels must be in groups of their own. All norms of a VAE have the
same number of groups, so all widths grow by one factor, which need not be whole.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sdvae.errors import InputError
from sdvae.model import AutoencoderKL, ConvolutionalVAE
from sdvae.model.blocks import SelfAttention
from sdvae.training.initialise import initialise

logger = logging.getLogger(__name__)

OPAQUE = 1.0  # of alpha, which like colours is in [-1, 1]


def widened(
    vae: ConvolutionalVAE,
    *,
    latent_channels: int | None = None,
    image_channels: int | None = None,
    block_out_channels: Sequence[int] | None = None,
    seed: int = 0,
) -> ConvolutionalVAE:
    """A wider copy of a VAE.

    Args:
        vae: the VAE, in fp32 on the CPU; it is not changed.
        latent_channels: channels of the latents; None keeps them. New ones have the mean of a new VAE, a standard
            deviation of the order of 1 and the log-variance of a new VAE, and the decoder does not use them yet.
        image_channels: 4 makes an RGB VAE one of RGBA. The encoder does not see alpha yet, and the decoder's is opaque.
        block_out_channels: the width of each level; None keeps them.
        seed: the seed of the new weights.

    Returns:
        The new VAE, in fp32 on the CPU and in evaluation mode. Its scaling_factor is the old one: training measures it.

    Raises:
        InputError: when the numbers cannot be had by adding channels.
    """
    if type(vae) is not AutoencoderKL:
        raise InputError(f"got an {type(vae).__name__}; need an AutoencoderKL: others cannot be widened")
    old: Any = vae.config
    settings = {key: value for key, value in old.items() if not key.startswith("_")}
    settings |= _channels(old, latent_channels, image_channels)
    settings |= _widths(old, tuple(block_out_channels or old.block_out_channels))
    if all(settings[key] == old[key] for key in ("latent_channels", "in_channels", "norm_num_groups")):
        raise InputError(
            "got a VAE to widen and nothing that is wider than it is; need more latent_channels, image_channels or "
            "block_out_channels"
        )
    added = settings["latent_channels"] - old.latent_channels
    for key, value in (("latents_mean", 0.0), ("latents_std", 1.0)):
        if old[key] is not None and added:
            settings[key] = (*old[key], *[value] * added)
            logger.info("%s of the new latent channels is %g", key, value)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = AutoencoderKL(**settings)
        initialise(wide)
    wide.set_likelihood(vae.likelihood)
    _keep_what_was_there(vae, wide)
    return wide.eval()


def _channels(old: Any, latent_channels: int | None, image_channels: int | None) -> dict[str, int]:
    latents, images = latent_channels or old.latent_channels, image_channels or old.in_channels
    if latents < old.latent_channels:
        raise InputError(f"got latent_channels={latents}; need {old.latent_channels} or more, as the VAE has")
    before = (old.in_channels, old.out_channels)
    if before != (images, images) and (*before, images) != (3, 3, 4):
        raise InputError(
            f"got image_channels={images} for a VAE with {before} image channels in and out; need 4 (RGBA) for one of "
            "RGB, or no change"
        )
    return {"latent_channels": latents, "in_channels": images, "out_channels": images}


def _widths(old: Any, widths: tuple[int, ...]) -> dict[str, Any]:
    """The widths, and the number of groups with which each group keeps its channels.

    Raises:
        InputError: when there is no such number.
    """
    sizes = [width // old.norm_num_groups for width in old.block_out_channels]  # of the groups, in channels
    groups = widths[0] // sizes[0]
    if len(widths) != len(sizes) or groups < old.norm_num_groups or [groups * size for size in sizes] != list(widths):
        more = max(old.norm_num_groups, groups)
        more += more == old.norm_num_groups
        raise InputError(
            f"got block_out_channels={list(widths)}; need {', '.join(f'{size}n' for size in sizes)} with one n of "
            f"{old.norm_num_groups} or more, the number of groups of every norm, so that old groups keep their "
            f"channels; such as {[size * more for size in sizes]}"
        )
    return {"block_out_channels": widths, "norm_num_groups": groups}


@torch.no_grad()
def _keep_what_was_there(vae: ConvolutionalVAE, wide: ConvolutionalVAE) -> None:
    """Put the old weights into the new VAE, and cut what leads from new channels to old ones."""
    c, more = vae.config.latent_channels, wide.config.latent_channels
    moments = torch.cat([torch.arange(c), more + torch.arange(c)])  # where the old means and log-variances are
    rows = {"encoder.conv_out": moments, "quant_conv": moments}
    columns = {"quant_conv": moments}
    for name, weight in vae.named_parameters():
        layer = name.rpartition(".")[0]
        out = rows.get(layer, torch.arange(weight.shape[0]))
        new = wide.get_parameter(name)
        if weight.ndim == 1:
            new[out] = weight
            continue
        into = columns.get(layer, torch.arange(weight.shape[1]))
        new[out] = 0.0
        new[out[:, None], into] = weight
    new_latents = torch.arange(c, more)
    if wide.quant_conv is not None:
        _pass_on(wide.quant_conv.weight, new_latents)
    if wide.post_quant_conv is not None:
        _pass_on(wide.post_quant_conv.weight, new_latents)
    if wide.config.out_channels > vae.config.out_channels:
        wide.decoder.conv_out.weight[vae.config.out_channels :] = 0.0
        assert wide.decoder.conv_out.bias is not None
        wide.decoder.conv_out.bias[vae.config.out_channels :] = OPAQUE
    for before, after in zip(_attentions(vae), _attentions(wide), strict=True):
        if len(after.to_q.weight) > len(before.to_q.weight):
            _keep_logits(len(before.to_q.weight), after)


def _pass_on(weight: Tensor, channels: Tensor) -> None:
    """Let a 1x1 conv pass on some channels as they are."""
    weight[channels] = 0.0
    weight[channels, channels] = 1.0


def _attentions(vae: ConvolutionalVAE) -> list[SelfAttention]:
    return [module for module in vae.modules() if isinstance(module, SelfAttention)]


def _keep_logits(channels: int, attention: SelfAttention) -> None:
    """Keep q · k / sqrt(channels), although the layer now divides by the root of more channels.

    Queries get no new channels; they learn them from the keys'.
    """
    weight, bias = attention.to_q.weight, attention.to_q.bias
    assert bias is not None
    weight[channels:] = 0.0
    bias[channels:] = 0.0
    factor = math.sqrt(len(weight) / channels)
    weight.mul_(factor)
    bias.mul_(factor)
