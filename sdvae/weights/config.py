"""The configuration of a VAE: read from config.json, or inferred from the shapes of its weights."""

from __future__ import annotations

import difflib
import inspect
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdvae.errors import InputError
from sdvae.io import read_json
from sdvae.model import AutoencoderKL
from sdvae.model.autoencoder import LIKELIHOODS

log = logging.getLogger(__name__)

CONFIG_KEYS = tuple(name for name in inspect.signature(AutoencoderKL.__init__).parameters if name != "self")
_LISTS = ("down_block_types", "up_block_types", "block_out_channels")
_COUNTS = ("in_channels", "out_channels", "layers_per_block", "latent_channels", "norm_num_groups", "sample_size")
_SWITCHES = ("force_upcast", "use_quant_conv", "use_post_quant_conv", "mid_block_add_attention")

SD1_SCALING_FACTOR = 0.18215  # 1/std of SD-1's latents; LDM, appendix G; SD 2 kept it
FLUX_SCALING_FACTOR, FLUX_SHIFT_FACTOR = 0.3611, 0.1159  # black-forest-labs/flux, src/flux/util.py
# diffusers' default of 32 would make its tiles 32 px wide, and these models were trained on 256 to 1024.
SAMPLE_SIZE = 512


def checked_config(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The keys that `AutoencoderKL` takes, with lists as tuples; of the keys that begin with "_", which are notes,
    only `_likelihood` is kept.

    Raises: InputError for another class's config, an unknown key, a value of the wrong kind.
    """
    class_name = config.get("_class_name", "AutoencoderKL")
    if class_name != "AutoencoderKL":
        raise InputError(f"{origin} is for {class_name}; need an AutoencoderKL; point at the VAE's folder")
    known: dict[str, Any] = {}
    for key, value in config.items():
        if key == "_likelihood":
            if value not in LIKELIHOODS:
                raise InputError(f"{origin} has {key} = {value!r}; need one of {', '.join(LIKELIHOODS)}; correct it")
            known[key] = value
            continue
        if key.startswith("_"):
            continue
        if key not in CONFIG_KEYS:
            close = difflib.get_close_matches(key, CONFIG_KEYS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it if you know that it changes nothing"
            raise InputError(f"{origin} has the unknown key {key!r}; need keys of AutoencoderKL; {hint}")
        known[key] = tuple(value) if key in _LISTS and isinstance(value, list) else value
        if need := _fault(key, known[key]):
            raise InputError(f"{origin} has {key} = {value!r}; need {need}; correct it")
    return known


def _fault(key: str, value: Any) -> str | None:
    if key in _LISTS:
        kind: type = int if key == "block_out_channels" else str
        fits = isinstance(value, tuple) and value and all(isinstance(item, kind) for item in value)
        return None if fits else f"a list of {'widths' if kind is int else 'block names'}, one a level"
    if key in _COUNTS:
        fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return None if fits else "a positive integer"
    if key in _SWITCHES:
        return None if isinstance(value, bool) else "true or false"
    if key == "scaling_factor":
        return None if isinstance(value, (int, float)) and value > 0 else "a positive number"
    return None


def read_config(source: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """What the caller gives as `config=`: a dict, the path of a config.json, or nothing.

    Raises: InputError as `checked_config`, or when the file can not be read.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return checked_config(source, "config")
    return checked_config(read_json(Path(source)), str(source))


def infer_config(weights: Mapping[str, Tensor], given: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The configuration that diffusers-named weights must have come from; `given` wins over what is inferred.

    Shapes tell all but the number of groups (32, as all published models), the factors and `sample_size`.
    Factors: 4 channels are taken for SD-1/SD-2 (SDXL's is 0.13025), 16 channels without quant convs for Flux
    (SD3's are 1.5305 and 0.0609); shapes can not tell them apart, so the choice is logged. For any other
    number of channels they are 1 and 0, with a warning.

    Raises: InputError when the shapes do not determine a VAE.
    """
    levels = _count(weights, r"encoder\.down_blocks\.(\d+)\..*")
    if levels == 0:
        raise InputError(f"{origin} has no encoder levels; need a whole VAE; get a whole copy")
    widths = tuple(
        _shape(weights, f"encoder.down_blocks.{level}.resnets.0.conv1.weight", origin)[0] for level in range(levels)
    )
    down = [_has(weights, f"encoder.down_blocks.{level}.attentions.") for level in range(levels)]
    up = [_has(weights, f"decoder.up_blocks.{level}.attentions.") for level in range(levels)]
    config: dict[str, Any] = {
        "in_channels": _shape(weights, "encoder.conv_in.weight", origin)[1],
        "out_channels": _shape(weights, "decoder.conv_out.weight", origin)[0],
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D" for attention in down
        ),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D" for attention in up),
        "block_out_channels": widths,
        "layers_per_block": _count(weights, r"encoder\.down_blocks\.0\.resnets\.(\d+)\..*"),
        "latent_channels": _shape(weights, "decoder.conv_in.weight", origin)[1],
        "use_quant_conv": _has(weights, "quant_conv."),
        "use_post_quant_conv": _has(weights, "post_quant_conv."),
        "mid_block_add_attention": _has(weights, "encoder.mid_block.attentions."),
        "sample_size": SAMPLE_SIZE,
    }
    # SDXL pipelines read post_quant_conv's dtype when they upcast, so a model without it must not ask for that.
    config["force_upcast"] = config["use_post_quant_conv"]
    if "norm_num_groups" not in given:
        odd = [width for width in widths if width % 32]
        if odd:
            raise InputError(
                f"{origin} has a level of width {odd[0]}, not a multiple of 32, so the number of groups is unknown; "
                'give it: config={"norm_num_groups": …}, or a config.json (sdvae export --config FILE)'
            )
        config["norm_num_groups"] = 32
    return {**config, **_factors({**config, **given}, given, origin), **given}


def _factors(config: Mapping[str, Any], given: Mapping[str, Any], origin: str) -> dict[str, Any]:
    if "scaling_factor" in given:
        return {}
    channels = config["latent_channels"]
    if channels == 4:
        log.info(
            "%s: scaling_factor %s of SD 1 and 2 assumed; SDXL's is 0.13025: config={'scaling_factor': 0.13025}",
            origin,
            SD1_SCALING_FACTOR,
        )
        return {"scaling_factor": SD1_SCALING_FACTOR}
    if channels == 16 and not config["use_quant_conv"] and not config["use_post_quant_conv"]:
        log.info(
            "%s: Flux's scaling_factor %s and shift_factor %s assumed; for SD3's give "
            "config={'scaling_factor': 1.5305, 'shift_factor': 0.0609}",
            origin,
            FLUX_SCALING_FACTOR,
            FLUX_SHIFT_FACTOR,
        )
        return {"scaling_factor": FLUX_SCALING_FACTOR, "shift_factor": FLUX_SHIFT_FACTOR}
    log.warning(
        "%s: no known scaling_factor for %d latent channels; 1.0 is taken: measure it, or give config=",
        origin,
        channels,
    )
    return {"scaling_factor": 1.0, "shift_factor": 0.0}


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for key in weights if (found := re.fullmatch(pattern, key))), default=-1)


def _has(weights: Mapping[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in weights)


def _shape(weights: Mapping[str, Tensor], key: str, origin: str) -> tuple[int, ...]:
    if key not in weights:
        raise InputError(f"{origin} lacks {key}; need a whole VAE (encoder and decoder); get a whole copy")
    if weights[key].ndim != 4:
        raise InputError(
            f"{origin} has {key} of shape {tuple(weights[key].shape)}; need a convolution (out, in, height, width)"
        )
    return tuple(weights[key].shape)
