"""Reading the rows of Parquet shards by row group."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sdvae.latents.folder import LatentFolder
from sdvae.latents.rows import OUR_COLUMNS, is_value

if TYPE_CHECKING:
    import pyarrow as pa

WINDOW = 64  # row groups (of 1 MiB, or of one row if that is larger) that are shuffled together and kept in memory


@dataclass(frozen=True)
class RowGroup:
    """A row group in memory.

    Attributes:
        values: column of latents -> its bytes, and the place in them where each row begins; the last place is the end.
        shapes: the shape of each row's latents, (C, h, w).
        pairs: our columns of two whole numbers.
        items: the other columns of each row, except those in `large`.
        large: the columns in which an item may need much more memory in Python than in Arrow, such as embeddings.
    """

    values: dict[str, tuple[np.ndarray, list[int]]]
    shapes: list[tuple[int, ...]]
    pairs: dict[str, np.ndarray]
    items: list[dict[str, Any]]
    large: dict[str, pa.Array]

    def row(self, offset: int) -> dict[str, Any]:
        """The columns of a row except latents and their shape."""
        return {
            **self.items[offset],
            **{name: column[offset].tolist() for name, column in self.pairs.items()},
            **{name: column[offset].as_py() for name, column in self.large.items()},
        }

    def value(self, column: str, offset: int) -> np.ndarray:
        """The bytes of a row in a column of latents: uint8."""
        data, starts = self.values[column]
        return data[starts[offset] : starts[offset + 1]]


class Reader:
    """Reads row groups. The last `WINDOW` of them, and as many open files, are kept.

    Args:
        folder: a finished data set.
    """

    def __init__(self, folder: LatentFolder):
        self._folder = folder
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._folder = state["_folder"]
        self._forget()

    def group(self, shard: int, number: int) -> RowGroup:
        """A row group of a shard."""
        key = (shard, number)
        if key not in self._groups:
            self._groups[key] = _row_group(self._file(shard).read_row_group(number, use_threads=False))
            if len(self._groups) > WINDOW:
                self._groups.popitem(last=False)
        self._groups.move_to_end(key)
        return self._groups[key]

    def pairs(self, shards: Sequence[int], column: str) -> np.ndarray:
        """A column of pairs of whole numbers, of some shards one after the other: (N, 2) int32."""
        parts = [_numbers(self._file(shard).read([column]).column(column), 2) for shard in shards]
        return np.concatenate(parts).astype(np.int32)

    def names(self, shards: Sequence[int]) -> Iterator[str]:
        """The names of the images of some shards, as the column holds them."""
        for shard in shards:
            yield from self._file(shard).read(["name"]).column("name").to_pylist()

    def _file(self, shard: int) -> Any:
        if self._process != os.getpid():  # a forked worker opens files of its own
            self._forget()
        if shard not in self._files:
            self._files[shard] = self._folder.parquet(shard)
            if len(self._files) > WINDOW:
                self._files.popitem(last=False)
        self._files.move_to_end(shard)
        return self._files[shard]

    def _forget(self) -> None:
        self._process = os.getpid()
        self._groups: OrderedDict[tuple[int, int], RowGroup] = OrderedDict()
        self._files: OrderedDict[int, Any] = OrderedDict()


def _row_group(table: pa.Table) -> RowGroup:
    import pyarrow as pa

    values: dict[str, tuple[np.ndarray, list[int]]] = {}
    numbers: dict[str, np.ndarray] = {}
    items: dict[str, list[Any]] = {}
    large: dict[str, pa.Array] = {}
    for name in table.column_names:
        column = table.column(name)
        kind = column.type
        if is_value(name):
            array = column.cast(pa.large_binary()).combine_chunks()
            _, starts, data = array.buffers()
            places = np.frombuffer(starts, np.int64)[array.offset : array.offset + len(array) + 1]
            values[name] = (np.frombuffer(data, np.uint8), places.tolist())
        elif name in OUR_COLUMNS and pa.types.is_fixed_size_list(kind):
            numbers[name] = _numbers(column, kind.list_size)
        elif pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
            items[name] = column.to_pylist()
        else:
            large[name] = column.combine_chunks()
    shapes = [tuple(shape) for shape in numbers.pop("shape").tolist()]
    rows = [dict(zip(items, row, strict=True)) for row in zip(*items.values(), strict=True)]
    return RowGroup(values, shapes, numbers, rows, large)


def _numbers(column: pa.ChunkedArray, length: int) -> np.ndarray:
    """(N, length) of a column of lists of whole numbers."""
    return column.combine_chunks().flatten().to_numpy().reshape(-1, length)
