"""Writing a VAE: as a diffusers folder, or in LDM's or TAESD's layout, which ComfyUI, A1111 and others load."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as StockAutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2 as StockAutoencoderKLFlux2
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as StockAutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor, nn

from sdvae.errors import InputError, first_few
from sdvae.io import read_json, refuse_url, replacing
from sdvae.model import Autoencoder, AutoencoderTiny
from sdvae.model.config import CLASS_NAMES, decoder_widths
from sdvae.model.kinds import KINDS
from sdvae.model.state import COUNTER, declared_padding, plain_weights, rebuilt
from sdvae.weights.config import metadata_of
from sdvae.weights.load import STEM
from sdvae.weights.names import to_ldm
from sdvae.weights.read import SAFETENSORS_SUFFIXES, check_tensors
from sdvae.weights.tiny import PARTS, check_told_by_shapes, names_of_pair, to_taesd

log = logging.getLogger(__name__)

RGB_FACTORS = "latent_rgb_factors.json"  # beside a VAE: the linear map that `sdvae export --data` fits to it


def save_ldm(vae: Autoencoder, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
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
    if isinstance(model, StockAutoencoderTiny):
        raise InputError(
            "got a student for one file in LDM's layout; need an AutoencoderKL; use save_taesd, or a folder"
        )
    if (padding := declared_padding(model)) != "zeros":
        log.warning(
            "%s: load_vae reads from this file that the VAE pads by %s; other programs pad with zeros and give wrong "
            "edges, unless its layers' padding_mode is set after loading (docs/inference.md, «Padding»)",
            *(path, padding),
        )
    ldm = {key: weight.cpu().contiguous() for key, weight in to_ldm(_checked_weights(model, dtype)).items()}
    with replacing(path) as temporary:
        save_file(ldm, temporary, metadata={"format": "pt", **metadata_of(model.config)})
    factors_beside(path).unlink(missing_ok=True)  # those of the VAE that was there before


def save_taesd(student: Autoencoder, path: str | Path, *, dtype: torch.dtype | None = None) -> list[Path]:
    """Write a student as the pair NAME_encoder and NAME_decoder in TAESD's layout, for previewers and `load_vae`.

    ComfyUI reads both from models/vae_approx, and takes the latents' scaling from the name (see `PUBLISHED` in
    `sdvae.weights.tiny`). A1111 reads only pickles (.pth), from models/VAE-taesd. Neither file is ever half-written.

    Args:
        student: the model, which is not changed; also one that torch.compile or DDP wraps.
        path: the path of either file, such as taesd_decoder.safetensors. With the ending .pth the files are pickles
            of tensors.
        dtype: the dtype of the weights in the files; by default the model's own.

    Returns:
        The paths of encoder and decoder.

    Raises:
        InputError: when the path has another name or ending, when the student's configuration has what these files
            cannot hold, when it has no plain weights, or when one is not finite after the conversion to `dtype`.
        OSError: when a file cannot be written.
    """
    files = names_of_pair(Path(path).expanduser())
    model = _unwrapped(student)
    if not isinstance(model, StockAutoencoderTiny):
        raise InputError(
            f"got an {type(model).__name__} for {path}; need a student (AutoencoderTiny); see sdvae distil"
        )
    check_told_by_shapes(model.config)
    weights = _checked_weights(model, dtype)
    for part, file in files.items():
        own = {key: weight.cpu().contiguous() for key, weight in to_taesd(weights, part).items()}
        with replacing(file) as temporary:
            if file.suffix.lower() in SAFETENSORS_SUFFIXES:
                save_file(own, temporary, metadata={"format": "pt"})
            else:
                torch.save(own, temporary)
        factors_beside(file).unlink(missing_ok=True)
    return [files[part] for part in PARTS]


def factors_beside(vae: Path) -> Path:
    """The file of RGB factors in a VAE's folder, or beside its file."""
    return vae / RGB_FACTORS if vae.is_dir() else vae.with_name(f"{vae.stem}.{RGB_FACTORS}")


def save_as(vae: Autoencoder, target: str | Path) -> list[Path]:
    """Write a VAE or a student in the format that the target's name asks for: a file, a student's pair, or a folder.

    Args:
        vae: the model.
        target: the argument of `save_ldm`, `save_taesd` or `save_vae`.

    Returns:
        What was written.

    Raises:
        InputError: as these functions do.
        OSError: as these functions do.
    """
    if Path(target).suffix.lower() not in (*SAFETENSORS_SUFFIXES, ".pth"):
        save_vae(vae, target)
    elif isinstance(vae, AutoencoderTiny):
        return save_taesd(vae, target)
    else:
        save_ldm(vae, target)
    return [Path(target)]


