"""The kinds of image sources: files, tar archives, tables and streams. `sdvae.data.sources` opens them."""

from __future__ import annotations

import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sdvae.data.images import ImageError, read_file
from sdvae.errors import InputError
from sdvae.io import utf8

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, Features, IterableDataset

IMAGE_EXTENSIONS = frozenset(
    (
        *(".apng", ".avif", ".avifs", ".bmp", ".dds", ".dib", ".gif", ".icns", ".ico", ".j2c", ".j2k", ".jfif", ".jp2"),
        *(".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm"),
        *(".ppm", ".psd", ".qoi", ".rgb", ".rgba", ".sgi", ".tif", ".tiff", ".webp"),
    )
)


logger = logging.getLogger(__name__)


class ImageSource(Protocol):
    """A sequence of image files. It can be pickled, holds no open file, and may be read by many processes."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """A name that stays the same, such as the path within the folder."""
        ...

    def read(self, index: int) -> bytes:
        """The bytes of one file, not decoded.

        Raises:
            ImageError: when they cannot be read.
        """
        ...

    @property
    def features(self) -> Features:
        """The columns besides the image.

        A table has its own. Other sources may have `caption`, from NAME.txt beside the image, and `label`, from
        NAME.cls in an archive or from the name of the image's folder.
        """
        ...

    def columns(self, indices: Sequence[int]) -> pa.Table:
        """The other columns of some images, in the order of `indices`."""
        ...


class ImageStream:
    """An iterable data set that is divided into parts by its files. Each part can be read separately, from its start.

    Args:
        dataset: a data set of the `datasets` library.
        column: the column of the images.
    """

    def __init__(self, dataset: IterableDataset, column: str):
        self._dataset = dataset
        self._column = column
        names = {name: name for name in dataset.features if name != column}
        if "__key__" in names:  # a webdataset; its columns get the names that `Tars` gives them
            renamed = {"txt": "caption", "cls": "label"}
            names = {name: renamed.get(name, name) for name in names if not name.startswith("__")}
        self._names = names  # of the other columns: name in the data set -> name here

    @property
    def num_parts(self) -> int:
        return self._dataset.num_shards

    @property
    def features(self) -> Features:
        """The other columns."""
        import datasets

        return datasets.Features({new: self._dataset.features[old] for old, new in self._names.items()})

    def part(self, number: int) -> Iterator[tuple[str, Callable[[], bytes], dict[str, Any]]]:
        """(name, function that returns the image's bytes, other columns) of each row."""
        rows = self._dataset.shard(num_shards=self.num_parts, index=number)
        for position, row in enumerate(rows):
            value = row[self._column]
            path = value.get("path") if isinstance(value, dict) else None
            others = {new: row[old] for old, new in self._names.items()}
            yield path or f"part-{number:05d}/row-{position:08d}", partial(_bytes_of, value), others


class Names:
    """Many strings in one buffer.

    Forked workers share its memory. They would each copy a list's, since the reference counts in it change.

    Args:
        names: the strings.
    """

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._buffer = b"".join(encoded)
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._buffer[start : self._ends[index]])


class Subset:
    """Some images of a source."""

    def __init__(self, source: ImageSource, indices: np.ndarray):
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def read(self, index: int) -> bytes:
        return self._source.read(int(self._indices[index]))

    @property
    def features(self) -> Features:
        return self._source.features

    def columns(self, indices: Sequence[int]) -> pa.Table:
        return self._source.columns([int(self._indices[index]) for index in indices])


class Files:
    """Image files below a folder.

    Args:
        root: the folder.
        files: paths below it.
        names: the names of the images; by default these paths.
        others: other files below the folder, which may be captions.
    """

    def __init__(
        self, root: Path, files: Sequence[str], names: Sequence[str] | None = None, others: Iterable[str] = ()
    ):
        self._root = str(root)
        self._files = Names(files)
        self._names = Names(names) if names is not None else self._files
        texts = {file for file in others if file.endswith(".txt")}
        captions = [text if (text := os.path.splitext(file)[0] + ".txt") in texts else "" for file in files]
        self._captions = Names(captions) if any(captions) else None
        folders = sorted({os.path.dirname(file) for file in files})
        # as `datasets` does for its "imagefolder": labels need at least two folders, and no image beside them
        is_labelled = len(folders) > 1 and all(folder.count("/") == 0 and folder for folder in folders)
        self._labels = folders if is_labelled and names is None else []

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        return read_file(os.path.join(self._root, self._files[index]))

    @property
    def features(self) -> Features:
        import datasets

        found: dict[str, Any] = {}
        if self._captions is not None:
            found["caption"] = datasets.Value("string")
        if self._labels:
            found["label"] = datasets.ClassLabel(names=[utf8(name) for name in self._labels])
        return datasets.Features(found)

    def columns(self, indices: Sequence[int]) -> pa.Table:
        values: dict[str, list] = {}
        if self._captions is not None:
            values["caption"] = [self._caption(self._captions[index]) for index in indices]
        if self._labels:
            numbers = {folder: number for number, folder in enumerate(self._labels)}
            values["label"] = [numbers[os.path.dirname(self._files[index])] for index in indices]
        return _table(values, self.features)

    def _caption(self, file: str) -> str | None:
        if not file:
            return None
        try:
            return read_file(os.path.join(self._root, file)).decode("utf-8", "replace").strip()
        except ImageError as error:
            logger.warning("caption %s: %s", file, error)
            return None


