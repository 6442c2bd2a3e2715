"""The metadata files of `datasets`' imagefolder: a row of columns for each image."""

from __future__ import annotations

import io
import posixpath
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sdvae.errors import InputError, one_line
from sdvae.storage import Storage, StorageError

if TYPE_CHECKING:
    import pyarrow as pa


def read_metadata(storage: Storage, files: Sequence[str], image_column: str | None) -> tuple[list[str], pa.Table]:
    """Read metadata.csv, metadata.jsonl or metadata.parquet, of one folder or of several.

    Args:
        storage: a folder above all of them.
        files: paths below it.
        image_column: which column names the image: `image` stands for the column `file_name`, NAME for
            `NAME_file_name`. By default the only one of these.

    Returns:
        For each row that names an image the image's path below that folder; and the other columns of these rows.

    Raises:
        InputError: when a file cannot be read, or no column names images inside the folder of its metadata file.
    """
    import pyarrow as pa

    paths: list[str] = []
    tables = []
    for file in files:
        table = _read(storage, file)
        column = _file_name_column(storage.where(file), table, image_column)
        table = table.filter(table.column(column).is_valid())
        folder = posixpath.dirname(file)
        paths += [_inside(name, folder, storage.where(file)) for name in table.column(column).to_pylist()]
        tables.append(table.drop_columns([column]))
    try:
        return paths, pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(
            f"the metadata files {[storage.where(file) for file in files]} have columns of different types; "
            f"need the same in all; {one_line(error)}"
        ) from error


def _read(storage: Storage, file: str) -> pa.Table:
    import pandas
    import pyarrow as pa
    import pyarrow.json
    import pyarrow.parquet

    try:
        data = storage.read(file)
        if file.endswith(".parquet"):
            return pyarrow.parquet.read_table(pa.BufferReader(data)).replace_schema_metadata(None)
        if file.endswith(".jsonl"):
            # all in one block, since a row may not be longer than a block
            options = pyarrow.json.ReadOptions(block_size=max(len(data), 2**16))
            return pyarrow.json.read_json(pa.BufferReader(data), read_options=options)
        # only an empty cell is null; pandas would also take words such as NA and None for that
        frame = pandas.read_csv(io.BytesIO(data), encoding="utf-8-sig", keep_default_na=False, na_values=[""])
        return pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    except StorageError:
        raise
    except (OSError, ValueError) as error:  # pandas' and pyarrow's exceptions for bad content are ValueErrors
        raise InputError(f"metadata {storage.where(file)!r} cannot be read; {one_line(error)}") from error


def _file_name_column(path: str, table: pa.Table, image_column: str | None) -> str:
    import pyarrow as pa

    columns = {
        name.removesuffix("file_name").removesuffix("_") or "image": name
        for name, kind in zip(table.schema.names, table.schema.types, strict=True)
        if (name == "file_name" or name.endswith("_file_name"))
        and (pa.types.is_string(kind) or pa.types.is_large_string(kind))
    }
    if image_column is None and len(columns) == 1:
        return next(iter(columns.values()))
    if image_column is not None and image_column in columns:
        return columns[image_column]
    if not columns:
        raise InputError(f"metadata {path!r} has the columns {table.schema.names}; need one named 'file_name'")
    raise InputError(
        f"metadata {path!r} names several images in a row: {list(columns)}; choose one of them with image_column"
        if image_column is None
        else f"metadata {path!r} has no images {image_column!r}; need image_column to be one of {list(columns)}"
    )


def _inside(name: str, folder: str, path: str) -> str:
    relative = posixpath.normpath(name.replace("\\", "/"))
    if "://" in name or posixpath.isabs(relative) or relative.split("/")[0] == "..":
        raise InputError(f"metadata {path!r} names {name!r}; need a path inside the folder of the metadata")
    return posixpath.join(folder, relative)
