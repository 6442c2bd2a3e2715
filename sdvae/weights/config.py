"""The configuration of a VAE: read from config.json, or inferred from the shapes of its weights."""

from __future__ import annotations

import difflib
import inspect
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdvae.errors import InputError
from sdvae.io import read_json
from sdvae.model import ConvolutionalVAE
from sdvae.model.config import CLASS_NAMES, LIKELIHOODS, PADDING_MODES, ModelShape, block_types
from sdvae.model.kinds import KINDS
from sdvae.model.patches import PatchSize
from sdvae.model.stock import STOCK_KINDS
from sdvae.weights.family import FLUX, SD, family_of
from sdvae.weights.names import has_batch_norm

log = logging.getLogger(__name__)

# Keys that some of diffusers' classes write into config.json by themselves, or have had, and that say nothing.
DERIVED = ("block_out_channels", "force_upcast")

# What the shapes of the weights do not tell. `save_ldm` writes these into the metadata of its file.
UNSHAPED = (
    *("scaling_factor", "shift_factor", "latents_mean", "latents_std", "_likelihood"),
    *("norm_num_groups", "act_fn", "force_upcast", "sample_size", "padding_mode"),
    *("batch_norm_eps", "batch_norm_momentum"),
)
WORDS = {"_likelihood": LIKELIHOODS, "padding_mode": PADDING_MODES}  # keys that take one of these
FLUX2_SAMPLE_SIZE = 1024  # in diffusers' config.json of FLUX.2
METADATA_KEY = "sdvae.config"


def kind_of(config: Mapping[str, Any], origin: str, kinds: Mapping[str, type[Any]] = KINDS) -> type[Any]:
    """The class that a config.json is for.

    Args:
        config: the content of the file.
        origin: the file's name, for messages.
        kinds: the classes that may be loaded.

    Raises:
        InputError: when it is for another one.
    """
    class_name = config.get("_class_name", "AutoencoderKL")
    if class_name not in kinds:
        if class_name in STOCK_KINDS:
            raise InputError(
                f"{origin} is for {class_name}, which evaluate, report, reconstruct and encode take, and nothing else "
                f"does; need an {' or '.join(KINDS)}"
            )
        other = class_name in CLASS_NAMES
        hint = (
            f"load it with sdvae.tutorial.conditional.{class_name}.from_pretrained" if other else "give a VAE's folder"
        )
        raise InputError(f"{origin} is for {class_name}; need an {' or '.join(kinds)}; {hint}")
    return kinds[class_name]


