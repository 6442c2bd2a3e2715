"""Image files in uncompressed tar archives."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdvae.data.base import Names, arrow_table, is_image_name
from sdvae.data.images import ImageError
from sdvae.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features


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
        return arrow_table(values, self.features)

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


def _label(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _places(rows: list[tuple[int, int, int]]) -> np.ndarray:
    """(N, 3) int64: archive, offset, size; the size is -1 if there is no such member."""
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


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
