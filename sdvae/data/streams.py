"""Data sets of the Hugging Face hub that are read as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from sdvae.data.base import ImageStream, StreamedImage
from sdvae.data.tables import image_bytes, nameless, stored_path

if TYPE_CHECKING:
    from datasets import Features, IterableDataset


class HubStream(ImageStream):
    """An iterable data set that is divided into parts by its files.

    Args:
        dataset: a data set of the `datasets` library.
        column: the column of the images.
        spec: the data set's id.
    """

    def __init__(self, dataset: IterableDataset, column: str, spec: str):
        self._dataset = dataset
        self._column = column
        self._spec = spec
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
        import datasets

        return datasets.Features({new: self._dataset.features[old] for old, new in self._names.items()})

    def identity(self) -> dict[str, Any]:
        return {"stream": self._spec, "parts": self.num_parts}

    def part(self, number: int) -> Iterator[StreamedImage]:
        rows = self._dataset.shard(num_shards=self.num_parts, index=number)
        for position, row in enumerate(rows):
            value = row[self._column]
            others = {new: row[old] for old, new in self._names.items()}
            yield stored_path(value) or nameless(number, position), partial(image_bytes, value, None), others
