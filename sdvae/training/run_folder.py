"""What a run leaves on disk, and where."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from sdvae.errors import InputError
from sdvae.training.config import TrainConfig


class RunFolder:
    """config.yaml, metrics.jsonl, curves.png, images/, tracker logs and model/ under one folder.

    Only the main process writes; `create` belongs to it alone.
    """

    TRACKER = "sdvae"  # trackers' project name, and the folder of those that write files

    def __init__(self, root: str | Path):
        self.root = Path(root).expanduser()
        self.config = self.root / "config.yaml"
        self.metrics = self.root / "metrics.jsonl"
        self.curves = self.root / "curves.png"
        self.images = self.root / "images"
        self.model = self.root / "model"

    def check_free(self, overwrite: bool) -> None:
        """Raises: InputError when the folder holds something that a new run would mix with."""
        if self.root.exists() and not self.root.is_dir():
            raise InputError(f"output_dir={self.root} is a file; need the path of a folder")
        if not self.root.is_dir() or not any(self.root.iterdir()):
            return
        if not (self.config.is_file() and self.metrics.is_file()):
            raise InputError(
                f"output_dir={self.root} holds files that no run wrote; need a new or empty folder; choose another"
            )
        if not overwrite:
            raise InputError(
                f"output_dir={self.root} already holds a run; choose another with --output_dir, "
                "or replace it with --overwrite=true"
            )

    def create(self, config: TrainConfig) -> None:
        """Begin an empty run. Of an earlier one only what a run writes is removed, whatever else lies there."""
        self.check_free(config.overwrite)
        for path in (self.images, self.model, self.root / self.TRACKER):
            if path.is_dir():
                shutil.rmtree(path)
        for path in (self.config, self.metrics, self.curves):
            path.unlink(missing_ok=True)
        self.images.mkdir(parents=True)
        self.config.write_text(to_yaml(config), encoding="utf-8")
        self.metrics.touch()

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")


def to_yaml(config: TrainConfig) -> str:
    """The recipe as `sdvae train --config` reads it."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False)
