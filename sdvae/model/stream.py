"""`stream`: exact strips for a VAE of diffusers that is already in a pipeline, around its own weights."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from diffusers.models.attention_processor import Attention
from torch import nn

from sdvae.errors import InputError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.blocks import set_padding
from sdvae.model.config import PADDING_MODES
from sdvae.model.convolutional import ConvolutionalVAE
from sdvae.model.flux2 import AutoencoderKLFlux2
from sdvae.model.plain import HOOKS, is_plain
from sdvae.model.state import built, declared_padding, shared_weights

# diffusers' class -> the class that streams it
OURS: dict[type[Any], type[Any]] = {kind._stock: kind for kind in (AutoencoderKL, AutoencoderKLFlux2)}
CALLS = ("encode", "decode", "_encode", "_decode", "_diffusers_hook")  # attributes by which the VAE itself is changed


def stream(vae: Any, *, memory_bytes: int | None = None) -> ConvolutionalVAE:
    """Encode and decode images of any size in bounded memory, with a VAE of diffusers that is already loaded.

        pipe.vae = sdvae.stream(pipe.vae)

    The result is this package's class around the same parameters, not around copies: what moves, casts or trains one
    of the two models does it to both. Outputs are those of the whole image in diffusers' class (`sdvae.model.tiling`).
    Configuration, device, dtype, mode, slicing, the padding of the layers, and the hook of `enable_model_cpu_offload`
    are kept. An adapter is added to the result, as to any VAE; until it is merged and unloaded, whole images are
    computed, with a warning.

    Args:
        vae: a `diffusers.AutoencoderKL` or `diffusers.AutoencoderKLFlux2`, which stays as it is. For a VAE of this
            package, this is `enable_tiling`.
        memory_bytes: what the device may use in addition to weights, input and output, as in `enable_tiling`.

    Raises:
        InputError: for another class; or when a layer was replaced, adapted, hooked or changed, because the result
            would not compute what that layer does.
    """
    if not isinstance(vae, ConvolutionalVAE):
        vae = _around(vae)
    vae.enable_tiling(memory_bytes=memory_bytes)
    return vae


def _around(vae: Any) -> Any:
    """A model of this package with the parameters of a model of diffusers."""
    if type(vae) not in OURS:
        names = " or ".join(f"diffusers.{kind.__name__}" for kind in OURS)
        raise InputError(f"got a {type(vae).__name__} to stream; need {names}, or this package's class")
    weights = shared_weights(vae)
    padding_mode = _padding_of(vae)
    _check_unchanged(vae, padding_mode)
    ours = built(vae, OURS[type(vae)], weights, padding_mode)
    ours.set_padding_mode(padding_mode)  # in the configuration too
    ours.use_slicing = vae.use_slicing
    if hasattr(vae, "_hf_hook"):
        add_hook_to_module(ours, vae._hf_hook)
    return ours


def _padding_of(vae: Any) -> str:
    """How the layers pad, whatever the configuration says: diffusers reads no padding from it.

    Raises:
        InputError: when they pad in several ways, or the configuration says another.
    """
    modes = {module.padding_mode for module in vae.modules() if isinstance(module, nn.Conv2d) and any(module.padding)}
    said = {declared_padding(vae)} if "padding_mode" in vae.config else modes
    if len(modes | said) > 1 or not modes <= set(PADDING_MODES):
        raise InputError(
            f"got a VAE whose layers pad with {', '.join(sorted(modes))}, and whose configuration says "
            f"{declared_padding(vae)}; need one of {', '.join(PADDING_MODES)} in all; set module.padding_mode in every "
            "nn.Conv2d that pads"
        )
    return modes.pop()


def _check_unchanged(vae: Any, padding_mode: str) -> None:
    """Refuse what computes otherwise than a newly built VAE with the same configuration, weights and padding."""
    with torch.device("meta"):
        new = type(vae).from_config(vae.config)
    set_padding(new, padding_mode)
    if any(name in vae.__dict__ for name in CALLS) or any(getattr(vae, name) for name in HOOKS):
        raise InputError("got a VAE to stream that is hooked as a whole; need it without hooks; stream it before that")
    found, wanted = (dict(model.named_modules()) for model in (vae, new))
    for name in [name for name in found | wanted if name]:
        if name not in found or name not in wanted or not _alike(found[name], wanted[name]):
            raise InputError(
                f"got a VAE to stream whose layer {name} was replaced, adapted, hooked or changed; need diffusers' own "
                "layers; stream it before that, or remove what was added"
            )


def _alike(module: nn.Module, new: nn.Module) -> bool:
    """Whether two modules of diffusers compute the same from the same weights and inputs."""
    same = is_plain(module, type(new)) and module.extra_repr() == new.extra_repr()
    if isinstance(module, Attention) and isinstance(new, Attention):
        return same and type(module.processor) is type(new.processor)
    return same
