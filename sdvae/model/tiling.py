"""The VAE on images of any size in bounded memory, with the result of the whole-image pass.

Usually, tiling means running the whole network on each tile. Group norm and attention then use a tile instead of the
image, which causes seams and wrong colours. Here the network runs layer by layer over the whole image, and each layer
computes its output in strips of rows:

- a 3x3 conv also reads one row above and one below its strip, the halo; only at the edges of the map does it pad;
- group norm takes its statistics from all strips, merged by Chan et al. 1979, «Updating formulae and a pairwise
  algorithm for computing sample variances», eq. 2.1; after that it is a scale and a shift of each channel;
- attention, at the lowest resolution, computes keys and values of all positions, and then queries strip by strip.

The output of a layer, called a map, is a list of strips, and each strip is freed when no layer needs it any more. So at
most two maps of one width exist at a time (a ResNet block's input and the map between its convs). They are on the
device or, if they do not fit there, in the host's memory. To decode to 1024² in fp32, SD's VAE needs 1 GiB for maps,
compared with 3.8 GiB for the whole image at once.

This bypasses the `forward` of blocks and upsamplers, so `can_stream` checks first that all layers are of the kinds that
this module computes (`sdvae.model.plain`). Convs with kernels of their own are called on strips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.model.blocks import (
    Decoder,
    DownBlock,
    Downsample,
    Encoder,
    MidBlock,
    ResnetBlock,
    SelfAttention,
    UpBlock,
    Upsample,
    activated_in_place,
    fused_norm,
)
from sdvae.model.config import DOWN_BLOCK_TYPES, PADDING_MODES, UP_BLOCK_TYPES, decoder_widths, level_attention
from sdvae.model.plain import has_geometry, is_conv, is_plain, kind_of
from sdvae.model.posterior import at_least_fp32
from sdvae.runtime import give_back

STRIP_BYTES = 64 * 2**20  # size of a strip of a layer's wider map; with taller strips fewer halo rows are recomputed
STRIPS_A_MAP = 64  # least number of strips in a map; larger strips would take more memory than they save
STRIPS_AT_ONCE = 6  # the most strips that a layer holds, of which one and more are left for kernels' workspaces
FREE_SHARE = 0.7  # share of an accelerator's free memory that maps may take if no budget is given

CONVS: tuple[dict[str, int], ...] = ({"kernel": 3, "padding": 1}, {"kernel": 3, "stride": 2}, {"kernel": 1})
BLOCKS = {Encoder, Decoder, DownBlock, UpBlock, MidBlock, ResnetBlock, Downsample, Upsample, nn.ModuleList}
LAYERS = {nn.Conv2d, nn.GroupNorm, nn.Linear, SelfAttention, nn.Dropout, nn.SiLU, nn.Mish, nn.GELU, nn.ReLU}
KNOWN = BLOCKS | LAYERS
PROCESSORS = (AttnProcessor2_0, FusedAttnProcessor2_0)


@torch.compiler.disable  # a compiler would unroll the loops over layers and strips, which takes it minutes
def can_stream(part: nn.Module | None, groups: int) -> bool:
    """Whether `Streamed` can compute all layers of a part of the VAE.

    Args:
        part: encoder, decoder, a conv around the latents, or None for a conv that the VAE lacks.
        groups: the number of groups that all group norms must have.
    """
    return part is None or all(_can_stream_layer(module, groups) for module in part.modules())


def is_known(module: nn.Module) -> bool:
    """Whether a module is a plain one of the kinds that the VAE's networks are built from."""
    kind = kind_of(module)
    return kind in KNOWN and is_plain(module, kind)


def _can_stream_layer(module: nn.Module, groups: int) -> bool:
    if not is_known(module):
        return False
    if isinstance(module, nn.Conv2d):
        return any(has_geometry(module, **geometry, modes=PADDING_MODES) for geometry in CONVS)
    if isinstance(module, nn.GroupNorm):
        return module.num_groups == groups and module.affine
    return not isinstance(module, SelfAttention) or type(module.processor) in PROCESSORS


