"""The forms of layers by name, and how a VAE is put into them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from sdvae.errors import InputError
from sdvae.kernels.group_norm import FastGroupNorm, FastResnetBlock
from sdvae.kernels.upsample import CudaTransposedUpsample, CudaUpsample, FastUpsample, TransposedUpsample
from sdvae.kernels.winograd import FastConv3x3, MeasuredConv3x3
from sdvae.model import Autoencoder
from sdvae.model.plain import METHODS, is_replaced, kind_of

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

# The forms by their names, for each type of device. A form's class says which kind of layer it stands in for.
FORMS: dict[str, dict[str, type[nn.Module]]] = {
    "cpu": {
        "winograd": FastConv3x3,
        "winograd, measured": MeasuredConv3x3,
        "four taps": FastUpsample,
        "transposed": TransposedUpsample,
    },
    "cuda": {
        "four taps": CudaUpsample,
        "transposed": CudaTransposedUpsample,
        "norm with silu": FastGroupNorm,
        "fused": FastResnetBlock,
    },
}
ALL_FORMS = {form for forms in FORMS.values() for form in forms.values()}


@dataclass(frozen=True)
class Forms:
    """How a VAE is computed: what `speed_up` chose, and can be given again.

    Attributes:
        layout: of weights and maps, "contiguous" or "channels_last".
        layers: the name of each layer that is not computed in the ordinary way -> the name of its form.
        seconds: what was measured, if it was: for each layout, the seconds that its fastest forms take together.
    """

    layout: str = "contiguous"
    layers: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = Counter(self.layers.values())
        forms = [f"{count} layers «{form}»" for form, count in sorted(counts.items())]
        times = [f"{layout} {seconds * 1e3:.3g} ms" for layout, seconds in self.seconds.items()]
        measured = f" (fastest forms: {', '.join(times)})" if times else ""
        return f"layout {self.layout}, {', '.join(forms) or 'no other forms'}{measured}"


def use(vae: Autoencoder, forms: Forms) -> None:
    """Compute `vae` in these forms.

    Raises:
        InputError: for forms of another VAE or another type of device. The VAE is then as it was.
    """
    known, layers = FORMS[vae.device.type], dict(own_modules(vae))
    if forms.layout not in LAYOUTS:
        raise InputError(f"got layout {forms.layout!r}; need one of {', '.join(LAYOUTS)}")
    for name, form in forms.layers.items():
        if form not in known:
            raise InputError(f"got form {form!r} on {vae.device.type}; need one of {', '.join(known)}")
        if name not in layers:
            raise InputError(f"got a form for layer {name!r}, which this VAE lacks; need forms of the same VAE")
    for module in layers.values():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=LAYOUTS[forms.layout])
        make_ordinary(module)
    for name, form in forms.layers.items():
        if type(layers[name]) is kind_of_form(known[form]):  # otherwise somebody put another layer there
            change_class(layers[name], known[form])
    winograd = any(issubclass(known[form], FastConv3x3) for form in forms.layers.values())
    vae.use_slicing = vae.use_slicing or winograd


def make_ordinary(module: nn.Module) -> None:
    """Give a layer that has a form its ordinary class back."""
    if type(module) in ALL_FORMS:
        change_class(module, kind_of(module))


def kind_of_form(form: type[nn.Module]) -> type[nn.Module]:
    return form.__dict__["stands_in_for"]


def own_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and all below it with their names, without the layers of peft's adapters.

    peft keeps them in `nn.ModuleDict`s. They must keep their layout: DoRA's can only be computed in the contiguous one.
    """
    yield name, module
    for key, child in module.named_children():
        if not isinstance(child, nn.ModuleDict):
            yield from own_modules(child, f"{name}.{key}" if name else key)


def change_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Turn a module into an instance of a subclass, which must not add attributes, or back.

    If a new module took its place, parameters and hooks would have to be moved, and other references would still point
    at the old one. Removed hooks leave the old class's own `forward` behind, which must not hide the new class's.
    """
    if not is_replaced(module):
        for name in METHODS:
            module.__dict__.pop(name, None)
    module.__class__ = cls