def defaults_of(kind: type[Any]) -> dict[str, Any]:
    """The keys that a class takes, each with its default, whose type says what kind of value the key takes."""
    parameters = inspect.signature(kind.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def checked_config(config: Mapping[str, Any], origin: str, kind: type[Any]) -> dict[str, Any]:
    """The keys of a config.json that the class takes, with lists as tuples.

    Keys that begin with "_", except `_likelihood`, are notes and left out.

    Args:
        config: the content of the file.
        origin: the file's name, for messages.
        kind: the class.

    Raises:
        InputError: for the config of another class, an unknown key, or a value of the wrong kind.
    """
    if config.get("_class_name", kind.__name__) != kind.__name__:
        raise InputError(f"{origin} is for {config['_class_name']}, but the weights are of an {kind.__name__}")
    defaults = defaults_of(kind)
    is_own = kind.__name__ in KINDS
    known: dict[str, Any] = {}
    for key, value in config.items():
        if key in DERIVED and key not in defaults:
            continue
        if key in WORDS and issubclass(kind, ConvolutionalVAE):
            if value not in WORDS[key]:
                raise InputError(f"{origin} has {key} = {value!r}; need one of {', '.join(WORDS[key])}; correct it")
            known[key] = value
            continue
        if key.startswith("_"):
            continue
        if key not in defaults:
            close = difflib.get_close_matches(key, defaults, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "remove it if you know that it changes nothing"
            raise InputError(f"{origin} has the unknown key {key!r}; need keys of {kind.__name__}; {hint}")
        if not is_own:  # the kinds of their values are diffusers' to know
            known[key] = value
            continue
        default = defaults[key]
        if default is None and key == "decoder_block_out_channels" and value is not None:  # None: the encoder's widths
            default = defaults["block_out_channels"]
        known[key] = tuple(value) if isinstance(default, tuple) and isinstance(value, list) else value
        if need := _fault(default, known[key]):
            raise InputError(f"{origin} has {key} = {value!r}; need {need}; correct it")
    return known


def _fault(default: Any, value: Any) -> str | None:
    """The kind of value that a key with this default needs, or None if `value` is of that kind."""
    if isinstance(default, tuple):
        item = type(default[0])
        fits = isinstance(value, tuple) and value and all(isinstance(part, item) for part in value)
        return None if fits else f"a list of {'numbers' if item is int else 'block names'}, one for each level"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return None if fits else "a positive integer"
    if isinstance(default, float):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if fits and (value > 0 or default == 0) else "a positive number"
    return None


def read_config(source: Mapping[str, Any] | str | Path | None, kind: type[Any]) -> dict[str, Any]:
    """The checked keys of a config: a dict, the path of a config.json, or None for no keys.

    Args:
        source: the argument `config` of `load_vae`.
        kind: the class that takes them.

    Raises:
        InputError: as `checked_config` does, or when the file cannot be read.
    """
    if source is None:
        return {}
    if isinstance(source, Mapping):
        return checked_config(source, "config", kind)
    return checked_config(read_json(Path(source)), str(source), kind)


def metadata_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a safetensors file that hold what the shapes of its weights do not tell.

    Args:
        config: the VAE's.
    """
    return {METADATA_KEY: json.dumps({key: config[key] for key in UNSHAPED if config.get(key) is not None})}


def config_in(metadata: Mapping[str, str], origin: str, kind: type[Any]) -> dict[str, Any]:
    """What `metadata_of` wrote: keys of a config, or none.

    Raises:
        InputError: when the entry is not what `metadata_of` writes.
    """
    try:
        content = json.loads(metadata.get(METADATA_KEY, "{}"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{origin} has metadata {METADATA_KEY} that is no JSON object; get a whole copy")
    return checked_config(content, f"{origin}: {METADATA_KEY}", kind)


def infer_config(
    weights: Mapping[str, Tensor],
    given: Mapping[str, Any],
    origin: str,
    *,
    keys: Iterable[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The configuration that belongs to weights with diffusers' names.

    Shapes determine everything except the number of groups (32, as in all published models), the factors and
    `sample_size`. The factors are those of the family that the other keys of the file or its metadata show. If nothing
    shows it, a VAE of 4 channels gets the factor of SD 1 and 2, and a VAE of 16 channels without quant convs gets
    Flux's, with a warning, because SDXL's and SD3's VAEs have the same shapes. Any other VAE gets the factors 1 and 0,
    with a warning. A VAE with a batch norm, as of FLUX.2, needs none.

    Args:
        weights: name -> tensor.
        given: keys that the caller knows; they replace the inferred ones.
        origin: where the weights come from, for messages.
        keys: all keys of the file.
        metadata: of the file, if it is a safetensors file.

    Raises:
        InputError: when the shapes do not determine a VAE.
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
        **block_types(down, up),
        "block_out_channels": widths,
        "layers_per_block": _count(weights, r"encoder\.down_blocks\.0\.resnets\.(\d+)\..*"),
        "latent_channels": _shape(weights, "decoder.conv_in.weight", origin)[1],
        "use_quant_conv": _has(weights, "quant_conv."),
        "use_post_quant_conv": _has(weights, "post_quant_conv."),
        "mid_block_add_attention": _has(weights, "encoder.mid_block.attentions."),
        # diffusers' default of 32 would make its tiles 32 pixels wide; published models were trained on 256 to 1024
        "sample_size": ModelShape.sample_size,
    }
    up_widths = tuple(
        _shape(weights, f"decoder.up_blocks.{level}.resnets.0.conv1.weight", origin)[0]
        for level in reversed(range(_count(weights, r"decoder\.up_blocks\.(\d+)\..*")))
    )
    if "norm_num_groups" not in given:
        groups = ModelShape.norm_num_groups
        odd = [width for width in (*widths, *up_widths) if width % groups]
        if odd:
            raise InputError(
                f"{origin} has a level of width {odd[0]}, no multiple of {groups}, so the number of groups is unknown; "
                'give config={"norm_num_groups": …} or the path of a config.json; '
                "`sdvae export SOURCE FOLDER --config FILE` writes a folder that holds it"
            )
        config["norm_num_groups"] = groups
    if has_batch_norm(weights):
        own = {"decoder_block_out_channels": up_widths} if up_widths != widths else {}
        patches = _patch_size(weights, config["latent_channels"], origin)
        return {**config, **own, "patch_size": patches, "sample_size": FLUX2_SAMPLE_SIZE, **given}
    # SDXL pipelines read post_quant_conv's dtype when they upcast, so a model without it must not ask for that.
    config["force_upcast"] = config["use_post_quant_conv"]
    found = None if "scaling_factor" in given else _factors(config, origin, keys, metadata or {})
    return {**config, **(found or {}), **given}


def _patch_size(weights: Mapping[str, Tensor], channels: int, origin: str) -> PatchSize:
    """The square patches over which a batch norm has this many channels of statistics."""
    count = weights["bn.running_mean"].numel() if "bn.running_mean" in weights else 0
    side = math.isqrt(count // channels)
    if not side or side * side * channels != count:
        raise InputError(
            f"{origin} has a batch norm of {count} channels over latents of {channels}; need 4 times as many, or those "
            "of other square patches; get a whole copy"
        )
    return (side, side)


def _factors(
    config: Mapping[str, Any], origin: str, keys: Iterable[str], metadata: Mapping[str, str]
) -> Mapping[str, Any]:
    channels = config["latent_channels"]
    if found := family_of(keys, metadata, channels):
        family, shown = found
        log.info("%s: the factors of %s, which %s shows: %s", origin, family.name, shown, dict(family.factors))
        return family.factors
    remedy = "config= (sdvae export: --config FILE.json)"
    if channels == 4:
        log.warning(
            "%s: nothing tells whether this VAE is of SD 1 or 2 (scaling_factor 0.18215) or SDXL (0.13025). SD's is "
            "assumed; for SDXL's give {'scaling_factor': 0.13025} as %s",
            origin,
            remedy,
        )
        return SD
    if channels == 16 and not config["use_quant_conv"] and not config["use_post_quant_conv"]:
        log.warning(
            "%s: nothing tells whether this VAE is of Flux (scaling_factor 0.3611, shift_factor 0.1159) or SD3 "
            "(1.5305, 0.0609). Flux's is assumed; for SD3's give "
            "{'scaling_factor': 1.5305, 'shift_factor': 0.0609} as %s",
            origin,
            remedy,
        )
        return FLUX
    log.warning(
        "%s: the scaling_factor for %d latent channels is not known, so it is set to 1.0; measure it and give it as %s",
        origin,
        channels,
        remedy,
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
