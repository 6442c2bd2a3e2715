"""fp16 without overflow: the largest value of each layer, and an exact rescaling of the weights.

The largest number of fp16 is 65504. In these networks the values that exceed it are in the residual stream. Only group
norms read the stream, and

    GroupNorm(s·x; eps·s²) = GroupNorm(x; eps)

so the stream may be scaled by any s. In layers that write to it (conv_in, each block's conv2, the output of attention),
weight and bias are multiplied by s. In layers that map the stream to itself (shortcuts, resamplers), only the bias is
multiplied by s. In norms that read it, eps is multiplied by s². The same works inside a ResNet block, from conv1 to
norm2, and for the values of attention, from to_v to to_out. If s is a power of two, nothing is rounded, and the
function in fp32 stays the same to the bit.

A saved folder cannot hold eps, since diffusers' class has 1e-6 everywhere. In a VAE that was loaded from a folder, a
norm that reads s·x therefore adds eps·(1/s² - 1) to the variance of x. This reduces the norm's output by at most the
fraction 1 - sqrt((var + eps) / (var + eps/s²)); `fix` reports this bound for the smallest variance in the calibration
images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.model import ConvolutionalVAE
from sdvae.model.blocks import NORM_EPS, Decoder, Downsample, Encoder, ResnetBlock, SelfAttention, Upsample
from sdvae.model.tiling import is_known

FP16_MAX = 65504.0
MARGIN = 8.0  # by this factor, other images and sums inside a layer may exceed the values of the calibration images
FP16_NORMAL = 2.0**-14  # smaller weights lose bits in fp16


@dataclass(frozen=True)
class Fix:
    """What `fix` did.

    Attributes:
        scales: name of a stream -> the power of two by which it was multiplied. Unchanged streams are left out.
        eps_bound: the largest relative change of a norm's output by diffusers' eps, on the calibration images.
        subnormal: by how much the share of weights below fp16's normal numbers has grown.
    """

    scales: dict[str, float]
    eps_bound: float
    subnormal: float


@torch.no_grad()
def audit(vae: ConvolutionalVAE, images: Sequence[Tensor]) -> dict[str, float]:
    """The largest absolute value in each layer's output, in fp32, when some images are encoded and decoded.

    Args:
        vae: a VAE in fp32.
        images: batches (B, C, H, W) in [-1, 1], H and W multiples of the compression ratio.

    Returns:
        Name of the layer -> value, in the order of the forward pass: convs, norms, linear maps, and the blocks that
        output the residual stream.

    Raises:
        InputError: when there is no image, or the VAE is not in fp32.
    """
    _check(vae, images)
    largest: dict[str, float] = {}
    layers = (nn.Conv2d, nn.GroupNorm, nn.Linear, ResnetBlock, SelfAttention)

    def note(name: str, output: Tensor) -> None:
        largest[name] = max(largest.get(name, 0.0), float(output.abs().max()))

    with _watched([(name, m) for name, m in vae.named_modules() if isinstance(m, layers)], note):
        for x in images:
            vae(x)
    return largest


@torch.no_grad()
def fix(vae: ConvolutionalVAE, images: Sequence[Tensor]) -> Fix:
    """Rescale `vae`, in place, so that its largest values on some images stay `MARGIN` times below fp16's largest.

    Weights and the norms' eps are multiplied by powers of two. The function that the VAE computes in fp32 stays.

    Args:
        vae: a VAE in fp32.
        images: batches (B, C, H, W) in [-1, 1], H and W multiples of the compression ratio.

    Raises:
        InputError: when a layer was replaced, adapted or hooked, when a value is not finite in fp32, or when one is too
            large in a place that rescaling does not change: the latents, the image, queries and keys, or the output of
            a norm.
    """
    _check_layers(vae)
    before = audit(vae, images)
    if not all(math.isfinite(value) for value in before.values()):
        raise InputError("the VAE gives values that are not finite in fp32 as well; need one that works in fp32")
    weights_before = _subnormal(vae)
    norms: dict[str, float] = {}  # name of a scaled norm -> s
    scales: dict[str, float] = {}
    for part, net in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        _scale_stream(part, net, before, scales, norms)
        for name, module in net.named_modules():
            if isinstance(module, ResnetBlock):
                _scale_inside(f"{part}.{name}", module, before, scales, norms)
            elif isinstance(module, SelfAttention):
                _scale_values(f"{part}.{name}", module, before, scales)
    after = audit(vae, images)
    beyond = {name: value for name, value in after.items() if value * 2 > FP16_MAX}
    if beyond:
        worst = max(beyond, key=lambda name: beyond[name])
        raise InputError(
            f"{len(beyond)} layers have values of up to {beyond[worst]:.3g} ({worst}) that rescaling cannot reduce; "
            "need less than 32752; use bf16 or fp32"
        )
    return Fix(scales, _eps_bound(vae, images, norms), _subnormal(vae) - weights_before)


def _scale_stream(
    part: str, net: Encoder | Decoder, largest: dict[str, float], scales: dict[str, float], norms: dict[str, float]
) -> None:
    """Scale the residual stream: from conv_in through the blocks and resamplers to the norms that read it."""
    carriers = (ResnetBlock, SelfAttention, Downsample, Upsample)
    names = [f"{part}.conv_in"]
    for name, module in net.named_modules():
        if isinstance(module, carriers):
            inner = ".conv" if isinstance(module, (Downsample, Upsample)) else ""
            names.append(f"{part}.{name}{inner}")
            if isinstance(module, ResnetBlock):
                names.append(f"{part}.{name}.conv2")
                names += [f"{part}.{name}.conv_shortcut"] if module.conv_shortcut is not None else []
    s = _power_of_two(max(largest[name] for name in names))
    if s == 1:
        return
    scales[part] = s
    _multiply(net.conv_in, s, s)
    for name, module in net.named_modules():
        if isinstance(module, ResnetBlock):
            _multiply(module.conv2, s, s)
            if module.conv_shortcut is not None:
                _multiply(module.conv_shortcut, 1, s)
            _read(module.norm1, f"{part}.{name}.norm1", s, norms)
        elif isinstance(module, SelfAttention):
            _multiply(module.to_out[0], s, s)
            _read(module.group_norm, f"{part}.{name}.group_norm", s, norms)
        elif isinstance(module, (Downsample, Upsample)):
            _multiply(module.conv, 1, s)
    _read(net.conv_norm_out, f"{part}.conv_norm_out", s, norms)


def _scale_inside(
    name: str, block: ResnetBlock, largest: dict[str, float], scales: dict[str, float], norms: dict[str, float]
) -> None:
    """Scale the values between a block's two convs, from conv1 to norm2."""
    t = _power_of_two(largest[f"{name}.conv1"])
    if t != 1:
        scales[f"{name}.conv1"] = t
        _multiply(block.conv1, t, t)
        _read(block.norm2, f"{name}.norm2", t, norms)


