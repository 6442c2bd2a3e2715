"""The names of weights in diffusers' and in LDM's state dicts, and the conversion in both directions by one table.

LDM (CompVis, Stability, ComfyUI, A1111, Flux's ae.safetensors) numbers the decoder's levels from the image to the
latents, and diffusers from the latents to the image. LDM stores attention projections as 1x1 convolutions, and
diffusers as linear layers. All other weights only have other names. FLUX.2's file (black-forest-labs/flux2,
src/flux2/autoencoder.py) has LDM's names, except that its quant convs are parts of encoder and decoder; its batch norm
has diffusers' names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product

from torch import Tensor

from sdvae.errors import InputError, first_few
from sdvae.model.state import BATCH_NORM

# Pairs (diffusers, LDM). {level} is diffusers' number of the level, and {mirrored} = levels - 1 - level.
_RESNETS = [
    ("encoder.down_blocks.{level}.resnets.{layer}", "encoder.down.{level}.block.{layer}"),
    ("encoder.mid_block.resnets.0", "encoder.mid.block_1"),
    ("encoder.mid_block.resnets.1", "encoder.mid.block_2"),
    ("decoder.up_blocks.{level}.resnets.{layer}", "decoder.up.{mirrored}.block.{layer}"),
    ("decoder.mid_block.resnets.0", "decoder.mid.block_1"),
    ("decoder.mid_block.resnets.1", "decoder.mid.block_2"),
]
_RESNET_LAYERS = [
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("conv_shortcut", "nin_shortcut"),
]
_ATTENTIONS = [
    ("encoder.down_blocks.{level}.attentions.{layer}", "encoder.down.{level}.attn.{layer}"),
    ("encoder.mid_block.attentions.0", "encoder.mid.attn_1"),
    ("decoder.up_blocks.{level}.attentions.{layer}", "decoder.up.{mirrored}.attn.{layer}"),
    ("decoder.mid_block.attentions.0", "decoder.mid.attn_1"),
]
_ATTENTION_LAYERS = [
    ("group_norm", "norm"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("to_out.0", "proj_out"),
]
_OTHERS = [
    ("encoder.conv_in", "encoder.conv_in"),
    ("encoder.down_blocks.{level}.downsamplers.0.conv", "encoder.down.{level}.downsample.conv"),
    ("encoder.conv_norm_out", "encoder.norm_out"),
    ("encoder.conv_out", "encoder.conv_out"),
    ("quant_conv", "quant_conv"),
    ("post_quant_conv", "post_quant_conv"),
    ("decoder.conv_in", "decoder.conv_in"),
    ("decoder.up_blocks.{level}.upsamplers.0.conv", "decoder.up.{mirrored}.upsample.conv"),
    ("decoder.conv_norm_out", "decoder.norm_out"),
    ("decoder.conv_out", "decoder.conv_out"),
]
TABLE: list[tuple[str, str]] = [
    *_OTHERS,
    *((f"{a}.{layer_a}", f"{b}.{layer_b}") for (a, b), (layer_a, layer_b) in product(_RESNETS, _RESNET_LAYERS)),
    *((f"{a}.{layer_a}", f"{b}.{layer_b}") for (a, b), (layer_a, layer_b) in product(_ATTENTIONS, _ATTENTION_LAYERS)),
]

# LDM's name -> that in FLUX.2's file
_FLUX2_NAMES = {"quant_conv": "encoder.quant_conv", "post_quant_conv": "decoder.post_quant_conv"}

# Names of attention layers that either layout has had, the first before diffusers 0.13 -> today's names in diffusers'
# and in LDM's layout.
_ATTENTION_NAMES = {
    other: names
    for names, others in (
        (("to_q", "q"), ("query", "to_q", "q")),
        (("to_k", "k"), ("key", "to_k", "k")),
        (("to_v", "v"), ("value", "to_v", "v")),
        (("to_out.0", "proj_out"), ("proj_attn", "to_out.0", "to_out", "proj_out")),
    )
    for other in others
}
_ATTENTION_KEY = re.compile(
    rf"(.*\.(?:attentions\.\d+|attn_1|attn\.\d+))\.({'|'.join(map(re.escape, _ATTENTION_NAMES))})\.(weight|bias)"
)
_PROJECTION_WEIGHT = re.compile(r"(.*\.attentions\.\d+)\.(to_q|to_k|to_v|to_out\.0)\.weight")
_DIFFUSERS_ONLY = re.compile(r"(encoder|decoder)\.(down_blocks|up_blocks|mid_block|conv_norm_out)\..*")


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(template)))


_FROM_DIFFUSERS = [(_pattern(diffusers), ldm) for diffusers, ldm in TABLE]
_FROM_LDM = [(_pattern(ldm), diffusers) for diffusers, ldm in TABLE]


def is_diffusers_layout(keys: list[str]) -> bool:
    """Whether these keys of a VAE, without prefix, are diffusers' names. Otherwise they are LDM's."""
    return any(_DIFFUSERS_ONLY.fullmatch(key) for key in keys)


def has_batch_norm(weights: Mapping[str, Tensor]) -> bool:
    """Whether the weights, without prefix and in either layout, are those of FLUX.2's kind of VAE."""
    return any(key in weights for key in BATCH_NORM)


