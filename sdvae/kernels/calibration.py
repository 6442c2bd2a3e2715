"""Which forms are the fastest on this machine, by timing each on maps of the sizes that will come.

A unit is a part of the network whose forms are compared: a ResNet block, an up- or downsampler, the layers at either
end. Every form of every unit is timed in each memory layout; units of equal shapes are timed once. The layout in which
the fastest forms take the least time together is chosen, and these forms. A form that fails here, or whose result is
not that of the ordinary layer, is left out, and a warning says so.

At last the whole network is timed in these forms and in those of the rules, since a unit alone finds more of its map in
the cache than it does in the network. The faster of the two is kept.

A large map is cut to fewer rows, and its time is extrapolated from two heights, because part of it does not depend on
the height: Winograd's algorithm transforms the weights at each call.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdvae.errors import InputError, one_line
from sdvae.kernels.forms import FORMS, LAYOUTS, Forms, change_class, make_ordinary, own_modules, use
from sdvae.kernels.group_norm import kernels
from sdvae.kernels.winograd import has_nnpack
from sdvae.model import Autoencoder, AutoencoderTiny
from sdvae.model.blocks import Downsample, ResnetBlock, Upsample, activated
from sdvae.model.plain import kind_of
from sdvae.model.tiling import is_known

logger = logging.getLogger(__name__)

REPEATS = 3
WHOLE_REPEATS = 2
LEAST_GAIN = 0.03  # of the time, below which the ordinary layer is kept
PRODUCTS = {"cpu": 1e9, "cuda": 4e11}  # of a timed call, about: 10 ms on a CPU core, 2 ms on a large GPU
LEAST_ROWS = 12  # of a map that is cut: two tiles of Winograd's
# Relative 2-norm by which a form may differ from the ordinary layer; fp32 may be computed in TF32.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 4e-3}

Changes = dict[str, str]  # layer of a unit -> form; "" is the unit itself


class Ending(nn.Module):
    """The last layers of an encoder or a decoder, under their names there."""

    def __init__(self, part: Any):
        super().__init__()
        self.conv_norm_out, self.conv_act, self.conv_out = part.conv_norm_out, part.conv_act, part.conv_out

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(activated(self.conv_norm_out, self.conv_act, x))


@dataclass(frozen=True)
class Unit:
    """A part of the network.

    Attributes:
        name: its name in the VAE.
        module: its layers, which are the VAE's own.
        shape: (C, H, W) of its input.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """What two units have in common that take the same time."""
        return (kind_of(self.module), self.shape, *(weight.shape for weight in self.module.parameters()))


@torch.no_grad()
def faster(vae: Autoencoder, size: tuple[int, int], dtype: torch.dtype, rules: Forms, measured: Forms) -> Forms:
    """The one of two choices in which the whole VAE encodes and decodes an image faster. `vae` is left in either."""
    x = _random((1, vae.config.in_channels, *size), vae.device, vae.dtype)
    least: dict[int, float] = {}
    for _ in range(WHOLE_REPEATS):
        for i, forms in enumerate((rules, measured)):
            use(vae, forms)
            with torch.autocast(vae.device.type, dtype=dtype, enabled=dtype != vae.dtype):
                if vae.device.type == "cuda" and i not in least:
                    vae(x)  # a first call prepares cuDNN and Triton
                least[i] = min(least.get(i, float("inf")), _seconds(partial(vae, x), vae.device))
    logger.info("one image there and back: %.3g ms by the rules, %.3g ms in the forms measured", *(
        1e3 * least[i] for i in (0, 1)
    ))  # fmt: skip
    return measured if least[1] < least[0] else rules


@torch.no_grad()
def fastest(vae: Autoencoder, size: tuple[int, int], dtype: torch.dtype) -> Forms:
    """The layout and the forms that take the least time to encode and decode one image.

    Args:
        vae: a VAE on its final device.
        size: height and width of the image, in pixels.
        dtype: of the computation; another than that of the weights means autocast.

    Raises:
        InputError: when the VAE cannot take images of this size, or needs labels.
    """
    begun = time.perf_counter()
    alike: dict[tuple[Any, ...], list[Unit]] = {}
    for unit in _units(vae, size):
        alike.setdefault(unit.key, []).append(unit)
    seconds = dict.fromkeys(LAYOUTS, 0.0)
    layers: dict[str, dict[str, str]] = {layout: {} for layout in LAYOUTS}
    for units in alike.values():
        for layout, (took, changes) in _fastest_forms(units[0], vae.device, vae.dtype, dtype).items():
            seconds[layout] += took * len(units)
            layers[layout] |= {_join(unit.name, name): form for unit in units for name, form in changes.items()}
    chosen = min(seconds, key=lambda layout: seconds[layout])
    logger.info("timed the forms of %d kinds of layers in %.1f s", len(alike), time.perf_counter() - begun)
    return Forms(chosen, layers[chosen], seconds)


