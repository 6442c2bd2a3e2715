"""Parsing arguments and YAML files into dataclasses. An argument that does not fit gives a message of one line."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from sdvae.errors import InputError, one_line
from sdvae.io import refuse_url

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # each field's docstring is its help text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")


def parse_options(
    options: type[Options],
    argv: Sequence[str],
    program: str,
    summary: str | None = None,
    positional: Collection[str] = (),
    urls: Collection[str] = (),
) -> Options:
    """Parse arguments into a dataclass: an option for each field, and `--config FILE` for a YAML file of options.

    The command line overrides files, and a later file overrides an earlier one. Several values of an option are written
    `--key A B` or `--key=[A,B]`.

    Args:
        options: the dataclass. The type of a field says which values it takes, and its docstring is its help text.
        argv: the arguments.
        program: the program's name, for messages.
        summary: what the program does, for its help.
        positional: fields that are given without a name, in this order. Those with a default are options as well.
        urls: dotted names of the fields that may hold a URL. In any other one it is refused.

    Raises:
        InputError: for an unknown key, with the known key nearest to it, for a value of the wrong type, or for a URL.
    """
    fields = {field.name: field for field in dataclasses.fields(options)}
    hints = dict(_hints(options))
    known = set(hints)
    files, others = ([], list(argv)) if "config" in fields else _files_apart(argv)
    for key, origin in _given_keys(files, others, known):
        if key not in known and key not in ("print_config", "help"):
            hint = suggest(key, known) or f"see {program} --help"
            raise InputError(f"unknown key {key!r} in {origin}; {hint}")

    for file in files:
        refuse_url(file, "config")
    parser = ArgumentParser(prog=program, description=summary, exit_on_error=False)
    if "config" not in fields:
        parser.add_argument("--config", action="config", help="options in YAML; may be given more than once")
    unnamed = {name for name in positional if fields[name].default is dataclasses.MISSING}
    parser.add_class_arguments(options, skip=unnamed)
    helps = _helps(options)
    for name in positional:
        item, several = _item_type(hints[name])
        if name in unnamed:
            settings: dict[str, Any] = {"nargs": "+"} if several else {}
        else:  # no default here, since it would replace the value of the option of the same name
            settings = {"nargs": "*" if several else "?", "default": argparse.SUPPRESS}
        parser.add_argument(name, type=item, help=helps[name], **settings)
    try:
        arguments: Namespace = parser.parse_args([*(f"--config={file}" for file in files), *_joined(hints, others)])
    except ArgumentError as error:
        raise InputError(f"{_plain(one_line(error))} (see {program} --help)") from error
    for key, text in _texts(arguments.as_dict()):
        if key not in urls:
            refuse_url(text, key)
    # `instantiate` makes nested dataclasses. Commands with positional arguments have none, and jsonargparse cannot
    # instantiate an argument that is both positional and an option.
    instances = arguments if positional else parser.instantiate(arguments)
    values = {name: getattr(instances, name) for name in fields}
    return options(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


_WRONG_VALUE = re.compile(
    r'Parser key "(?P<key>[^"]+)": '
    r"(?:Expected a (?P<one>.+)\. Got value: |.*Subtypes: \[(?P<several>.+?)\] Errors: .* Given value: )(?P<value>.*)"
)
_TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "<class 'str'>": "text",
    "<class 'NoneType'>": "null",
}


def _plain(reason: str) -> str:
    """jsonargparse's message about a value of a wrong type, without Python's names for types; others as they are."""
    wrong = _WRONG_VALUE.fullmatch(reason)
    if wrong is None:
        return reason
    need = wrong["one"] or wrong["several"].replace(", <class", " or <class").replace(", tuple", " or tuple")
    for name, meaning in _TYPES.items():
        need = need.replace(name, meaning)
    need = need.replace("tuple with", "a list with")
    need = re.sub(r"tuple\[\w+, \.\.\.\]", "several as in --key A B", need)
    return f"got {wrong['key']}={wrong['value']}; need {need.replace('typing.Literal', 'one of ')}"


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str | Path]]:
    """(dotted key, text) of every string and path in the values of options."""
    if isinstance(value, str | Path):
        yield key, value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else name)


def _item_type(hint: Any) -> tuple[Any, bool]:
    """(T, True) of `tuple[T, ...]`, and (hint, False) of any other type."""
    arguments = get_args(hint)
    return (arguments[0], True) if arguments[-1:] == (Ellipsis,) else (hint, False)


def _joined(hints: Mapping[str, Any], argv: Sequence[str]) -> list[str]:
    """The same arguments, with `--key A B` written as `--key=[A,B]` for the options that take several values."""
    items = {key: item for key, hint in hints.items() if (item := _item_of_several(hint)) is not None}
    joined, rest = [], deque(argv)
    while rest:
        argument = rest.popleft()
        joined.append(argument)
        key = argument.removeprefix("--")
        if key == argument or key not in items or not rest or rest[0].startswith("[") or rest[0] == "null":
            continue
        item, may_be_one = items[key]
        values = []
        while rest and not rest[0].startswith("--"):
            values.append(rest.popleft())
        if len(values) == 1 and may_be_one:
            joined.append(values[0])
        elif values:
            joined[-1] = f"{argument}=[{', '.join(json.dumps(value) if item is str else value for value in values)}]"
    return joined


def _item_of_several(hint: Any) -> tuple[Any, bool] | None:
    """(type of an item, whether one item may stand alone) of a type that is or may be a tuple; None of any other."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    items = [get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple]
    return (items[0], items[0] in kinds) if items else None


def _hints(options: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of all fields: `loss`, `loss.kl_weight`, …"""
    for name, hint in get_type_hints(options).items():
        yield prefix + name, hint
        if dataclasses.is_dataclass(hint):
            yield from _hints(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


def _helps(options: type) -> dict[str, str | None]:
    """The docstring of each field."""
    classes = [cls for cls in reversed(options.__mro__) if dataclasses.is_dataclass(cls)]
    return {entry.arg_name: entry.description for cls in classes for entry in parse_from_object(cls).params}


def _files_apart(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files given as `--config FILE`, and the other arguments."""
    files, others, arguments = [], [], iter(argv)
    for argument in arguments:
        if argument == "--config":
            files.append(next(arguments, ""))
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        else:
            others.append(argument)
    return files, others


def _given_keys(files: Sequence[str], argv: Sequence[str], known: Set[str]) -> Iterator[tuple[str, str]]:
    """(dotted key, where it is written) of every option and of every key in the YAML files."""
    for argument in argv:
        if argument.startswith("--") and argument != "--":
            yield argument[2:].partition("=")[0], "the command line"
    for file in files:
        if Path(file).is_file():  # the parser reports other paths
            yield from ((key, file) for key in _yaml_keys(Path(file), known))


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
    """The question «did you mean …?» with the known name nearest to `name`, or an empty string if none is near."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not nearest:  # the right field in the wrong section
        leaf = name.rsplit(".", 1)[-1]
        nearest = [key for key in known if key.rsplit(".", 1)[-1] == leaf][:1]
    return f"did you mean {nearest[0]!r}?" if nearest else ""
