"""Reading a run's recipe from its config.yaml."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from sdvae.errors import InputError, one_line
from sdvae.training.config import TrainConfig


def read_recipe(path: Path) -> TrainConfig:
    """The recipe in a run folder's config.yaml. Fields that the file lacks get their defaults.

    Raises:
        InputError: for an unknown field, or a value that does not fit.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    try:
        return TrainConfig(**vars(parser.instantiate(parser.parse_string(path.read_text(encoding="utf-8")))))
    except ArgumentError as error:
        raise InputError(f"{path} does not hold a recipe of `sdvae train`: {one_line(error)}") from error
