"""Nearest x2 and the 3x3 conv after it as one, with 4 products a value instead of 9.

Along each side, the three taps of the conv see only two different pixels. So the two layers equal four 2x2 convs, one
for each parity of the output's row and column (the sub-pixel convolution of Shi et al. 2016, section 3.2, with tied
weights). They are computed as one conv to four times the channels, which are then interleaved, or as one transposed
conv of 4x4 with stride 2. The weights are summed at each call: a kept sum would be wrong as soon as somebody changed
the weights in a way that torch does not count, such as `weight.data.add_`.

Where the conv pads the doubled map by reflection or replication, it reads beside each edge what is in the outermost
pixel of the map before it was doubled. In both cases that map, replicated by one pixel, gives the same.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sdvae.kernels.fitness import fits_conv3x3, layout_of
from sdvae.kernels.winograd import FastConv3x3
from sdvae.model.blocks import Upsample
from sdvae.model.config import PADDING_MODES
from sdvae.model.plain import is_conv
from sdvae.model.posterior import at_least_fp32


class FastUpsample(Upsample):
    """Nearest x2 and a 3x3 conv computed as one, unless the conv uses Winograd."""

    stands_in_for = Upsample
    device_type = "cpu"

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        conv: nn.Conv2d = self.conv
        here = is_conv(conv, 3, padding=1, modes=PADDING_MODES) and fits_conv3x3(x, conv, self.device_type)
        if not here or (isinstance(conv, FastConv3x3) and conv.pays(2 * x.shape[2], 2 * x.shape[3])):
            return super().forward(x)
        if conv.padding_mode == "zeros":
            return self.computed(x, conv.weight, conv.bias)
        return self.computed(F.pad(x, (1, 1, 1, 1), mode="replicate"), conv.weight, conv.bias, padded=True)

    def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool = False) -> Tensor:
        return upsample_conv(x, weight, bias, padded)


class TransposedUpsample(FastUpsample):
    """The same as one transposed conv."""

    stands_in_for = Upsample

    def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool = False) -> Tensor:
        return upsample_conv_transposed(x, weight, bias, padded)


class CudaUpsample(FastUpsample):
    """`FastUpsample` for CUDA."""

    stands_in_for = Upsample
    device_type = "cuda"


class CudaTransposedUpsample(TransposedUpsample):
    """`TransposedUpsample` for CUDA."""

    stands_in_for = Upsample
    device_type = "cuda"


def taps_of(weight: Tensor) -> Tensor:
    """Which of the conv's taps read which pixel, along one side.

    Returns:
        (2, 2, 3): [parity, pixel, tap] is 1 if, at output positions of this parity, the tap reads this pixel (0: the
        earlier, 1: the later) of the map before it was doubled, else 0. Dtype and device are those of the weight. It is
        computed there, since a copy from the host would make a GPU wait.
    """
    parity, pixel, tap = (torch.arange(n, device=weight.device) for n in (2, 2, 3))
    return (pixel[:, None] == (tap + 1 - parity[:, None, None]) // 2).to(weight.dtype)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool = False) -> Tensor:
    """conv3x3(nearest x2 of x), computed as a 2x2 conv to 4 · O channels, which are then interleaved.

    y[2i + a, 2j + b] = Σ_pq w_ab[p, q] x[i + a - 1 + p, j + b - 1 + q], where w_ab[p, q] is the sum of those taps of w
    that read that pixel; in half precision each sum is rounded once.

    Args:
        x: (B, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,).
        padded: whether x is (B, C, H + 2, W + 2), and has what is beyond its edges. Otherwise these are zeros.

    Returns:
        (B, O, 2H, 2W).
    """
    with torch.autocast(x.device.type, enabled=False):
        exact = at_least_fp32(weight)
        taps = taps_of(exact)
        summed = torch.einsum("apk,bql,ockl->abocpq", taps, taps, exact).flatten(0, 2)  # (4·O, C, 2, 2)
    bias = None if bias is None else bias.repeat(4)
    phases = F.conv2d(x, summed.to(weight.dtype), bias, padding=0 if padded else 1)  # (B, 4·O, H + 1, W + 1)
    return _Interleave.apply(phases)


def upsample_conv_transposed(x: Tensor, weight: Tensor, bias: Tensor | None, padded: bool = False) -> Tensor:
    """`upsample_conv` as y[s, t] = Σ_ij v[s + 1 - 2i, t + 1 - 2j] x[i, j], with a kernel v of 4x4."""
    with torch.autocast(x.device.type, enabled=False):
        exact = at_least_fp32(weight)
        taps = taps_of(exact).flip(0, 1).transpose(0, 1).flatten(0, 1)  # tap 3 - parity - 2 · pixel reads that pixel
        summed = torch.einsum("uk,vl,ockl->couv", taps, taps, exact).to(weight.dtype)  # (C, O, 4, 4)
        summed = summed.contiguous(memory_format=layout_of(weight))
    return F.conv_transpose2d(x, summed, bias, stride=2, padding=3 if padded else 1)


class _Interleave(torch.autograd.Function):
    """(B, 4·O, H + 1, W + 1) -> (B, O, 2H, 2W): y[2i + a, 2j + b] = phase_ab[i + a, j + b]."""

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        ctx.shape = phases.shape
        height, width = phases.shape[2] - 1, phases.shape[3] - 1
        shape = (phases.shape[0], phases.shape[1] // 4, 2 * height, 2 * width)
        out = torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=layout_of(phases))
        for k, phase in enumerate(phases.chunk(4, dim=1)):
            a, b = divmod(k, 2)
            out[:, :, a::2, b::2] = phase[:, :, a : a + height, b : b + width]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        phases = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=layout_of(grad)).zero_()
        height, width = phases.shape[2] - 1, phases.shape[3] - 1
        for k, phase in enumerate(phases.chunk(4, dim=1)):
            a, b = divmod(k, 2)
            phase[:, :, a : a + height, b : b + width] = grad[:, :, a::2, b::2]
        return phases
