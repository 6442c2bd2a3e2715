"""The networks of the Stable-Diffusion autoencoder and their blocks.

ResNet blocks with group norm and SiLU (Esser et al. 2021, VQGAN, table 7; Rombach et al. 2022, LDM), single-head
self-attention, a strided and a nearest-neighbour resampler. Attribute names are those of diffusers' state dict, so the
same file serves both implementations.

Every block maps (B, C, H, W) -> (B, C', H', W') in the dtype of its weights. Blocks with ResNet blocks inside also take
`temb`, (B, E), an embedding of each image's condition, such as a class label. The name is diffusers', whose UNets embed
the diffusion time. Plain VAEs have no embedding. The other arguments too have diffusers' names, by which users call
blocks and export them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import get_activation
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.model.plain import is_plain

NORM_EPS = 1e-6  # LDM, ldm/modules/diffusionmodules/model.py, Normalize


class ResnetBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a 1x1 conv on the shortcut if the width changes.

    A linear map of the embedding, if there is one, is added between the two convs, the same at every position.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_groups: int,
        act_fn: str = "silu",
        temb_channels: int | None = None,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.norm1 = group_norm(num_groups, in_channels)
        self.conv1 = conv3x3(in_channels, out_channels)
        self.norm2 = group_norm(num_groups, out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.nonlinearity = get_activation(act_fn)
        self.use_in_shortcut = in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1) if self.use_in_shortcut else None
        self.label_proj = None if temb_channels is None else nn.Linear(temb_channels, out_channels)

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:
        x = input_tensor  # (B, C_in, H, W) -> (B, C_out, H, W)
        h = self.conv1(activated(self.norm1, self.nonlinearity, x))
        h = self.plus_embedding(h, temb)
        h = self.conv2(activated(self.norm2, self.nonlinearity, h))
        return added(x if self.conv_shortcut is None else self.conv_shortcut(x), h, self.conv2)

    def plus_embedding(self, h: Tensor, temb: Tensor | None) -> Tensor:
        """(B, C_out, H, W), (B, E) -> (B, C_out, H, W).

        Raises:
            InputError: when there is an embedding and no `label_proj`, or the other way round.
        """
        if (temb is None) != (self.label_proj is None):
            given, needed = ("no embedding", "one (temb)") if temb is None else ("an embedding (temb)", "none")
            raise InputError(f"got {given}; this ResNet block needs {needed}; see sdvae.tutorial.conditional")
        if self.label_proj is None or temb is None:
            return h
        return h + self.label_proj(self.nonlinearity(temb))[:, :, None, None]


class SelfAttention(Attention):
    """Single-head self-attention over the H·W positions: x + W_o softmax(Q Kᵀ / sqrt(C)) V, of the normalised x.

    (Vaswani et al. 2017, eq. 1.) It maps (B, C, H, W) -> (B, C, H, W). It is a subclass of diffusers' layer, so that
    diffusers' attention processors work here too. The default one calls torch's scaled_dot_product_attention.
    """

    def __init__(self, channels: int, num_groups: int):
        super().__init__(
            channels,
            heads=1,
            dim_head=channels,
            bias=True,
            upcast_softmax=True,
            norm_num_groups=num_groups,
            eps=NORM_EPS,
            residual_connection=True,
            _from_deprecated_attn_block=True,  # so that folders from before diffusers 0.13 are read: query -> to_q, …
        )

    def fuse_projections(self, fuse: bool = True) -> None:
        """Let diffusers' fused processor call `to_qkv`, which uses the three separate weights.

        diffusers' own layer makes a fused copy of them. The copy is saved with the model, stays after unfusing, and is
        trained instead of the originals. Here there is no copy.
        """
        self.fused_projections = fuse

    def to_qkv(self, tokens: Tensor) -> Tensor:  # type: ignore[override]  # diffusers' is a layer
        """(B, HW, C) -> (B, HW, 3·C): queries, keys and values in one product."""
        layers = (self.to_q, self.to_k, self.to_v)
        if not all(is_plain(layer, nn.Linear) for layer in layers):
            return torch.cat([layer(tokens) for layer in layers], dim=-1)
        weight, bias = (torch.cat(parts) for parts in zip(*((y.weight, y.bias) for y in layers), strict=True))
        return F.linear(tokens, weight, bias)


class Downsample(nn.Module):
    """A 3x3 conv of stride 2. The only padding is one column of zeros on the right and one row below, as in LDM."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, hidden_states: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        return self.conv(F.pad(hidden_states, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour x2, then a 3x3 conv."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, hidden_states: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        return self.conv(F.interpolate(hidden_states, scale_factor=2.0, mode="nearest"))


