"""Reading tensors from files, and checking them. No file can execute code here."""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdvae.errors import InputError, first_few, one_line
from sdvae.model.state import COUNTER

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHT_SUFFIXES = (*SAFETENSORS_SUFFIXES, *PICKLE_SUFFIXES)
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Keys under which training programs store a state dict: Lightning, many others, DeepSpeed, a trainer of several models.
STATE_DICT_KEYS = ("state_dict", "model", "module", "vae", "ema", "model_ema")


def is_weight_file(path: Path) -> bool:
    """Whether the name has the ending of a file of weights, in upper or lower case."""
    return path.suffix.lower() in WEIGHT_SUFFIXES


def all_keys(keys: list[str]) -> dict[str, str]:
    """Every key under its own name."""
    return {key: key for key in keys}


def read_weights(path: Path, pick: Callable[[list[str]], dict[str, str]] = all_keys) -> dict[str, Tensor]:
    """Read tensors from one file, to the CPU and in the file's dtypes.

    Args:
        path: a safetensors file (.safetensors, .sft), or a pickle (.ckpt, .pt, .pth, .bin), which is read with
            weights_only=True and may hold its tensors under one of `STATE_DICT_KEYS`.
        pick: called with all keys of the file; returns those to read and their new names, {key: name}. Only these
            are read into memory where the format allows it. By default all, under their own names.

    Returns:
        The tensors by their new names.

    Raises:
        InputError: when the file is missing, truncated, not a checkpoint, or holds code; when it has several state
            dicts; or when `pick` gives several keys the same name.
    """
    _check_head(path)
    if path.suffix.lower() not in SAFETENSORS_SUFFIXES:
        return _read_pickle(path, pick)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(key) for key, name in _picked(path, pick, list(file.keys())).items()}
    except SafetensorError as error:
        raise InputError(f"{path} is damaged or truncated ({one_line(error)}); get a whole copy") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file that `read_weights` has read; none for a pickle."""
    if path.suffix.lower() not in SAFETENSORS_SUFFIXES:
        return {}
    with safe_open(path, framework="pt", device="cpu") as file:
        return file.metadata() or {}


def _read_pickle(path: Path, pick: Callable[[list[str]], dict[str, str]]) -> dict[str, Tensor]:
    # A full Stable Diffusion checkpoint has 2 to 7 GB, and its VAE only 0.3 GB. So the file is mapped into memory, and
    # only the VAE's part is copied.
    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
    except Exception as error:  # unpickling random bytes can raise any exception, even KeyError
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise InputError(
                f"{path} holds code or unsupported objects, which are never executed here; need plain tensors; "
                "convert it to safetensors on a machine you trust"
            ) from error
        raise InputError(
            f"{path} is damaged, truncated or not a checkpoint ({type(error).__name__}); get a whole copy"
        ) from error
    content = _state_dict(path, content)
    picked = _picked(path, pick, [key for key in content if isinstance(key, str)])
    strangers = [key for key in picked if not isinstance(content[key], Tensor)]
    if strangers:
        raise InputError(f"{path} has entries that are not tensors ({first_few(strangers)}); need a plain state dict")
    return {name: content[key].clone() if mapped else content[key] for key, name in picked.items()}


def _state_dict(path: Path, content: Any) -> Mapping[Any, Any]:
    """The dict of tensors in a pickle's content: the content itself, or what is inside under `STATE_DICT_KEYS`."""
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}; need a dict of tensors (a state dict)")
    inner = {
        key: value
        for key in STATE_DICT_KEYS
        if isinstance(value := content.get(key), Mapping) and _holds_tensors(value)
    }
    if len(inner) > 1:
        raise InputError(
            f"{path} holds weights under {', '.join(inner)}; need one state dict; save the one you want by itself"
        )
    return _state_dict(path, next(iter(inner.values()))) if inner else content


def _holds_tensors(content: Mapping[Any, Any]) -> bool:
    """Whether a dict has tensors, itself or in a dict under one of `STATE_DICT_KEYS`."""
    nested = (value for key in STATE_DICT_KEYS if isinstance(value := content.get(key), Mapping))
    return any(isinstance(item, Tensor) for item in content.values()) or any(_holds_tensors(value) for value in nested)


def _picked(path: Path, pick: Callable[[list[str]], dict[str, str]], keys: list[str]) -> dict[str, str]:
    picked = pick(keys)
    for name, count in Counter(picked.values()).items():
        if count > 1:
            same = [key for key, its in picked.items() if its == name]
            raise InputError(f"{path} has {count} keys for {name} ({first_few(same)}); need each weight once")
    return picked


def _check_head(path: Path) -> None:
    if not is_weight_file(path):
        raise InputError(f"got {path}; need a file that ends in one of {', '.join(WEIGHT_SUFFIXES)}, or a folder")
    if not path.is_file():
        raise InputError(f"there is no file {path}; need an existing checkpoint; check the path")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise InputError(f"{path} is empty (0 bytes); get a whole copy")
    if head.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{path} is a Git LFS pointer, not the weights; run `git lfs pull` or download the file itself"
        )
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise InputError(f"{path} is a web page, not the weights; use the site's direct download link")


def check_tensors(weights: Mapping[str, Tensor], origin: str) -> None:
    """Check that all weights are floating-point numbers and finite, except a batch norm's counter.

    Args:
        weights: name -> tensor.
        origin: where they come from, for the message.

    Raises:
        InputError: with the names of the first few that are not.
    """
    odd = [
        f"{key} ({weight.dtype})"
        for key, weight in weights.items()
        if weight.dtype not in WEIGHT_DTYPES and key != COUNTER
    ]
    if odd:
        raise InputError(
            f"{origin} has {len(odd)} tensors of unsupported dtype ({first_few(odd)}); "
            "need float16, bfloat16, float32 or float64; convert them"
        )
    away = [key for key, weight in weights.items() if weight.is_meta]
    if away:
        raise InputError(
            f"{origin} has {len(away)} weights without data (offloaded: {first_few(away)}); load them first"
        )
    broken = [key for key, weight in weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise InputError(
            f"{origin} has NaN or infinite values in {len(broken)} of {len(weights)} tensors ({first_few(broken)}); "
            "need finite weights; take an earlier checkpoint or a wider dtype"
        )


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The names of weights that do not fit a network, by what is wrong with them; an empty dict if all fit.

    Args:
        expected: the state dict of the network, whose values do not count.
        found: name -> tensor.

    Returns:
        {"missing": names, "unexpected": names, "of another shape": names with both shapes}, without empty lists.
    """
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape": [
            f"{key} {tuple(found[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in sorted(expected.keys() & found.keys())
            if expected[key].shape != found[key].shape
        ],
    }
    return {fault: names for fault, names in faults.items() if names}
