"""Image files in uncompressed tar archives, in webdataset's layout."""

from __future__ import annotations

import json
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sdvae.data.base import IMAGE_EXTENSIONS, FileStream, Names, StreamedImage, arrow_table, is_lfs_pointer
from sdvae.data.folders import Unused
from sdvae.data.reading import ImageError, read_stored
from sdvae.data.text import decode_text, warn_once
from sdvae.errors import InputError, first_few, one_line
from sdvae.io import printable
from sdvae.storage import Storage, StorageError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

_TEXT_FIELDS = ("txt", "cls", "json")
# webdataset's base_plus_ext: the key ends at the first dot of the base name, the rest is the field
_KEY_AND_FIELD = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)
_NOWHERE = (0, 0, -1)  # the place of a member that is not there
_Place = tuple[int, int, int]  # archive, offset, size
AT_ONCE = 8  # archives of a bucket whose members are listed at the same time
FIRST_SAMPLES = 100  # of a stream: those that tell its columns
STREAM_BUFFER = 2**18  # bytes that tarfile reads at once


@dataclass(frozen=True)
class _Words:
    """The columns that come from the members beside the images.

    Attributes:
        fields: those of `_TEXT_FIELDS` that samples have.
        caption_is_in_json: whether the captions are those in the .json, as tools write it that keep all words there.
        source: a name for all archives, for warnings.
    """

    fields: frozenset[str]
    caption_is_in_json: bool
    source: str

    @property
    def features(self) -> Features:
        import datasets

        kinds: dict[str, Any] = {}
        if "txt" in self.fields or self.caption_is_in_json:
            kinds["caption"] = datasets.Value("string")
        if "cls" in self.fields:
            kinds["label"] = datasets.Value("int64")
        if "json" in self.fields:
            kinds["json"] = datasets.Value("string")
        return datasets.Features(kinds)

    def row(self, name: str, texts: Mapping[str, bytes]) -> dict[str, Any]:
        """The columns of one image.

        Args:
            name: the image's name.
            texts: those of `_TEXT_FIELDS` that its sample has -> the bytes of the member.
        """
        found = {field: decode_text(data, f"the {field} of {name}", self.source) for field, data in texts.items()}
        row: dict[str, Any] = {}
        if "txt" in self.fields:
            row["caption"] = found.get("txt")
        elif self.caption_is_in_json:
            row["caption"] = _caption_in(found.get("json"))
        if "cls" in self.fields:
            row["label"] = self._label(name, found.get("cls"))
        if "json" in self.fields:
            row["json"] = found.get("json")
        return row

    def _label(self, name: str, text: str | None) -> int | None:
        if text is None:
            return None
        try:
            return int(text)
        except ValueError:
            example = f"the label of {printable(name)} is {printable(text[:40])!r}"
            warn_once(self.source, "label", f"{example} and not an integer, so it is left out")
            return None


class Tars:
    """Image files in tar archives, and the words beside them.

    Members of an archive that differ only in what follows the first dot of their base name are one sample, as in
    webdataset. Their offsets are found once, so that each file can be read directly. On a disk only the headers are
    read for that; in a bucket, where each request takes long, the whole archive, unless its members are large.

    Args:
        storage: a folder above all archives.
        tars: paths below it.
        image_column: which member of a sample is the image, such as `input.jpg`, or None if samples have only one.
        unused: gets the members that are not used.

    Raises:
        InputError: when an archive is damaged or compressed, or samples have several images and none is chosen.
    """

    def __init__(self, storage: Storage, tars: Sequence[str], image_column: str | None, unused: Unused):
        self._storage = storage
        self._tars = list(tars)
        rows: list[tuple[_Place, str, list[_Place]]] = []  # image, its name, texts in the order of _TEXT_FIELDS
        for number, (tar, members) in enumerate(self._members_of_all()):
            samples: dict[str, dict[str, _Member]] = defaultdict(dict)
            for member in members:
                if (found := _key_and_field(tar, member, unused)) is not None:
                    _add(samples[found[0]], found[1], member, tar, unused)
            for key, fields in samples.items():
                image = _chosen([field for field in fields if _is_image(field)], image_column, f"{tar}/{key}")
                if image is not None:
                    chosen = fields.pop(image)
                    texts = [fields.pop(field).place(number) if field in fields else _NOWHERE for field in _TEXT_FIELDS]
                    rows.append((chosen.place(number), f"{tar}/{chosen.name}", texts))
                unused.add_files(f"{tar}/{key}.{field}" for field in fields)
        if not rows and image_column is not None:
            raise _no_such_images(storage, image_column)
        rows.sort()
        self._names = Names(name for _, name, _ in rows)
        self._places = _array([place for place, _, _ in rows])
        self._texts = {
            field: places
            for number, field in enumerate(_TEXT_FIELDS)
            if ((places := _array([texts[number] for _, _, texts in rows]))[:, 2] >= 0).any()
        }
        caption_is_in_json = "txt" not in self._texts and isinstance(self._first_json().get("caption"), str)
        self._words = _Words(frozenset(self._texts), caption_is_in_json, str(storage))

    def _members_of_all(self) -> Iterator[tuple[str, list[_Member]]]:
        at_once = 1 if self._storage.is_local else AT_ONCE
        with ThreadPoolExecutor(at_once) as threads:
            for start in range(0, len(self._tars), at_once):
                tars = self._tars[start : start + at_once]
                yield from zip(tars, threads.map(partial(_members, self._storage), tars), strict=True)

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        return self._names[index]

    def read(self, index: int) -> bytes:
        return self._bytes(self._places[index])

    @property
    def features(self) -> Features:
        return self._words.features

    def columns(self, indices: Sequence[int]) -> pa.Table:
        rows = [self._words.row(self.name(index), self._texts_of(index)) for index in indices]
        return arrow_table({name: [row[name] for row in rows] for name in self.features}, self.features)

    def _first_json(self) -> dict[str, Any]:
        if "json" not in self._texts:
            return {}
        data = self._texts_of(int((self._texts["json"][:, 2] >= 0).argmax())).get("json", b"{}")
        return _object_in(decode_text(data, "the first json", str(self._storage)))

    def _texts_of(self, index: int) -> dict[str, bytes]:
        texts = {}
        for field, places in self._texts.items():
            if places[index][2] < 0:
                continue
            try:
                texts[field] = self._bytes(places[index])
            except ImageError as error:
                warn_once(str(self._storage), "text", f"the {field} of {printable(self.name(index))}: {error}")
        return texts

    def _bytes(self, place: np.ndarray) -> bytes:
        number, offset, size = (int(value) for value in place)
        # opened each time, since forked workers would share the position in an open file
        return read_stored(self._storage, self._tars[number], offset, size)