class MidBlock(nn.Module):
    """ResNet block, self-attention (optional), ResNet block, all at the lowest resolution."""

    def __init__(self, channels: int, num_groups: int, act_fn: str, add_attention: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, num_groups, act_fn) for _ in range(2)])
        # None without attention, as in diffusers: users' own loops go through attentions and resnets in pairs
        self.attentions = nn.ModuleList([SelfAttention(channels, num_groups) if add_attention else None])  # type: ignore[list-item]

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        x = self.resnets[0](hidden_states, temb)  # (B, C, H, W) -> (B, C, H, W)
        if self.attentions[0] is not None:
            x = self.attentions[0](x)
        return self.resnets[1](x, temb)


class _Level(nn.Module):
    """The blocks of one resolution: ResNet blocks, each followed by self-attention if the level has it."""

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

    def layers(self, x: Tensor, temb: Tensor | None) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, temb)
            if self.attentions is not None:
                x = self.attentions[i](x)
        return x


class DownBlock(_Level):
    """A level of the encoder; all except the last halve the resolution at their end."""

    def __init__(self, *, out_channels: int, add_downsample: bool, **kwargs: Any):
        super().__init__(out_channels=out_channels, **kwargs)
        self.downsamplers = nn.ModuleList([Downsample(out_channels)]) if add_downsample else None

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        x = self.layers(hidden_states, temb)
        return x if self.downsamplers is None else self.downsamplers[0](x)


class UpBlock(_Level):
    """A level of the decoder; all except the last double the resolution at their end."""

    def __init__(self, *, out_channels: int, add_upsample: bool, **kwargs: Any):
        super().__init__(out_channels=out_channels, **kwargs)
        self.upsamplers = nn.ModuleList([Upsample(out_channels)]) if add_upsample else None

    def forward(self, hidden_states: Tensor, temb: Tensor | None = None) -> Tensor:
        x = self.layers(hidden_states, temb)
        return x if self.upsamplers is None else self.upsamplers[0](x)


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, 2·latent_channels, H/f, W/f) with f = 2^(levels - 1)."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        level_attention: Sequence[bool],
        layers_per_block: int,
        norm_num_groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
    ):
        super().__init__()
        first, last = block_out_channels[0], block_out_channels[-1]
        self.layers_per_block = layers_per_block
        self.conv_in = conv3x3(in_channels, first)
        self.down_blocks = nn.ModuleList()
        width = first
        for level, out_width in enumerate(block_out_channels):
            block = DownBlock(
                in_channels=width,
                out_channels=out_width,
                num_layers=layers_per_block,
                num_groups=norm_num_groups,
                act_fn=act_fn,
                add_attention=level_attention[level],
                add_downsample=level < len(block_out_channels) - 1,
            )
            self.down_blocks.append(block)
            width = out_width
        self.mid_block = MidBlock(last, norm_num_groups, act_fn, mid_block_add_attention)
        self.conv_norm_out = group_norm(norm_num_groups, last)
        self.conv_act = nn.SiLU()
        self.conv_out = conv3x3(last, 2 * latent_channels)
        self.gradient_checkpointing = False

    def forward(self, sample: Tensor, temb: Tensor | None = None) -> Tensor:
        h = self.conv_in(sample)
        for block in self.down_blocks:
            h = checkpointed(self, block, h, temb)
        h = checkpointed(self, self.mid_block, h, temb)
        return self.conv_out(activated(self.conv_norm_out, self.conv_act, h))


class Decoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, out_channels, f·h, f·w): the encoder mirrored, with one more layer a level."""

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        level_attention: Sequence[bool],
        layers_per_block: int,
        norm_num_groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
    ):
        super().__init__()
        first, last = block_out_channels[0], block_out_channels[-1]
        self.layers_per_block = layers_per_block
        self.conv_in = conv3x3(latent_channels, last)
        self.mid_block = MidBlock(last, norm_num_groups, act_fn, mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        width = last
        for level, out_width in enumerate(reversed(block_out_channels)):
            block = UpBlock(
                in_channels=width,
                out_channels=out_width,
                num_layers=layers_per_block + 1,
                num_groups=norm_num_groups,
                act_fn=act_fn,
                add_attention=level_attention[level],
                add_upsample=level < len(block_out_channels) - 1,
            )
            self.up_blocks.append(block)
            width = out_width
        self.conv_norm_out = group_norm(norm_num_groups, first)
        self.conv_act = nn.SiLU()
        self.conv_out = conv3x3(first, out_channels)
        self.gradient_checkpointing = False

    def forward(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        h = self.conv_in(sample)
        h = checkpointed(self, self.mid_block, h, latent_embeds)
        for block in self.up_blocks:
            h = checkpointed(self, block, h, latent_embeds)
        return self.conv_out(activated(self.conv_norm_out, self.conv_act, h))


def group_norm(num_groups: int, channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=NORM_EPS)


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


def set_padding(network: nn.Module, mode: str) -> None:
    """Let all convs that pad their input themselves do it in `mode`.

    The convs of downsamplers do not: `Downsample` pads for them. This is what those do who train VAEs with another
    padding in diffusers or ComfyUI (such as Anzhc's MS-LC-EQ-D-VR, whose model card has these lines).
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and any(module.padding):
            module.padding_mode = mode  # type: ignore[assignment]  # torch's stubs want a Literal


def checkpointed(module: Any, function: Callable[..., Tensor], x: Tensor, temb: Tensor | None) -> Tensor:
    """function(x, temb), recomputed in the backward pass if `module.gradient_checkpointing` is on."""
    if module.gradient_checkpointing and torch.is_grad_enabled():
        return module._gradient_checkpointing_func(function, x, *only(temb))
    return function(x, *only(temb))


def only(temb: Tensor | None) -> tuple[Tensor, ...]:
    """The embedding as a tuple of arguments, which is empty without one: a replaced block may take only the map."""
    return () if temb is None else (temb,)


def activated(norm: nn.Module, act: nn.Module, x: Tensor) -> Tensor:
    """act(norm(x)). In inference the activation overwrites the norm's output, which saves a pass over memory."""
    if _may_keep_outputs() or not is_plain(norm, nn.GroupNorm):
        return act(norm(x))
    fused = fused_norm(norm, act, x)
    return activated_in_place(act, norm(x)) if fused is None else fused.then_silu(x)


def fused_norm(norm: nn.Module, act: nn.Module | None, x: Tensor) -> Any:
    """The norm, if it has a kernel that computes it and then the activation (`sdvae.kernels.group_norm`), or None."""
    fits = getattr(norm, "fits", None)
    both = fits is not None and is_plain(norm, nn.GroupNorm) and is_plain(act, nn.SiLU) and fits(x)
    return norm if both else None


def activated_in_place(act: nn.Module, h: Tensor) -> Tensor:
    """act(h), written over h if `act` is SiLU. The values are the same bits either way."""
    return F.silu(h, inplace=True) if is_plain(act, nn.SiLU) else act(h)


def added(x: Tensor, h: Tensor, last: nn.Module) -> Tensor:
    """x + h. In inference the sum overwrites h, the output of the conv `last`, which saves an allocation.

    This needs operands of one memory layout and dtype; otherwise the sum's layout or dtype would not be that of x + h.
    """
    alike = h.stride() == x.stride() and h.dtype == x.dtype
    return h.add_(x) if alike and not _may_keep_outputs() and is_plain(last, nn.Conv2d) else x + h


def _may_keep_outputs() -> bool:
    """Whether outputs of layers must not be overwritten: by autograd, which may need them, or under a compiler."""
    return torch.is_grad_enabled() or torch.compiler.is_compiling()
