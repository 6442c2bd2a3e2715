"""Image files in uncompressed tar archives, in webdataset's layout."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdvae.data.base import IMAGE_EXTENSIONS, Names, arrow_table, is_lfs_pointer
from sdvae.data.folders import Unused
from sdvae.data.images import ImageError
from sdvae.data.text import decode_text, warn_once
from sdvae.errors import InputError, first_few, one_line
from sdvae.io import printable

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

_TEXT_FIELDS = ("txt", "cls", "json")
# webdataset's base_plus_ext: the key ends at the first dot of the base name, the rest is the field
_KEY_AND_FIELD = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_NOWHERE = (0, 0, -1)  # the place of a member that is not there
_Place = tuple[int, int, int]  # archive, offset, size


class Tars:
    """Image files in tar archives, and the words beside them.

    Members of an archive that differ only in what follows the first dot of their base name are one sample, as in
    webdataset. Their offsets are found once, so that each file can be read directly.

    Args:
        root: a folder above all archives.
        tars: paths below it.
        image_column: which member of a sample is the image, such as `input.jpg`, or None if samples have only one.
        unused: gets the members that are not used.

    Raises:
        InputError: when an archive is damaged or compressed, or samples have several images and none is chosen.
    """

    def __init__(self, root: Path, tars: Sequence[str], image_column: str | None, unused: Unused):
        self._root = str(root)
        self._tars = list(tars)
        rows: list[tuple[_Place, str, list[_Place]]] = []  # image, its name, texts in the order of _TEXT_FIELDS
        for number, tar in enumerate(tars):
            for key, fields in _samples(self._root, number, tar, unused).items():
                image = _chosen([field for field in fields if _is_image(field)], image_column, f"{tar}/{key}")
                if image is not None:
                    member, place = fields.pop(image)
                    texts = [fields.pop(field)[1] if field in fields else _NOWHERE for field in _TEXT_FIELDS]
                    rows.append((place, f"{tar}/{member}", texts))
                unused.add_files(f"{tar}/{key}.{field}" for field in fields)
        if not rows and image_column is not None:
            raise InputError(f"{self._root!r} has no images {image_column!r} in its archives; check image_column")
        rows.sort()
        self._names = Names(name for _, name, _ in rows)
        self._places = _array([place for place, _, _ in rows])
        self._texts = {
            field: places
            for number, field in enumerate(_TEXT_FIELDS)
            if ((places := _array([texts[number] for _, _, texts in rows]))[:, 2] >= 0).any()
        }
        # as tools write it that keep all words in the .json
        self._caption_is_in_json = "txt" not in self._texts and isinstance(self._first_json().get("caption"), str)

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        return self._bytes(self._places[index])

    @property
    def features(self) -> Features:
        import datasets

        kinds: dict[str, Any] = {}
        if "txt" in self._texts or self._caption_is_in_json:
            kinds["caption"] = datasets.Value("string")
        if "cls" in self._texts:
            kinds["label"] = datasets.Value("int64")
        if "json" in self._texts:
            kinds["json"] = datasets.Value("string")
        return datasets.Features(kinds)

    def columns(self, indices: Sequence[int]) -> pa.Table:
        values = {field: [self._text(field, index) for index in indices] for field in self._texts}
        columns: dict[str, list] = {}
        if "txt" in values:
            columns["caption"] = values["txt"]
        elif self._caption_is_in_json:
            columns["caption"] = [_caption_in(text) for text in values["json"]]
        if "cls" in values:
            columns["label"] = [self._label(index, text) for index, text in zip(indices, values["cls"], strict=True)]
        if "json" in values:
            columns["json"] = values["json"]
        return arrow_table(columns, self.features)

    def _first_json(self) -> dict[str, Any]:
        if "json" not in self._texts:
            return {}
        return _object_in(self._text("json", int((self._texts["json"][:, 2] >= 0).argmax())))

    def _text(self, field: str, index: int) -> str | None:
        place = self._texts[field][index]
        if place[2] < 0:
            return None
        try:
            return decode_text(self._bytes(place), f"the {field} of {self.name(index)}", self._root)
        except ImageError as error:
            warn_once(self._root, "text", f"the {field} of {printable(self.name(index))}: {error}")
            return None

    def _label(self, index: int, text: str | None) -> int | None:
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            example = f"the label of {printable(self.name(index))} is {printable(text[:40])!r}"
            warn_once(self._root, "label", f"{example} and not an integer, so it is left out")
            return None

    def _bytes(self, place: np.ndarray) -> bytes:
        number, offset, size = (int(value) for value in place)
        try:
            # opened each time, since forked workers would share the position in an open file
            with open(os.path.join(self._root, self._tars[number]), "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise ImageError(f"cannot be read: {error.strerror or error}") from error


def _chosen(images: Sequence[str], image_column: str | None, sample: str) -> str | None:
    """The image of a sample among its fields, or None if it has none."""
    if image_column is not None:
        return image_column if image_column in images else None
    if len(images) > 1:
        raise InputError(
            f"the sample {printable(sample)!r} has the images {first_few(list(images), 8)}; name one with image_column "
            "or unpack the archive (in webdataset, files whose names are equal up to the first dot are one sample)"
        )
    return images[0] if images else None


def _samples(root: str, number: int, tar: str, unused: Unused) -> dict[str, dict[str, tuple[str, _Place]]]:
    """Key -> field in lower case -> name and place of the member."""
    path = os.path.join(root, tar)
    size = os.path.getsize(path)
    samples: dict[str, dict[str, tuple[str, _Place]]] = defaultdict(dict)
    for member in _members(path):
        name = member.name
        base = name.rpartition("/")[2]
        if member.isdir():
            continue
        found = _KEY_AND_FIELD.fullmatch(name)
        if not member.isreg() or member.issparse():
            unused.add("members that are not regular files", [f"{tar}/{name}"], warn=True)
        elif base.startswith(".") or any(_is_hidden(part) for part in name.split("/")[:-1]):
            unused.add("hidden members", [f"{tar}/{name}"], warn=False)
        elif found is None:
            unused.add_files([f"{tar}/{name}"])
        else:
            key, field = found[1], found[2].lower()
            if member.offset_data + member.size > size:
                raise InputError(f"{path!r} ends within {name!r}; need a whole tar, copy it again")
            if field in samples[key]:  # the later one replaces it when the archive is unpacked
                unused.add("members that later ones of the same name replace", [f"{tar}/{name}"], warn=True)
            samples[key][field] = (name, (number, member.offset_data, member.size))
    return samples


def _is_hidden(folder: str) -> bool:
    return folder.startswith((".", "__")) and folder not in (".", "..")


def _is_image(field: str) -> bool:
    return f".{field.rpartition('.')[2]}" in IMAGE_EXTENSIONS


def _object_in(text: str | None) -> dict[str, Any]:
    """The JSON object in a text, or an empty one if there is none."""
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _caption_in(text: str | None) -> str | None:
    caption = _object_in(text).get("caption")
    return caption if isinstance(caption, str) else None


def _array(rows: Sequence[_Place]) -> np.ndarray:
    """(N, 3) int64: archive, offset, size; the size is -1 if there is no such member."""
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _members(path: str) -> Iterator[tarfile.TarInfo]:
    try:
        with open(path, "rb") as file:
            if is_lfs_pointer(file.read(64)):
                raise InputError(f"{path!r} is a Git LFS pointer; need the archive itself; run «git lfs pull»")
        # tarfile takes a header that is cut off for the end, unless it is the first
        if os.path.getsize(path) % tarfile.BLOCKSIZE:
            raise tarfile.ReadError("cut off")
        with tarfile.open(path, "r:") as tar:
            return iter(tar.getmembers())
    except (tarfile.TarError, OSError) as error:
        raise InputError(
            f"{path!r} is not a whole, uncompressed tar ({one_line(error)}); copy or unpack it again"
        ) from error