class Tars:
    """Image files in uncompressed tar archives. Their offsets are found once, so that each file can be read directly.

    Args:
        root: a folder above all archives.
        tars: paths below it.

    Raises:
        InputError: when an archive is damaged or compressed.
    """

    def __init__(self, root: Path, tars: Sequence[str]):
        self._root = str(root)
        self._tars = list(tars)
        names: list[str] = []
        places: list[tuple[int, int, int]] = []
        # extension -> name without extension -> place
        beside: dict[str, dict[str, tuple[int, int, int]]] = {".txt": {}, ".cls": {}}
        for number, tar in enumerate(tars):
            path = os.path.join(root, tar)
            for member in _tar_members(path):
                if not member.isreg() or member.issparse():
                    continue
                name = f"{tar}/{member.name}"
                stem, extension = os.path.splitext(name)
                place = (number, member.offset_data, member.size)
                if is_image_name(member.name):
                    names.append(name)
                    places.append(place)
                    if member.offset_data + member.size > os.path.getsize(path):
                        raise InputError(f"{path!r} ends within {member.name!r}; need a whole tar, copy it again")
                elif extension in beside:
                    beside[extension][stem] = place
        self._names = Names(names)
        self._places = _places(places)
        stems = [os.path.splitext(name)[0] for name in names]
        self._texts = {
            column: _places([of_extension.get(stem, (0, 0, -1)) for stem in stems])
            for column, of_extension in (("caption", beside[".txt"]), ("label", beside[".cls"]))
            if of_extension
        }

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        return self._names[index]

    @property
    def features(self) -> Features:
        import datasets

        kinds = {"caption": datasets.Value("string"), "label": datasets.Value("int64")}
        return datasets.Features({column: kinds[column] for column in self._texts})

    def columns(self, indices: Sequence[int]) -> pa.Table:
        values: dict[str, list] = {}
        for column, places in self._texts.items():
            texts = [self._bytes(places[index]).decode("utf-8", "replace").strip() for index in indices]
            numbers = column == "label"
            values[column] = [
                None if places[index][2] < 0 else _label(text) if numbers else text
                for index, text in zip(indices, texts, strict=True)
            ]
        return _table(values, self.features)

    def read(self, index: int) -> bytes:
        return self._bytes(self._places[index])

    def _bytes(self, place: np.ndarray) -> bytes:
        number, offset, size = (int(value) for value in place)
        if size < 0:  # there is no such member
            return b""
        try:
            # opened each time, since forked workers would share the position in an open file
            with open(os.path.join(self._root, self._tars[number]), "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error


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
        return _bytes_of(self._dataset[index][self._column])

    @property
    def features(self) -> Features:
        return self._others.features

    def columns(self, indices: Sequence[int]) -> pa.Table:
        if not self._others.features:
            return _table({}, self._others.features)
        return self._others.select(indices)[:].cast(self._others.features.arrow_schema)


def _bytes_of(value: Any) -> bytes:
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


def _table(values: dict[str, list], features: Features) -> pa.Table:
    import pyarrow as pa

    return pa.table(values, schema=features.arrow_schema)


def _label(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _places(rows: list[tuple[int, int, int]]) -> np.ndarray:
    """(N, 3) int64: archive, offset, size; the size is -1 if there is no such member."""
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


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


def _tar_members(path: str) -> list[tarfile.TarInfo]:
    try:
        if (
            os.path.getsize(path) % tarfile.BLOCKSIZE
        ):  # tarfile takes a header that is cut off for the end, unless it is the first
            raise tarfile.ReadError("cut off")
        with tarfile.open(path, "r:") as tar:
            return tar.getmembers()
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path!r} is not a whole, uncompressed tar ({error}); copy or unpack it again") from error


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS and not os.path.basename(name).startswith(".")
