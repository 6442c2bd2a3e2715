"""What all kinds of image sources share: the interfaces, a part of a source, and names in one buffer."""

from __future__ import annotations

import hashlib
import logging
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np

from sdvae.data.reading import ImageError, read_stored
from sdvae.errors import InputError, one_line
from sdvae.io import printable
from sdvae.storage import Storage, StorageError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

logger = logging.getLogger(__name__)

IMAGE_EXTENSIONS = frozenset(
    (
        *(".apng", ".avif", ".avifs", ".bmp", ".dds", ".dib", ".gif", ".icns", ".ico", ".j2c", ".j2k", ".jfif", ".jp2"),
        *(".jpc", ".jpe", ".jpeg", ".jpf", ".jpg", ".jpx", ".mpo", ".pbm", ".pcx", ".pfm", ".pgm", ".png", ".pnm"),
        *(".ppm", ".psd", ".qoi", ".rgb", ".rgba", ".sgi", ".tif", ".tiff", ".webp"),
    )
)


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


StreamedImage = tuple[str, Callable[[], bytes], dict[str, Any]]  # name, function that returns its bytes, other columns


class ImageStream(ABC):
    """Images in parts. Each part is read from its start to its end; how many images it holds is not known before."""

    @property
    @abstractmethod
    def num_parts(self) -> int: ...

    @property
    @abstractmethod
    def features(self) -> Features:
        """The columns besides the image."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The values that must be equal for two runs to find the same parts."""

    @abstractmethod
    def part(self, number: int) -> Iterator[StreamedImage]:
        """The images of a part. The function of a bad image raises `ImageError`."""


class FileStream(ImageStream):
    """A stream whose parts are files: archives or tables.

    Args:
        storage: a folder above all of them.
        files: name below it -> bytes, in order.
    """

    def __init__(self, storage: Storage, files: Mapping[str, int]):
        self._storage = storage
        self._files = list(files)
        self._sizes = list(files.values())

    @property
    def num_parts(self) -> int:
        return len(self._files)

    def identity(self) -> dict[str, Any]:
        # Neither the time of the last change nor the server's tag, which differ between copies of the same file.
        digest = hashlib.sha256()
        for file, size in zip(self._files, self._sizes, strict=True):
            digest.update(os.fsencode(file) + b"\0%d\n" % size)
        return {"files": len(self._files), "files_sha256": digest.hexdigest()}

    def part(self, number: int) -> Iterator[StreamedImage]:
        """The images of a file. If it is damaged or gone, one bad image stands for what cannot be read of it."""
        import pyarrow as pa

        try:
            yield from self._images(number)
        except (StorageError, InputError):
            raise
        except (OSError, tarfile.TarError, pa.ArrowException) as error:
            reason = (isinstance(error, OSError) and error.strerror) or one_line(error)
            where = printable(self._storage.where(self._files[number]))
            logger.warning("%s cannot be read (%s); what follows in it is skipped", where, reason)
            yield self._files[number], partial(_raise_unreadable, reason, error), {}

    @abstractmethod
    def _images(self, number: int) -> Iterator[StreamedImage]:
        """The images of a file, as `part` yields them."""


def _raise_unreadable(reason: str, error: Exception) -> NoReturn:
    raise ImageError(f"this file cannot be read, or not to its end: {reason}") from error


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


def arrow_table(values: dict[str, list], features: Features) -> pa.Table:
    import pyarrow as pa

    return pa.table(values, schema=features.arrow_schema)


def read_image_file(storage: Storage, file: str) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageError: when it cannot be read, or was not downloaded.
        StorageError: when a bucket does not answer.
    """
    data = read_stored(storage, file)
    if is_lfs_pointer(data):
        raise ImageError("a Git LFS pointer: run «git lfs pull» to get the image")
    return data


def is_lfs_pointer(data: bytes) -> bool:
    """Whether a file's first bytes are those of a Git LFS pointer, which stands for a file that was not downloaded."""
    return data.startswith(b"version https://git-lfs.github.com/spec/")
