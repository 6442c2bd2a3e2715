"""What becomes of an image that goes round many times, and of the result in half precision or in strips."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdvae.metrics.image import psnr
from sdvae.model import AutoencoderKL

TRIPS = 10
SHOWN_TRIPS = (1, 2, 5, 10)
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Drift:
    """Encode and decode, encode what came out, and so on.

    Attributes:
        to_original: (TRIPS, B) PSNR in dB against the image that went in first; row 0 is the reconstruction's.
        to_previous: (TRIPS, B) PSNR in dB against the image of one trip before.
        shown: {trip: (B, C, H, W) in [-1, 1]} for SHOWN_TRIPS.
    """

    to_original: Tensor
    to_previous: Tensor
    shown: dict[int, Tensor]


@torch.inference_mode()
def drift(vae: AutoencoderKL, images: Tensor) -> Drift:
    """Through the posterior's mode TRIPS times, clamped to [-1, 1] after each; not rounded to 8 bits.

    Args: images: (B, C, H, W) in [-1, 1], on the VAE's device.
    """
    to_original, to_previous, shown = [], [], {}
    previous = images
    for trip in range(1, TRIPS + 1):
        current = vae(previous).sample.clamp(-1, 1)
        to_original.append(psnr(images, current).cpu())
        to_previous.append(psnr(previous, current).cpu())
        if trip in SHOWN_TRIPS:
            shown[trip] = current.cpu()
        previous = current
    return Drift(torch.stack(to_original), torch.stack(to_previous), shown)


@dataclass(frozen=True)
class Delta:
    """One way of computing the reconstruction against the plain one in fp32, both clamped to [-1, 1].

    Attributes:
        name: «bf16», «fp16», «strips».
        values: of all images together.
        not_finite: of those, infinite or NaN. Where there are any, the three below are None.
        latents_not_finite: of the latents' values: so much of it was the encoder's.
        largest: greatest absolute difference, in levels of 8 bits.
        psnr: dB between the two; the mean over images.
        changed: share of the values that differ after rounding to 8 bits.
    """

    name: str
    values: int
    not_finite: int
    latents_not_finite: int
    largest: float | None
    psnr: float | None
    changed: float | None


@torch.inference_mode()
def deltas(vae: AutoencoderKL, images: Tensor) -> list[Delta]:
    """bf16, fp16 and `enable_tiling` against the whole image in fp32.

    Args: vae: in fp32. images: (B, C, H, W) in [-1, 1], on its device.
    """
    _, wanted = _there_and_back(vae, images)
    found = [_compare(name, *_in_half(vae, images, dtype), wanted) for name, dtype in HALVES.items()]
    was_on = vae.use_tiling
    vae.enable_tiling()
    try:
        found.append(_compare("strips", *_there_and_back(vae, images), wanted))
    finally:
        vae.use_tiling = was_on
    return found


def computes_natively(device: torch.device) -> bool:
    """In half precision; see `_in_half` for what is done elsewhere."""
    return device.type != "cpu"


def _in_half(vae: AutoencoderKL, images: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction, by the device; on a CPU, most of which take minutes an image, by `Rounded`."""
    half = torch.nn.Module.to(copy.deepcopy(vae), dtype)  # diffusers' own warns of modules to be kept in fp32: none
    if computes_natively(images.device):
        return _there_and_back(half, images.to(dtype))
    rounded = half.float()  # the weights stay rounded, and what overflowed infinite
    with Rounded(dtype):
        return _there_and_back(rounded, images.to(dtype).float())


class Rounded(TorchDispatchMode):
    """Every operation in fp32, its result rounded to a half precision: what a GPU does that accumulates in fp32."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:  # a view's values are rounded already
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                    tensor.copy_(tensor.to(self.dtype))
        return result


def _there_and_back(vae: Callable[..., Any], images: Tensor) -> tuple[Tensor, Tensor]:
    """The posterior's mode and its image, in fp32, not clamped."""
    output = vae(images)
    return output.posterior.mode().float(), output.sample.float()


def _compare(name: str, latents: Tensor, image: Tensor, wanted: Tensor) -> Delta:
    not_finite = int((~image.isfinite()).sum())
    latents_not_finite = int((~latents.isfinite()).sum())
    if not_finite:
        return Delta(name, image.numel(), not_finite, latents_not_finite, None, None, None)
    a, b = (((x.clamp(-1, 1) + 1) * 127.5) for x in (image, wanted))
    return Delta(
        name=name,
        values=image.numel(),
        not_finite=0,
        latents_not_finite=latents_not_finite,
        largest=float((a - b).abs().max()),
        psnr=float(psnr(wanted.clamp(-1, 1), image).mean()),
        changed=float((a.round() != b.round()).float().mean()),
    )
