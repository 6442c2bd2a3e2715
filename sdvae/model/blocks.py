"""The building blocks of the Stable-Diffusion autoencoder.

ResNet blocks with group norm and SiLU (Esser et al. 2021, VQGAN, table 7; Rombach et al. 2022, LDM),
single-head self-attention, a strided and a nearest-neighbour resampler. Attribute names are those of
diffusers' state dict, so that the same file serves both implementations.

Shapes: every block maps (B, C, H, W) -> (B, C', H', W') in the dtype of its weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import get_activation
from torch import Tensor, nn

NORM_EPS = 1e-6  # LDM, ldm/modules/diffusionmodules/model.py, Normalize


def group_norm(num_groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=NORM_EPS)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def activated(activation: nn.Module, h: Tensor, norm: nn.Module) -> Tensor:
    """activation(h), in the memory of h where nobody needs it: one pass over memory less, and the same bits.

    Args: norm: what gave h; with a hook, somebody may have kept it.
    """
    if torch.is_grad_enabled() or norm._forward_hooks or not isinstance(activation, nn.SiLU):
        return activation(h)
    return F.silu(h, inplace=True)


class ResnetBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 conv on the shortcut where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, act_fn: str = "silu"):
        super().__init__()
        self.norm1 = group_norm(num_groups, in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(num_groups, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.nonlinearity = get_activation(act_fn)
        same_width = in_channels == out_channels
        self.conv_shortcut = None if same_width else nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, H, W)
        h = self.conv1(activated(self.nonlinearity, self.norm1(x), self.norm1))
        h = self.conv2(activated(self.nonlinearity, self.norm2(h), self.norm2))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        if torch.is_grad_enabled() or self.conv2._forward_hooks or h.stride() != x.stride():
            return x + h
        return h.add_(x)


class SelfAttention(nn.Module):
    """Single-head self-attention over the H·W positions, with a residual connection.

    softmax(Q K^T / sqrt(C)) V, then an output projection (Vaswani et al. 2017, eq. 1).
    """

    # diffusers' ModelMixin looks for this mark and renames query/key/value/proj_attn, the names that
    # folders saved before diffusers 0.13 carry, to to_q/to_k/to_v/to_out.0.
    _from_deprecated_attn_block = True

    def __init__(self, channels: int, num_groups: int):
        super().__init__()
        self.group_norm = group_norm(num_groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list only for the key «to_out.0»

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        batch, channels, height, width = x.shape
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)  # (B, HW, C)
        q, k, v = (to(tokens).unsqueeze(1) for to in (self.to_q, self.to_k, self.to_v))  # (B, 1, HW, C)
        tokens = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # (B, HW, C)
        tokens = self.to_out[0](tokens)
        # The sum takes its first operand's memory layout. In this order that is diffusers', which makes all that
        # follows equal to its output bit for bit.
        return tokens.transpose(1, 2).reshape(batch, channels, height, width) + x


class Downsample(nn.Module):
    """A 3x3 conv of stride 2. The padding is one column right and one row below only, as in LDM."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour x2, then a 3x3 conv."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MidBlock(nn.Module):
    """ResNet block, self-attention (optional), ResNet block, all at the lowest resolution."""

    def __init__(self, channels: int, num_groups: int, act_fn: str, add_attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, num_groups, act_fn) for _ in range(2)])
        self.attentions = nn.ModuleList([SelfAttention(channels, num_groups)] if add_attention else [])

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class _Level(nn.Module):
    """One resolution: ResNet blocks, each followed by self-attention where the level has it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        num_groups: int,
        act_fn: str,
        add_attention: bool,
    ):
        super().__init__()
        widths = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(
            [ResnetBlock(widths[i], widths[i + 1], num_groups, act_fn) for i in range(num_layers)]
        )
        self.attentions = (
            nn.ModuleList([SelfAttention(out_channels, num_groups) for _ in range(num_layers)])
            if add_attention
            else None
        )

    def layers(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, H, W)
        for i, resnet in enumerate(self.resnets):
            x = resnet(x)
            if self.attentions is not None:
                x = self.attentions[i](x)
        return x


class DownBlock(_Level):
    """A level of the encoder; all but the last halve the resolution at their end."""

    def __init__(self, *, out_channels: int, add_downsample: bool, **kwargs: Any):
        super().__init__(out_channels=out_channels, **kwargs)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)]) if add_downsample else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class UpBlock(_Level):
    """A level of the decoder; all but the last double the resolution at their end."""

    def __init__(self, *, out_channels: int, add_upsample: bool, **kwargs: Any):
        super().__init__(out_channels=out_channels, **kwargs)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)]) if add_upsample else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return x if self.upsamplers is None else self.upsamplers[0](x)


def checkpointed(module: Any, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run `function(x)`; recompute it in the backward pass when `module.gradient_checkpointing` is on."""
    if module.gradient_checkpointing and torch.is_grad_enabled():
        return module._gradient_checkpointing_func(function, x)
    return function(x)
