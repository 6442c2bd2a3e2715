"""Arguments and YAML files to frozen dataclasses; what does not fit is one line that names it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Sequence, Set
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from sdvae.errors import InputError, one_line
from sdvae.training.config import TrainConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # each field's docstring is its help text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """YAML files and dotted overrides to a recipe; later ones win. Raises: as `parse_fields`."""
    return parse_fields(TrainConfig, argv, "sdvae train")


def parse_fields(config_class: type[Config], argv: Sequence[str], program: str, first: str | None = None) -> Config:
    """Arguments to a frozen dataclass: an option for each field, `--config FILE` for many.

    Args: first: the field that takes what stands before the first option, if anything does.

    Raises: InputError for an unknown key, with the nearest known one, or for a value of the wrong type.
    """
    parser = ArgumentParser(prog=program, exit_on_error=False)
    parser.add_argument("--config", action="config", help="options in YAML; may be given more than once")
    parser.add_class_arguments(config_class)
    leading = () if first is None else tuple(takewhile(lambda argument: not argument.startswith("-"), argv))
    argv = argv[len(leading) :]
    known = set(_keys(config_class))
    for key, origin in _given_keys(argv, known):
        if key not in known and key not in ("config", "print_config", "help"):
            hint = suggest(key, known) or f"see {program} --help"
            raise InputError(f"unknown key {key!r} in {origin}; {hint}")
    instance = parser.instantiate(parse(parser, argv))
    values = {field.name: getattr(instance, field.name) for field in dataclasses.fields(config_class)}
    return config_class(**(values | {first: leading} if first and leading else values))


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    try:
        return parser.parse_args(list(argv))
    except ArgumentError as error:
        raise InputError(f"{one_line(error)} (see {parser.prog} --help)") from error


def _keys(config_class: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields: «loss», «loss.kl_weight», …"""
    for field in dataclasses.fields(config_class):
        yield prefix + field.name
        if dataclasses.is_dataclass(field.default_factory):
            yield from _keys(field.default_factory, f"{prefix}{field.name}.")


def _given_keys(argv: Sequence[str], known: Set[str]) -> Iterator[tuple[str, str]]:
    """(dotted key, where it stands) of every override and of every key in the YAML files."""
    for i, argument in enumerate(argv):
        if not argument.startswith("--"):
            continue
        key, _, value = argument[2:].partition("=")
        yield key, "the command line"
        if key == "config":
            path = Path(value or (argv[i + 1] if i + 1 < len(argv) else ""))
            if path.is_file():  # what is no file, the parser reports
                yield from ((name, str(path)) for name in _yaml_keys(path, known))


def _yaml_keys(path: Path, known: Set[str]) -> Iterator[str]:
    sections = {key.rsplit(".", 1)[0] for key in known if "." in key}

    def walk(node: dict[str, Any], prefix: str) -> Iterator[str]:
        for key, value in node.items():
            if f"{prefix}{key}" in sections and not isinstance(value, dict):
                raise InputError(f"{path}: {prefix}{key} is a section; need «key: value» lines below it, got {value!r}")
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {one_line(error)}") from error
    if content is None:
        return
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; need «key: value» lines")
    yield from walk(content, "")


def suggest(name: str, known: Iterable[str]) -> str:
    """«did you mean …?» for the known name nearest to `name`, or nothing."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not nearest:  # the right field under the wrong section
        leaf = name.rsplit(".", 1)[-1]
        nearest = [key for key in known if key.rsplit(".", 1)[-1] == leaf][:1]
    return f"did you mean {nearest[0]!r}?" if nearest else ""
