"""Group norm with SiLU, and the residual sum, as Triton kernels for maps in either layout.

Group norm reads its map twice, which is the least without keeping it on the chip, and writes it once:

1. `_moments`: many programs share the positions of a map, so that a batch of one image occupies the whole GPU. Each
   finds mean and Σ (x - mean)² of each channel over its own positions (Welford 1962), in fp32. A sum of squares less
   the square of the mean would lose all digits where a mean is large.
2. `_scale_and_shift` merges these numbers over positions and over the channels of a group (Chan et al. 1979, eq. 2.1).
   Group norm is then one scale and one shift for each image and channel. It reads a few KiB.
3. `_scaled` applies them, and the activation.

A conv's bias is the same at all positions. So the conv before a norm can leave it out, and step 2 puts it into the
shift. The conv before a residual sum leaves it out too, and the sum adds it. Otherwise torch reads and writes the map
once more for each bias, after cuDNN's convolution.

With TRITON_INTERPRET=1 in the environment before triton is first imported, everything here runs on the CPU, slowly.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # values that a program holds at a time
PROGRAMS = 4096  # that find the moments of a map, at most: about thirty for each multiprocessor of an H100
GROUP_TILE = 1024  # moments that a program of `_scale_and_shift` holds at a time


@triton.jit
def _moments(
    x, means, squares, positions, channels, x_b, x_c, x_p, share, shares, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """(B, C, P) -> means and squares, (B, C, shares), each over `share` positions."""
    part, image = tl.program_id(0), tl.program_id(2)
    row = tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    start = part.to(tl.int64) * share
    stop = tl.minimum(start + share, positions)
    x += image.to(tl.int64) * x_b + column.to(tl.int64)[None, :] * x_c
    inside = column[None, :] < channels
    mean = tl.zeros((ROWS, COLUMNS), tl.float32)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    seen = 0.0
    for first in range(start, stop, ROWS):
        place = first + row[:, None]
        mask = (place < stop) & inside
        value = tl.load(x + place * x_p, mask=mask, other=0.0).to(tl.float32)
        seen += 1.0
        delta = tl.where(mask, value - mean, 0.0)
        mean += delta / seen
        square += delta * tl.where(mask, value - mean, 0.0)
    count = tl.maximum(0, (stop - start - row + ROWS - 1) // ROWS).to(tl.float32)[:, None]
    total = tl.sum(mean * count, axis=0) / (stop - start).to(tl.float32)
    square += count * (mean - total[None, :]) * (mean - total[None, :])
    out = (image.to(tl.int64) * channels + column) * shares + part
    tl.store(means + out, total, mask=column < channels)
    tl.store(squares + out, tl.sum(square, axis=0), mask=column < channels)


@triton.jit
def _scale_and_shift(
    means, squares, weight, bias, conv_bias, scale, shift, positions, channels, share, shares, eps,
    EACH: tl.constexpr, CHANNELS: tl.constexpr, PARTS: tl.constexpr, HAS_CONV_BIAS: tl.constexpr,
):  # fmt: skip
    """The moments of one group -> scale and shift, (B, C), of its channels. EACH: channels of a group."""
    group, image = tl.program_id(0), tl.program_id(1)
    place = tl.arange(0, CHANNELS)
    inside = place < EACH
    channel = group * EACH + place
    line = (image.to(tl.int64) * channels + channel) * shares
    added = tl.zeros((CHANNELS,), tl.float32)
    if HAS_CONV_BIAS:
        added = tl.load(conv_bias + channel, mask=inside, other=0.0).to(tl.float32)
    part = tl.arange(0, PARTS)
    sums = tl.zeros((CHANNELS, PARTS), tl.float32)
    for first in range(0, shares, PARTS):
        mask = inside[:, None] & (first + part < shares)[None, :]
        mean = tl.load(means + line[:, None] + first + part[None, :], mask=mask, other=0.0) + added[:, None]
        count = tl.minimum(share, positions - (first + part).to(tl.int64) * share).to(tl.float32)[None, :]
        sums += tl.where(mask, mean * (count / positions), 0.0)
    centre = tl.sum(tl.sum(sums, axis=1), axis=0) / EACH
    sums = tl.zeros((CHANNELS, PARTS), tl.float32)
    for first in range(0, shares, PARTS):
        mask = inside[:, None] & (first + part < shares)[None, :]
        mean = tl.load(means + line[:, None] + first + part[None, :], mask=mask, other=0.0) + added[:, None]
        square = tl.load(squares + line[:, None] + first + part[None, :], mask=mask, other=0.0)
        count = tl.minimum(share, positions - (first + part).to(tl.int64) * share).to(tl.float32)[None, :]
        sums += tl.where(mask, (square + count * (mean - centre) * (mean - centre)) / positions, 0.0)
    variance = tl.sum(tl.sum(sums, axis=1), axis=0) / EACH
    factor = tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32) / tl.sqrt(variance + eps)
    offset = tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32) + (added - centre) * factor
    tl.store(scale + image.to(tl.int64) * channels + channel, factor, mask=inside)
    tl.store(shift + image.to(tl.int64) * channels + channel, offset, mask=inside)


@triton.jit
def _part_of_map(positions, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Image, positions (ROWS, 1) and channels (1, COLUMNS) of this program, and which of them are in the map."""
    image = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :].to(tl.int64)
    return image, place, column, (place < positions) & (column < channels)


