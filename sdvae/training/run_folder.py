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
    """config.yaml, metrics.jsonl, images/, tracker logs and model/ under one folder.

    Only the main process writes; `create` belongs to it alone.
    """

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
        if not self.config.is_file():
            raise InputError(
                f"output_dir={self.root} holds files that no run wrote; need a new or empty folder; choose another"
            )
        if not overwrite:
            raise InputError(
                f"output_dir={self.root} already holds a run; choose another with --output_dir, "
                "or replace it with --overwrite=true"
            )

    def create(self, config: TrainConfig) -> None:
        """Begin an empty run; an earlier one, which `check_free` let pass, is removed."""
        if self.root.is_dir():
            shutil.rmtree(self.root)
        self.images.mkdir(parents=True)
        self.config.write_text(to_yaml(config), encoding="utf-8")
        self.metrics.touch()

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def to_yaml(config: TrainConfig) -> str:
    """The recipe as `sdvae train --config` reads it."""
    plain = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists
    return yaml.safe_dump(plain, sort_keys=False)
