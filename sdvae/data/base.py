"""What all kinds of image sources share: the interface, a part of a source, and names in one buffer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

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


def is_lfs_pointer(data: bytes) -> bool:
    """Whether a file's first bytes are those of a Git LFS pointer, which stands for a file that was not downloaded."""
    return data.startswith(b"version https://git-lfs.github.com/spec/")
