"""sdvae: train and use Stable-Diffusion-style image VAEs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # «as» the same name marks a name as public for type checkers
    from sdvae.errors import InputError as InputError
    from sdvae.kernels.speed import speed_up as speed_up
    from sdvae.latents.config import EncodeConfig as EncodeConfig
    from sdvae.latents.dataset import LatentDataset as LatentDataset
    from sdvae.latents.encode import encode as encode
    from sdvae.latents.encoder import LatentEncoder as LatentEncoder
    from sdvae.model import AutoencoderKL as AutoencoderKL
    from sdvae.model import AutoencoderKLFlux2 as AutoencoderKLFlux2
    from sdvae.model import AutoencoderTiny as AutoencoderTiny
    from sdvae.model import DiagonalGaussian as DiagonalGaussian
    from sdvae.model.stream import stream as stream
    from sdvae.previews import Previews as Previews
    from sdvae.roundtrip import crop_to as crop_to
    from sdvae.roundtrip import pad_to_multiple as pad_to_multiple
    from sdvae.roundtrip import round_trip as round_trip
    from sdvae.runtime import keep_freed_memory as keep_freed_memory
    from sdvae.training.config import TrainConfig as TrainConfig
    from sdvae.training.loop import train as train
    from sdvae.weights import export_targets as export_targets
    from sdvae.weights import load_autoencoder as load_autoencoder
    from sdvae.weights import load_vae as load_vae
    from sdvae.weights import save_ldm as save_ldm
    from sdvae.weights import save_taesd as save_taesd
    from sdvae.weights import save_vae as save_vae

__version__ = "0.1.0"

# The public names and the modules that define them. They are imported on first use, so that a command line that is
# misspelt, or only asks for help, need not wait for torch.
_MODULE_OF = {
    "AutoencoderKL": "sdvae.model",
    "AutoencoderKLFlux2": "sdvae.model",
    "AutoencoderTiny": "sdvae.model",
    "DiagonalGaussian": "sdvae.model",
    "stream": "sdvae.model.stream",
    "round_trip": "sdvae.roundtrip",
    "pad_to_multiple": "sdvae.roundtrip",
    "Previews": "sdvae.previews",
    "crop_to": "sdvae.roundtrip",
    "speed_up": "sdvae.kernels.speed",
    "keep_freed_memory": "sdvae.runtime",
    "load_autoencoder": "sdvae.weights",
    "load_vae": "sdvae.weights",
    "save_vae": "sdvae.weights",
    "save_ldm": "sdvae.weights",
    "save_taesd": "sdvae.weights",
    "export_targets": "sdvae.weights",
    "TrainConfig": "sdvae.training.config",
    "train": "sdvae.training.loop",
    "EncodeConfig": "sdvae.latents.config",
    "encode": "sdvae.latents.encode",
    "LatentEncoder": "sdvae.latents.encoder",
    "LatentDataset": "sdvae.latents.dataset",
    "InputError": "sdvae.errors",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'sdvae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULE_OF])
