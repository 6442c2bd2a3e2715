"""Which layers are exactly those that a shortcut was made for.

A shortcut does a layer's work without calling it as torch would: it writes over the layer's output, computes the output
in strips of rows, or takes another kernel. But users hang hooks on layers, replace a layer or its `forward`, or change
its padding, and expect that to take effect. So every shortcut asks here each time it runs, and whatever is not plain is
called in the ordinary way.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
METHODS = ("forward", "_conv_forward")  # replaced by offloading, and by tricks that make seamless images


def is_plain(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Does calling `module` do what `kind.forward` does, and nothing else?

    A subclass may have been given to do anything, so it does not count, except one that says `stands_in_for = kind` in
    its own body: it promises the same values to rounding, in memory of their own. Parametrizations change the class of
    a module, so they do not count either.
    """
    if module is None or is_replaced(module):
        return False
    hooked = any(getattr(module, name) or getattr(torch_module, f"_global{name}") for name in HOOKS)
    return kind_of(module) is kind and not hooked


def kind_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that its class stands in for."""
    return type(module).__dict__.get("stands_in_for", type(module))


def is_replaced(module: nn.Module) -> bool:
    """Has this one instance another `forward` than its class?

    Hooks of accelerate and diffusers that are removed leave the class's own method behind as the instance's.
    """
    return any(module.__dict__[name] != _own(module, name) for name in METHODS if name in module.__dict__)


def _own(module: nn.Module, name: str) -> Any:
    """The class's method, bound to the module; None where the class has none of this name."""
    function = getattr(type(module), name, None)
    return None if function is None else MethodType(function, module)


def is_conv(module: nn.Module | None, kernel: int, stride: int = 1, padding: int = 0) -> bool:
    """Is it a plain `nn.Conv2d` of this shape, padded with zeros?"""
    return is_plain(module, nn.Conv2d) and has_geometry(module, kernel, stride, padding)


def has_geometry(conv: nn.Module | None, kernel: int, stride: int = 1, padding: int = 0) -> bool:
    """The geometry of `is_conv`, which attributes of a conv can change at any time."""
    return (
        isinstance(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.padding) == ((kernel,) * 2, (stride,) * 2, (padding,) * 2)
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
    )
