"""Verifying a latent data set: finding files that were damaged, and rows that the VAE would encode differently now."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdvae.data import ImageError
from sdvae.errors import InputError, one_line
from sdvae.io import printable
from sdvae.latents.folder import ShardFault
from sdvae.latents.rows import from_bytes, value_columns
from sdvae.latents.shards import SourceImage, raise_if_passing
from sdvae.latents.summary import statistics_of
from sdvae.latents.task import EncodeTask
from sdvae.latents.writer import LatentWriter
from sdvae.storage import is_bad_content

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
    faults = [fault for place in range(len(task.targets)) if (fault := _verify(task, place))]
    if faults:
        raise InputError(f"{'; '.join(faults)}; repair: --repair true")


def _verify(task: EncodeTask, place: int) -> str | None:
    """Check the data set of the resolution at a place, and say what is wrong with it if that is not repaired."""
    folder, config = task.targets[place].folder, task.config
    columns = value_columns(config)
    listed = {shard: len(lines) for shard, lines in folder.skipped_lines().items()}
    sound: dict[int, int] = {}  # shard -> its rows
    broken: dict[int, str] = {}
    for shard, size in enumerate(folder.sizes()):
        try:
            entry = folder.check(shard, size)
            _check_content(folder, shard, entry["rows"], columns)
            if folder.is_complete and (found := listed.get(shard, 0)) != entry["skipped"]:
                raise ShardFault(f"has {entry['skipped']} skipped images, of which skipped.jsonl names {found}")
            sound[shard] = entry["rows"]
        except ShardFault as fault:
            broken[shard] = str(fault)
    compared, worst, differing = _encode_again(task, place, sound)
    broken |= differing
    for shard, reason in sorted(broken.items()):
        logger.warning("%s: %s", folder.shard_name(shard), reason)
    logger.info(
        "%s: %d of %d shards with %d rows are whole; %d rows encoded again differ by at most %.2g std",
        folder.storage,
        len(sound),
        folder.num_shards,
        sum(sound.values()),
        compared,
        worst,
    )
    if broken and not config.repair:
        named = "; ".join(f"{folder.shard_name(k)} {reason}" for k, reason in sorted(broken.items())[:3])
        of = f" of {folder.storage}" if len(task.targets) > 1 else ""
        return f"{len(broken)} of {folder.num_shards} shards{of} are broken ({named})"
    if broken:
        folder.undo(sorted(broken))
    return None


def _check_content(folder: LatentWriter, shard: int, num_rows: int, columns: list[str]) -> None:
    import pyarrow as pa

    try:
        with folder.parquet(shard) as file:
            if file.metadata.num_rows != num_rows:
                raise ShardFault(f"has {file.metadata.num_rows} rows instead of {num_rows}")
            for batch in file.iter_batches(columns=["index", "shape", *columns]):
                if fault := _first_not_finite(batch.to_pylist(), folder.dtype, columns):
                    raise ShardFault(fault)
    except (pa.ArrowException, RuntimeError, ValueError, OSError) as error:  # the middle two: too many or few bytes
        if not is_bad_content(error):
            raise
        raise ShardFault(f"cannot be read ({one_line(error)})") from error


def _first_not_finite(rows: list[dict[str, Any]], dtype: torch.dtype, columns: list[str]) -> str | None:
    for row in rows:
        for name in columns:
            if not from_bytes(row[name], dtype, row["shape"]).isfinite().all():
                return f"has values that are not finite in {name} of row {row['index']}"
    return None


def _encode_again(task: EncodeTask, place: int, sound: Mapping[int, int]) -> tuple[int, float, dict[int, str]]:
    """Encode some rows of whole shards again and compare.

    Args:
        task: holds the encoder.
        place: the place of the data set's resolution among those of the task.
        sound: shard -> number of its rows.

    Returns:
        The number of rows, their greatest difference in standard deviations, and {shard: what is wrong with it}.
    """
    config, folder = task.config, task.targets[place].folder
    shards = list(sound)
    chosen = _choose(list(sound.values()), config.verify_rows, config.seed)
    if not chosen:
        return 0, 0.0, {}
    compared, worst = 0, 0.0
    differing: dict[int, str] = {}
    patch_size = folder.scaling.patch_size
    statistics = (
        folder.manifest["statistics"] if folder.is_complete else statistics_of(folder.records(shards), patch_size)
    )
    std = torch.tensor(statistics["latents_std"])
    for number, positions in chosen.items():
        shard = shards[number]
        stored = _stored_rows(folder, shard, positions, value_columns(config))
        for image in task.shards.images(shard):
            if image.index not in stored:
                continue
            fault, difference = _compare(task, place, image, stored.pop(image.index), std)
            compared += 1
            worst = max(worst, difference)
            if fault is not None:
                differing.setdefault(shard, f"row {image.index} ({printable(image.name)}) {fault}")
        if stored:
            differing.setdefault(shard, f"has rows of images that the source lacks: {sorted(stored)[:3]}")
    return compared, worst, differing


def _compare(
    task: EncodeTask, place: int, image: SourceImage, stored: dict[str, Any], std: Tensor
) -> tuple[str | None, float]:
    """Encode an image again and compare it with its row.

    Args:
        task: holds the encoder.
        place: the place of the row's resolution among those of the task.
        image: an image of the source.
        stored: the image's row.
        std: (C,), the standard deviation of the data set's latents.

    Returns:
        What is wrong with the row, or None, and its greatest difference in standard deviations.
    """
    try:
        decoded = task.reader.decode(image)[place]
        if isinstance(decoded, ImageError):
            raise decoded
    except ImageError as error:  # no fault of the row
        raise_if_passing(error)
        logger.warning("%s can no longer be read, so its row is not compared: %s", printable(image.name), error)
        return None, 0.0
    if decoded.sha256 != stored["sha256"]:
        return "has another image file now", 0.0
    (values,), _ = task.stored_values(task.encoder.launch([decoded.pixels]), [image.index])
    if values is None:
        return "is not finite when encoded again", 0.0
    difference = 0.0
    dtype = task.targets[place].folder.dtype
    for name, data in values.items():
        new, old = (from_bytes(d, dtype, stored["shape"]) for d in (data, stored[name]))
        scale = torch.ones_like(std) if name.startswith("logvar") else std.where(std > 0, 1.0)
        beyond = (new - old).abs() - 2 * torch.finfo(dtype).eps * torch.maximum(new.abs(), old.abs())
        difference = max(difference, float((beyond / scale[:, None, None]).max()))
    if difference > TOLERANCE[task.precision]:
        return f"differs by {difference:.2g} std when encoded again", difference
    return None, difference


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


def _stored_rows(
    folder: LatentWriter, shard: int, positions: list[int], columns: list[str]
) -> dict[int, dict[str, Any]]:
    with folder.parquet(shard) as file:
        table = file.read(columns=["index", "sha256", "shape", *columns])
    return {row["index"]: row for row in table.take(positions).to_pylist()}
