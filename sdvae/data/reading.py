"""How image files are read: one set of options for every command."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from sdvae.errors import InputError, one_line
from sdvae.storage import Storage, StorageError

Color = Literal["srgb", "raw"]

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels
MAX_PIXELS = 178_956_970  # Pillow's own limit: half a gigabyte of RGB


class ImageError(InputError):
    """A file cannot be used. The message is only the reason; the caller adds the name of the file."""


def read_stored(storage: Storage, name: str, start: int = 0, size: int | None = None) -> bytes:
    """The bytes of a file, or only `size` of them from `start` on.

    Raises:
        ImageError: when this file cannot be read.
        StorageError: when a bucket does not answer, which says nothing about this file.
    """
    try:
        return storage.read(name, start, size)
    except StorageError:
        raise
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or one_line(error)}") from error


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What `read_image` makes of a file, and which files it refuses.

    Attributes:
        channels: 3 for mode "RGB", 1 for "L", 4 for "RGBA": straight alpha, opaque where a file has none.
        background: RGB in 0..255, the colour behind transparent parts; not used if alpha is kept.
        min_side: the smallest permitted length of the shorter side, in pixels; None is 1, and half of the resolution
            for images that are cropped to one. Images that are enlarged more than twice teach the decoder to blur.
        max_pixels: the largest permitted number of pixels; None is MAX_PIXELS. The header is checked before anything is
            decoded.
        color: "srgb" converts colours to sRGB (see `sdvae.data.color`); "raw" takes the numbers in the file as they
            are, which is what versions without this option did.
    """

    channels: int = 3
    background: tuple[int, int, int] = (255, 255, 255)
    min_side: int | None = None
    max_pixels: int | None = None
    color: Color = "srgb"

    def __post_init__(self) -> None:
        if self.channels not in MODES:
            raise InputError(f"channels is {self.channels}; need 1 (grey), 3 (RGB) or 4 (RGBA)")

    def check_side(self, width: int, height: int) -> None:
        """Refuse an image whose shorter side is less than `min_side`.

        Args:
            width: pixels, in the file.
            height: pixels, in the file.

        Raises:
            ImageError: when it is.
        """
        need = max(self.min_side or 1, 1)
        if min(width, height) < need:
            raise ImageError(f"too small: {width} x {height} pixels, the shorter side needs {need}")

    def for_crops(self, resolution: int) -> ReadOptions:
        """The same options for images that are cropped to `resolution` x `resolution`: with a number as `min_side`."""
        if resolution < 1:
            raise InputError(f"resolution is {resolution}; need at least 1")
        return self if self.min_side is not None else dataclasses.replace(self, min_side=max(resolution // 2, 1))
