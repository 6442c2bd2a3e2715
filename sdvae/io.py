"""Files and folders: written whole or not at all, read with a clear refusal, compared and named."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sdvae.errors import InputError, one_line

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def left_beside(target: Path) -> list[Path]:
    """What processes that were killed while `replacing` a target left beside it."""
    return list(target.parent.glob(f".{glob.escape(target.name)}.tmp-*"))


def make_folder(folder: Path) -> None:
    """For what takes long to compute and is written later: what is wrong with the folder shows now.

    Raises: InputError where a file is in the way, or nothing may be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder} is a file or below one; need a folder; choose another with --output") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} may not be written to; need a folder that may; choose another with --output")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target` to write to, which takes its name only when the block ends well.

    Works for a file and for a folder. An existing target stays whole until the new one is on disk.

    Raises: OSError when the disk does not take it; safetensors and torch have errors of their own for that.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")
    try:
        yield temporary
        _flush(temporary)
        if temporary.is_dir() and target.is_dir():  # os.replace only takes an empty folder's place
            retired = target.with_name(f".{target.name}.old-{uuid.uuid4().hex}")
            os.replace(target, retired)
            try:
                os.replace(temporary, target)
            except OSError:
                os.replace(retired, target)
                raise
            shutil.rmtree(retired)
        else:
            os.replace(temporary, target)
        _sync(target.parent)
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(f"{target} cannot be written: {one_line(error)}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    for inner in path.rglob("*") if path.is_dir() else ():
        _sync(inner)
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until the disk has it: a rename that survives a power cut must not name an empty file."""
    if os.name == "nt" and path.is_dir():  # Windows can not open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: InputError when the file is missing or holds something else."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; need a JSON object; check the path")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise InputError(f"{path} is not JSON ({one_line(error)}); get a whole copy") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; need a JSON object")
    return content


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    for block in iter(lambda: file.read(2**20), b""):
        digest.update(block)
    return digest.hexdigest()


def utf8(name: str) -> str:
    """A file's name may hold bytes that are no UTF-8; JSON, Parquet and labels take none."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def changed_fields(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    free: frozenset[str] = frozenset(),
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """«loss.kl_weight: 1e-06 -> 1e-05» for each field of two recipes that differs, but for the `free` ones.

    Args:
        free: dotted names of fields, or of sections, whose change changes nothing that is learned.
        defaults: what a field counts as that `before` lacks: an older version wrote it, which knew no other way.
    """
    flat_before, flat_after = flatten(defaults or {}) | flatten(before), flatten(after)
    return [
        f"{key}: {flat_before.get(key, 'unset')} -> {flat_after.get(key, 'unset')}"
        for key in sorted(flat_before.keys() | flat_after.keys())
        if flat_before.get(key, "unset") != flat_after.get(key, "unset")
        and key not in free
        and key.split(".")[0] not in free
    ]


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def version() -> str:
    """The version of the installed package."""
    return metadata.version("sdvae")