class TarStream(FileStream):
    """Image files in tar archives, each of which is a part and is read from its start to its end.

    The members of a sample must follow each other, as webdataset demands and as its tools write them. The columns are
    those of the first samples.

    Args:
        storage: a folder above all archives.
        tars: name below it -> bytes, in order.
        image_column: which member of a sample is the image, such as `input.jpg`, or None if samples have only one.

    Raises:
        InputError: when the first archive is damaged or compressed, or none holds such images.
    """

    def __init__(self, storage: Storage, tars: Mapping[str, int], image_column: str | None):
        super().__init__(storage, tars)
        self._image_column = image_column
        self._unused = Unused()
        self._words = self._first_words()
        self._unused = Unused()  # again, to count what the parts hold

    def _first_words(self) -> _Words:
        """The columns of the first samples, in the first archive that holds images."""
        fields: set[str] = set()
        json_text = None
        for number, tar in enumerate(self._files):
            count = 0
            try:
                for name, _, texts in self._samples(number):
                    fields |= texts.keys()
                    if json_text is None and "json" in texts:
                        json_text = decode_text(texts["json"], f"the json of {name}", str(self._storage))
                    count += 1
                    if count == FIRST_SAMPLES:
                        break
            except StorageError:
                raise
            except (tarfile.TarError, OSError) as error:
                raise _not_whole(self._storage, tar, error) from error
            if count:
                in_json = "txt" not in fields and isinstance(_object_in(json_text).get("caption"), str)
                return _Words(frozenset(fields), in_json, str(self._storage))
        if self._image_column is not None:
            raise _no_such_images(self._storage, self._image_column)
        raise no_images(str(self._storage), self._unused)

    @property
    def features(self) -> Features:
        return self._words.features

    def _images(self, number: int) -> Iterator[StreamedImage]:
        for name, data, texts in self._samples(number):
            for field in sorted(texts.keys() - self._words.fields):
                warn_once(
                    str(self._storage),
                    f"late {field}",
                    f"{printable(name)} has a .{field}, which none of the first samples has, so that it is left out",
                )
            used = {field: text for field, text in texts.items() if field in self._words.fields}
            yield name, partial(bytes, data), self._words.row(name, used)
        self._unused.say(self._storage.where(self._files[number]))

    def _samples(self, number: int) -> Iterator[tuple[str, bytes, dict[str, bytes]]]:
        """The name of each image of an archive, its bytes, and those of the members of `_TEXT_FIELDS` beside it."""
        tar = self._files[number]
        ended: set[str] = set()
        current = ""
        fields: dict[str, _Member] = {}
        contents: dict[str, bytes] = {}
        for member, data in _contents(self._storage, tar, self._sizes[number]):
            if (found := _key_and_field(tar, member, self._unused)) is None:
                continue
            key, field = found
            if key != current:
                yield from self._sample(tar, current, fields, contents)
                ended.add(current)
                current, fields, contents = key, {}, {}
                if key in ended:
                    raise InputError(
                        f"in {self._storage.where(tar)!r} the members of {printable(key)!r} do not follow each other; "
                        "in a stream they must, as webdataset writes them; pack the archive again"
                        + (", or leave out --streaming" if self._storage.is_local else "")
                    )
            _add(fields, field, member, tar, self._unused)
            contents[field] = data
        yield from self._sample(tar, current, fields, contents)

    def _sample(
        self, tar: str, key: str, fields: dict[str, _Member], contents: dict[str, bytes]
    ) -> Iterator[tuple[str, bytes, dict[str, bytes]]]:
        images = [field for field in fields if _is_image(field)]
        image = _chosen(images, self._image_column, f"{tar}/{key}")
        texts = {} if image is None else {field: contents[field] for field in _TEXT_FIELDS if field in fields}
        self._unused.add_files(f"{tar}/{key}.{field}" for field in fields if field != image and field not in texts)
        if image is not None:
            yield f"{tar}/{fields[image].name}", contents[image], texts


