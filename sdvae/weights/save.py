"""Writing a VAE: as a diffusers folder, or as a single file in LDM's layout, which ComfyUI, A1111 and kohya load."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as StockAutoencoderKL
from safetensors.torch import save_file
from torch import nn

from sdvae.errors import InputError, first_few
from sdvae.io import read_json, refuse_url, replacing
from sdvae.model import AutoencoderKL
from sdvae.model.config import CLASS_NAMES
from sdvae.model.state import plain_weights, rebuilt
from sdvae.weights.config import metadata_of
from sdvae.weights.load import STEM
from sdvae.weights.names import to_ldm
from sdvae.weights.read import SAFETENSORS_SUFFIXES, check_tensors


def save_ldm(vae: AutoencoderKL, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the weights as one unprefixed .safetensors file in LDM's layout, for ComfyUI, A1111 and kohya.

    These programs take the scaling factor from the diffusion model. For `load_vae`, the file's metadata hold the keys
    of the configuration that shapes do not tell. `export_targets` says which programs can load this VAE. `path` is
    never half-written.

    Args:
        vae: the model, which is not changed; also one that torch.compile or DDP wraps.
        path: the file to write, which ends in .safetensors or .sft; it is replaced if it exists.
        dtype: the dtype of the weights in the file; by default the model's own.

    Raises:
        InputError: when the path is a folder or has another ending, when the VAE has no plain weights (see
            `sdvae.model.state`), or when one is not finite after the conversion to `dtype` (float16 ends at 65504).
        OSError: when the file cannot be written.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() not in SAFETENSORS_SUFFIXES or path.is_dir():
        raise InputError(f"got {path}; need the path of a file that ends in .safetensors")
    model = _unwrapped(vae)
    weights = plain_weights(model)
    if dtype is not None:
        weights = {key: weight.to(dtype) for key, weight in weights.items()}
    check_tensors(weights, "the VAE" if dtype is None else f"the VAE as {dtype}")
    ldm = {key: weight.cpu().contiguous() for key, weight in to_ldm(weights).items()}
    with replacing(path) as temporary:
        save_file(ldm, temporary, metadata={"format": "pt", **metadata_of(model.config)})


def save_vae(vae: AutoencoderKL, folder: str | Path) -> None:
    """Write a diffusers folder (config.json, diffusion_pytorch_model.safetensors), which diffusers' class loads too.

    Args:
        vae: the model, whose weights are written in its own dtype; also one that torch.compile or DDP wraps.
        folder: a new or empty folder, or the folder of a VAE. An old VAE is replaced when the new one is complete;
            other files in its folder (such as a model card) are kept.

    Raises:
        InputError: when `folder` is a URL or holds something other than a VAE, when the VAE has no plain weights (see
            `sdvae.model.state`), or when one is not finite.
        OSError: when the folder cannot be written.
    """
    refuse_url(folder, "folder")
    folder = Path(folder).expanduser().resolve()
    kept = _other_files(folder)
    model = _unwrapped(vae)
    plain = rebuilt(model, type(model))
    check_tensors(plain.state_dict(), "the VAE")
    with replacing(folder) as temporary:
        plain.save_pretrained(temporary)
        for file in kept:
            shutil.copy2(file, temporary / file.name)


def _unwrapped(vae: Any) -> StockAutoencoderKL:
    """The VAE inside torch.compile and DDP.

    Raises:
        InputError: when it is of another class.
    """
    model = vae
    while isinstance(inside := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inside
    if not isinstance(model, StockAutoencoderKL):
        hint = "first call .merge_and_unload()" if hasattr(model, "merge_and_unload") else "give the VAE alone"
        raise InputError(f"got a {type(model).__name__} to save; need an AutoencoderKL; {hint}")
    return model


def _other_files(folder: Path) -> list[Path]:
    """The files of an existing VAE folder that are not part of the VAE.

    Raises:
        InputError: when the folder is not that of a VAE, since it would be replaced.
    """
    if not folder.exists():
        return []
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; need the path of a folder")
    content = sorted(folder.iterdir())
    inner = [path.name for path in content if path.is_dir()]
    config = folder / "config.json"
    is_vae = config.is_file() and read_json(config).get("_class_name") in CLASS_NAMES
    if content and (inner or not is_vae):
        raise InputError(
            f"{folder} holds other things ({first_few([path.name for path in content])}); "
            "need a new or empty folder, or a VAE's to replace; choose another path"
        )
    return [path for path in content if path != config and not path.name.startswith(STEM)]


def export_targets(vae: AutoencoderKL) -> dict[str, str | None]:
    """Which programs can load this VAE.

    "diffusers" loads the folder of `save_vae`; "comfyui", "a1111" and "kohya" load the file of `save_ldm`. These three
    build a network of fixed shape (ComfyUI comfy/sd.py, A1111 modules/sd_vae.py, kohya library/model_util.py).

    Args:
        vae: the model; only its configuration is used.

    Returns:
        For each program None if it can load the VAE, else the reason why it cannot.
    """
    config: Any = vae.config
    widths = tuple(config.block_out_channels)
    # In LDM's configs: ch 128, and ch_mult [1, 2, 4, 4] or, for the x4 upscaler, [1, 2, 4].
    sd_widths, x4_widths = (128, 256, 512, 512), (128, 256, 512)
    level_attention = any(name.startswith("Attn") for name in (*config.down_block_types, *config.up_block_types))
    has_quant = config.use_quant_conv and config.use_post_quant_conv
    common = [
        (config.in_channels == 3 and config.out_channels == 3, "needs 3 image channels"),
        (config.layers_per_block == 2, f"needs layers_per_block 2, got {config.layers_per_block}"),
        (config.norm_num_groups == 32, f"needs norm_num_groups 32, got {config.norm_num_groups}"),
        (config.act_fn in ("silu", "swish"), f"needs act_fn silu, got {config.act_fn}"),
        (config.mid_block_add_attention, "needs attention in the middle blocks"),
        (not level_attention, "takes no attention in the levels"),
        (vae.likelihood == "gaussian", "takes the decoder's output for an image, and this VAE gives logits"),
    ]
    comfyui = [
        *common,
        (widths in (sd_widths, x4_widths), f"needs widths {sd_widths} or {x4_widths}, got {widths}"),
        (config.use_quant_conv == config.use_post_quant_conv, "needs both quant convs or none"),
    ]
    sd1 = [
        *common,
        (widths == sd_widths, f"needs widths {sd_widths}, got {widths}"),
        (config.latent_channels == 4, f"needs 4 latent channels, got {config.latent_channels}"),
        (has_quant, "needs both quant convs"),
    ]
    return {
        "diffusers": None,
        "comfyui": _reason(comfyui),
        "a1111": _reason(sd1),
        "kohya": _reason(sd1),
    }


def _reason(demands: list[tuple[bool, str]]) -> str | None:
    return "; ".join(reason for met, reason in demands if not met) or None
