"""Repeated round trips, and reconstructions in half precision and in strips."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sdvae.alpha import as_seen, colours
from sdvae.metrics.image import psnr
from sdvae.model import AnyAutoencoder, StockAutoencoder
from sdvae.roundtrip import RoundTrip, round_trip

TRIPS = 10
SHOWN_TRIPS = (1, 2, 5, 10)
STRIPS_NAME = "strips"
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Drift:
    """The change of images that are encoded and decoded several times in a row.

    Attributes:
        to_original: (TRIPS, B) PSNR in dB against the original image; the first row is the reconstruction's PSNR.
        to_previous: (TRIPS, B) PSNR in dB against the image before this trip.
        shown: the images after each of SHOWN_TRIPS, (B, C, H, W) in [-1, 1].
    """

    to_original: Tensor
    to_previous: Tensor
    shown: dict[int, Tensor]


@torch.inference_mode()
def drift(vae: AnyAutoencoder, images: Tensor) -> Drift:
    """Encode and decode TRIPS times, by the posterior's mode. Each result is clamped to [-1, 1], not rounded to 8 bits.

    Args:
        vae: the VAE.
        images: (B, C, H, W) in [-1, 1], on its device.
    """
    to_original, to_previous, shown = [], [], {}
    previous = images
    original = before = colours(as_seen(images))
    for trip in range(1, TRIPS + 1):
        current = round_trip(vae, previous).reconstruction.clamp(-1, 1)
        now = colours(as_seen(current))
        to_original.append(psnr(original, now).cpu())
        to_previous.append(psnr(before, now).cpu())
        if trip in SHOWN_TRIPS:
            shown[trip] = current.cpu()
        previous, before = current, now
    return Drift(torch.stack(to_original), torch.stack(to_previous), shown)


@dataclass(frozen=True)
class Delta:
    """The difference of a reconstruction from that of the whole image in fp32, both clamped to [-1, 1].

    Attributes:
        name: «bf16», «fp16» or «strips».
        values: number of values in all images together.
        not_finite: how many of them are infinite or NaN. If there are any, the last three attributes are None.
        latents_not_finite: how many values of the latents, the encoder's output, are infinite or NaN.
        largest: greatest absolute difference, in 8-bit levels.
        psnr: dB between the two, the mean over images.
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
def deltas(vae: AnyAutoencoder, images: Tensor) -> list[Delta]:
    """bf16, fp16 and, if the VAE has strips, `enable_tiling`, each compared with the whole image in fp32.

    Args:
        vae: a VAE in fp32.
        images: (B, C, H, W) in [-1, 1], on its device.
    """
    wanted = round_trip(vae, images).reconstruction
    found = [_compare(name, _in_half(vae, images, dtype), wanted) for name, dtype in HALVES.items()]
    if isinstance(vae, StockAutoencoder):
        return found
    was_on = vae.use_tiling
    vae.enable_tiling()
    try:
        found.append(_compare(STRIPS_NAME, round_trip(vae, images), wanted))
    finally:
        vae.use_tiling = was_on
    return found


def computes_natively(device: torch.device) -> bool:
    """Whether the device itself computes in half precision. Otherwise it is emulated; see `_in_half`."""
    return device.type != "cpu"


def _in_half(vae: AnyAutoencoder, images: Tensor, dtype: torch.dtype) -> RoundTrip:
    """Reconstruct in half precision: a GPU's own, or emulated by `Rounded`, since most CPUs take minutes an image."""
    half = torch.nn.Module.to(copy.deepcopy(vae), dtype)  # diffusers' own method warns of modules to keep in fp32
    if computes_natively(images.device):
        return round_trip(half, images)
    rounded = half.float()  # weights keep their rounded values, and stay infinite where they overflowed
    with Rounded(dtype):
        return round_trip(rounded, images.to(dtype).float())


class Rounded(TorchDispatchMode):
    """Compute every operation in fp32 and round its result to half precision, as a GPU that accumulates in fp32 does.

    Args:
        dtype: fp16 or bf16.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:  # the values of a view have been rounded already
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                    tensor.copy_(tensor.to(self.dtype))
        return result


def _compare(name: str, trip: RoundTrip, wanted: Tensor) -> Delta:
    image = trip.reconstruction
    not_finite = int((~image.isfinite()).sum())
    latents_not_finite = int((~trip.latents.isfinite()).sum())
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
