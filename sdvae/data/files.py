"""Image files below a folder, with their captions and labels."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdvae.data.base import Names, arrow_table
from sdvae.data.images import ImageError, read_file
from sdvae.io import utf8

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Features

logger = logging.getLogger(__name__)


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
        return arrow_table(values, self.features)

    def _caption(self, file: str) -> str | None:
        if not file:
            return None
        try:
            return read_file(os.path.join(self._root, file)).decode("utf-8", "replace").strip()
        except ImageError as error:
            logger.warning("caption %s: %s", file, error)
            return None
