"""Group norm and SiLU as one, and ResNet blocks around them, by the Triton kernels of `triton_norm.py`.

They are for inference: with gradients the ordinary layers compute. A compiler too gets the ordinary layers, since it
fuses norms, activations, biases and sums itself, and a kernel of ours would be a border that it cannot fuse across.
Without Triton, too, the ordinary layers compute.

A ResNet block could also find the moments for the next block's norm while it adds its residual. That would save one of
about thirteen passes over a map, and the moments would have to travel beside the map, past the hooks that users put
between blocks. It is left out.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae.errors import one_line
from sdvae.kernels.fitness import is_ordinary, is_recorded, layout_of
from sdvae.model.blocks import ResnetBlock
from sdvae.model.plain import is_conv, is_plain

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def kernels() -> Any:
    """The module of the kernels; None without a Triton that can be imported. It is imported on first use."""
    if find_spec("triton") is None:
        return None
    try:
        return import_module("sdvae.kernels.triton_norm")
    except ImportError as error:
        logger.warning("Triton is installed, but cannot be imported, and is not used: %s", one_line(error))
        return None


class FastGroupNorm(nn.GroupNorm):
    """A group norm with a method for norm and SiLU as one. `forward` is the ordinary one."""

    stands_in_for = nn.GroupNorm

    def fits(self, x: Tensor) -> bool:
        """Whether the kernels can compute the norm of x."""
        return self.affine and _fits(x, self.weight, self.bias)

    def then_silu(self, x: Tensor, conv_bias: Tensor | None = None, *, in_place: bool = False) -> Tensor:
        """silu(norm(x + conv_bias)), for an x that `fits`.

        Args:
            x: (B, C, H, W).
            conv_bias: (C,), what the conv before left out.
            in_place: write over x.

        Returns:
            (B, C, H, W) in the dtype and layout of x.
        """
        scale, shift = kernels().scale_and_shift(x, self.num_groups, self.weight, self.bias, self.eps, conv_bias)
        return kernels().scaled_silu(x, scale, shift, in_place=in_place)

    def scaled_silu(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """silu(x · scale + shift), for an x that `fits`, and scale and shift of (B, C) from moments known before."""
        return kernels().scaled_silu(x, scale.float(), shift.float())


class FastResnetBlock(ResnetBlock):
    """A ResNet block whose norms are computed together with SiLU, and whose convs leave their biases to what follows.

    Its maps have the layout of its convs' weights.
    """

    stands_in_for = ResnetBlock

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None) -> Tensor:  # (B, C, H, W) -> (B, C', H, W)
        if temb is not None or not self.fits(input_tensor):
            return super().forward(input_tensor, temb)
        conv1, conv2, shortcut = self.conv1, self.conv2, self.conv_shortcut
        norm1: Any = self.norm1
        norm2: Any = self.norm2
        x = input_tensor.contiguous(memory_format=layout_of(conv1.weight))
        h = F.conv2d(norm1.then_silu(x), conv1.weight, padding=1)
        h = F.conv2d(norm2.then_silu(h, conv1.bias, in_place=True), conv2.weight, padding=1)
        bias = _sum(conv2.bias, None if shortcut is None else shortcut.bias)
        residual = x if shortcut is None else F.conv2d(x, shortcut.weight)
        return kernels().add(h, residual, torch.zeros_like(conv2.weight[:, 0, 0, 0]) if bias is None else bias)

    def fits(self, x: Tensor) -> bool:
        """Whether all its layers are the ordinary ones, and the kernels can compute them."""
        norms, convs, shortcut = (self.norm1, self.norm2), (self.conv1, self.conv2), self.conv_shortcut
        return (
            not torch.is_grad_enabled()
            and all(isinstance(norm, FastGroupNorm) and is_plain(norm, nn.GroupNorm) and norm.affine for norm in norms)
            and all(is_conv(conv, 3, padding=1) for conv in convs)
            and (shortcut is None or is_conv(shortcut, 1))
            and is_plain(self.nonlinearity, nn.SiLU)
            and self.label_proj is None
            and _fits(x, *self.parameters())
        )


def _fits(x: Tensor, *weights: Tensor) -> bool:
    """Whether a kernel can compute a layer with these weights: one device, one dtype, nothing quantised or traced."""
    if is_recorded() or kernels() is None:
        return False
    alike = all(weight.device == x.device and weight.dtype == x.dtype for weight in weights)
    here = x.device.type == kernels().DEVICE_TYPE and not torch.is_autocast_enabled(x.device.type)
    return alike and here and is_ordinary(x, *weights) and x.dtype in DTYPES and x.ndim == 4 and x.numel() > 0


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a + b in fp32, without those that are None."""
    given = [x.float() for x in (a, b) if x is not None]
    return sum(given[1:], given[0]) if given else None
