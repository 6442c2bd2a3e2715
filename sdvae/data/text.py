"""Decoding text files beside images: captions."""

from __future__ import annotations

import codecs
import logging

from sdvae.io import printable

logger = logging.getLogger(__name__)
_said: set[tuple[str, str]] = set()  # what has been warned of: (source, kind)


def decode_text(data: bytes, name: str, source: str) -> str:
    """The text of a file, without a byte-order mark and without white space around it. Lines end with a line feed.

    Args:
        data: the file's bytes: UTF-8, or UTF-16 with a byte-order mark. Anything else is decoded as UTF-8, with the
            replacement character for each byte that does not belong to it, and a warning.
        name: the file's name, for the warning.
        source: a name for all files among which only the first one of this kind is warned of.
    """
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        text = data.decode(encoding, "replace")
        warn_once(source, "encoding", f"{printable(name)} is not UTF-8 ({error.reason}); some characters are lost")
    return text.replace("\r\n", "\n").strip()


def warn_once(source: str, kind: str, text: str) -> None:
    """Log a warning, but only the first of its kind about a source."""
    if (source, kind) not in _said:
        _said.add((source, kind))
        logger.warning("%s; others like it in %s are not named", text, printable(source))
