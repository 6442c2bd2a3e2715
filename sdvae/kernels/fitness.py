"""Whether a form's own computation fits what it is given."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdvae.model.config import PADDING_MODES
from sdvae.model.plain import has_geometry, is_replaced


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether all are plain tensors or parameters: neither quantised nor traced. None counts as one."""
    return all(x is None or type(x) in (Tensor, nn.Parameter) for x in tensors)


def is_recorded() -> bool:
    """Whether the call is compiled, traced, or part of a transformation of torch.func or of forward-mode gradients.

    All of these look into a layer's computation, and know torch's own operations alone.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def fits_conv3x3(x: Tensor, conv: nn.Conv2d, device_type: str) -> bool:
    """Whether `conv` of x is a 3x3 conv of stride 1 and padding 1 of any kind, on such a device, outside a compiler.

    It reads only the layer's weight and bias.
    """
    if is_recorded():
        return False
    plain = is_ordinary(x) and x.ndim == 4 and type(conv.weight) is nn.Parameter
    here = x.device.type == conv.weight.device.type == device_type
    unchanged = has_geometry(conv, 3, padding=1, modes=PADDING_MODES) and not is_replaced(conv)
    return plain and here and unchanged and x.shape[0] > 0


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last if x has that layout alone; a map of one channel or of one pixel has both layouts."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