def plan(
    vae: Any, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, memory_bytes: int | None
) -> Budget:
    """Choose where maps are kept and how large strips are, for images of a given size.

    Args:
        vae: an AutoencoderKL.
        shape: (B, C, H, W) of the images.
        device: the device that computes.
        dtype: the dtype of the maps.
        memory_bytes: what the device may use in addition to weights, input and output. None: strips of up to 64 MiB
            and, on an accelerator, 70 % of its free memory for maps.

    Raises:
        InputError: when the maps, or a strip of one row, do not fit.
    """
    batch, _, height, width = shape
    rows = row_bytes(vae, batch, height, width, dtype)  # a layer also reads one above and one below its strip
    fused = _attention_is_fused(vae, device, dtype)
    attention = attention_bytes(vae, batch, height, width, dtype, fused)
    maps = max(map_bytes(vae, batch, height, width, dtype), 2 * attention)  # attention's own two maps are no larger
    on_host = device.type == "cpu"
    if memory_bytes is None:
        strip = max(rows, min(STRIP_BYTES, maps // STRIPS_A_MAP))
        fits = on_host or maps + STRIPS_AT_ONCE * (strip + 2 * rows) <= FREE_SHARE * _free_bytes(device)
    else:

        def strip_beside(held: int) -> int:
            return min(max(STRIP_BYTES, rows), (memory_bytes - held) // STRIPS_AT_ONCE - 2 * rows)

        least_held = maps if on_host else attention
        strip = strip_beside(least_held)
        if strip < rows:
            least = least_held + 3 * STRIPS_AT_ONCE * rows
            raise InputError(
                f"got memory_bytes={memory_bytes} for images of {height} x {width}, batch {batch}; "
                f"need at least {least}; raise it, or use a smaller batch or dtype"
            )
        fits = strip_beside(maps) >= max(rows, strip // 4)  # smaller strips, if the maps can then stay on the device
        strip = strip_beside(maps) if fits else strip
    return Budget(device, device if fits else torch.device("cpu"), int(strip), fused)


def _attention_is_fused(vae: Any, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a kernel for the lowest level's attention that does not build the matrix of scores."""
    if device.type != "cuda":
        return device.type == "cpu"
    few = torch.empty(1, 1, 8, _widths(vae)[-1], device=device, dtype=dtype)
    case = torch.backends.cuda.SDPAParams(few, few, few, None, 0.0, False, False)
    kernels = (torch.backends.cuda.can_use_flash_attention, torch.backends.cuda.can_use_efficient_attention)
    return any(can_use(case) for can_use in kernels)


def _free_bytes(device: torch.device) -> float:
    """Free memory of an NVIDIA GPU, including what torch has reserved and does not use.

    It is infinite for other devices, since torch does not report their free memory.
    """
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _widths(vae: Any) -> list[int]:
    """The width of each level, in the encoder or the decoder, whichever has the wider."""
    widths = zip(vae.config.block_out_channels, decoder_widths(vae.config), strict=True)
    return [max(pair) for pair in widths]


def map_bytes(vae: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> int:
    """The most bytes that maps take at one time: for the two maps of a ResNet block, or of an upsampler.

    Args:
        vae: an AutoencoderKL.
        batch: number of images.
        height: height of the images, in pixels.
        width: width of the images, in pixels.
        dtype: the dtype of the maps.
    """
    most, widths = 0, _widths(vae)
    for level, channels in enumerate(widths):
        wider = widths[min(level + 1, len(widths) - 1)]  # width of the level below, which ends in the upsampler
        most = max(most, max(2 * channels, wider + wider // 4) * (height >> level) * (width >> level))
    return most * batch * dtype.itemsize


def row_bytes(vae: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> int:
    """The most bytes that a strip of one row takes in a layer. The arguments are those of `map_bytes`.

    An upsampler makes two rows of twice the width from one. It has the channels of the level that it comes from.
    """
    widths = _widths(vae)
    wider = [*widths[1:], widths[-1]]
    rows = [2 * max(pair) * (width >> level) for level, pair in enumerate(zip(widths, wider, strict=True))]
    return max(rows) * batch * dtype.itemsize


def attention_bytes(vae: Any, batch: int, height: int, width: int, dtype: torch.dtype, fused: bool) -> int:
    """The bytes of what attention needs of all positions at once, on the device that computes: keys and values.

    The other arguments are those of `map_bytes`; `fused` is that of `Budget`. Where torch builds the matrix of scores,
    it computes in fp32, for which it converts keys and values, and scales the keys.
    """
    each = 2 * dtype.itemsize + (0 if fused else 3 * 4)
    return each * batch * _attended(vae, height, width)


def _attended(vae: Any, height: int, width: int) -> int:
    """The most elements of a map of one image that attention reads; 0 if there is no attention."""
    config, levels = vae.config, len(vae.config.block_out_channels)
    down = level_attention("down_block_types", config.down_block_types, DOWN_BLOCK_TYPES, levels)
    up = level_attention("up_block_types", config.up_block_types, UP_BLOCK_TYPES, levels)
    has_it = [any(kinds) for kinds in zip(down, reversed(up), strict=True)]
    has_it[-1] |= config.mid_block_add_attention
    sizes = [channels * (height >> level) * (width >> level) for level, channels in enumerate(_widths(vae))]
    return max((size for size, there in zip(sizes, has_it, strict=True) if there), default=0)


@dataclass(frozen=True)
class Budget:
    """Where maps are kept, and how large strips are.

    Attributes:
        work: the device that computes.
        store: the device that keeps the maps.
        strip_bytes: size of a strip of the wider of a layer's two maps.
        fused: whether torch computes attention without building the matrix of scores.
    """

    work: torch.device
    store: torch.device
    strip_bytes: int
    fused: bool


class Rows:
    """A map (B, C, H, W) in strips, which are appended from the top.

    Args:
        height: H.
        budget: the budget of memory that holds the strips.
        groups: the number of groups of the group norm that will read the map; None if there is no such norm.
    """

    def __init__(self, height: int, budget: Budget, groups: int | None = None):
        self.height = height
        self._budget = budget
        self._groups = groups
        self._strips: list[tuple[int, Tensor]] = []  # (first row, its rows), without those that were freed
        self._filled = 0  # rows appended
        self._count = 0.0
        self._mean: Tensor | None = None  # (B, groups) float64
        self._square: Tensor | None = None  # Σ (x - mean)²

    def append(self, rows: Tensor) -> None:
        """Add the next rows, (B, C, h, W), on the device that computes."""
        if self._groups is not None:
            self._merge(rows)
        self._strips.append((self._filled, rows.to(self._budget.store)))
        self._filled += rows.shape[2]

    def __getitem__(self, window: slice) -> Tensor:
        """Rows [start, stop) on the device that computes. Rows outside the map are left out."""
        start, stop = max(0, window.start), min(self.height, window.stop)
        parts = []
        for first, strip in self._strips:
            top, bottom = max(start, first), min(stop, first + strip.shape[2])
            if top < bottom:
                parts.append(strip[:, :, top - first : bottom - first].to(self._budget.work, non_blocking=True))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def free_above(self, row: int) -> None:
        """Free the strips above `row`, which no layer will read again."""
        kept = len(self._strips)
        while self._strips and self._strips[0][0] + self._strips[0][1].shape[2] <= row:
            self._strips.pop(0)
        if len(self._strips) < kept and self._budget.store.type == "cpu":
            give_back()

    def strips(self, channels: int) -> Iterator[tuple[int, int]]:
        """(top, bottom) of each strip, for a layer whose wider map has `channels` channels."""
        _, first = self._strips[0]
        row_bytes = first.shape[0] * channels * first.shape[3] * first.element_size()
        step = max(1, self._budget.strip_bytes // row_bytes)
        for top in range(0, self.height, step):
            yield top, min(self.height, top + step)

    def norm(self, norm: nn.GroupNorm, act: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
        """Group norm with the statistics of the whole map, and then `act`, as a function of some rows of the map."""
        assert self._mean is not None
        assert self._square is not None
        rstd = (self._square / self._count + norm.eps).rsqrt()  # (B, groups)
        each = norm.num_channels // norm.num_groups
        mean, rstd = (x.repeat_interleave(each, dim=1) for x in (self._mean, rstd))  # (B, C)
        scale = rstd * norm.weight.to(rstd)
        shift = norm.bias.to(rstd) - mean * scale

        def normalised(rows: Tensor) -> Tensor:
            fused = fused_norm(norm, act, rows)
            if fused is not None:
                return fused.scaled_silu(rows, scale, shift)
            wide = at_least_fp32(rows)
            factor, offset = (x[:, :, None, None].to(wide) for x in (scale, shift))
            own = None if wide is rows else wide  # a copy can be overwritten
            h = torch.addcmul(offset, wide, factor, out=own).to(rows.dtype)
            return h if act is None else activated_in_place(act, h)

        return normalised

    def _merge(self, rows: Tensor) -> None:
        grouped = at_least_fp32(rows.reshape(rows.shape[0], self._groups, -1))  # type: ignore[arg-type]
        count = grouped.shape[2]
        var, mean = torch.var_mean(grouped, dim=2, correction=0)
        mean, square = mean.double(), var.double() * count
        if self._mean is None or self._square is None:
            self._count, self._mean, self._square = count, mean, square
            return
        total = self._count + count
        delta = mean - self._mean
        self._square = self._square + square + delta.square() * (self._count * count / total)
        self._mean = self._mean + delta * (count / total)
        self._count = total


class Streamed:
    """The layers of a VAE, computed on maps in strips. Every method frees its input while reading it."""

    def __init__(self, budget: Budget, groups: int):
        self._budget = budget
        self._groups = groups

    @torch.compiler.disable
    def encode(self, vae: Any, images: Tensor, temb: Tensor | None) -> Tensor:
        """Compute encoder and quant_conv.

        Args:
            vae: an AutoencoderKL.
            images: (B, in_channels, H, W).
            temb: (B, E), the embedding that ResNet blocks may take.

        Returns:
            (B, 2·latent_channels, H/f, W/f) on the device of the images.
        """
        encoder = vae.encoder
        x = self._conv(self._whole(images), encoder.conv_in, normed=True)
        for block in encoder.down_blocks:
            x = self._level(x, temb, block)
        x = self._mid(x, temb, encoder.mid_block)
        x = self._conv(x, encoder.conv_out, norm=encoder.conv_norm_out, act=encoder.conv_act)
        if vae.quant_conv is not None:
            x = self._conv(x, vae.quant_conv)
        return x[0 : x.height].to(images.device)

    @torch.compiler.disable
    def decode(self, vae: Any, latents: Tensor, temb: Tensor | None) -> Tensor:
        """Compute post_quant_conv and decoder.

        Args:
            vae: an AutoencoderKL.
            latents: (B, latent_channels, h, w).
            temb: (B, E), the embedding that ResNet blocks may take.

        Returns:
            (B, out_channels, f·h, f·w) on the device of the latents.
        """
        decoder = vae.decoder
        x = self._whole(latents)
        if vae.post_quant_conv is not None:
            x = self._conv(x, vae.post_quant_conv)
        x = self._conv(x, decoder.conv_in, normed=True)
        x = self._mid(x, temb, decoder.mid_block)
        for block in decoder.up_blocks:
            x = self._level(x, temb, block)
        x = self._conv(x, decoder.conv_out, norm=decoder.conv_norm_out, act=decoder.conv_act)
        return x[0 : x.height].to(latents.device)

    def _level(self, x: Rows, temb: Tensor | None, block: Any) -> Rows:  # a DownBlock or an UpBlock
        for i, resnet in enumerate(block.resnets):
            x = self._resnet(x, temb, resnet)
            if block.attentions is not None:
                x = self._attention(x, block.attentions[i])
        if type(block) is DownBlock:
            return x if block.downsamplers is None else self._downsample(x, block.downsamplers[0])
        return x if block.upsamplers is None else self._upsample(x, block.upsamplers[0])

    def _mid(self, x: Rows, temb: Tensor | None, block: Any) -> Rows:
        x = self._resnet(x, temb, block.resnets[0])
        if block.attentions[0] is not None:
            x = self._attention(x, block.attentions[0])
        return self._resnet(x, temb, block.resnets[1])

    def _resnet(self, x: Rows, temb: Tensor | None, block: ResnetBlock) -> Rows:
        conv1, conv2 = block.conv1, block.conv2
        normalised = x.norm(block.norm1, block.nonlinearity)
        h, residual = self._rows(x.height, normed=True), x
        if block.conv_shortcut is not None:
            residual = self._rows(x.height, normed=False)
        for top, bottom in x.strips(max(conv1.in_channels, conv1.out_channels)):
            rows = x[top - 1 : bottom + 1]
            inner = _conv_rows(conv1, normalised(rows), top > 0, bottom < x.height)
            h.append(block.plus_embedding(inner, temb))
            if block.conv_shortcut is not None:
                above = int(top > 0)
                residual.append(block.conv_shortcut(rows[:, :, above : above + bottom - top]))
                x.free_above(bottom - 1)
            del rows, inner
        normalised, out = h.norm(block.norm2, block.nonlinearity), self._rows(x.height, normed=True)
        for top, bottom in h.strips(conv2.in_channels):
            rows = _conv_rows(conv2, normalised(h[top - 1 : bottom + 1]), top > 0, bottom < h.height)
            out.append(rows.add_(residual[top:bottom]))
            h.free_above(bottom - 1)
            residual.free_above(bottom)
        return out

    def _attention(self, x: Rows, block: SelfAttention) -> Rows:
        norm = x.norm(block.group_norm)
        some = x[0:1]  # (B, C, 1, W)
        batch, _, _, columns = some.shape
        k, v = (
            some.new_empty(batch, 1, x.height * columns, block.to_k.out_features) for _ in range(2)
        )  # (B, 1, HW, C)
        for top, bottom in x.strips(block.to_k.out_features):
            tokens = norm(x[top:bottom]).flatten(2).transpose(1, 2)  # (B, n, C)
            positions = slice(top * columns, bottom * columns)
            k[:, 0, positions], v[:, 0, positions] = block.to_k(tokens), block.to_v(tokens)
        out = self._rows(x.height, normed=True)
        # Where torch builds the matrix of scores, (n, HW) in fp32 and a few copies of it, fewer queries at a time keep
        # these below the size of a strip. Elsewhere a few queries would not keep a GPU busy.
        chunk = k.shape[2]
        if not self._budget.fused:
            chunk = max(1, self._budget.strip_bytes // (3 * 4 * batch * chunk))
        for top, bottom in x.strips(block.to_q.out_features):
            rows = x[top:bottom]
            tokens = block.to_q(norm(rows).flatten(2).transpose(1, 2)).unsqueeze(1)  # (B, 1, n, C)
            tokens = torch.cat([F.scaled_dot_product_attention(q, k, v) for q in tokens.split(chunk, dim=2)], dim=2)
            tokens = block.to_out[0](tokens.squeeze(1))  # (B, n, C)
            out.append(tokens.transpose(1, 2).reshape(rows.shape).add_(rows))
            del rows, tokens
            x.free_above(bottom)
        return out

    def _upsample(self, x: Rows, layer: Upsample) -> Rows:
        out = self._rows(2 * x.height, normed=True)
        for top, bottom in x.strips(4 * layer.conv.in_channels):
            above, below = top > 0, bottom < x.height
            rows = F.interpolate(x[top - 1 : bottom + 1], scale_factor=2.0, mode="nearest")
            rows = _without_ends(rows, above, below)  # a halo row became two, and the conv needs only one of them
            out.append(_conv_rows(layer.conv, rows, above, below))
            x.free_above(bottom - 1)
        return out

    def _downsample(self, x: Rows, layer: Any) -> Rows:  # a Downsample
        out = self._rows(x.height // 2, normed=True)
        for top, bottom in x.strips(layer.conv.in_channels):
            top, bottom = top // 2, bottom // 2 if bottom < x.height else x.height // 2
            if top < bottom:
                # The layer pads one row below its input. Output row i reads input rows 2i to 2i + 2, so only the last
                # strip needs that padding. The others are given one more row, and their outputs do not reach it.
                out.append(layer(x[2 * top : 2 * bottom + 1]))
                x.free_above(2 * bottom)
        return out

    def _conv(
        self,
        x: Rows,
        conv: nn.Conv2d,
        *,
        norm: nn.GroupNorm | None = None,
        act: nn.Module | None = None,
        normed: bool = False,
    ) -> Rows:
        """A 3x3 or 1x1 conv, after norm and activation if they are given. `normed`: a group norm reads the output."""
        normalised = None if norm is None else x.norm(norm, act)
        halo = conv.kernel_size[0] // 2
        out = self._rows(x.height, normed)
        for top, bottom in x.strips(max(conv.in_channels, conv.out_channels)):
            rows = x[top - halo : bottom + halo]
            if normalised is not None:
                rows = normalised(rows)
            above, below = halo and top > 0, halo and bottom < x.height
            out.append(_conv_rows(conv, rows, bool(above), bool(below)))
            x.free_above(bottom - halo)
        return out

    def _rows(self, height: int, normed: bool) -> Rows:
        """An empty map. `normed`: a group norm will read it."""
        return Rows(height, self._budget, self._groups if normed else None)

    def _whole(self, x: Tensor) -> Rows:
        rows = self._rows(x.shape[2], normed=False)
        rows.append(x.to(self._budget.work))
        return rows


def _conv_rows(conv: nn.Conv2d, rows: Tensor, above: bool, below: bool) -> Tensor:
    """A conv of some rows of a map. The output leaves the halo out.

    Args:
        conv: 1x1, or 3x3 padded by 1.
        rows: (B, C, h, W), with the halo.
        above: whether the first row is halo. Otherwise it is the map's first row, and the conv pads above it.
        below: the same for the last row.
    """
    if above and below and type(conv) is nn.Conv2d and is_conv(conv, 3, padding=1, modes=PADDING_MODES):
        if conv.padding_mode == "zeros":
            return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))  # computes no halo rows
        return F.conv2d(F.pad(rows, (1, 1, 0, 0), mode=conv.padding_mode), conv.weight, conv.bias)
    return _without_ends(conv(rows), above, below)


def _without_ends(rows: Tensor, above: bool, below: bool) -> Tensor:
    """All rows except the first, the last or both."""
    return rows[:, :, int(above) : rows.shape[2] - int(below)]