def _units(vae: Autoencoder, size: tuple[int, int]) -> Iterator[Unit]:
    """The units of a VAE whose layers are all as its class made them.

    The shapes come from a twin without memory, because the VAE itself may have hooks, and computing takes time.
    """
    if any(getattr(module, "label_proj", None) is not None for module in vae.modules()):
        raise InputError("got calibrate for a conditional VAE; need one without labels; leave calibrate out")
    if isinstance(vae, AutoencoderTiny):
        raise InputError("got calibrate for an AutoencoderTiny; need an AutoencoderKL; leave calibrate out")
    with torch.device("meta"):
        twin: Any = type(vae)(**{key: value for key, value in vae.config.items() if not key.startswith("_")})
    twin.eval()
    shapes: dict[str, tuple[int, ...]] = {}

    def noted(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        shapes[name] = tuple(inputs[0].shape[1:])

    for name in [unit for unit, module in twin.named_modules() if not isinstance(module, nn.ModuleList)]:
        twin.get_submodule(name).register_forward_pre_hook(partial(noted, name))
    image = torch.empty(1, vae.config.in_channels, *size, device="meta")
    twin.decode(twin.encode(image).latent_dist.mode())
    weights = {key: weight.shape for key, weight in twin.state_dict().items()}
    for name, module in own_modules(vae):
        found: nn.Module | None = None
        if kind_of(module) in (ResnetBlock, Upsample, Downsample) or name in ("encoder.conv_in", "decoder.conv_in"):
            found = module
        elif name in ("encoder", "decoder"):
            found = Ending(module)
        if found is None or not all(is_known(layer) or layer is found for layer in found.modules()):
            continue
        if all(weights.get(f"{name}.{key}") == weight.shape for key, weight in found.state_dict().items()):
            yield Unit(name, found, shapes[f"{name}.conv_norm_out" if isinstance(found, Ending) else name])


def _candidates(unit: Unit, layout: str, device: torch.device, dtype: torch.dtype) -> Iterator[Changes]:
    """The forms of a unit, the ordinary one first."""
    kind = kind_of(unit.module)
    yield {}
    if kind is Upsample:
        yield {"": "four taps"}
        yield {"": "transposed"}
    if device.type == "cpu" and layout == "contiguous" and dtype == torch.float32 and has_nnpack():
        if kind is ResnetBlock:
            yield dict.fromkeys(("conv1", "conv2"), "winograd, measured")
        elif kind is Upsample:
            yield {"conv": "winograd, measured"}
    if device.type == "cuda" and kernels() is not None:
        if kind is ResnetBlock:
            yield {"": "fused", "norm1": "norm with silu", "norm2": "norm with silu"}
        elif kind is Ending:
            yield {"conv_norm_out": "norm with silu"}


def _fastest_forms(
    unit: Unit, device: torch.device, stored: torch.dtype, dtype: torch.dtype
) -> dict[str, tuple[float, Changes]]:
    """For each layout the seconds of the unit's fastest form, and what this form changes.

    All forms take turns, so that a machine that becomes busy meanwhile slows them all.
    """
    channels, height, width = unit.shape
    products = width * sum(weight.numel() for weight in unit.module.parameters())  # for each row, about
    rows = min(height, max(LEAST_ROWS, int(PRODUCTS[device.type] / products)))
    heights = (rows,) if rows == height else (rows, rows // 2)
    x = _random((1, channels, rows, width), device, stored)
    maps = {(name, h): x[:, :, :h].contiguous(memory_format=LAYOUTS[name]) for name in LAYOUTS for h in heights}
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != stored):
        forms = list(_correct_forms(unit, x, device, dtype))
        least = [dict.fromkeys(heights, float("inf")) for _ in forms]
        for _ in range(REPEATS):
            quickest = min(times[rows] for times in least)
            for (layout, _, form), times in zip(forms, least, strict=True):
                if times[rows] == float("inf") or times[rows] < 2 * quickest:  # not those that cannot win any more
                    for h in heights:
                        times[h] = min(times[h], _seconds(partial(form, maps[layout, h]), device))
    best: dict[str, tuple[float, Changes]] = {}
    for (layout, changes, _), times in zip(forms, least, strict=True):
        took = times[rows]
        if rows < height:
            took += max(0.0, took - times[rows // 2]) / (rows - rows // 2) * (height - rows)
        if layout not in best or took < best[layout][0] * (1 - LEAST_GAIN):
            best[layout] = took, changes
    return best


def _correct_forms(
    unit: Unit, x: Tensor, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Changes, nn.Module]]:
    """The forms of a unit in each layout, the ordinary one first, without those that fail on x."""
    wanted: Tensor | None = None
    for layout in LAYOUTS:
        for changes in _candidates(unit, layout, device, dtype):
            form = _in_form(unit.module, layout, device, changes)
            try:
                found = form(x.contiguous(memory_format=LAYOUTS[layout])).float()
            except Exception as fault:  # of a compiler or a driver, which may raise anything
                if not changes:
                    raise
                logger.warning("left out «%s» for %s: %s", _names(changes), unit.name, one_line(fault))
                continue
            wanted = found if wanted is None else wanted
            error = float((found - wanted).norm() / wanted.norm())
            if changes and not error <= TOLERANCE[dtype]:
                logger.warning("left out «%s» for %s: its result is off by %.1e", _names(changes), unit.name, error)
                continue
            yield layout, changes, form


def _in_form(module: nn.Module, layout: str, device: torch.device, changes: Changes) -> nn.Module:
    """A copy of a unit, in a layout and with changed layers."""
    copied = copy.deepcopy(module).eval()
    for layer in copied.modules():
        make_ordinary(layer)
        if isinstance(layer, nn.Conv2d):
            layer.to(memory_format=LAYOUTS[layout])
    for name, form in changes.items():
        change_class(copied.get_submodule(name), FORMS[device.type][form])
    return copied


def _random(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Normal numbers, without a change of torch's own generator."""
    return torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def _join(unit: str, name: str) -> str:
    return f"{unit}.{name}" if name else unit


def _names(changes: Changes) -> str:
    return ", ".join(dict.fromkeys(changes.values()))
