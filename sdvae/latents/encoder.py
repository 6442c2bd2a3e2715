"""Pixels -> posterior moments, on any device, and a second try in fp32 for what overflowed."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from sdvae.cpu.kernels import speed_up
from sdvae.errors import InputError
from sdvae.model import AutoencoderKL
from sdvae.runtime import DTYPES, accelerator_type, resolve_precision


@dataclass
class Encoded:
    """A batch on its way: the device may still be at it.

    Attributes:
        pixels: (B, H, W, C) uint8, as they were given.
    """

    pixels: Tensor
    _moments: Tensor  # (V, B, 2·latent_channels, h, w), with V = 2 views where the mirror image is encoded too
    _ready: torch.cuda.Event | None

    def moments(self) -> Tensor:
        """(V, B, 2·latent_channels, h, w) fp32 on the CPU; waits for the device."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._moments.float()


class MomentEncoder:
    """The encoder of a VAE in the precision that was asked for.

    Args:
        vae: on the CPU; is taken over, and loses its decoder.
        precision: «fp32», «bf16» or «fp16».
        mirror: also encode the left-right mirror image.
    """

    def __init__(self, vae: AutoencoderKL, device: torch.device, precision: str, mirror: bool):
        vae.decoder = nn.Identity()  # type: ignore[assignment]  # half of the memory, of no use here
        self._fp32 = vae.float().eval()
        self._vae = _laid_out(self._fp32, DTYPES[precision], device)
        self._retrying = self._vae if precision == "fp32" else None
        self._device = device
        self._mirror = mirror

    @torch.inference_mode()
    def launch(self, pixels: Sequence[np.ndarray]) -> Encoded:
        """Start on a batch of (H, W, C) uint8 images of one size."""
        batch = torch.from_numpy(np.stack(pixels))
        if self._device.type != "cuda":
            return Encoded(batch, self._encode(self._vae, batch).cpu(), None)
        moments = self._encode(self._vae, batch.pin_memory())
        on_cpu = torch.empty(moments.shape, dtype=moments.dtype, pin_memory=True)
        on_cpu.copy_(moments, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Encoded(batch, on_cpu, ready)

    @torch.inference_mode()
    def again(self, pixels: Tensor) -> Tensor:
        """The moments of a batch in fp32, for what was not finite: (V, B, 2·latent_channels, h, w) on the CPU."""
        if self._retrying is None:
            self._retrying = _laid_out(self._fp32, torch.float32, self._device)
        return self._encode(self._retrying, pixels).cpu()

    def _encode(self, vae: AutoencoderKL, pixels: Tensor) -> Tensor:
        # scaled on the device, with to_tensor's own arithmetic; uint8 is a quarter to copy
        x = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        x = x.contiguous() if vae.encoder.conv_in.weight.is_contiguous() else x
        views = [x, x.flip(3)] if self._mirror else [x]
        return torch.stack([vae.encode(view.to(vae.dtype)).latent_dist.parameters for view in views])


def _laid_out(vae: AutoencoderKL, dtype: torch.dtype, device: torch.device) -> AutoencoderKL:
    """A copy, in the memory format and with the kernels that encode fastest."""
    copied = copy.deepcopy(vae)
    nn.Module.to(copied, device, dtype)  # diffusers' own wants to speak of the dtype
    if device.type == "cpu":
        speed_up(copied)
    else:
        nn.Module.to(copied, memory_format=torch.channels_last)
    return copied


def encoder_sha256(vae: AutoencoderKL) -> str:
    """Over the name, dtype, shape and bytes of every weight that latents depend on: a decoder may be tuned further."""
    digest = hashlib.sha256()
    for name, weight in sorted(vae.state_dict().items()):
        if not name.startswith(("encoder.", "quant_conv.")):
            continue
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def choose_device(name: str | None) -> torch.device:
    """Raises: InputError for a device that is not there."""
    if name is None:
        kind = accelerator_type()
        if kind is None:
            return torch.device("cpu")
        return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"got device {name!r}, which is not there ({str(error).splitlines()[0]}); try cpu") from error
    return device


def choose_precision(requested: str, device: torch.device) -> str:
    """«auto» to what this device computes fast and right. Raises: InputError for fp16 on a CPU."""
    if requested == "fp32":
        return "fp32"
    resolved = resolve_precision(requested, device.type)
    return "fp32" if resolved == "no" else resolved
