"""Students as a pair of files, NAME_encoder and NAME_decoder: the layout of TAESD, which previewers read.

Each file is the state dict of an `nn.Sequential` (github.com/madebyollin/taesd, taesd.py). diffusers' AutoencoderTiny
has the same layers after `encoder.layers.` and `decoder.layers.`, without the first one of TAESD's decoder, which
bounds the latents and has no weights. ComfyUI (latent_preview.py, nodes.py) looks for the pair in models/vae_approx, as
.safetensors or .pth, by the names of `PUBLISHED`. A1111 (modules/sd_vae_taesd.py) looks for .pth in models/VAE-taesd.
TAEF2's pair has the same layout and, in the blocks at the latents' resolution, a `pool` more (`TinyBlock`). Its latents
are the normalised ones of FLUX.2, with the patches undone.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sdvae.errors import InputError
from sdvae.weights.read import WEIGHT_SUFFIXES, is_weight_file

PARTS = ("encoder", "decoder")
# The name before _encoder and _decoder -> the diffusion models whose latents these files decode
PUBLISHED = {"taesd": "SD 1 and 2", "taesdxl": "SDXL", "taesd3": "SD3", "taef1": "Flux.1", "taef2": "FLUX.2"}
# What the shapes of the weights do not tell, as in all published students
UNSHAPED = {
    "act_fn": "relu",
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
FIRST = {"encoder": 0, "decoder": 1}  # the number in TAESD's files of diffusers' layer 0
_LAYER = re.compile(r"(\d+)\.(.*)")
_ONLY_LAYERS = re.compile(r"\d+\.((conv|pool)\.\d+\.)?(weight|bias)")
_CONV = r"{part}\.layers\.(\d+)\.weight"
_BLOCK = r"{part}\.layers\.(\d+)\.conv\.0\.weight"
_NORM = re.compile(r"(encoder|decoder)\.layers\.\d+\.pool\..*")


def is_half(keys: Iterable[str]) -> bool:
    """Whether these are the keys of one file of a pair."""
    keys = list(keys)
    return bool(keys) and all(_ONLY_LAYERS.fullmatch(key) for key in keys)


def is_tiny(keys: Iterable[str]) -> bool:
    """Whether these are keys of diffusers' AutoencoderTiny."""
    return any(re.match(r"(encoder|decoder)\.layers\.\d+\.", key) for key in keys)


def is_of_pair(path: Path) -> bool:
    """Whether a file's name is that of one file of a pair."""
    return is_weight_file(path) and path.stem.endswith(("_encoder", "_decoder"))


def names_of_pair(path: Path) -> dict[str, Path]:
    """The paths of encoder and decoder, by the path of either.

    Raises:
        InputError: when the name tells not which one it is.
    """
    if not is_of_pair(path):
        raise InputError(
            f"got {path} for one half of a student; need a name that ends in _encoder or _decoder, as in "
            "taesd_decoder.safetensors; rename it"
        )
    name = path.stem[: -len("encoder")]
    return {part: path.with_name(f"{name}{part}{path.suffix}") for part in PARTS}


def pair_of(path: Path) -> dict[str, Path]:
    """Encoder and decoder, by the path of either; the other one may have another ending.

    Raises:
        InputError: when the name tells not which one it is, or the other one is not there.
    """
    found = names_of_pair(path)
    for part, file in found.items():
        others = (file, *(file.with_suffix(suffix) for suffix in WEIGHT_SUFFIXES))
        existing = next((other for other in others if other.is_file()), None)
        if existing is None:
            raise InputError(f"{path} is one half of a student; need the other, {file.name}; put it beside this one")
        found[part] = existing
    return found


def from_taesd(weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """Rename the weights of one file to diffusers' names.

    Args:
        weights: of a file of the pair.
        part: «encoder» or «decoder».
    """
    return {f"{part}.layers.{number - FIRST[part]}.{rest}": weights[key] for key, (number, rest) in _split(weights)}


def to_taesd(weights: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    """The weights of one file of the pair: the inverse of `from_taesd`.

    Args:
        weights: of the student, with diffusers' names.
        part: «encoder» or «decoder».
    """
    start = f"{part}.layers."
    own = {key.removeprefix(start): weight for key, weight in weights.items() if key.startswith(start)}
    return {f"{number + FIRST[part]}.{rest}": own[key] for key, (number, rest) in _split(own)}


def _split(keys: Iterable[str]) -> Iterable[tuple[str, tuple[int, str]]]:
    for key in keys:
        found = _LAYER.fullmatch(key)
        assert found is not None
        yield key, (int(found[1]), found[2])


def infer_tiny_config(weights: Mapping[str, Tensor], given: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """The configuration that belongs to a student's weights, with diffusers' names.

    The shapes tell all that published students differ in. What they do not tell has diffusers' defaults.

    Args:
        weights: name -> tensor.
        given: keys that the caller knows; they replace the inferred ones.
        origin: where the weights come from, for messages.

    Raises:
        InputError: when there are no convolutions before and after the blocks, or levels of several widths.
    """
    config: dict[str, Any] = {}
    for part in PARTS:
        convs = _numbers(weights, _CONV.format(part=part))
        blocks = _numbers(weights, _BLOCK.format(part=part))
        if len(convs) < 2:
            raise InputError(f"{origin} has no {part} of a student; need encoder and decoder; get a whole copy")
        *begins, last = (weights[f"{part}.layers.{number}.weight"] for number in convs)
        first = begins[0]
        if len(widths := {len(begin) for begin in begins}) > 1:
            raise InputError(
                f"{origin} has levels of several widths in its {part} ({', '.join(map(str, sorted(widths)))}), as "
                "TAESana has; need one width for all levels, as in TAESD, TAEF1 and TAEF2"
            )
        levels = list(itertools.pairwise(convs))  # a convolution begins each level, and one ends the last
        config[f"num_{part}_blocks"] = tuple(sum(low < block < high for block in blocks) for low, high in levels)
        config[f"{part}_block_out_channels"] = (len(first),) * len(levels)
        config["in_channels" if part == "encoder" else "latent_channels"] = first.shape[1]
        config["latent_channels" if part == "encoder" else "out_channels"] = len(last)
    if any(_NORM.fullmatch(key) for key in weights):
        config["use_midblock_gn"] = True
    return {**config, **given}


def check_told_by_shapes(config: Mapping[str, Any]) -> None:
    """Check that a student's weights alone tell its configuration, so that a pair of files can hold it.

    Raises:
        InputError: with what they do not tell.
    """
    lost = [f"{key} {config[key]!r}" for key, wanted in UNSHAPED.items() if config[key] != wanted]
    if lost:
        raise InputError(
            f"got a student with {', '.join(lost)}, which a pair of files cannot hold, and no previewer computes; need "
            f"{', '.join(f'{key} {wanted!r}' for key, wanted in UNSHAPED.items())}; write a folder"
        )


def _numbers(keys: Iterable[str], pattern: str) -> list[int]:
    return sorted(int(found[1]) for key in keys if (found := re.fullmatch(pattern, key)))