def _checked_weights(model: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    weights = plain_weights(model)
    if dtype is not None:
        weights = {key: weight if key == COUNTER else weight.to(dtype) for key, weight in weights.items()}
    check_tensors(weights, "the VAE" if dtype is None else f"the VAE as {dtype}")
    return weights


def save_vae(vae: Autoencoder, folder: str | Path) -> None:
    """Write a diffusers folder (config.json, diffusion_pytorch_model.safetensors), which diffusers' class loads too.

    Args:
        vae: the model, whose weights are written in its own dtype; also one that torch.compile or DDP wraps.
        folder: a new or empty folder, or the folder of a VAE. An old VAE is replaced when the new one is complete,
            and its RGB factors are removed; other files in its folder (such as a model card) are kept.

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


def _unwrapped(vae: Any) -> StockAutoencoderKL | StockAutoencoderKLFlux2 | StockAutoencoderTiny:
    """The VAE inside torch.compile and DDP.

    Raises:
        InputError: when it is of another class.
    """
    model = vae
    while isinstance(inside := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inside
    if not isinstance(model, (StockAutoencoderKL, StockAutoencoderKLFlux2, StockAutoencoderTiny)):
        hint = "first call .merge_and_unload()" if hasattr(model, "merge_and_unload") else "give the VAE alone"
        raise InputError(f"got a {type(model).__name__} to save; need an {' or '.join(KINDS)}; {hint}")
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
    own = (STEM, RGB_FACTORS)
    return [path for path in content if path != config and not path.name.startswith(own)]


def export_targets(vae: Autoencoder) -> dict[str, str | None]:
    """Which programs can load this VAE and compute what it does.

    "diffusers" loads the folder of `save_vae`; "comfyui", "a1111" and "kohya" load the file of `save_ldm`. These three
    build a network of fixed shape (ComfyUI comfy/sd.py, A1111 modules/sd_vae.py, kohya library/model_util.py). A
    student's files are those of `save_taesd` (ComfyUI comfy/taesd/taesd.py, A1111 modules/sd_vae_taesd.py).

    Args:
        vae: the model; only its configuration is used.

    Returns:
        For each program None if it can, else the reason why it cannot.
    """
    config: Any = vae.config
    if isinstance(vae, AutoencoderTiny):
        return _student_targets(config)
    widths = tuple(config.block_out_channels)
    # In LDM's configs: ch 128, and ch_mult [1, 2, 4, 4] or, for the x4 upscaler, [1, 2, 4].
    sd_widths, x4_widths = (128, 256, 512, 512), (128, 256, 512)
    level_attention = any(name.startswith("Attn") for name in (*config.down_block_types, *config.up_block_types))
    has_quant = config.use_quant_conv and config.use_post_quant_conv
    zeros = (
        vae.padding_mode == "zeros",
        f"pads with zeros, and this VAE by {vae.padding_mode}, so that edges come out wrong unless its layers' "
        "padding_mode is set after loading",
    )
    common = [
        zeros,
        (config.in_channels == 3 and config.out_channels == 3, "needs 3 image channels"),
        (config.layers_per_block == 2, f"needs layers_per_block 2, got {config.layers_per_block}"),
        (config.norm_num_groups == 32, f"needs norm_num_groups 32, got {config.norm_num_groups}"),
        (config.act_fn in ("silu", "swish"), f"needs act_fn silu, got {config.act_fn}"),
        (config.mid_block_add_attention, "needs attention in the middle blocks"),
        (not level_attention, "takes no attention in the levels"),
        (vae.likelihood == "gaussian", "takes the decoder's output for an image, and this VAE gives logits"),
    ]
    # The decoder's may be narrower by one factor, and only its last width is looked at.
    up_widths = decoder_widths(config)
    in_proportion = up_widths == tuple(up_widths[-1] * width // widths[-1] for width in widths)
    has_norm = "batch_norm_eps" in config
    norm = (config.get("batch_norm_eps"), tuple(config.get("patch_size") or ()))
    sd1_kind = (not has_norm, "takes no batch norm over the latents (FLUX.2's)")
    comfyui = [
        *common,
        (widths in (sd_widths, x4_widths), f"needs widths {sd_widths} or {x4_widths}, got {widths}"),
        (in_proportion, f"needs a decoder's widths in proportion to {widths}, got {up_widths}"),
        (not has_norm or norm == (1e-4, (2, 2)), f"needs batch_norm_eps 0.0001 and patch_size (2, 2), got {norm}"),
        (config.use_quant_conv == config.use_post_quant_conv, "needs both quant convs or none"),
    ]
    sd1 = [
        *common,
        sd1_kind,
        (up_widths == widths, f"needs a decoder's widths {widths}, got {up_widths}"),
        (widths == sd_widths, f"needs widths {sd_widths}, got {widths}"),
        (config.latent_channels == 4, f"needs 4 latent channels, got {config.latent_channels}"),
        (has_quant, "needs both quant convs"),
    ]
    return {
        "diffusers": _reason([zeros]),
        "comfyui": _reason(comfyui),
        "a1111": _reason(sd1),
        "kohya": _reason(sd1),
    }


def _student_targets(config: Any) -> dict[str, str | None]:
    """`export_targets` of a student."""
    shape = {
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "relu",
        "upsample_fn": "nearest",
        "upsampling_scaling_factor": 2,
        "num_encoder_blocks": (1, 3, 3, 3),
        "num_decoder_blocks": (3, 3, 3, 1),
        "encoder_block_out_channels": (64,) * 4,
        "decoder_block_out_channels": (64,) * 4,
    }
    got = {key: tuple(config[key]) if isinstance(config[key], list) else config[key] for key in shape}
    same = [(got[key] == wanted, f"needs {key} {wanted}, got {got[key]}") for key, wanted in shape.items()]
    channels, with_norms = config.latent_channels, config.get("use_midblock_gn", False)
    plain = (not with_norms, "takes no group norm in the blocks (use_midblock_gn)")
    # TAESD's network, or TAEF2's, which ComfyUI builds for FLUX.2's latents alone
    of_flux2 = (with_norms == (channels == 32), f"needs use_midblock_gn {channels == 32} for {channels} channels")
    comfyui = [*same, of_flux2]
    a1111 = [*same, plain, (channels in (4, 16), f"needs 4 latent channels, or 16 for SD3, got {channels}")]
    return {
        "diffusers": _reason([plain]),
        "comfyui": _reason(comfyui),
        "a1111": _reason(a1111),
        "kohya": "it has no previews",
    }


def _reason(demands: list[tuple[bool, str]]) -> str | None:
    return "; ".join(reason for met, reason in demands if not met) or None
