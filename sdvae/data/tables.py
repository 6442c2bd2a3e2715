"""The images in one column of a table: their bytes, or paths of image files."""

from __future__ import annotations

import os
import posixpath
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from sdvae.data.base import FileStream, Names, StreamedImage, arrow_table, is_lfs_pointer, read_image_file
from sdvae.data.reading import ImageError
from sdvae.errors import InputError, one_line
from sdvae.storage import LocalStorage, Storage, StorageError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features

BATCH_ROWS = 64  # rows of a streamed table that are in memory beside the row group that they are taken from
KEPT_ROW_GROUPS = 2  # of a table in a bucket; images that are read in order need each row group once
OPENERS = 16  # threads that read the ends of Parquet files, each of which waits for its answer


class TableImages:
    """The images in one column of a `datasets.Dataset`: image files that the library does not decode, bytes, or paths.

    Args:
        dataset: the data set with all columns.
        column: the column of the images.
        folder: the folder that relative paths begin in; None if there is none, as for a data set of the hub.
    """

    def __init__(self, dataset: Dataset, column: str, folder: Storage | None = None):
        self._others = dataset.remove_columns([column]).with_format("arrow")
        self._dataset = dataset.select_columns([column]).with_format(None)
        self._column = column
        self._folder = folder
        arrow = self._dataset.with_format("arrow")
        self._paths = distinct_paths(
            arrow[start : start + 10_000].column(column) for start in range(0, len(dataset), 10_000)
        )

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


class BucketTable:
    """The images in one column of Parquet files in a bucket, in any order.

    Row groups are read whole, and each process keeps the last two. Images that are read in order need each row group
    once; in a random order nearly every image needs another one.

    Args:
        storage: a folder above all files.
        files: Parquet files below it.
        column: the column of the images.
        features: all columns.
        folder: the folder that relative paths begin in.

    Raises:
        InputError: when a file cannot be read, or has other columns.
    """

    def __init__(self, storage: Storage, files: Sequence[str], column: str, features: Features, folder: Storage):
        self._storage = storage
        self._files = list(files)
        self._column = column
        self._folder = folder
        self._features = _without(column, features)
        with ThreadPoolExecutor(OPENERS) as threads:
            opened = list(threads.map(self._ends_and_paths, files))
        self._groups = [(file, group) for file, (ends, _) in enumerate(opened) for group in range(len(ends))]
        self._ends = np.cumsum([rows for groups, _ in opened for rows in groups], dtype=np.int64)
        self._paths = distinct_paths(paths for _, of_file in opened for paths in of_file)
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def _ends_and_paths(self, file: str) -> tuple[list[int], list[pa.ChunkedArray]]:
        """The number of rows of each row group, and the paths that are stored as images or beside them."""
        import pyarrow as pa

        try:
            with self._storage.parquet(file) as opened:
                check_columns(self._storage.where(file), opened.schema_arrow, [self._column, *self._features])
                metadata = opened.metadata
                rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
                kind = opened.schema_arrow.field(self._column).type
                if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
                    return rows, [opened.read(columns=[f"{self._column}.path"]).column(self._column)]
                is_path = pa.types.is_string(kind) or pa.types.is_large_string(kind)
                return rows, [opened.read(columns=[self._column]).column(self._column)] if is_path else []
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise InputError(
                f"{self._storage.where(file)!r} cannot be read ({one_line(error)}); copy it again"
            ) from error

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def name(self, index: int) -> str:
        path = self._paths[index] if self._paths is not None else ""
        return path or f"row-{index:08d}"

    def _place(self, index: int) -> tuple[int, int]:
        """The row group of an image, and its row in that group."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        return group, index - (int(self._ends[group - 1]) if group else 0)

    def read(self, index: int) -> bytes:
        group, row = self._place(index)
        with self._lock:  # so that threads that need the same row group read it once
            if group not in self._kept:
                self._kept[group] = self._read_group(group, [self._column]).column(self._column)
            self._kept.move_to_end(group)
            while len(self._kept) > KEPT_ROW_GROUPS:
                self._kept.popitem(last=False)
            value = self._kept[group][row].as_py()
        return image_bytes(value, self._folder)

    def _read_group(self, group: int, columns: list[str]) -> pa.Table:
        import pyarrow as pa

        file, number = self._groups[group]
        try:
            with self._storage.parquet(self._files[file]) as opened:
                return opened.read_row_group(number, columns=columns)
        except StorageError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise ImageError(f"cannot be read: {one_line(error)}") from error

    @property
    def features(self) -> Features:
        return self._features

    def columns(self, indices: Sequence[int]) -> pa.Table:
        import pyarrow as pa

        if not self._features:
            return arrow_table({}, self._features)
        places = [self._place(index) for index in indices]
        groups = sorted({group for group, _ in places})
        tables = [self._read_group(group, list(self._features)) for group in groups]
        starts = dict(zip(groups, np.cumsum([0, *map(len, tables)]).tolist(), strict=False))
        schema = self._features.arrow_schema
        table = pa.concat_tables([table.select(schema.names).cast(schema) for table in tables])
        return table.take([starts[group] + row for group, row in places])


class TableStream(FileStream):
    """The images in one column of Parquet or Arrow files, each of which is a part.

    Args:
        storage: a folder above all files.
        files: name below it -> bytes, in order.
        column: the column of the images.
        features: all columns.
        folder: the folder that relative paths begin in.
    """

    def __init__(self, storage: Storage, files: Mapping[str, int], column: str, features: Features, folder: Storage):

        super().__init__(storage, files)
        self._column = column
        self._folder = folder
        self._features = _without(column, features)

    @property
    def features(self) -> Features:
        return self._features

    def _images(self, number: int) -> Iterator[StreamedImage]:
        import pyarrow as pa

        where, schema = self._storage.where(self._files[number]), self._features.arrow_schema
        position = 0
        for batch in _batches(self._storage, self._files[number]):
            check_columns(where, batch.schema, [self._column, *self._features])
            table = pa.Table.from_batches([batch])
            try:
                others = table.select(schema.names).cast(schema).to_pylist() if schema.names else [{}] * len(table)
            except pa.ArrowException as error:
                raise InputError(
                    f"{where!r} has columns of other types than the first file ({one_line(error)}); need the same in "
                    "all; choose files by a pattern"
                ) from error
            for value, row in zip(table.column(self._column).to_pylist(), others, strict=True):
                name = stored_path(value) or nameless(number, position)
                yield name, partial(image_bytes, value, self._folder), row
                position += 1


def _batches(storage: Storage, file: str) -> Iterator[pa.RecordBatch]:
    """The rows of a table, of which no more than a row group is in memory."""
    import pyarrow as pa

    if file.lower().endswith(".parquet"):
        with storage.parquet(file) as opened:
            for group in range(opened.num_row_groups):  # of several at once, `pre_buffer` would read all beforehand
                yield from opened.iter_batches(BATCH_ROWS, row_groups=[group])
        return
    with storage.open(file) as opened:
        reader = _arrow_reader(opened)
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from reader


def _arrow_reader(opened: BinaryIO) -> pa.ipc.RecordBatchStreamReader | pa.ipc.RecordBatchFileReader:
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(opened)  # as `datasets` writes it
    except pa.ArrowInvalid:
        opened.seek(0)
        return pa.ipc.open_file(opened)  # with an index at its end


def table_features(storage: Storage, file: str) -> Features:
    """The columns of a Parquet or Arrow file.

    Raises:
        InputError: when it is no such file.
    """
    import datasets
    import pyarrow as pa

    where = storage.where(file)
    try:
        if file.lower().endswith(".parquet"):
            with storage.parquet(file) as opened:
                schema = opened.schema_arrow
        else:
            with storage.open(file) as opened:
                schema = _arrow_reader(opened).schema
    except StorageError:
        raise
    except (OSError, pa.ArrowException) as error:
        if is_lfs_pointer(storage.read(file, 0, 64)):
            raise InputError(f"{where!r} is a Git LFS pointer; need the table itself; run «git lfs pull»") from error
        raise InputError(f"{where!r} cannot be read as a table ({one_line(error)}); copy it again") from error
    return datasets.Features.from_arrow_schema(schema)


def _without(column: str, features: Features) -> Features:
    import datasets

    return datasets.Features({name: kind for name, kind in features.items() if name != column})


def check_columns(where: str, schema: pa.Schema, names: Sequence[str]) -> None:
    """Check that a table has the columns that the first one of its source has.

    Raises:
        InputError: when it lacks one.
    """
    missing = [name for name in names if name not in schema.names]
    if missing:
        raise InputError(
            f"{where!r} has no column {missing[0]!r}, which the first file has; need the same columns in all; choose "
            "files by a pattern"
        )


def stored_path(value: Any) -> str | None:
    """The path that is an image's value in a row or is stored beside its bytes."""
    return value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None


