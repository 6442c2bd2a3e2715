"""Checkpoints. Each is a folder that gets its name when it is complete. Reading one executes no code.

    checkpoints/step-00001000/
        state.json                    counters, the recipe, and the size and SHA-256 of every other file
        generator.safetensors         weights in fp32; also ema.safetensors and discriminator.safetensors
        generator_optimizer.pt        moments, read with torch.load(weights_only=True); also discriminator_optimizer.pt

A checkpoint is used only if every file has the size and hash that state.json gives, and no network is changed before
all files have been read and found to fit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdvae.errors import InputError, one_line
from sdvae.io import replacing, sha256_of
from sdvae.weights.read import misfits

FORMAT = 1
STATE = "state.json"
NAME = re.compile(r"step-(\d{8,})")


class Checkpoint(NamedTuple):
    """The state from which a run is continued, on the CPU.

    It is a tuple of dicts, in which `from_main` finds the tensors that it sends to the other processes.

    Attributes:
        weights: {"generator": state dict, "ema": …, "discriminator": …}.
        optimizers: {"generator": torch's state dict of the optimizer, …}.
        state: the content of state.json: step, position, recipe, counters.
    """

    weights: dict[str, dict[str, Tensor]]
    optimizers: dict[str, dict[str, Any]]
    state: dict[str, Any]


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write all files into a temporary folder, flush them to the disk, and rename it to `folder`."""
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        for name, tensors in checkpoint.weights.items():
            write_weights(temporary / f"{name}.safetensors", tensors)
        for name, state in checkpoint.optimizers.items():
            torch.save(state, temporary / f"{name}_optimizer.pt")
        files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
        state = {"format": FORMAT, **checkpoint.state, "files": files}
        (temporary / STATE).write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")


def write_weights(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a state dict from any device."""
    save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, file)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        InputError: when a file is missing, damaged, or holds something other than plain data.
    """
    state = read_state(folder)
    weights: dict[str, dict[str, Tensor]] = {}
    optimizers: dict[str, dict[str, Any]] = {}
    for name, expected in state["files"].items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise InputError(f"{folder} lacks {name}")
        found = _fingerprint(path)
        if found != expected:
            raise InputError(f"{path} has changed since it was written ({found['bytes']} of {expected['bytes']} bytes)")
        try:
            if path.suffix == ".safetensors":
                weights[path.stem] = load_file(path)
            else:
                optimizers[path.stem.removesuffix("_optimizer")] = torch.load(
                    path, weights_only=True, map_location="cpu"
                )
        except Exception as error:  # damaged or hostile bytes may raise any error in safetensors and pickle
            reason = one_line(error)[:120]
            raise InputError(f"{path} does not hold plain tensors ({type(error).__name__}: {reason})") from error
    return Checkpoint(weights, optimizers, state)


def read_state(folder: Path) -> dict[str, Any]:
    """Read only state.json.

    Raises:
        InputError: when it cannot be read, is not that of a checkpoint, or has another format.
    """
    path = folder / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__})") from error
    if not isinstance(state, dict) or not {"format", "step", "config", "files"} <= state.keys():
        raise InputError(f"{path} is not that of a checkpoint")
    if state["format"] != FORMAT:
        raise InputError(f"{path} has format {state['format']}; this version reads {FORMAT}")
    return state


def checkpoints(root: Path) -> list[Path]:
    """The folders in `root` that have the name of a checkpoint, newest first."""
    named = [(int(found[1]), path) for path in root.glob("step-*") if (found := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(named, reverse=True)]


def newest_step(root: Path) -> int:
    """The step of the newest checkpoint, by its name; -1 if there is none."""
    return max((int(path.name.removeprefix("step-")) for path in checkpoints(root)), default=-1)


def newest_whole(root: Path) -> tuple[tuple[Path, Checkpoint] | None, list[tuple[Path, str]]]:
    """The newest checkpoint that can be read.

    Returns:
        Its folder and its content, or None; and each newer folder with the reason why it cannot be read.
    """
    damaged: list[tuple[Path, str]] = []
    for folder in checkpoints(root):
        try:
            return (folder, read_checkpoint(folder)), damaged
        except InputError as error:
            damaged.append((folder, str(error)))
    return None, damaged


def prune(root: Path, keep_last: int) -> None:
    """Remove all checkpoints except the newest `keep_last`.

    Each is renamed first, so that no folder that is partly removed has the name of a checkpoint.
    """
    for folder in checkpoints(root)[keep_last:]:
        doomed = folder.with_name(f".{folder.name}.old")
        os.replace(folder, doomed)
        shutil.rmtree(doomed)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def check_fit(expected: dict[str, Tensor], found: dict[str, Tensor], origin: str) -> None:
    """Compare the names and shapes of weights.

    Raises:
        InputError: when they differ.
    """
    wrong = sum(misfits(expected, found).values(), [])
    if wrong:
        raise InputError(f"{origin} does not fit the recipe's network: {len(wrong)} weights differ, such as {wrong[0]}")
