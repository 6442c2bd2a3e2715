"""Dividing a source into shards. Each is encoded independently and always has the same images."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from sdvae.data import ImageError, ImageSource, ImageStream
from sdvae.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

MOST_ROWS = 4096
FEWEST_ROWS = 64
SHARDS_AT_LEAST = 64  # if there are enough images, so that up to 64 processes have work
SHARD_BYTES = 128 * 2**20  # files of 100 to 500 MB suit the hub, and a whole shard is held in memory
SAMPLES = 64  # images whose bytes are compared to tell apart sources with the same names
OF_THE_FILE = frozenset(  # errors that would occur again if the file were opened again
    {
        errno.ENOENT,
        errno.EACCES,
        errno.EPERM,
        errno.EISDIR,
        errno.ENOTDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.EINVAL,
    }
)
STREAM_STRIDE = 2**32  # images of a stream's part p are numbered from p * STREAM_STRIDE on


@dataclass(frozen=True)
class SourceImage:
    """One image of the source.

    Attributes:
        index: unique in the data set, and the same in every run.
        read: returns the file's bytes, or raises `ImageError`.
        others: for a stream, the other columns of the image's row; otherwise empty.
    """

    index: int
    name: str
    read: Callable[[], bytes]
    others: dict[str, Any] = field(default_factory=dict)


class RangeShards:
    """Ranges of a source whose length is known.

    Attributes:
        total: the number of images.
        features: the features of the columns that are copied from the source.

    Args:
        source: the images.
        names: columns to carry through; None: all.
        shard_rows: images in each shard, except the last one, which may have fewer.

    Raises:
        InputError: for a column that the source does not have.
    """

    def __init__(self, source: ImageSource, names: Sequence[str] | None, shard_rows: int):
        self._source = source
        self.features = chosen(source.features, names)
        self._shard_rows = shard_rows
        self.total: int | None = len(source)

    def __len__(self) -> int:
        return -(-len(self._source) // self._shard_rows)

    def identity(self) -> dict[str, Any]:
        """The values that must be equal for two runs to make the same shards."""
        count = len(self._source)
        names, samples = hashlib.sha256(), hashlib.sha256()
        for index in range(count):
            names.update(os.fsencode(self._source.name(index)) + b"\0")
        for index in sorted({number * (count - 1) // (SAMPLES - 1) for number in range(SAMPLES)}) if count else ():
            try:
                samples.update(hashlib.sha256(self._source.read(index)).digest())
            except ImageError as error:
                raise_if_passing(error)
                samples.update(b"unreadable")
        return {
            "images": count,
            "names_sha256": names.hexdigest(),
            "samples_sha256": samples.hexdigest(),
            "shard_rows": self._shard_rows,
            "columns": {name: str(feature) for name, feature in self.features.items()},
        }

    def count(self, shard: int) -> int | None:
        return len(self._range(shard))

    def _range(self, shard: int) -> range:
        return range(len(self._source))[shard * self._shard_rows :][: self._shard_rows]

    def images(self, shard: int) -> Iterator[SourceImage]:
        for index in self._range(shard):
            yield SourceImage(index, self._source.name(index), partial(self._source.read, index))

    def columns(self, images: Sequence[SourceImage]) -> pa.Table:
        """The copied columns of some images of one shard."""
        table = self._source.columns([image.index for image in images])
        return table.select(list(self.features))


class StreamShards:
    """The parts of a stream. The number of images in a part is known only when it has been read.

    The attributes and methods are those of `RangeShards`.

    Args:
        stream: the images.
        names: columns to carry through; None: all.

    Raises:
        InputError: for a column that the source does not have.
    """

    total: int | None = None

    def __init__(self, stream: ImageStream, names: Sequence[str] | None):
        self._stream = stream
        self.features = chosen(stream.features, names)

    def __len__(self) -> int:
        return self._stream.num_parts

    def identity(self) -> dict[str, Any]:
        columns = {name: str(feature) for name, feature in self.features.items()}
        return {**self._stream.identity(), "columns": columns}

    def count(self, shard: int) -> int | None:
        return None

    def images(self, shard: int) -> Iterator[SourceImage]:
        for position, (name, data, others) in enumerate(self._stream.part(shard)):
            yield SourceImage(shard * STREAM_STRIDE + position, name, data, others)

    def columns(self, images: Sequence[SourceImage]) -> pa.Table:
        import pyarrow as pa

        features = self.features
        examples = [features.encode_example({name: image.others[name] for name in features}) for image in images]
        values = {name: [example[name] for example in examples] for name in features}
        return pa.table(values, schema=features.arrow_schema)


Shards = RangeShards | StreamShards  # a source that is divided into shards


def rows_per_shard(images: int, row_bytes: int) -> int:
    """The number of images in a shard: few enough that many processes have work and interruptions cost little.

    Args:
        images: the number of images in the source.
        row_bytes: bytes of the latents of an image.
    """
    fit = max(1, SHARD_BYTES // row_bytes)
    return min(fit, MOST_ROWS, max(FEWEST_ROWS, -(-images // SHARDS_AT_LEAST)))


def chosen(features: Features, names: Sequence[str] | None) -> Features:
    """The features of some columns, or of all."""
    import datasets

    if names is None:
        return features
    for name in names:
        if name not in features:
            raise InputError(f"got columns with {name!r}; the source has {list(features) or 'none'}; choose among them")
    return datasets.Features({name: features[name] for name in names})


def raise_if_passing(error: ImageError) -> None:
    """Raise the cause of an `ImageError` if it is a fault of the machine that may pass, not a fault of the image.

    Raises:
        OSError: the fault of the machine.
    """
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno not in OF_THE_FILE:
        raise cause
