"""Reading a recipe: from the command line, and from the config.yaml of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdvae.options import parse_options
from sdvae.training.config import TrainConfig


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """Parse YAML files and dotted options into a training recipe, as `parse_options` does.

    Raises:
        InputError: as `parse_options` does.
    """
    return parse_options(TrainConfig, argv, "sdvae train")


def read_recipe(path: Path) -> TrainConfig:
    """The recipe in a run folder's config.yaml. Fields that the file lacks get their defaults.

    Raises:
        InputError: for an unknown field, or a value that does not fit.
    """
    return parse_train_config(["--config", str(path)])
