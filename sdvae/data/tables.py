"""The images in one column of a table: their bytes, or paths of image files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdvae.data.base import Names, arrow_table, is_lfs_pointer
from sdvae.data.images import ImageError, read_file

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features


class TableImages:
    """The images in one column of a `datasets.Dataset`: image files that the library does not decode, bytes, or paths.

    Args:
        dataset: the data set with all columns.
        column: the column of the images.
        folder: the folder that relative paths begin in; None if there is none, as for a data set of the hub.
    """

    def __init__(self, dataset: Dataset, column: str, folder: str | None = None):
        self._others = dataset.remove_columns([column]).with_format("arrow")
        self._dataset = dataset.select_columns([column]).with_format(None)
        self._column = column
        self._folder = folder
        self._paths = _distinct_paths(self._dataset, column)

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        path = self._paths[index] if self._paths is not None else ""
        return path or f"row-{index:08d}"

    def read(self, index: int) -> bytes:
        return image_bytes(self._dataset[index][self._column], self._folder)

    @property
    def features(self) -> Features:
        return self._others.features

    def columns(self, indices: Sequence[int]) -> pa.Table:
        if not self._others.features:
            return arrow_table({}, self._others.features)
        return self._others.select(indices)[:].cast(self._others.features.arrow_schema)


def image_bytes(value: Any, folder: str | None) -> bytes:
    """The bytes of an image in a row.

    Args:
        value: raw bytes, a path, or a dict with `bytes`, `path` or both.
        folder: the folder that relative paths begin in.

    Raises:
        ImageError: when there are none.
    """
    if isinstance(value, dict):
        value = (value.get("path") or None) if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, str):
        if value is None:
            raise ImageError("the row holds no image")
        return bytes(value)
    path = os.path.join(folder or "", value)
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe would wait for its other end
        raise ImageError("cannot be read: not a regular file")
    data = read_file(path)
    if is_lfs_pointer(data):
        raise ImageError("is a Git LFS pointer; run «git lfs pull» to get the image")
    return data


def _distinct_paths(dataset: Dataset, column: str) -> Names | None:
    """The paths that are stored in a column or beside its images, or None if they are missing or not all different."""
    import pyarrow as pa
    import pyarrow.compute as pc

    arrow = dataset.with_format("arrow")
    paths: list[str] = []
    for start in range(0, len(dataset), 10_000):
        values = arrow[start : start + 10_000].column(column)
        if pa.types.is_struct(values.type) and values.type.get_field_index("path") >= 0:
            values = pc.struct_field(values, "path")
        elif not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            return None
        paths += [path or "" for path in values.to_pylist()]
    present = [path for path in paths if path]
    return Names(paths) if present and len(set(present)) == len(present) else None
