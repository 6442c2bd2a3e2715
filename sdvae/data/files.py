"""Image files below a folder of this machine or of a bucket, with their captions, classes and metadata."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sdvae.data.base import Names, arrow_table, read_image_file
from sdvae.data.reading import ImageError, read_stored
from sdvae.data.text import decode_text, warn_once
from sdvae.io import printable, utf8
from sdvae.storage import Storage

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features


class Files:
    """Image files below a folder.

    Args:
        storage: the folder.
        files: paths below it; "" for an image that is not there.
        names: the names of the images; by default these paths.
        captions: for each image the path of its caption, or "".
        classes: folder -> name of its class, for the folder of each image and for others.
        metadata: a row of other columns for each image.
    """

    def __init__(
        self,
        storage: Storage,
        files: Sequence[str],
        *,
        names: Sequence[str] | None = None,
        captions: Sequence[str] = (),
        classes: Mapping[str, str] | None = None,
        metadata: pa.Table | None = None,
    ):
        self._storage = storage
        self._files = Names(files)
        self._names = Names(names) if names is not None else self._files
        self._captions = Names(captions) if any(captions) else None
        self._class_names = sorted(set((classes or {}).values()))
        numbers = {name: number for number, name in enumerate(self._class_names)}
        self._classes = {folder: numbers[name] for folder, name in (classes or {}).items()}
        self._metadata = metadata

    def __len__(self) -> int:
        return len(self._files)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        if not (file := self._files[index]):
            raise ImageError("cannot be read: it is named in the metadata and is not there")
        return read_image_file(self._storage, file)

    @property
    def features(self) -> Features:
        import datasets

        found: dict[str, Any] = {}
        if self._metadata is not None:
            found |= datasets.Features.from_arrow_schema(self._metadata.schema)
        if self._captions is not None:
            found["caption"] = datasets.Value("string")
        if self._classes:
            found["label"] = datasets.ClassLabel(names=[utf8(name) for name in self._class_names])
        return datasets.Features(found)

    def columns(self, indices: Sequence[int]) -> pa.Table:
        values: dict[str, Any] = {}
        if self._metadata is not None:
            rows = self._metadata.take(list(indices))
            values |= {name: rows.column(name) for name in rows.column_names}
        if self._captions is not None:
            values["caption"] = [self._caption(self._captions[index]) for index in indices]
        if self._classes:
            values["label"] = [self._classes[self._files[index].rpartition("/")[0]] for index in indices]
        return arrow_table(values, self.features)

    def _caption(self, file: str) -> str | None:
        if not file:
            return None
        try:
            return decode_text(read_stored(self._storage, file), file, str(self._storage))
        except ImageError as error:
            warn_once(str(self._storage), "caption", f"caption {printable(file)}: {error}")
            return None