@triton.jit
def _scaled(
    x, out, scale, shift, positions, channels, x_b, x_c, x_p, out_b, out_c, out_p,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = silu(x · scale + shift)"""
    image, place, column, mask = _part_of_map(positions, channels, ROWS, COLUMNS)
    factor = tl.load(scale + image * channels + column, mask=column < channels, other=0.0)
    offset = tl.load(shift + image * channels + column, mask=column < channels, other=0.0)
    value = tl.load(x + image * x_b + column * x_c + place * x_p, mask=mask, other=0.0).to(tl.float32)
    value = value * factor + offset
    value = value / (1.0 + tl.exp(-value))
    tl.store(out + image * out_b + column * out_c + place * out_p, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _summed(
    h, x, bias, positions, channels, h_b, h_c, h_p, x_b, x_c, x_p,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h += x + bias"""
    image, place, column, mask = _part_of_map(positions, channels, ROWS, COLUMNS)
    target = h + image * h_b + column * h_c + place * h_p
    value = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(x + image * x_b + column * x_c + place * x_p, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)
    tl.store(target, value.to(h.dtype.element_ty), mask=mask)


DEVICE_TYPE = "cuda" if isinstance(_moments, triton.JITFunction) else "cpu"  # where the kernels run


def scale_and_shift(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, conv_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Group norm of x + conv_bias as a scale and a shift of x.

    Args:
        x: (B, C, H, W).
        groups: of the norm.
        weight: (C,), of the norm.
        bias: (C,), of the norm.
        eps: of the norm.
        conv_bias: (C,), what the conv before the norm left out.

    Returns:
        Two of (B, C), in fp32.
    """
    batch, channels = x.shape[:2]
    x, positions, strides = _flat(x)
    rows, columns = _tile(positions, channels, strides)
    tiles, blocks = triton.cdiv(positions, rows), triton.cdiv(channels, columns)
    share = rows * triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // (blocks * batch))))
    shares = triton.cdiv(positions, share)
    means, squares = x.new_empty((2, batch, channels, shares), dtype=torch.float32)
    scale, shift = x.new_empty((2, batch, channels), dtype=torch.float32)
    each = channels // groups
    held = triton.next_power_of_2(each)
    parts = min(triton.next_power_of_2(shares), max(1, GROUP_TILE // held))
    with torch.cuda.device_of(x):
        _moments[(shares, blocks, batch)](
            x, means, squares, positions, channels, *strides, share, shares, rows, columns
        )
        _scale_and_shift[(groups, batch)](
            means, squares, weight, bias, bias if conv_bias is None else conv_bias, scale, shift,
            positions, channels, share, shares, eps, each, held, parts, conv_bias is not None,
        )  # fmt: skip
    return scale, shift


def scaled_silu(x: Tensor, scale: Tensor, shift: Tensor, *, in_place: bool = False) -> Tensor:
    """silu(x · scale + shift).

    Args:
        x: (B, C, H, W).
        scale: (B, C) in fp32.
        shift: (B, C) in fp32.
        in_place: write over x.

    Returns:
        (B, C, H, W) in the dtype and layout of x.
    """
    x, positions, strides = _flat(x)
    last = strides[1] == 1 and x.shape[1] > 1
    layout = torch.channels_last if last else torch.contiguous_format
    out = x if in_place else torch.empty_like(x, memory_format=layout)
    _, _, out_strides = _flat(out)
    rows, columns = _tile(positions, x.shape[1], strides)
    grid = (triton.cdiv(positions, rows), triton.cdiv(x.shape[1], columns), x.shape[0])
    with torch.cuda.device_of(x):
        _scaled[grid](
            x, out, scale.contiguous(), shift.contiguous(), positions, x.shape[1], *strides, *out_strides, rows, columns
        )  # fmt: skip
    return out


def add(h: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    """h + x + bias, (B, C, H, W) in the dtype of h and written over it. bias: (C,)."""
    h, positions, strides = _flat(h)
    x, _, x_strides = _flat(x)
    rows, columns = _tile(positions, h.shape[1], strides)
    grid = (triton.cdiv(positions, rows), triton.cdiv(h.shape[1], columns), h.shape[0])
    with torch.cuda.device_of(h):
        _summed[grid](h, x, bias, positions, h.shape[1], *strides, *x_strides, rows, columns)
    return h


def _flat(x: Tensor) -> tuple[Tensor, int, tuple[int, int, int]]:
    """A map, the number H·W of its positions, and its strides between images, channels and positions.

    Some rows of a larger map are such a map too. Where positions have no common stride, the map is copied.
    """
    batch, _, height, width = x.shape
    if min(height, width) > 1 and x.stride(2) != width * x.stride(3):
        x = x.contiguous()
    step = x.stride(3) if width > 1 else x.stride(2)
    return x, height * width, (x.stride(0) if batch > 1 else 0, x.stride(1), step)


def _tile(positions: int, channels: int, strides: tuple[int, int, int]) -> tuple[int, int]:
    """Positions and channels that a program holds at a time, so that neighbours in memory are read together."""
    columns = min(triton.next_power_of_2(channels), 128) if strides[1] == 1 else 1
    return min(triton.next_power_of_2(positions), TILE // columns), columns
