"""The columns of a latent data set.

`mean` and `logvar` (or `mean` alone, or `sample`), each also with the ending `_mirrored`, are binary: the bytes of a
contiguous (C, h, w) array, little-endian, in the dtype that manifest.json has under fingerprint.stored.dtype. The
column `shape` is [C, h, w]. To read them without this package:

    row = pyarrow.parquet.read_table("data/train-00000-of-00001.parquet").to_pylist()[0]
    np.frombuffer(row["mean"], "<f2").reshape(row["shape"])                             # fp16; "<f4" for fp32
    torch.frombuffer(bytearray(row["mean"]), dtype=torch.bfloat16).reshape(row["shape"])  # bf16, which NumPy lacks

With NumPy alone, bf16 is the upper half of fp32: (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdvae.io import utf8
from sdvae.latents.buckets import Size
from sdvae.latents.config import EncodeConfig
from sdvae.model import DiagonalGaussian
from sdvae.runtime import DTYPES

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from datasets import Features

ORIENTATION = "exif_orientation"  # data sets of format version 1 lack this column
OUR_COLUMNS = ("index", "name", "sha256", "shape", "original_size", "crop_top_left", "target_size", ORIENTATION)
VALUE_COLUMNS = ("mean", "logvar", "sample")  # each also with the ending _mirrored
ROW_KEYS = ("latents", "mirrored")  # the keys that `LatentDataset` adds to a row
PREFIX = "source_"  # of a column of the source whose name is one of the names above


def is_value(column: str) -> bool:
    """Whether the column holds latents."""
    return column.removesuffix("_mirrored") in VALUE_COLUMNS


@dataclass(frozen=True)
class LatentRow:
    """One image's row.

    Attributes:
        index: the image's place in its source.
        name: the image's name in its source. The column holds it as `sdvae.io.utf8` writes it.
        sha256: the checksum of the image file.
        shape: the shape of the latents, (C, h, w).
        original_size: height and width of the upright image, in pixels.
        crop_top_left: top and left of the crop in the resized image, in pixels.
        target_size: height and width of the crop, which was encoded, in pixels.
        exif_orientation: 1 to 8, how the file's pixels were turned to make the image upright. From 5 on, height and
            width in the file are those of the image exchanged.
        values: column of latents -> the bytes of a contiguous (C, h, w) array in the stored dtype, little-endian.
    """

    index: int
    name: str
    sha256: str
    shape: tuple[int, int, int]
    original_size: Size
    crop_top_left: Size
    target_size: Size
    exif_orientation: int
    values: dict[str, bytes]


def value_columns(config: EncodeConfig) -> list[str]:
    """The names of the columns of latents for these options."""
    names = ["mean", "logvar"] if config.store == "moments" else [config.store]
    return names + [f"{name}_mirrored" for name in names if config.mirror]


def row_bytes(sizes: Sequence[Size], compression: int, latent_channels: int, config: EncodeConfig) -> int:
    """The bytes of a row's latents, for the largest of the image sizes.

    Args:
        sizes: height and width of the images, in pixels.
        compression: the VAE's compression ratio, in pixels for each latent along one side.
        latent_channels: C.
        config: the options.
    """
    pixels = max(height * width for height, width in sizes)
    elements = pixels // compression**2 * latent_channels
    return elements * DTYPES[config.dtype].itemsize * len(value_columns(config))


def posterior_values(posterior: DiagonalGaussian, dtype: torch.dtype, suffix: str) -> dict[str, Tensor]:
    """The columns of one image's posterior.

    Args:
        posterior: the posterior of one image; one without variance has no log-variance to store.
        dtype: the dtype to store.
        suffix: the end of the columns' names.
    """
    values = (
        {"mean": posterior.mean} if posterior.deterministic else {"mean": posterior.mean, "logvar": posterior.logvar}
    )
    return {f"{name}{suffix}": value.to(dtype) for name, value in values.items()}


def to_bytes(values: Tensor) -> bytes:
    return values.contiguous().view(torch.uint8).numpy().tobytes()


def from_bytes(data: bytes | np.ndarray, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Read the bytes of latents.

    Args:
        data: the stored bytes, or an array of uint8 that holds them.
        dtype: the dtype of these values.
        shape: (C, h, w).

    Returns:
        (C, h, w) in fp32.

    Raises:
        ValueError: when the number of bytes does not fit the dtype.
        RuntimeError: when it does not fit the shape.
    """
    return torch.frombuffer(bytearray(data), dtype=dtype).float().reshape(*shape)


def table_of(rows: Sequence[LatentRow], others: pa.Table, others_features: Features, config: EncodeConfig) -> pa.Table:
    """The table of a shard, with the features that `datasets` reads.

    Args:
        rows: the latents.
        others: the columns that are copied from the source, with rows in the same order.
        others_features: the features of these columns.
        config: the options.
    """
    import pyarrow as pa

    features = _features(others_features, config)
    ours: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in OUR_COLUMNS}
    ours["name"] = [utf8(row.name) for row in rows]
    ours |= {name: [row.values[name] for row in rows] for name in value_columns(config)}
    schema = features.arrow_schema
    arrays = [pa.array(values, type=schema.field(name).type) for name, values in ours.items()]
    carried = [others.column(name) for name in others_features]
    return pa.Table.from_arrays([*arrays, *carried], schema=schema)


def _features(others: Features, config: EncodeConfig) -> Features:
    import datasets

    pair = datasets.Sequence(datasets.Value("int32"), length=2)
    features: dict[str, Any] = {
        "index": datasets.Value("int64"),
        "name": datasets.Value("string"),
        "sha256": datasets.Value("string"),
        "shape": datasets.Sequence(datasets.Value("int32"), length=3),
        "original_size": pair,
        "crop_top_left": pair,
        "target_size": pair,
        ORIENTATION: datasets.Value("int32"),
        **{name: datasets.Value("binary") for name in value_columns(config)},
    }
    taken = {*OUR_COLUMNS, *ROW_KEYS}
    for name, feature in others.items():
        free = name
        while free in taken or is_value(free) or free in features or (free != name and free in others):
            free = f"{PREFIX}{free}"
        features[free] = feature
    return datasets.Features(features)