def nameless(part: int, position: int) -> str:
    """The name of an image of a stream that has no path."""
    return f"part-{part:05d}/row-{position:08d}"


def image_bytes(value: Any, folder: Storage | None) -> bytes:
    """The bytes of an image in a row.

    Args:
        value: raw bytes, a path, or a dict with `bytes`, `path` or both.
        folder: the folder that relative paths begin in; None for the current one.

    Raises:
        ImageError: when there are none.
        StorageError: when a bucket does not answer.
    """
    if isinstance(value, dict):
        value = (value.get("path") or None) if value.get("bytes") is None else value["bytes"]
    if not isinstance(value, str):
        if value is None:
            raise ImageError("the row holds no image")
        return bytes(value)
    folder = folder or LocalStorage(Path())
    path = folder.where(value)
    # opening a pipe would wait for its other end
    if folder.is_local and os.path.exists(path) and not os.path.isfile(path):
        raise ImageError("cannot be read: not a regular file")
    return read_image_file(folder, value if folder.is_local else posixpath.normpath(value))


def distinct_paths(columns: Iterator[pa.ChunkedArray]) -> Names | None:
    """The paths that are stored as images or beside them, or None if they are missing or not all different.

    Args:
        columns: the images of all rows, in pieces.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    paths: list[str] = []
    for values in columns:
        if pa.types.is_struct(values.type) and values.type.get_field_index("path") >= 0:
            values = pc.struct_field(values, "path")
        elif not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            return None
        paths += [path or "" for path in values.to_pylist()]
    present = [path for path in paths if path]
    return Names(paths) if present and len(set(present)) == len(present) else None