def modern_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename attention layers that have another name to today's name in the layout of the rest, diffusers' or LDM's.

    Raises:
        InputError: when a weight is there under both its old and its new name.
    """
    column = 0 if is_diffusers_layout(list(weights)) else 1
    renamed: dict[str, Tensor] = {}
    for key, weight in weights.items():
        found = _ATTENTION_KEY.fullmatch(key)
        new = f"{found[1]}.{_ATTENTION_NAMES[found[2]][column]}.{found[3]}" if found else key
        if new in renamed or (new != key and new in weights):
            raise InputError(f"got {key!r} beside its other name {new!r}; need each weight once; get a whole copy")
        renamed[new] = weight
    return renamed


def linear_attention(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reshape attention projections of (C, C, 1, 1) or (C, C, 1) to (C, C); the names are diffusers'."""
    return {
        key: weight.reshape(weight.shape[:2])
        if _PROJECTION_WEIGHT.fullmatch(key) and weight.ndim > 2 and weight.shape[2:].numel() == 1
        else weight
        for key, weight in weights.items()
    }


def to_ldm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict from diffusers' names to LDM's, without prefix.

    Attention projections (C, C) become (C, C, 1, 1). Weights with a batch norm get the names in FLUX.2's file.

    Args:
        weights: diffusers' name -> tensor.

    Returns:
        LDM's name -> tensor of the input, or a view of it.

    Raises:
        InputError: naming the keys that a VAE does not have.
    """
    renamed = _renamed(weights, _FROM_DIFFUSERS, _levels(weights, r"decoder\.up_blocks\.(\d+)\..*"), "diffusers")
    if has_batch_norm(weights):
        renamed = {old: _in_layer(new, _FLUX2_NAMES) for old, new in renamed.items()}
    return {
        new: weights[old][:, :, None, None] if _PROJECTION_WEIGHT.fullmatch(old) else weights[old]
        for old, new in renamed.items()
    }


def from_ldm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a state dict from LDM's names, without prefix, to diffusers': the inverse of `to_ldm`.

    Args:
        weights: LDM's name -> tensor; attention projections may also be (C, C).

    Returns:
        diffusers' name -> tensor of the input, or a view of it.

    Raises:
        InputError: naming the keys that a VAE does not have.
    """
    plain = {name: ldm for ldm, name in _FLUX2_NAMES.items()}
    weights = modern_names({_in_layer(key, plain): weight for key, weight in weights.items()})
    renamed = _renamed(weights, _FROM_LDM, _levels(weights, r"decoder\.up\.(\d+)\..*"), "LDM")
    return linear_attention({new: weights[old] for old, new in renamed.items()})


def _in_layer(key: str, layers: Mapping[str, str]) -> str:
    """The key with its layer's other name, if `layers` has one."""
    layer, dot, kind = key.rpartition(".")
    return f"{layers.get(layer, layer)}{dot}{kind}"


def _levels(weights: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for key in weights if (found := re.fullmatch(pattern, key))), default=-1)


def _renamed(
    weights: Mapping[str, Tensor], table: list[tuple[re.Pattern[str], str]], levels: int, layout: str
) -> dict[str, str]:
    """Old key -> new key for every weight."""
    renamed = {key: _rename(key, table, levels) for key in weights}
    unknown = sorted(key for key, new in renamed.items() if new is None)
    if unknown:
        raise InputError(
            f"got {len(unknown)} keys that a VAE in {layout} layout does not have ({first_few(unknown)}); "
            "need an AutoencoderKL's weights; check that the file holds one"
        )
    return {key: new for key, new in renamed.items() if new is not None}


def _rename(key: str, table: list[tuple[re.Pattern[str], str]], levels: int) -> str | None:
    if key in BATCH_NORM:
        return key
    layer, _, kind = key.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    for pattern, template in table:
        if found := pattern.fullmatch(layer):
            numbers = {name: int(number) for name, number in found.groupdict().items()}
            if "mirrored" in numbers:
                numbers["level"] = levels - 1 - numbers["mirrored"]
            elif "level" in numbers:
                numbers["mirrored"] = levels - 1 - numbers["level"]
            return f"{template.format(**numbers)}.{kind}"
    return None
