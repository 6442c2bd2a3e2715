"""The images in one column of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sdvae.data.base import Names, arrow_table
from sdvae.data.images import ImageError, read_file

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features


class TableImages:
    """The images in one column of a `datasets.Dataset`: image files that the library does not decode, or raw bytes.

    Args:
        dataset: the data set with all columns.
        column: the column of the images.
    """

    def __init__(self, dataset: Dataset, column: str):
        self._others = dataset.remove_columns([column]).with_format("arrow")
        self._dataset = dataset.select_columns([column]).with_format(None)
        self._column = column
        self._paths = _distinct_paths(self._dataset, column)

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        path = self._paths[index] if self._paths is not None else ""
        return path or f"row-{index:08d}"

    def read(self, index: int) -> bytes:
        return image_bytes(self._dataset[index][self._column])

    @property
    def features(self) -> Features:
        return self._others.features

    def columns(self, indices: Sequence[int]) -> pa.Table:
        if not self._others.features:
            return arrow_table({}, self._others.features)
        return self._others.select(indices)[:].cast(self._others.features.arrow_schema)


def image_bytes(value: Any) -> bytes:
    """The bytes of an image in a row.

    Args:
        value: raw bytes, or a dict with `bytes`, `path` or both.

    Raises:
        ImageError: when there are none.
    """
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return read_file(value["path"])
        value = value.get("bytes")
    if value is None:
        raise ImageError("the row holds no image")
    return bytes(value)


def _distinct_paths(dataset: Dataset, column: str) -> Names | None:
    """The paths that are stored with the images of a column, or None if they are missing or not all different."""
    import pyarrow as pa
    import pyarrow.compute as pc

    arrow = dataset.with_format("arrow")
    paths: list[str] = []
    for start in range(0, len(dataset), 10_000):
        values = arrow[start : start + 10_000].column(column)
        if not pa.types.is_struct(values.type) or values.type.get_field_index("path") < 0:
            return None
        paths += [path or "" for path in pc.struct_field(values, "path").to_pylist()]
    present = [path for path in paths if path]
    return Names(paths) if present and len(set(present)) == len(present) else None
