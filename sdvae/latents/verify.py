"""Verifying a latent data set: finding files that were damaged, and rows that the VAE would encode differently now."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdvae.data import ImageError
from sdvae.errors import InputError, one_line
from sdvae.io import sha256_of
from sdvae.latents.rows import from_bytes, value_columns
from sdvae.latents.shards import SourceImage, raise_if_passing
from sdvae.latents.summary import statistics_of
from sdvae.latents.task import EncodeTask
from sdvae.latents.writer import LatentWriter

logger = logging.getLogger(__name__)

# How much a row may change when it is encoded again, beyond two rounding steps of the stored dtype. The unit is the
# channel's standard deviation over the data set for means and samples, and nats for log-variances. In fp32, another
# batch size or number of threads changes the last bits; half precision computes with only 8 or 11 bits.
TOLERANCE = {"fp32": 1e-2, "fp16": 0.1, "bf16": 0.5}


def verify(task: EncodeTask) -> None:
    """Check every shard of a data set, and encode some of its rows again.

    Args:
        task: the task with the options that made the data set. With `repair` the broken shards are removed, so that the
            pipeline encodes them again.

    Raises:
        InputError: with the names of broken shards, unless `repair` is set.
    """
    folder, config = task.folder, task.config
    columns = value_columns(config)
    num_listed = {shard: len(lines) for shard, lines in folder.skipped_lines().items()}
    broken = {
        shard: reason
        for shard in range(folder.num_shards)
        if (reason := shard_fault(folder, shard, columns, num_listed.get(shard, 0))) is not None
    }
    sound = [shard for shard in range(folder.num_shards) if shard not in broken]
    compared, worst, differing = _encode_again(task, sound)
    broken |= differing
    for shard, reason in sorted(broken.items()):
        logger.warning("%s: %s", folder.shard_path(shard).name, reason)
    logger.info(
        "%s: %d of %d shards with %d rows are whole; %d rows encoded again differ by at most %.2g std",
        config.output,
        len(sound),
        folder.num_shards,
        sum(_num_rows(folder, sound)),
        compared,
        worst,
    )
    if broken and not config.repair:
        named = "; ".join(f"{folder.shard_path(k).name} {reason}" for k, reason in sorted(broken.items())[:3])
        raise InputError(f"{len(broken)} of {folder.num_shards} shards are broken ({named}); repair: --repair true")
    if broken:
        folder.undo(sorted(broken))


def shard_fault(folder: LatentWriter, shard: int, columns: list[str], num_listed: int) -> str | None:
    """Find out what is wrong with a shard.

    Args:
        folder: the data set.
        shard: its number.
        columns: the columns that hold latents.
        num_listed: the number of the shard's images in skipped.jsonl.

    Returns:
        The fault in words, or None if there is none.
    """
    record, path = folder.record(shard), folder.shard_path(shard)
    if record is None:
        return "is not done"
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != record["bytes"]:
        return f"has {path.stat().st_size} bytes instead of {record['bytes']}"
    if sha256_of(path) != record["sha256"]:
        return "has another checksum than its record"
    if fault := _content_fault(path, folder.dtype, record["rows"], columns):
        return fault
    if "skipped_images" not in record and num_listed != record["skipped"]:  # the record of a finished data set
        return f"has {record['skipped']} skipped images, of which skipped.jsonl names {num_listed}"
    return None


def _content_fault(path: Path, dtype: torch.dtype, num_rows: int, columns: list[str]) -> str | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows != num_rows:
                return f"has {file.metadata.num_rows} rows instead of {num_rows}"
            for batch in file.iter_batches(columns=["index", "shape", *columns]):
                if fault := _first_not_finite(batch.to_pylist(), dtype, columns):
                    return fault
    except (pa.ArrowException, OSError, RuntimeError, ValueError) as error:  # the last two: too many or few bytes
        return f"cannot be read ({one_line(error)})"
    return None


def _first_not_finite(rows: list[dict[str, Any]], dtype: torch.dtype, columns: list[str]) -> str | None:
    for row in rows:
        for name in columns:
            if not from_bytes(row[name], dtype, row["shape"]).isfinite().all():
                return f"has values that are not finite in {name} of row {row['index']}"
    return None


def _encode_again(task: EncodeTask, shards: list[int]) -> tuple[int, float, dict[int, str]]:
    """Encode some rows of whole shards again and compare.

    Returns:
        The number of rows, their greatest difference in standard deviations, and {shard: what is wrong with it}.
    """
    config, folder = task.config, task.folder
    chosen = _choose(_num_rows(folder, shards), config.verify_rows, config.seed)
    if not chosen:
        return 0, 0.0, {}
    compared, worst = 0, 0.0
    differing: dict[int, str] = {}
    records = [folder.record(shard) for shard in shards]
    std = torch.tensor(statistics_of([record for record in records if record is not None])["latents_std"])
    for number, positions in chosen.items():
        shard = shards[number]
        stored = _stored_rows(folder.shard_path(shard), positions, value_columns(config))
        for image in task.shards.images(shard):
            if image.index not in stored:
                continue
            fault, difference = _compare(task, image, stored.pop(image.index), std)
            compared += 1
            worst = max(worst, difference)
            if fault is not None:
                differing.setdefault(shard, f"row {image.index} ({image.name}) {fault}")
        if stored:
            differing.setdefault(shard, f"has rows of images that the source lacks: {sorted(stored)[:3]}")
    return compared, worst, differing


def _compare(task: EncodeTask, image: SourceImage, stored: dict[str, Any], std: Tensor) -> tuple[str | None, float]:
    """Encode an image again and compare it with its row.

    Args:
        task: holds the encoder.
        image: an image of the source.
        stored: the image's row.
        std: (C,), the standard deviation of the data set's latents.

    Returns:
        What is wrong with the row, or None, and its greatest difference in standard deviations.
    """
    try:
        decoded = task.decode(image)
    except ImageError as error:  # no fault of the row
        raise_if_passing(error)
        logger.warning("%s can no longer be read, so its row is not compared: %s", image.name, error)
        return None, 0.0
    if decoded.sha256 != stored["sha256"]:
        return "has another image file now", 0.0
    (values,), _ = task.stored_values(task.encoder.launch([decoded.pixels]), [image.index])
    if values is None:
        return "is not finite when encoded again", 0.0
    difference = 0.0
    dtype = task.folder.dtype
    for name, data in values.items():
        new, old = (from_bytes(d, dtype, stored["shape"]) for d in (data, stored[name]))
        scale = torch.ones_like(std) if name.startswith("logvar") else std.where(std > 0, 1.0)
        beyond = (new - old).abs() - 2 * torch.finfo(dtype).eps * torch.maximum(new.abs(), old.abs())
        difference = max(difference, float((beyond / scale[:, None, None]).max()))
    if difference > TOLERANCE[task.precision]:
        return f"differs by {difference:.2g} std when encoded again", difference
    return None, difference


def _num_rows(folder: LatentWriter, shards: Sequence[int]) -> list[int]:
    return [(folder.record(shard) or {"rows": 0})["rows"] for shard in shards]


def _choose(num_rows: Sequence[int], count: int, seed: int) -> dict[int, list[int]]:
    """Draw rows from several shards.

    Args:
        num_rows: the number of rows of each shard.
        count: rows to draw, or all if there are fewer.
        seed: the seed of the choice.

    Returns:
        For each shard, by its place in `num_rows`, the positions of its chosen rows.
    """
    total = sum(num_rows)
    if not total:
        return {}
    places = np.random.default_rng(seed).choice(total, size=min(count, total), replace=False)
    ends = np.cumsum(num_rows)
    chosen: dict[int, list[int]] = defaultdict(list)
    for place in sorted(int(p) for p in places):
        number = int(np.searchsorted(ends, place, side="right"))
        chosen[number].append(place - (int(ends[number]) - num_rows[number]))
    return chosen


def _stored_rows(path: Path, positions: list[int], columns: list[str]) -> dict[int, dict[str, Any]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["index", "sha256", "shape", *columns])
    return {row["index"]: row for row in table.take(positions).to_pylist()}