def _scale_values(name: str, block: SelfAttention, largest: dict[str, float], scales: dict[str, float]) -> None:
    """Divide to_v and multiply to_out by the same number, which is exact since attention is linear in its values."""
    t = _power_of_two(largest[f"{name}.to_v"])
    if t != 1:
        scales[f"{name}.to_v"] = t
        _multiply(block.to_v, t, t)
        _multiply(block.to_out[0], 1 / t, 1)


def _multiply(layer: nn.Module, weight: float, bias: float) -> None:
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    layer.weight.mul_(weight)
    if layer.bias is not None:
        layer.bias.mul_(bias)


def _read(norm: nn.GroupNorm, name: str, s: float, norms: dict[str, float]) -> None:
    norm.eps *= s * s
    norms[name] = s


def _power_of_two(largest: float) -> float:
    """The largest s = 2^-k, k >= 0, with s · largest · MARGIN <= FP16_MAX."""
    if largest * MARGIN <= FP16_MAX:
        return 1.0
    return 2.0 ** -math.ceil(math.log2(largest * MARGIN / FP16_MAX))


@torch.no_grad()
def _eps_bound(vae: ConvolutionalVAE, images: Sequence[Tensor], norms: dict[str, float]) -> float:
    """max over scaled norms, images and groups of 1 - sqrt((s²var + eps s²) / (s²var + eps)), eps = 1e-6."""
    modules = dict(vae.named_modules())
    least: dict[str, float] = {}

    def note(name: str, x: Tensor) -> None:
        norm = modules[name]
        assert isinstance(norm, nn.GroupNorm)
        variance = x.reshape(x.shape[0], norm.num_groups, -1).double().var(dim=2, correction=0)
        least[name] = min(least.get(name, math.inf), float(variance.min()))

    with _watched([(name, modules[name]) for name in norms], note, inputs=True):
        for x in images:
            vae(x)
    bounds = [
        1 - math.sqrt((variance + NORM_EPS * norms[name] ** 2) / (variance + NORM_EPS))
        for name, variance in least.items()
    ]
    return max(bounds, default=0.0)


def _subnormal(vae: ConvolutionalVAE) -> float:
    """The share of the weights that are not 0 and below fp16's normal numbers."""
    weights = torch.cat([p.detach().abs().flatten() for p in vae.parameters()])
    return float(((weights < FP16_NORMAL) & (weights > 0)).double().mean())


@contextmanager
def _watched(
    modules: list[tuple[str, nn.Module]], note: Callable[[str, Tensor], None], inputs: bool = False
) -> Iterator[None]:
    """Call note(name, output) whenever one of the modules has run, or note(name, input) if `inputs` is true."""
    handles = [
        module.register_forward_hook(lambda _, x, y, name=name: note(name, x[0] if inputs else y))
        for name, module in modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check(vae: ConvolutionalVAE, images: Sequence[Tensor]) -> None:
    if not images:
        raise InputError("got no calibration image; need at least one")
    if vae.dtype != torch.float32:
        raise InputError(f"got a VAE in {vae.dtype}; need fp32 to see what fp16 would lose; load it with dtype=fp32")


def _check_layers(vae: ConvolutionalVAE) -> None:
    """Refuse layers whose output need not be multiplied when their weights are."""
    for name, module in vae.named_modules():
        if name.startswith(("encoder", "decoder")) and not is_known(module):
            raise InputError(
                f"got a VAE whose layer {name} ({type(module).__name__}) was replaced, adapted or hooked; need this "
                "class's own layers; merge adapters into the weights and remove hooks first"
            )
