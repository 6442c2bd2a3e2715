"""Winograd's 3x3 convolutions, for training and inference on a CPU: the same function up to rounding, faster.

Winograd's minimal filtering computes an m x m tile of a 3x3 convolution from (m + 2)² products instead of 9 m²
(Lavin & Gray 2016, «Fast Algorithms for Convolutional Neural Networks», eq. 8):

    Y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A

and the gradient of w is that formula's adjoint, summed over tiles: Gᵀ [(A dY Aᵀ) ⊙ (Bᵀ x B)] G. Here the output and
the gradient of x come from NNPACK's F(6x6, 3x3) kernels, which are part of torch, and the gradient of w from
F(4x4, 3x3) in matrix products. Relative errors (2-norm) are near 3e-6, those of a direct convolution near 1e-6; single
values are off by up to 2e-5 of the largest.

With few channels, Winograd's transforms cost more than they save. In bf16 its sums of up to 36 values of mixed sign
would lose too much precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sdvae.kernels.fitness import fits_conv3x3

TILE = 4  # F(4x4, 3x3): patches of 6x6
CHUNK_BYTES = 8e6  # transformed patches held at once, to fit into a part of the last-level cache

# Lavin & Gray 2016, section 4.2 (interpolation points 0, ±1, ±2, ∞)
_BT = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
_BT += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
_G = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
_G += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
_AT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]


def _both_axes(one_axis: Sequence[Sequence[float]]) -> Tensor:
    """M ⊗ M, which transforms a flattened patch: M x Mᵀ = (M ⊗ M) vec(x)."""
    matrix = torch.tensor(one_axis, dtype=torch.float64)
    return torch.kron(matrix, matrix).float()


INPUT, KERNEL, OUTPUT = _both_axes(_BT), _both_axes(_G), _both_axes(_AT)  # (36, 36), (36, 9), (16, 36)


def winograd_pays(in_channels: int, out_channels: int, height: int, width: int) -> bool:
    """Whether NNPACK is faster than oneDNN in its best layout, for the output and for the gradient of x.

    Measured on two threads, with C -> C channels on S x S pixels, C from 32 to 512 and S from 32 to 256. If C·S is at
    least 16384, NNPACK is 1.2 to 2.7 times as fast on AVX2 (equally fast for 512 channels at 32²) and 1.3 to 2.7 times
    on Zen 4. Below 12288 it is 0.3 to 1 times as fast on AVX2 and 0.5 to 1.3 times on Zen 4. In between, either may be
    faster.
    """
    narrow, area = min(in_channels, out_channels), height * width
    return has_nnpack() and narrow >= 64 and area >= 32**2 and narrow**2 * area >= 16384**2


def weight_gradient_pays(in_channels: int, out_channels: int, height: int, width: int) -> bool:
    """Whether Winograd is faster than oneDNN for the gradient of the weights too.

    For maps where `winograd_pays` is true, it is 1.1 to 2.2 times as fast on AVX2 and 1.1 to 2.1 times on Zen 4 with at
    least 128 channels, and 0.6 times as fast with 64.
    """
    return min(in_channels, out_channels) >= 128 and winograd_pays(in_channels, out_channels, height, width)


def has_nnpack() -> bool:
    """Whether torch has NNPACK and this machine can run it. This must be called before the first of its kernels."""
    return hasattr(torch, "_nnpack_available") and torch._nnpack_available()


class FastConv3x3(nn.Conv2d):
    """A 3x3 conv of stride 1 and padding 1, by Winograd's algorithm where that pays."""

    stands_in_for = nn.Conv2d

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, O, H, W)
        exact = x.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not (exact and fits_conv3x3(x, self, "cpu") and self.pays(*x.shape[2:])):
            return super().forward(x)
        padding = 1
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, (1, 1, 1, 1), mode=self.padding_mode), 0
        if torch.is_grad_enabled():
            return _Conv3x3.apply(x, self.weight, self.bias, padding)
        return _nnpack(x, self.weight, self.bias, padding)

    def pays(self, height: int, width: int) -> bool:
        return winograd_pays(self.in_channels, self.out_channels, height, width)


