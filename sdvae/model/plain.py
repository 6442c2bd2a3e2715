"""Whether a layer is exactly of the kind that a shortcut was made for.

A shortcut computes a layer's output without calling it as torch would: it overwrites the layer's output, computes it in
strips of rows, or uses another kernel. But users add hooks to layers, replace a layer or its `forward`, or change its
padding, and this must take effect. So every shortcut calls these functions each time it runs, and a layer that is not
plain is called in the ordinary way.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
METHODS = ("forward", "_conv_forward")  # replaced by offloading, and by recipes for images that tile seamlessly


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether calling `module` does what `kind.forward` does, and nothing else.

    A subclass may do anything, so it is not plain, unless its own body has `stands_in_for = kind`. Such a class must
    return the same values, up to rounding, in a new tensor. A parametrized module is not plain, since parametrization
    changes its class.
    """
    if module is None or is_replaced(module):
        return False
    hooked = any(getattr(module, name) or getattr(torch_module, f"_global{name}") for name in HOOKS)
    return kind_of(module) is kind and not hooked


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the class named by its `stands_in_for`."""
    return type(module).__dict__.get("stands_in_for", type(module))


def is_replaced(module: nn.Module) -> bool:
    """Whether this instance has another `forward` than its class.

    When accelerate or diffusers removes a hook, the class's own method stays behind as the instance's. That does not
    count.
    """
    return any(module.__dict__[name] != _own(module, name) for name in METHODS if name in module.__dict__)


def _own(module: nn.Module, name: str) -> Any:
    """The class's method, bound to the module; None where the class has none of this name."""
    function = getattr(type(module), name, None)
    return None if function is None else MethodType(function, module)


def is_conv(
    module: nn.Module | None, kernel: int, stride: int = 1, padding: int = 0, modes: Sequence[str] = ("zeros",)
) -> bool:
    """Whether it is a plain `nn.Conv2d` of this shape, padded in one of these modes."""
    return is_plain(module, nn.Conv2d) and has_geometry(module, kernel, stride, padding, modes)


def has_geometry(
    conv: nn.Module | None, kernel: int, stride: int = 1, padding: int = 0, modes: Sequence[str] = ("zeros",)
) -> bool:
    """Whether a conv has this geometry, which users can change at any time by setting its attributes."""
    return (
        isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.padding) == ((kernel,) * 2, (stride,) * 2, (padding,) * 2)
        and (conv.dilation, conv.groups) == ((1, 1), 1)
        and conv.padding_mode in modes
    )
