"""Reading a recipe: from the command line, and from the config.yaml of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import yaml

from sdvae.options import parse_options
from sdvae.training.config import DataConfig, TrainConfig

# What the fields meant to a run whose recipe lacks them, where that is not the default of today.
BEFORE = TrainConfig(data=DataConfig(color="raw"))


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """Parse YAML files and dotted options into a training recipe, as `parse_options` does.

    Raises:
        InputError: as `parse_options` does.
    """
    return parse_options(TrainConfig, argv, "sdvae train")


def read_recipe(path: Path) -> TrainConfig:
    """The recipe in a run folder's config.yaml. Fields that the file lacks get their values in `BEFORE`.

    Raises:
        InputError: for an unknown field, or a value that does not fit.
    """
    recipe = parse_train_config(["--config", str(path)])
    if "color" in (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("data", {}):
        return recipe
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, color=BEFORE.data.color))
