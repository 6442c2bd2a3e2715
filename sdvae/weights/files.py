"""Tensors from and to disk. No file can execute code here, and none is left half-written."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdvae.errors import InputError, first_few, one_line

PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def read_weights(path: Path, pick: Callable[[list[str]], dict[str, str]]) -> dict[str, Tensor]:
    """Tensors of one file, on the CPU, in the file's dtypes.

    Args:
        path: a .safetensors file, or a pickle (.ckpt, .pt, .pth, .bin), which is read with weights_only=True
            and may hold its tensors under "state_dict".
        pick: given all keys, which to read and under what name: {key in the file: name in the result}.
            Only those are read into memory where the format allows it.

    Raises: InputError when the file is missing, no checkpoint, truncated, or holds code.
    """
    _check_head(path)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(key) for key, name in pick(list(file.keys())).items()}
        except SafetensorError as error:
            raise InputError(f"{path} is damaged or truncated ({one_line(error)}); get a whole copy") from error
    return _read_pickle(path, pick)


def _read_pickle(path: Path, pick: Callable[[list[str]], dict[str, str]]) -> dict[str, Tensor]:
    # A full Stable Diffusion checkpoint has 2-7 GB, of which the VAE is 0.3: map it and copy that part.
    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=mapped)
    except Exception as error:  # a damaged pickle raises what its random bytes happen to lead to, even KeyError
        if isinstance(error, pickle.UnpicklingError) and "Unsupported" in str(error):
            raise InputError(
                f"{path} holds code or unsupported objects, which are never executed here; need plain tensors; "
                "convert it to safetensors on a machine you trust"
            ) from error
        raise InputError(
            f"{path} is damaged, truncated or no checkpoint ({type(error).__name__}); get a whole copy"
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}; need a dict of tensors (a state dict)")
    picked = pick([key for key in content if isinstance(key, str)])
    strangers = [key for key in picked if not isinstance(content[key], Tensor)]
    if strangers:
        raise InputError(f"{path} has entries that are no tensors ({first_few(strangers)}); need a plain state dict")
    return {name: content[key].clone() if mapped else content[key] for key, name in picked.items()}


def _check_head(path: Path) -> None:
    if path.suffix not in WEIGHT_SUFFIXES:
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
    """Refuse weights that are not floating or not finite.

    Raises: InputError naming the first few.
    """
    odd = [f"{key} ({weight.dtype})" for key, weight in weights.items() if weight.dtype not in WEIGHT_DTYPES]
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
