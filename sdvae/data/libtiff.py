"""The error messages of libtiff, which decodes TIFF files for Pillow.

libtiff writes its errors to stderr, without the name of the file. Some of them mean that pixels are wrong although
Pillow returns an image: a fax strip that breaks off, for one. Here they are collected for the file that a thread is
decoding. Where libtiff is linked into Pillow and cannot be reached (Windows), they still go to stderr.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p)  # module, format, va_list
_LONGEST = 200  # characters of a message
_thread = threading.local()


@contextmanager
def libtiff_errors() -> Iterator[list[str]]:
    """Collect what libtiff reports in this thread; the first message is kept, since the others follow from it."""
    _install()
    messages: list[str] = []
    _thread.messages = messages
    try:
        yield messages
    finally:
        _thread.messages = None


@functools.cache
def _install() -> object:
    """Set libtiff's error handler, once a process. The cache keeps the handler alive."""
    try:
        set_handler = ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler
    except (OSError, AttributeError):
        return None
    handler = _HANDLER(_collect)
    set_handler.argtypes, set_handler.restype = [_HANDLER], ctypes.c_void_p
    set_handler(handler)
    return handler


def _collect(module: bytes | None, template: bytes, arguments: int) -> None:
    text = ctypes.create_string_buffer(_LONGEST)
    ctypes.pythonapi.PyOS_vsnprintf(text, ctypes.c_size_t(_LONGEST), template, ctypes.c_void_p(arguments))
    message = text.value.decode(errors="replace")
    messages: list[str] | None = getattr(_thread, "messages", None)
    if messages is None:  # somebody else uses Pillow in this process
        sys.stderr.write(f"{(module or b'libtiff').decode(errors='replace')}: {message}\n")
    elif not messages:
        messages.append(message)
