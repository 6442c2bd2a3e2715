"""Files and folders: writing them completely or not at all, reading and comparing them."""

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

from sdvae.errors import InputError, escaped, one_line

TEMPORARY = ".*.tmp-*"  # the names of files and folders that are not complete yet
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # «owner/name» on the Hugging Face hub


_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # two letters or more, since C:/ is a drive of Windows


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether the path begins with a scheme, such as s3://. A `Path` has already made one slash of the two."""
    return _SCHEME.match(os.fspath(path)) is not None


def refuse_url(text: str | Path, what: str) -> None:
    """Refuse a URL where only a path or a name is understood, so that it does not become a folder such as «s3:».

    Args:
        text: what was given.
        what: the option's name, for the message.

    Raises:
        InputError: when it begins with a scheme, such as s3:// or file://.
    """
    if is_url(text):
        raise InputError(
            f"got {what}={text}; need a local path or a name, since URLs are not supported here; mount or copy the "
            "data, and give the local path"
        )


def temporary_beside(target: Path) -> Path:
    """A new path in the same folder, for content that is to be renamed to `target` when it is complete."""
    return target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")


def left_beside(target: Path) -> list[Path]:
    """Temporary files beside a target, left by processes that were killed while `replacing` it."""
    return list(target.parent.glob(f".{glob.escape(target.name)}.tmp-*"))


def make_folder(folder: Path) -> None:
    """Make a folder for results before a long computation, so that a fault of the folder shows at once.

    Raises:
        InputError: when a file is in the way, or the folder may not be written to.
    """
    refuse_url(folder, "folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder} is a file or below one; need a folder; choose another with --output") from error
    if not os.access(folder, os.W_OK):
        raise InputError(f"{folder} is not writable; need a writable folder; choose another with --output")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Replace a file or a folder by a complete new one, or leave it unchanged.

    Args:
        target: the path to replace, which may not exist yet. The old content stays until the new one is on disk.

    Yields:
        A temporary path beside it, for the block to write a file or folder to. It is renamed to `target` when the
        block ends without an exception, and removed otherwise.

    Raises:
        OSError: when writing fails, even if safetensors or torch raised another exception for that.
        InputError: when the target is a URL.
    """
    refuse_url(target, "target")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        yield temporary
        _make_readable(temporary)
        _flush(temporary)
        if temporary.is_dir() and target.is_dir():  # os.replace cannot replace a folder that holds something
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
        sync(target.parent)
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(f"{target} cannot be written: {one_line(error)}") from error
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _make_readable(path: Path) -> None:
    """Give files that only their owner can read the mode of any new file. safetensors 0.8 makes such files."""
    private = [file for file in (path, *path.rglob("*")) if file.is_file() and not file.stat().st_mode & 0o077]
    if private:
        new = temporary_beside(path)
        new.touch()
        for file in private:
            shutil.copymode(new, file)
        new.unlink()


def _flush(path: Path) -> None:
    for inner in path.rglob("*") if path.is_dir() else ():
        sync(inner)
    sync(path)


def sync(path: Path) -> None:
    """Wait until the content is on disk. Otherwise a power cut might keep the new name and lose the content."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: when the file is missing or holds something else.
    """
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
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def utf8(name: str) -> str:
    """A file's name as text for JSON, Parquet and labels. Different names give different texts.

    Bytes that are not UTF-8 become escapes such as \\xff. In a name that has such bytes, or that itself contains \\x,
    every backslash is doubled.
    """
    data = os.fsencode(name)
    text = _with_escapes(data)
    return _with_escapes(data.replace(b"\\", b"\\\\")) if "\\x" in text else text


def printable(name: str) -> str:
    """A file's name for a message on one line: other bytes than UTF-8, line breaks and such become escapes."""
    return escaped(_with_escapes(os.fsencode(name)))


def _with_escapes(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def changed_fields(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    free: frozenset[str] = frozenset(),
    defaults: Mapping[str, Any] | None = None,
) -> list[str]:
    """Compare two recipes.

    Args:
        before: the fields and sections of the first recipe; sections may be nested.
        after: the same for the second recipe.
        free: dotted names of fields, or names of sections, that may differ.
        defaults: values for fields that `before` lacks, because the version that wrote it did not have them.

    Returns:
        A line such as «loss.kl_weight: 1e-06 -> 1e-05» for each field that differs, except the free ones.
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
    """Nested sections as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether `folder` is a folder that is there, and `path` is the same or lies below it. URLs are only compared."""
    if is_url(folder):
        return f"{path}/".startswith(f"{str(folder).rstrip('/')}/")
    inner, outer = Path(path).expanduser().resolve(), Path(folder).expanduser().resolve()
    return outer.is_dir() and (inner == outer or outer in inner.parents)


def version() -> str:
    """The version of the installed package."""
    return metadata.version("sdvae")


def with_section(text: str, heading: str, content: str) -> str:
    """Markdown with the content of one second-level section replaced; a missing section is added at the end."""
    new = f"## {heading}\n\n{content}"
    pattern = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: f"{new}\n", text, count=1).rstrip("\n") + "\n"
    return f"{text.rstrip()}\n\n{new}"