class MeasuredConv3x3(FastConv3x3):
    """A 3x3 conv that uses Winograd's algorithm for maps of every size, since it was measured to be the fastest."""

    stands_in_for = nn.Conv2d

    def pays(self, height: int, width: int) -> bool:
        return has_nnpack()


def weight_gradient(x: Tensor, grad: Tensor, padding: int = 1) -> Tensor:
    """Gradient of a 3x3 conv's weights in F(4x4, 3x3): Σ_tiles Gᵀ [(A dY Aᵀ) ⊙ (Bᵀ x B)] G.

    Args:
        x: (B, C, H + 2 - 2 · padding, W + 2 - 2 · padding), the conv's input.
        grad: (B, O, H, W), the gradient of its output.
        padding: rows and columns of zeros that the conv adds on each side, 1 or 0.

    Returns:
        (O, C, 3, 3).
    """
    batch, channels, (height, width) = x.shape[0], x.shape[1], grad.shape[2:]
    rows, columns = -(-height // TILE), -(-width // TILE)
    below, right = rows * TILE - height, columns * TILE - width
    x = F.pad(x, (padding, right + padding, padding, below + padding))
    grad = F.pad(grad, (0, right, 0, below)) if below or right else grad
    bytes_a_row = INPUT.shape[0] * channels * batch * columns * x.element_size()
    chunk = max(1, int(CHUNK_BYTES / bytes_a_row))
    products = x.new_zeros(INPUT.shape[0], grad.shape[1], channels)
    for top in range(0, rows, chunk):
        bottom = min(top + chunk, rows)
        v = (INPUT.to(x) @ _patches(x, TILE + 2, top, bottom, columns)).unflatten(1, (channels, -1))  # (36, C, T)
        m = (OUTPUT.T.to(x) @ _patches(grad, TILE, top, bottom, columns)).unflatten(1, (grad.shape[1], -1))
        products.baddbmm_(m, v.transpose(1, 2))  # (36, O, C)
    weight = KERNEL.T.to(x) @ products.flatten(1)  # (9, O·C)
    return weight.view(3, 3, grad.shape[1], channels).permute(2, 3, 0, 1).contiguous()


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return _nnpack(x, weight, bias, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        out_channels, channels = weight.shape[:2]
        grad = grad.contiguous()
        wanted = list(ctx.needs_input_grad[:3])
        found: list[Tensor | None] = [None, None, None]
        if wanted[0]:
            wanted[0] = False  # the gradient of x is a conv of the same kind, with the kernel turned by 180 degrees
            found[0] = _nnpack(grad, weight.flip(2, 3).transpose(0, 1).contiguous(), None, 2 - ctx.padding)
        if wanted[1] and weight_gradient_pays(channels, out_channels, *grad.shape[2:]):
            wanted[1] = False
            found[1] = weight_gradient(x, grad, ctx.padding)
        if wanted[2] and not wanted[1]:
            wanted[2] = False
            found[2] = grad.sum(dim=(0, 2, 3))
        if any(wanted):
            geometry = (
                [1, 1],
                [ctx.padding] * 2,
                [1, 1],
                False,
                [0, 0],
                1,
            )  # stride, padding, dilation, transposed, …, groups
            rest = torch.ops.aten.convolution_backward(grad, x, weight, [out_channels], *geometry, wanted)
            found = [new if new is not None else old for old, new in zip(found, rest, strict=True)]
        return (*found, None)


def _nnpack(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """The conv with this padding of zeros, image by image, since on batches NNPACK is slower than a direct conv."""
    images = [torch._nnpack_spatial_convolution(image, weight, bias, [padding] * 2) for image in x.split(1)]
    return images[0] if len(images) == 1 else torch.cat(images)


def _patches(x: Tensor, side: int, top: int, bottom: int, columns: int) -> Tensor:
    """(B, C, H, W) -> (side², C · B · T): the patches of T tiles, those in rows [top, bottom) of tiles, TILE apart."""
    batch, channels = x.shape[:2]
    image, channel, row, column = x.stride()
    shape = (side, side, channels, batch, bottom - top, columns)
    strides = (row, column, channel, image, TILE * row, TILE * column)
    return x.as_strided(shape, strides, x.storage_offset() + top * TILE * row).reshape(side * side, -1)
