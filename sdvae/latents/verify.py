"""Reread a latent data set: what the disk lost, and what the VAE would not say today."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sdvae.data import ImageError
from sdvae.errors import InputError, one_line
from sdvae.io import sha256_of
from sdvae.latents.rows import from_bytes, value_columns
from sdvae.latents.shards import Row, raise_if_passing
from sdvae.latents.store import LatentFolder, statistics_of

if TYPE_CHECKING:
    from sdvae.latents.encode import Encoding

logger = logging.getLogger(__name__)

# Of a row encoded again, the greatest difference beyond two steps of the stored dtype: in units of the channel's std
# over the data set, for log-variances in nats. In fp32 another batch size or number of threads changes the last bits;
# half precision computes with 8 or 11 bits throughout.
TOLERANCE = {"fp32": 1e-2, "fp16": 0.1, "bf16": 0.5}


def verify(encoding: Encoding, *, repair: bool) -> None:
    """Check every shard of a data set, and encode some of its rows again.

    Args:
        encoding: with the options that made the data set.
        repair: make the broken shards undone, for `Encoding.run` to do again.

    Raises: InputError naming what is broken, when it is not to be repaired.
    """
    folder, config = encoding.folder, encoding.config
    broken: dict[int, str] = {}
    listed_skips = folder.skipped_lines()
    for shard in range(folder.num_shards):
        reason = shard_fault(folder, shard, value_columns(config))
        record = folder.record(shard)
        if reason is None and record is not None and "skipped_images" not in record:
            listed, skipped = len(listed_skips.get(shard, [])), record["skipped"]
            if listed != skipped:
                reason = f"has {skipped} skipped images, of which skipped.jsonl names {listed}"
        if reason is not None:
            broken[shard] = reason
    sound = [shard for shard in range(folder.num_shards) if shard not in broken]
    compared, worst, differing = _encode_again(encoding, sound)
    broken |= differing
    for shard, reason in sorted(broken.items()):
        logger.warning("%s: %s", folder.shard_path(shard).name, reason)
    rows = sum((folder.record(shard) or {"rows": 0})["rows"] for shard in sound)
    logger.info(
        "%s: %d of %d shards with %d rows are whole; %d rows encoded again differ by at most %.2g std",
        config.output,
        len(sound),
        folder.num_shards,
        rows,
        compared,
        worst,
    )
    if broken and not repair:
        named = "; ".join(f"{folder.shard_path(k).name} {reason}" for k, reason in sorted(broken.items())[:3])
        raise InputError(f"{len(broken)} of {folder.num_shards} shards are broken ({named}); mend with --repair true")
    if broken:
        folder.undo(sorted(broken))


def shard_fault(folder: LatentFolder, shard: int, columns: list[str]) -> str | None:
    """What is wrong with the file of a shard, or None."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    record, path = folder.record(shard), folder.shard_path(shard)
    if record is None:
        return "is not done"
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != record["bytes"]:
        return f"has {path.stat().st_size} bytes instead of {record['bytes']}"
    if sha256_of(path) != record["sha256"]:
        return "has another checksum than its record"
    try:
        with pq.ParquetFile(path) as file:
            if file.metadata.num_rows != record["rows"]:
                return f"has {file.metadata.num_rows} rows instead of {record['rows']}"
            for batch in file.iter_batches(columns=["index", "shape", *columns]):
                for row in batch.to_pylist():
                    for name in columns:
                        if not from_bytes(row[name], folder.dtype, row["shape"]).isfinite().all():
                            return f"has values that are not finite in {name} of row {row['index']}"
    except (pa.ArrowException, OSError, RuntimeError, ValueError) as error:  # the last two: bytes that fit no shape
        return f"cannot be read ({one_line(error)})"
    return None


def _encode_again(encoding: Encoding, shards: list[int]) -> tuple[int, float, dict[int, str]]:
    """Rows compared, their greatest difference in std, and the shards that differ by too much."""
    config, folder = encoding.config, encoding.folder
    wanted = _choose(folder, shards, config.verify_rows, config.seed)
    compared, worst = 0, 0.0
    differing: dict[int, str] = {}
    records = [folder.record(shard) for shard in shards]
    if not wanted:
        return 0, 0.0, {}
    std = torch.tensor(statistics_of([record for record in records if record is not None])["latents_std"])
    for shard, indices in wanted.items():
        stored = _stored_rows(folder.shard_path(shard), indices, value_columns(config))
        for row in encoding.shards.rows(shard):
            if row.index not in stored:
                continue
            fault, difference = _compare(encoding, row, stored.pop(row.index), std)
            compared += 1
            worst = max(worst, difference)
            if fault is not None:
                differing.setdefault(shard, f"row {row.index} ({row.name}) {fault}")
        if stored:
            differing.setdefault(shard, f"has rows that the source has not: {sorted(stored)[:3]}")
    return compared, worst, differing


def _compare(encoding: Encoding, row: Row, stored: dict[str, Any], std: Tensor) -> tuple[str | None, float]:
    """What is wrong with a stored row, or None; and its greatest difference.

    Args: std: (C,) of the latents of the data set.
    """
    try:
        decoded = encoding.decode(row)
    except ImageError as error:  # no fault of the row
        raise_if_passing(error)
        logger.warning("%s cannot be read any more, and its row not be compared: %s", row.name, error)
        return None, 0.0
    if decoded.sha256 != stored["sha256"]:
        return "has another image file now", 0.0
    (values,), _ = encoding.latents_of(encoding.encoder.launch([decoded.pixels]), [row.index])
    if values is None:
        return "is not finite when encoded again", 0.0
    difference = 0.0
    dtype = encoding.folder.dtype
    for name, data in values.items():
        new, old = (from_bytes(d, dtype, stored["shape"]) for d in (data, stored[name]))
        scale = torch.ones_like(std) if name.startswith("logvar") else std.where(std > 0, 1.0)
        beyond = (new - old).abs() - 2 * torch.finfo(dtype).eps * torch.maximum(new.abs(), old.abs())
        difference = max(difference, float((beyond / scale[:, None, None]).max()))
    if difference > TOLERANCE[encoding.precision]:
        return f"differs by {difference:.2g} std when encoded again", difference
    return None, difference


def _choose(folder: LatentFolder, shards: list[int], count: int, seed: int) -> dict[int, list[int]]:
    """Shard -> positions in it, of `count` rows drawn from all of them."""
    counts = [(folder.record(shard) or {"rows": 0})["rows"] for shard in shards]
    total = sum(counts)
    places = np.random.default_rng(seed).choice(total, size=min(count, total), replace=False) if total else []
    ends = np.cumsum(counts)
    wanted: dict[int, list[int]] = defaultdict(list)
    for place in sorted(int(p) for p in places):
        number = int(np.searchsorted(ends, place, side="right"))
        wanted[shards[number]].append(place - (int(ends[number]) - counts[number]))
    return wanted


def _stored_rows(path: Path, positions: list[int], columns: list[str]) -> dict[int, dict[str, Any]]:
    import pyarrow.parquet as pq

    table = pq.read_table(path, columns=["index", "sha256", "shape", *columns])
    return {row["index"]: row for row in table.take(positions).to_pylist()}
