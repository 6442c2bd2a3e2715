"""sdvae: train and use Stable-Diffusion-style image VAEs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sdvae.cpu.kernels import speed_up
    from sdvae.errors import InputError
    from sdvae.latents.config import EncodeConfig
    from sdvae.latents.dataset import LatentDataset
    from sdvae.latents.encode import encode
    from sdvae.model import AutoencoderKL, DiagonalGaussian
    from sdvae.roundtrip import crop_to, pad_to_multiple
    from sdvae.runtime import keep_freed_memory
    from sdvae.training.config import TrainConfig
    from sdvae.training.loop import train
    from sdvae.weights import export_targets, load_vae, save_ldm, save_vae

# Imported on first use: `sdvae train --print_config` or a misspelt option should not wait for torch.
_HOMES = {
    "AutoencoderKL": "sdvae.model",
    "DiagonalGaussian": "sdvae.model",
    "EncodeConfig": "sdvae.latents.config",
    "InputError": "sdvae.errors",
    "LatentDataset": "sdvae.latents.dataset",
    "TrainConfig": "sdvae.training.config",
    "crop_to": "sdvae.roundtrip",
    "encode": "sdvae.latents.encode",
    "export_targets": "sdvae.weights",
    "keep_freed_memory": "sdvae.runtime",
    "load_vae": "sdvae.weights",
    "pad_to_multiple": "sdvae.roundtrip",
    "save_ldm": "sdvae.weights",
    "save_vae": "sdvae.weights",
    "speed_up": "sdvae.cpu.kernels",
    "train": "sdvae.training.loop",
}

__all__ = [  # noqa: RUF022 - the order of a table of contents
    "AutoencoderKL",
    "DiagonalGaussian",
    "pad_to_multiple",
    "crop_to",
    "speed_up",
    "keep_freed_memory",
    "load_vae",
    "save_vae",
    "save_ldm",
    "export_targets",
    "TrainConfig",
    "train",
    "EncodeConfig",
    "encode",
    "LatentDataset",
    "InputError",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sdvae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
