"""Images that are read as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from sdvae.data.tables import image_bytes

if TYPE_CHECKING:
    from datasets import Features, IterableDataset


class ImageStream:
    """An iterable data set that is divided into parts by its files. Each part can be read separately, from its start.

    Args:
        dataset: a data set of the `datasets` library.
        column: the column of the images.
        folder: the folder that relative paths begin in; None if there is none, as for a data set of the hub.
    """

    def __init__(self, dataset: IterableDataset, column: str, folder: str | None = None):
        self._folder = folder
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
            path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
            others = {new: row[old] for old, new in self._names.items()}
            yield path or f"part-{number:05d}/row-{position:08d}", partial(image_bytes, value, self._folder), others
