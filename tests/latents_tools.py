"""Helpers for tests of latent data sets: a tiny VAE, tiny photographs, and processes that can be killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from sdvae import AutoencoderKL
from sdvae.latents.config import EncodeConfig
from sdvae.latents.encode import encode
from sdvae.latents.folder import LatentFolder
from sdvae.latents.rows import from_bytes, is_value
from tests.kill_at_boundaries import die_before

FORK = multiprocessing.get_context("fork")  # forked, so that a process need not import torch again


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """A VAE (f4, 4 channels) with random weights for which latents have values of a few units."""
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
    )
    with torch.no_grad():
        vae.quant_conv.weight.mul_(3)
    return vae.eval()


def draw(folder: Path, count: int, sizes: tuple[tuple[int, int], ...] = ((40, 40),), seed: int = 0) -> Path:
    """Write `count` different smooth pictures, with `sizes` (width, height) in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        coarse.resize(sizes[i % len(sizes)], Image.Resampling.BICUBIC).save(folder / f"{i:04}.png")
    return folder


def options(source: Path, output: Path, vae: Path, **changes) -> EncodeConfig:
    settings = {
        "resolution": 32,
        "batch_size": 4,
        "shard_rows": 5,
        "device": "cpu",
        "num_workers": 2,
        "precision": "fp32",
        "max_bad_fraction": 1.0,
    }
    return EncodeConfig(source=str(source), output=str(output), vae=str(vae), **{**settings, **changes})


def rows_of(folder: Path) -> dict[str, dict]:
    """Name -> row, with tensors instead of bytes. Fails if two rows have the same name."""
    dtype = LatentFolder(folder)
    dtype.open()
    rows: dict[str, dict] = {}
    for path in sorted((folder / "data").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            assert row["name"] not in rows, f"{row['name']} is there twice"
            values = {k: from_bytes(v, dtype.dtype, row["shape"]) for k, v in row.items() if is_value(k)}
            rows[row["name"]] = {**row, **values}
    return rows


def content(folder: Path) -> dict[str, bytes]:
    """Name -> content of every file in a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def in_process(function: Callable[[], None]) -> multiprocessing.Process:
    """Start `function` in a new process without output."""

    def run() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        function()

    process = FORK.Process(target=run)
    process.start()
    return process


def encode_in_process(config: EncodeConfig) -> multiprocessing.Process:
    return in_process(lambda: encode(config) and None)


def killed_at(boundary: int, config: EncodeConfig) -> bool:
    """Encode in a process that is killed by SIGKILL before its file operation number `boundary`, counted from 0.

    Returns:
        False if the process ended before, because it has fewer file operations.
    """

    def run() -> None:
        die_before(boundary, Path(config.output))
        encode(config)

    process = in_process(run)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0
