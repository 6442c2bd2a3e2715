"""Decoding image files.

What `read_image` does with each kind of file:

- The format is recognised by the content and never by the file name's extension. `FORMATS` lists what is read. Formats
  without a signature (TGA), vector formats and formats whose reader starts other programs (EPS, WMF) are refused.
- The EXIF orientation is applied, all eight values of it.
- Alpha is composited on `background`, never dropped: RGBA, LA, PA, premultiplied alpha, palettes with
  transparency, and the single transparent colour (tRNS) of grey and RGB PNGs.
- 16-bit grey is scaled, 0 -> 0 and 65535 -> 255, and rounded. For 16-bit colour, Pillow takes the high byte, which
  differs from that by at most one level. 32-bit integers count as 16-bit if all values fit, and floats as fractions if
  all lie in [0, 1]; otherwise the range from minimum to maximum is stretched to 0..255. No value is clipped.
- CMYK, YCbCr, LAB and HSV are converted. `sdvae.data.color` says how colours become those of sRGB.
- 1-bit and grey become three equal channels, or stay grey where `channels` is 1; colour becomes ITU-R 601-2 luma.
- An animation gives its first frame, a file of several pages its first page, and an icon file its largest image.
- A damaged file raises `ImageError` if the damage can be detected. JPEG and WebP have no checksum, so a file with a
  flipped bit may still decode. PNG has checksums; those of the pixels, which Pillow ignores, are compared here. If a
  PNG lacks its last rows, they are black: finding out would take a second decompression.
"""

from __future__ import annotations

import io
import zlib
from os import PathLike

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from sdvae.data.color import profile_of, to_srgb
from sdvae.data.reading import MAX_PIXELS, ImageError, ReadOptions
from sdvae.errors import one_line

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000", "PPM"),
    *("PSD", "QOI", "ICO", "ICNS", "DDS", "SGI", "PCX"),
)

# PIL.ImageOps.exif_transpose does the same, but it also rewrites the rest of the EXIF data, and raises an exception if
# a value there has the wrong type. Cameras and editors write such files, and their pixels can be read.
_ORIENTATION_TAG = 0x0112  # EXIF 2.32, 4.6.4
_UNDO_ORIENTATION = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def read_image(data: bytes | str | PathLike[str], options: ReadOptions = ReadOptions()) -> Image.Image:
    """Decode the image in a file and turn it upright. The module's docstring says how each kind of file is treated.

    Args:
        data: the bytes of the file, or its path.
        options: what it becomes, and which files are refused.

    Returns:
        An image of mode "RGB" or "L", without metadata except `info["orientation"]`: how the pixels were turned, as one
        of EXIF's eight numbers.

    Raises:
        ImageError: when the file is not an image, is damaged, or exceeds a limit; the message is the reason.
    """
    if not isinstance(data, bytes):
        data = read_file(data)
    if not data:
        raise ImageError("the file is empty")

    image = _open(data)
    kind = image.format
    try:
        _check_size(image, options.min_side or 1, options.max_pixels or MAX_PIXELS)
        if kind == "PNG":
            _check_png(data)
        image.load()
        if kind == "PNG" and "transparency" in image.info:
            _rescale_transparency(image, bit_depth=data[24])
        # Read after `load`: PNG and WebP files may hold EXIF data after the pixels, and Pillow's TIFF reader turns the
        # image itself and removes the tag.
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        profile = profile_of(image, data) if options.color == "srgb" else None
        image = _to_rgb_or_grey(image, profile, options.channels, options.background)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # for a damaged file, Pillow's plugins raise exceptions of any class
        raise ImageError(f"damaged {kind} file: {one_line(error)}") from error
    if orientation in _UNDO_ORIENTATION:
        image = image.transpose(_UNDO_ORIENTATION[orientation])
    # EXIF data must not stay here, since a later reader would turn the image again.
    image.info = {"orientation": int(orientation) if orientation in _UNDO_ORIENTATION else 1}
    return image