class _Member(NamedTuple):
    """What is needed of a member's header."""

    name: str
    is_file: bool
    offset: int  # of its content
    size: int

    def place(self, archive: int) -> _Place:
        return archive, self.offset, self.size


def _key_and_field(tar: str, member: _Member, unused: Unused) -> tuple[str, str] | None:
    """A member's key and its field in lower case, or None if it belongs to no sample."""
    name = member.name
    base = name.rpartition("/")[2]
    found = _KEY_AND_FIELD.fullmatch(name)
    if not member.is_file:
        unused.add("members that are not regular files", [f"{tar}/{name}"], warn=True)
    elif base.startswith(".") or any(_is_hidden(part) for part in name.split("/")[:-1]):
        unused.add("hidden members", [f"{tar}/{name}"], warn=False)
    elif found is None:
        unused.add_files([f"{tar}/{name}"])
    else:
        return found[1], found[2].lower()
    return None


def _add(fields: dict[str, _Member], field: str, member: _Member, tar: str, unused: Unused) -> None:
    """Add a member to its sample."""
    if field in fields:  # the later one replaces it when the archive is unpacked
        unused.add("members that later ones of the same name replace", [f"{tar}/{member.name}"], warn=True)
    fields[field] = member


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


def _members(storage: Storage, tar: str) -> list[_Member]:
    """The headers of an archive, without those of folders."""
    try:
        with storage.open(tar) as file:
            size = file.seek(0, 2)
            file.seek(0)
            if is_lfs_pointer(file.read(64)):
                raise _is_pointer(storage, tar)
            file.seek(0)
            _check_blocks(size)
            with tarfile.open(fileobj=file, mode="r:") as opened:
                members = [_member(info) for info in opened.getmembers() if not info.isdir()]
    except StorageError:
        raise
    except (tarfile.TarError, OSError) as error:
        raise _not_whole(storage, tar, error) from error
    for member in members:
        if member.is_file and member.offset + member.size > size:
            raise InputError(f"{storage.where(tar)!r} ends within {member.name!r}; need a whole tar, copy it again")
    return members


def _contents(storage: Storage, tar: str, size: int) -> Iterator[tuple[_Member, bytes]]:
    """The headers of an archive and the contents of its regular files, read from its start to its end.

    Raises:
        tarfile.TarError: when the archive is damaged, compressed or shorter than it should be.
        OSError: when it cannot be read.
    """
    with storage.open(tar) as file:
        if size < tarfile.RECORDSIZE and is_lfs_pointer(storage.read(tar, 0, 64)):
            raise _is_pointer(storage, tar)
        _check_blocks(size)
        with tarfile.open(fileobj=file, mode="r|", bufsize=STREAM_BUFFER) as opened:
            for info in opened:
                opened.members = []  # type: ignore[attr-defined]  # tarfile would keep all headers
                if info.isdir():
                    continue
                member = _member(info)
                if not member.is_file:
                    yield member, b""
                    continue
                if member.offset + member.size > size:
                    raise tarfile.ReadError(f"it ends within {member.name!r}")
                content = opened.extractfile(info)
                yield member, content.read() if content is not None else b""


def _member(info: tarfile.TarInfo) -> _Member:
    return _Member(info.name, info.isreg() and not info.issparse(), info.offset_data, info.size)


def _check_blocks(size: int) -> None:
    # tarfile takes a header that is cut off for the end, unless it is the first
    if size % tarfile.BLOCKSIZE:
        raise tarfile.ReadError("cut off")


def _is_pointer(storage: Storage, tar: str) -> InputError:
    where = storage.where(tar)
    return InputError(f"{where!r} is a Git LFS pointer; need the archive itself; run «git lfs pull»")


def _not_whole(storage: Storage, tar: str, error: Exception) -> InputError:
    return InputError(
        f"{storage.where(tar)!r} is not a whole, uncompressed tar ({one_line(error)}); copy or unpack it again"
    )


def _no_such_images(storage: Storage, image_column: str) -> InputError:
    return InputError(f"{str(storage)!r} has no images {image_column!r} in its archives; check image_column")


def no_images(spec: str, unused: Unused) -> InputError:
    """The error for archives without images."""
    there = f"; they hold {text}" if (text := unused.text()) else ""
    return InputError(f"{spec!r} holds no images; need .png, .jpg, … members in its archives{there}")
