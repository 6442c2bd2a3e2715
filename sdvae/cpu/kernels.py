"""Faster training and inference on a CPU: the same function up to rounding, with fewer operations.

Winograd's minimal filtering computes an m x m tile of a 3x3 convolution from (m + 2)² products instead of 9 m²
(Lavin & Gray 2016, «Fast Algorithms for Convolutional Neural Networks», eq. 8):

    Y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A

and the gradient of w is that formula's adjoint, summed over tiles: Gᵀ [(A dY Aᵀ) ⊙ (Bᵀ x B)] G. Here the output and
the gradient of x come from NNPACK's F(6x6, 3x3) kernels, which are part of torch, and the gradient of w from
F(4x4, 3x3) in matrix products. Relative errors (2-norm) are near 3e-6, those of a direct convolution near 1e-6; single
values are off by up to 2e-5 of the largest.

With few channels, Winograd's transforms cost more than they save. In bf16 its sums of up to 36 values of mixed sign
would lose too much precision. Both cases instead use the channels-last layout, which oneDNN's kernels read fastest, and
compute nearest x2 and the 3x3 conv after it as one: along each side, the three taps of the conv see only two different
pixels, so the two layers equal four 2x2 convs, one for each parity of the output's row and column, with 4 products a
value instead of 9 (the sub-pixel convolution of Shi et al. 2016, section 3.2, with tied weights).

The rest of the package does not need this module. A layer with other kernels is a subclass of the layer that it stands
in for (`sdvae.model.plain`). At each call it checks that its geometry and methods still fit the kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sdvae.model import Autoencoder
from sdvae.model.blocks import Upsample
from sdvae.model.plain import METHODS, has_geometry, is_conv, is_replaced
from sdvae.model.posterior import at_least_fp32
from sdvae.runtime import keep_freed_memory

logger = logging.getLogger(__name__)

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

# Along one side, TAPS[parity, pixel, tap] is 1 if, at output positions of this parity, the conv's tap (0, 1 or 2) reads
# this pixel (0: the earlier, 1: the later) of the map before it was doubled.
TAPS = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])


def speed_up(vae: Autoencoder, dtype: torch.dtype | None = None) -> None:
    """Make `vae` faster on a CPU, in place. Weights, state-dict names and, up to rounding, the function stay the same.

    A VAE for which `takes_winograd` is true (on many machines SD's VAE in fp32) gets Winograd's convolutions, which
    are used for maps of the sizes where `winograd_pays` is true. It also gets slicing: without gradients, a batch is
    computed image by image, as those kernels do (`disable_slicing` undoes that). Every other VAE gets the channels-last
    layout, which its outputs then have too. Upsamplers whose conv does not use Winograd use four taps instead of nine,
    except under `enable_tiling`. Deep copies, DDP and gradient checkpointing work as before. For other dtypes, after a
    move to another device, and if a layer was changed afterwards, the ordinary layers are used. A VAE that is not on a
    CPU is not changed.

    From now on the process also keeps the memory that it frees (`keep_freed_memory(False)` undoes that).

    docs/speed.md has the measured times. The custom gradients can be differentiated only once.

    Args:
        vae: a VAE whose weights have their final dtype.
        dtype: the dtype of its computation under autocast; by default the dtype of its weights.
    """
    if vae.device.type != "cpu":
        logger.warning("speed_up has kernels for CPUs alone; the VAE is on %s and stays as it is", vae.device)
        return
    winograd = takes_winograd(vae, dtype)
    layout = torch.contiguous_format if winograd else torch.channels_last
    vae.use_slicing = vae.use_slicing or winograd
    for module in _own_modules(vae):
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=layout)
        if type(module) is Upsample:
            _change_class(module, FastUpsample)
        elif winograd and type(module) is nn.Conv2d and has_geometry(module, 3, padding=1):
            _change_class(module, FastConv3x3)
    keep_freed_memory()


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all below it, without the layers of peft's adapters, which peft keeps in `nn.ModuleDict`s.

    They must keep their layout: DoRA's can only be computed in the contiguous one.
    """
    yield module
    for child in module.children():
        if not isinstance(child, nn.ModuleDict):
            yield from _own_modules(child)


def _change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Turn a module into an instance of a subclass, which must not add attributes.

    If a new module took its place, parameters and hooks would have to be moved, and other references would still point
    at the old one. Removed hooks leave the old class's own `forward` behind, which must not hide the new class's.
    """
    if not is_replaced(module):
        for name in METHODS:
            module.__dict__.pop(name, None)
    module.__class__ = cls


def takes_winograd(vae: Autoencoder, dtype: torch.dtype | None = None) -> bool:
    """Whether the VAE computes in fp32, with at least 64 channels at full resolution, on a machine where Winograd pays.

    The size of the images is not considered: below 128x128 pixels, SD's VAE has few maps for which Winograd pays.
    """
    wide = vae.config.block_out_channels[0] >= 64
    return wide and (dtype or vae.dtype) == torch.float32 and has_nnpack() and _multiplies_256_bits()


def _multiplies_256_bits() -> bool:
    """Whether the machine multiplies 256 bits at a time.

    A machine that multiplies 512 bits computes direct convolutions twice as fast, but not NNPACK's kernels, which were
    written for AVX2. Measured on AVX2 and on AMD's Zen 4, which computes AVX-512 in two halves. Zen 5 does not; it is
    recognised by AVX-VNNI, which Zen 4 lacks.
    """
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return True
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    amd = str(features.get("cpu_name", "")).startswith("AMD")
    return amd and bool(features.get("avx512_bf16")) and not features.get("avx_vnni", True)


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
        if not (exact and _computes_here(x, self) and self.pays(*x.shape[2:])):
            return super().forward(x)
        if torch.is_grad_enabled():
            return _Conv3x3.apply(x, self.weight, self.bias)
        return _nnpack(x, self.weight, self.bias)

    def pays(self, height: int, width: int) -> bool:
        return winograd_pays(self.in_channels, self.out_channels, height, width)


class FastUpsample(Upsample):
    """Nearest x2 and a 3x3 conv computed as one, unless the conv uses Winograd."""

    stands_in_for = Upsample

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2H, 2W)
        conv: nn.Conv2d = self.conv
        here = is_conv(conv, 3, padding=1) and _computes_here(x, conv)
        if not here or (isinstance(conv, FastConv3x3) and conv.pays(2 * x.shape[2], 2 * x.shape[3])):
            return super().forward(x)
        return upsample_conv(x, conv.weight, conv.bias)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """conv3x3(nearest x2 of x), computed as a 2x2 conv to 4 · O channels, which are then interleaved.

    y[2i + a, 2j + b] = Σ_pq w_ab[p, q] x[i + a - 1 + p, j + b - 1 + q], where w_ab[p, q] is the sum of those taps of w
    that read that pixel; in half precision each sum is rounded once.

    Args:
        x: (B, C, H, W).
        weight: (O, C, 3, 3).
        bias: (O,).

    Returns:
        (B, O, 2H, 2W).
    """
    with torch.autocast(x.device.type, enabled=False):
        exact = at_least_fp32(weight)
        taps = TAPS.to(exact)
        summed = torch.einsum("apk,bql,ockl->abocpq", taps, taps, exact).flatten(0, 2)  # (4·O, C, 2, 2)
    bias = None if bias is None else bias.repeat(4)
    phases = F.conv2d(x, summed.to(weight.dtype), bias, padding=1)  # (B, 4·O, H + 1, W + 1)
    return _Interleave.apply(phases)


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Gradient of a 3x3 conv's weights in F(4x4, 3x3): Σ_tiles Gᵀ [(A dY Aᵀ) ⊙ (Bᵀ x B)] G.

    Args:
        x: (B, C, H, W), the conv's input.
        grad: (B, O, H, W), the gradient of its output.

    Returns:
        (O, C, 3, 3).
    """
    batch, channels, height, width = x.shape
    rows, columns = -(-height // TILE), -(-width // TILE)
    below, right = rows * TILE - height, columns * TILE - width
    x = F.pad(x, (1, right + 1, 1, below + 1))
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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        return _nnpack(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        out_channels, channels = weight.shape[:2]
        grad = grad.contiguous()
        wanted = list(ctx.needs_input_grad)
        found: list[Tensor | None] = [None, None, None]
        if wanted[0]:
            wanted[0] = False  # the gradient of x is a conv of the same kind, with the kernel turned by 180 degrees
            found[0] = _nnpack(grad, weight.flip(2, 3).transpose(0, 1).contiguous(), None)
        if wanted[1] and weight_gradient_pays(channels, out_channels, *x.shape[2:]):
            wanted[1] = False
            found[1] = weight_gradient(x, grad)
        if wanted[2] and not wanted[1]:
            wanted[2] = False
            found[2] = grad.sum(dim=(0, 2, 3))
        if any(wanted):
            geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, …, groups
            rest = torch.ops.aten.convolution_backward(grad, x, weight, [out_channels], *geometry, wanted)
            found = [new if new is not None else old for old, new in zip(found, rest, strict=True)]
        return tuple(found)


class _Interleave(torch.autograd.Function):
    """(B, 4·O, H + 1, W + 1) -> (B, O, 2H, 2W): y[2i + a, 2j + b] = phase_ab[i + a, j + b]."""

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        ctx.shape = phases.shape
        height, width = phases.shape[2] - 1, phases.shape[3] - 1
        shape = (phases.shape[0], phases.shape[1] // 4, 2 * height, 2 * width)
        out = torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=_layout(phases))
        for k, phase in enumerate(phases.chunk(4, dim=1)):
            a, b = divmod(k, 2)
            out[:, :, a::2, b::2] = phase[:, :, a : a + height, b : b + width]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        phases = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=_layout(grad)).zero_()
        height, width = phases.shape[2] - 1, phases.shape[3] - 1
        for k, phase in enumerate(phases.chunk(4, dim=1)):
            a, b = divmod(k, 2)
            phase[:, :, a : a + height, b : b + width] = grad[:, :, a::2, b::2]
        return phases


def _computes_here(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether a kernel of this module can compute `conv` of x. It reads only the layer's weight and bias."""
    if torch.compiler.is_compiling():
        return False
    plain = type(x) in (Tensor, nn.Parameter) and type(conv.weight) is nn.Parameter  # not quantised, not traced
    on_cpu = x.device.type == conv.weight.device.type == "cpu"
    unchanged = has_geometry(conv, 3, padding=1) and not is_replaced(conv)
    return plain and on_cpu and unchanged and x.shape[0] > 0


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _nnpack(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The conv, image by image, since on batches NNPACK is slower than a direct conv."""
    images = [torch._nnpack_spatial_convolution(image, weight, bias, [1, 1]) for image in x.split(1)]
    return images[0] if len(images) == 1 else torch.cat(images)


def _patches(x: Tensor, side: int, top: int, bottom: int, columns: int) -> Tensor:
    """(B, C, H, W) -> (side², C · B · T): the patches of T tiles, those in rows [top, bottom) of tiles, TILE apart."""
    batch, channels = x.shape[:2]
    image, channel, row, column = x.stride()
    shape = (side, side, channels, batch, bottom - top, columns)
    strides = (row, column, channel, image, TILE * row, TILE * column)
    return x.as_strided(shape, strides, x.storage_offset() + top * TILE * row).reshape(side * side, -1)