def read_file(path: str | PathLike[str]) -> bytes:
    """All bytes of a file.

    Raises:
        ImageError: when it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or error}") from error


def _open(data: bytes) -> Image.Image:
    """Read the header.

    Pillow's plugins are called directly. `Image.open` would try unwanted formats, and compare the size with a limit
    that is global to the process.
    """
    Image.init()  # registers the plugins, once
    failure = ""
    for kind in FORMATS:
        if kind not in Image.OPEN:  # a Pillow built without this codec
            continue
        factory, accept = Image.OPEN[kind]
        try:
            if accept is None or accept(data[:16]) is True:
                return factory(io.BytesIO(data), "")
        except MemoryError:
            raise
        except Exception as error:
            failure = failure or f"damaged {kind} file: {one_line(error)}"
    raise ImageError(failure or f"not an image of a known format: starts with {data[:12]!r}")


def _check_size(image: Image.Image, min_side: int, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(f"too large: {width} x {height} pixels, at most {max_pixels} in all are decoded")
    if min(width, height) < max(min_side, 1):
        raise ImageError(f"too small: {width} x {height} pixels, the shorter side needs {max(min_side, 1)}")


def _check_png(data: bytes) -> None:
    """Compare the checksums of the pixel data. Pillow ignores them, so flipped bits would decode to a wrong picture."""
    view = memoryview(data)
    start = len(_PNG_SIGNATURE)
    while start + 12 <= len(data):
        length = int.from_bytes(view[start : start + 4], "big")
        end = start + 8 + length  # length, kind, content; then 4 bytes of checksum over kind and content
        if end + 4 > len(data):
            return  # cut off; decoding fails if pixels are missing
        if view[start + 4 : start + 8] == b"IDAT":
            if zlib.crc32(view[start + 4 : end]) != int.from_bytes(view[end : end + 4], "big"):
                raise ImageError("damaged PNG file: wrong checksum of the pixel data")
        elif view[start + 4 : start + 8] == b"IEND":
            return
        start = end + 4


def _rescale_transparency(image: Image.Image, bit_depth: int) -> None:
    """Bring a PNG's transparent colour to the scale of the pixels.

    Pillow scales 2- and 4-bit grey up and 16-bit colour down, but leaves the transparent colour at the file's depth.
    Without this, no pixel would match it.
    """
    color = image.info["transparency"]
    if image.mode == "L" and bit_depth in (2, 4):
        image.info["transparency"] = color * 255 // (2**bit_depth - 1)
    elif image.mode == "RGB" and bit_depth == 16:
        image.info["transparency"] = tuple(value >> 8 for value in color)


def _to_rgb_or_grey(
    image: Image.Image, profile: bytes | None, channels: int, background: tuple[int, int, int]
) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _deep_grey_to_bytes(image)
    if image.mode == "La":  # Pillow has no direct way from here to RGBA
        image = image.convert("LA")
    if profile is not None:
        image = to_srgb(image, profile)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", image.size, background)
        image.paste(rgba, mask=rgba)
    if channels == 1 and image.mode in ("1", "L"):
        return image.convert("L")
    image = image.convert("RGB") if image.mode != "RGB" else image
    return image.convert("L") if channels == 1 else image


def _deep_grey_to_bytes(image: Image.Image) -> Image.Image:
    """Convert grey of 16 or 32 bits or floats to "L", or to "LA" if one value is transparent."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ImageError("holds NaN or infinite values")
    low, high = float(values.min()), float(values.max())
    top = 1.0 if image.mode == "F" else 65535.0
    if low >= 0.0 and high <= top:
        low, high = 0.0, top
    gain = 255.0 / (high - low) if high > low else 0.0  # an image of a single value becomes black
    deep = Image.fromarray(np.rint((values - low) * gain).astype(np.uint8))
    if "transparency" in image.info:
        alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        return Image.merge("LA", (deep, Image.fromarray(alpha)))
    return deep
