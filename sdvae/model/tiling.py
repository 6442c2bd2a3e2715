"""The VAE on images of any size in bounded memory, with the result of the whole-image pass.

Tiling as it is usually done runs the whole network on each tile, so that group norm and attention see a tile instead
of the image: seams, and colours that drift. Here the network runs layer by layer over the whole image, each layer in
strips of rows:

- a 3x3 conv reads one row more above and below its strip, and drops what it computes there;
- group norm takes its statistics from all strips, merged by Chan et al. 1979, «Updating formulae and a pairwise
  algorithm for computing sample variances», eq. 2.1; after that it is a scale and a shift of each channel;
- attention, which has the lowest resolution, computes keys and values of all positions and queries strip by strip.

A map is kept as a list of strips, and each is let go with the last reader of its rows. So two maps of one width are
the most that there is at a time (a ResNet block's input and what is inside it), on the device or, where they do not
fit, in the host's memory. At 1024² SD's decoder keeps 1 GiB in fp32, where the whole-image pass has 3.8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.model.blocks import DownBlock, MidBlock, ResnetBlock, SelfAttention, UpBlock, activated
from sdvae.model.posterior import at_least_fp32
from sdvae.runtime import give_back

STRIP_BYTES = 64 * 2**20  # of the wider map of a layer, in a strip; tall strips waste less on the rows between them
STRIPS_A_MAP = 64  # at least, or strips would take more than the maps that they are to save
STRIPS_AT_ONCE = 6  # of that size, that a layer has in work: read, normalised, activated, computed, and the residual
FREE_SHARE = 0.7  # of an accelerator's free memory that maps may take where no budget is given


def plan(
    vae: Any, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, memory_bytes: int | None
) -> Budget:
    """Where maps are kept and how large strips are, for images of a size.

    Args:
        shape: (B, C, H, W) of the images.
        memory_bytes: of the device that computes, above weights, input and output; None: strips of up to 64
            MiB, and for maps 70 % of what is free on an accelerator.

    Raises: InputError when maps, or a strip of one row, do not fit.
    """
    batch, _, height, width = shape
    maps = map_bytes(vae, batch, height, width, dtype)
    rows = row_bytes(vae, batch, height, width, dtype)
    on_host = device.type == "cpu"
    if memory_bytes is None:
        free = FREE_SHARE * _free_bytes(device)
        strip = max(rows, min(STRIP_BYTES, maps // STRIPS_A_MAP))
    else:
        free = memory_bytes
        left = memory_bytes - maps if on_host else memory_bytes
        strip = min(STRIP_BYTES, left // (2 * STRIPS_AT_ONCE))
        beside = (memory_bytes - maps) // STRIPS_AT_ONCE
        if max(rows, strip // 4) <= beside:  # smaller strips, if with them the maps stay on the device
            strip = min(strip, beside)
        if strip < rows:
            least = 2 * STRIPS_AT_ONCE * rows + (maps if on_host else 0)
            raise InputError(
                f"got memory_bytes={memory_bytes} for images of {height} x {width}, batch {batch}; "
                f"need at least {least}; raise it, or use a smaller batch or dtype"
            )
    fits = on_host or maps + STRIPS_AT_ONCE * strip <= free
    return Budget(work=device, store=device if fits else torch.device("cpu"), strip_bytes=int(strip))


def _free_bytes(device: torch.device) -> float:
    """Of an NVIDIA GPU, with what torch keeps for itself and does not use; elsewhere nobody tells."""
    if device.type != "cuda":
        return float("inf")
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def map_bytes(vae: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> int:
    """The most that maps take at one time: a ResNet block's input and inside, or an upsampler's two maps.

    Args: height, width: of the image.
    """
    most, widths = 0, list(vae.config.block_out_channels)
    for level, channels in enumerate(widths):
        wider = widths[min(level + 1, len(widths) - 1)]  # what the decoder comes with, from the level below
        most = max(most, max(2 * channels, wider + wider // 4) * (height >> level) * (width >> level))
    return most * batch * dtype.itemsize


def row_bytes(vae: Any, batch: int, height: int, width: int, dtype: torch.dtype) -> int:
    """The most that a strip of one row takes in a layer: two rows of four channels' worth where a level ends.

    The keys and values of attention count too, since they are had for all positions at once.
    """
    widths = list(vae.config.block_out_channels)
    rows = [2 * channels * (width >> level) for level, channels in enumerate(widths)]
    lowest = len(widths) - 1
    attention = 3 * widths[-1] * (height >> lowest) * (width >> lowest) // (2 * STRIPS_AT_ONCE)
    return max(*rows, attention) * batch * dtype.itemsize


@dataclass(frozen=True)
class Budget:
    """Where maps are kept, and how large strips are.

    Attributes:
        work: the device that computes.
        store: the device that keeps the maps.
        strip_bytes: of a strip of the wider of a layer's maps.
    """

    work: torch.device
    store: torch.device
    strip_bytes: int


def has_hooks(vae: nn.Module) -> bool:
    """Does a layer below the VAE have hooks, of torch, or of accelerate and diffusers, which replace `forward`?"""
    return any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
        for module in vae.modules()
        if module is not vae
    )


class Rows:
    """A map (B, C, H, W) in strips.

    Args:
        groups: of the group norm that will read it; None where there is none.
    """

    def __init__(self, height: int, budget: Budget, groups: int | None = None):
        self.height = height
        self._budget = budget
        self._groups = groups
        self._strips: list[tuple[int, Tensor]] = []  # first row, rows; those in use
        self._filled = 0  # rows appended
        self._count = 0.0
        self._mean: Tensor | None = None  # (B, groups) float64
        self._square: Tensor | None = None  # Σ (x - mean)²

    def append(self, rows: Tensor) -> None:
        """The next rows, (B, C, h, W), on the working device."""
        if self._groups is not None:
            self._merge(rows)
        self._strips.append((self._filled, rows.to(self._budget.store)))
        self._filled += rows.shape[2]

    def __getitem__(self, window: slice) -> Tensor:
        """Rows [start, stop), less those outside of the map, on the working device."""
        start, stop = max(0, window.start), min(self.height, window.stop)
        parts = []
        for first, strip in self._strips:
            top, bottom = max(start, first), min(stop, first + strip.shape[2])
            if top < bottom:
                parts.append(strip[:, :, top - first : bottom - first].to(self._budget.work, non_blocking=True))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def let_go(self, row: int) -> None:
        """The rows above `row` are not read any more."""
        kept = len(self._strips)
        while self._strips and self._strips[0][0] + self._strips[0][1].shape[2] <= row:
            self._strips.pop(0)
        if len(self._strips) < kept and self._budget.store.type == "cpu":
            give_back()

    def strips(self, channels: int) -> Iterator[tuple[int, int]]:
        """(top, bottom) of strips for a layer whose wider map has so many channels."""
        _, first = self._strips[0]
        row_bytes = first.shape[0] * channels * first.shape[3] * first.element_size()
        step = max(1, self._budget.strip_bytes // row_bytes)
        for top in range(0, self.height, step):
            yield top, min(self.height, top + step)

    def norm(self, norm: nn.GroupNorm) -> Callable[[Tensor], Tensor]:
        """Group norm with the statistics of the whole map, as a function of some of its rows."""
        assert self._mean is not None
        assert self._square is not None
        rstd = (self._square / self._count + norm.eps).rsqrt()  # (B, groups)
        each = norm.num_channels // norm.num_groups
        mean, rstd = (x.repeat_interleave(each, dim=1) for x in (self._mean, rstd))  # (B, C)
        scale = rstd * norm.weight.to(rstd)
        shift = norm.bias.to(rstd) - mean * scale
        scale, shift = (x[:, :, None, None] for x in (scale, shift))

        def normalised(rows: Tensor) -> Tensor:
            wide = at_least_fp32(rows)
            return torch.addcmul(shift.to(wide), wide, scale.to(wide)).to(rows.dtype)

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
    """The layers of a VAE over `Rows`. Every method uses its input up, unless it says otherwise."""

    def __init__(self, budget: Budget, groups: int):
        self._budget = budget
        self._groups = groups

    def encode(self, vae: Any, images: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 2·latent_channels, H/f, W/f), as the encoder and quant_conv have it."""
        encoder = vae.encoder
        x = self._conv(self._whole(images), encoder.conv_in, normed=True)
        for block in encoder.down_blocks:
            x = self._level(x, block)
        x = self._mid(x, encoder.mid_block)
        x = self._conv(x, encoder.conv_out, norm=encoder.conv_norm_out, act=encoder.conv_act)
        if vae.quant_conv is not None:
            x = self._conv(x, vae.quant_conv)
        return self._gathered(x, images)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """(B, latent_channels, h, w) -> (B, out_channels, f·h, f·w), as post_quant_conv and the decoder have it."""
        decoder = vae.decoder
        x = self._whole(latents)
        if vae.post_quant_conv is not None:
            x = self._conv(x, vae.post_quant_conv)
        x = self._conv(x, decoder.conv_in, normed=True)
        x = self._mid(x, decoder.mid_block)
        for block in decoder.up_blocks:
            x = self._level(x, block)
        x = self._conv(x, decoder.conv_out, norm=decoder.conv_norm_out, act=decoder.conv_act)
        return self._gathered(x, latents)

    def _level(self, x: Rows, block: DownBlock | UpBlock) -> Rows:
        for i, resnet in enumerate(block.resnets):
            x = self._resnet(x, resnet)  # type: ignore[arg-type]  # a ModuleList forgets of what
            if block.attentions is not None:
                x = self._attention(x, block.attentions[i])  # type: ignore[arg-type]
        if isinstance(block, DownBlock):
            return x if block.downsamplers is None else self._downsample(x, block.downsamplers[0])
        return x if block.upsamplers is None else self._upsample(x, block.upsamplers[0])

    def _mid(self, x: Rows, block: MidBlock) -> Rows:
        x = self._resnet(x, block.resnets[0])  # type: ignore[arg-type]
        for attention in block.attentions:
            x = self._attention(x, attention)  # type: ignore[arg-type]
        return self._resnet(x, block.resnets[1])  # type: ignore[arg-type]

    def _resnet(self, x: Rows, block: ResnetBlock) -> Rows:
        conv1, conv2 = block.conv1, block.conv2
        norm, act = x.norm(block.norm1), block.nonlinearity
        h, residual = self._rows(x.height, normed=True), x
        if block.conv_shortcut is not None:
            residual = self._rows(x.height, normed=False)
        for top, bottom in x.strips(max(conv1.in_channels, conv1.out_channels)):
            rows = x[top - 1 : bottom + 1]
            h.append(_conv_rows(conv1, activated(act, norm(rows), block.norm1), top > 0, bottom < x.height))
            if block.conv_shortcut is not None:
                above = int(top > 0)
                residual.append(block.conv_shortcut(rows[:, :, above : above + bottom - top]))
                x.let_go(bottom - 1)
            del rows
        norm, out = h.norm(block.norm2), self._rows(x.height, normed=True)
        for top, bottom in h.strips(conv2.in_channels):
            rows = _conv_rows(
                conv2, activated(act, norm(h[top - 1 : bottom + 1]), block.norm2), top > 0, bottom < h.height
            )
            out.append(rows.add_(residual[top:bottom]))
            h.let_go(bottom - 1)
            residual.let_go(bottom)
        return out

    def _attention(self, x: Rows, block: SelfAttention) -> Rows:
        norm = x.norm(block.group_norm)
        keys, values = [], []
        for top, bottom in x.strips(block.to_k.out_features):
            tokens = norm(x[top:bottom]).flatten(2).transpose(1, 2)  # (B, n, C)
            keys.append(block.to_k(tokens))
            values.append(block.to_v(tokens))
        k, v = (torch.cat(parts, dim=1).unsqueeze(1) for parts in (keys, values))  # (B, 1, HW, C)
        del keys, values
        out = self._rows(x.height, normed=True)
        # Kernels that hold no scores are not to be had for every width and device: bound what the others hold.
        chunk = max(1, self._budget.strip_bytes // (k.shape[0] * k.shape[2] * k.element_size()))
        chunk = k.shape[2] if k.device.type == "cpu" else chunk
        for top, bottom in x.strips(block.to_q.out_features):
            rows = x[top:bottom]
            q = block.to_q(norm(rows).flatten(2).transpose(1, 2)).unsqueeze(1)  # (B, 1, n, C)
            found = [F.scaled_dot_product_attention(part, k, v) for part in q.split(chunk, dim=2)]
            tokens = block.to_out[0](torch.cat(found, dim=2).squeeze(1))  # (B, n, C)
            out.append(tokens.transpose(1, 2).reshape(rows.shape) + rows)
            x.let_go(bottom)
        return out

    def _upsample(self, x: Rows, layer: nn.Module) -> Rows:
        conv: Any = layer.conv
        out = self._rows(2 * x.height, normed=True)
        for top, bottom in x.strips(4 * conv.in_channels):
            rows = F.interpolate(x[top - 1 : bottom + 1], scale_factor=2.0, mode="nearest")
            above, below = top > 0, bottom < x.height
            rows = rows[:, :, int(above) : rows.shape[2] - int(below)]  # a conv needs one of the two halo rows
            out.append(_conv_rows(conv, rows, above, below))
            x.let_go(bottom - 1)
        return out

    def _downsample(self, x: Rows, layer: nn.Module) -> Rows:
        out = self._rows(x.height // 2, normed=True)
        for top, bottom in x.strips(layer.conv.in_channels):  # type: ignore[union-attr, arg-type]
            top, bottom = top // 2, bottom // 2 if bottom < x.height else x.height // 2
            if top < bottom:
                out.append(
                    layer(x[2 * top : 2 * bottom + 1])
                )  # the row that it pads below is not reached, but the last
                x.let_go(2 * bottom)
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
        """A conv of 3x3 or 1x1, after norm and activation where they are given. `normed`: a group norm comes next."""
        normalised = None if norm is None else x.norm(norm)
        halo = conv.kernel_size[0] // 2
        out = self._rows(x.height, normed)
        for top, bottom in x.strips(max(conv.in_channels, conv.out_channels)):
            rows = x[top - halo : bottom + halo]
            if norm is not None and normalised is not None and act is not None:
                rows = activated(act, normalised(rows), norm)
            above, below = halo and top > 0, halo and bottom < x.height
            out.append(_conv_rows(conv, rows, bool(above), bool(below)))
            x.let_go(bottom - halo)
        return out

    def _rows(self, height: int, normed: bool) -> Rows:
        """An empty map; a group norm will read it, or not."""
        return Rows(height, self._budget, self._groups if normed else None)

    def _whole(self, x: Tensor) -> Rows:
        rows = self._rows(x.shape[2], normed=False)
        rows.append(x.to(self._budget.work))
        return rows

    def _gathered(self, x: Rows, like: Tensor) -> Tensor:
        return x[0 : x.height].to(like.device)


def _conv_rows(conv: nn.Conv2d, rows: Tensor, above: bool, below: bool) -> Tensor:
    """The conv of some rows of a map, of which the first and the last are there only to be read.

    Args: above, below: whether there is such a row; else there is the map's border, with its zeros.
    """
    if not above and not below:
        return conv(rows)
    if above and below and type(conv) is nn.Conv2d:
        return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))
    out = conv(rows)  # a layer with kernels of its own: what it makes of the halo is dropped
    return out[:, :, int(above) : out.shape[2] - int(below)]
