"""Decoding image files.

What `read_image` does with each kind of file; docs/images.md has more, and how other readers differ:

- The format is recognised by the content and never by the file name's extension (`sdvae/data/signatures.py`). A layout
  that has not been compared with an independent reader is refused as «not supported» (`sdvae/data/containers.py`).
- The EXIF orientation is applied, all eight values of it; in AVIF, `irot` and `imir` in its stead.
- Alpha is composited on `background`, or kept where `channels` is 4, never dropped: RGBA, LA, PA, premultiplied
  alpha, palettes with transparency, and the single transparent colour (tRNS) of grey and RGB PNGs.
- 16-bit grey is scaled, 0 -> 0 and 65535 -> 255, and rounded. For 16-bit colour, Pillow takes the high byte, which
  differs from that by at most one level. 32-bit integers count as 16-bit if all values fit, and floats as fractions if
  all lie in [0, 1]; otherwise the range from minimum to maximum is stretched to 0..255. No value is clipped.
- CMYK, YCbCr, LAB and HSV are converted. `sdvae.data.color` says how colours become those of sRGB.
- 1-bit and grey become three equal channels, or stay grey where `channels` is 1; colour becomes ITU-R 601-2 luma.
- An animation gives its first frame, a file of several pages its first page, and an icon file its largest image.
- Broken metadata do not cost the picture.
- A damaged file raises `ImageError` if the damage can be detected. JPEG and WebP have no checksum, so a file with a
  flipped bit may still decode. PNG has checksums; those of the pixels, which Pillow ignores, are compared here. If a
  PNG lacks its last rows, they are black: finding out would take a second decompression.
"""

from __future__ import annotations

import io
import itertools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike

import numpy as np
from PIL import Image
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, COLORMAP, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile

from sdvae.data.color import profile_of, to_srgb
from sdvae.data.containers import prepare
from sdvae.data.libtiff import libtiff_errors
from sdvae.data.reading import MAX_PIXELS, MODES, ImageError, ReadOptions
from sdvae.data.signatures import format_of
from sdvae.errors import one_line

_BAND_PIXELS = 2**18

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


def read_image(data: bytes | str | PathLike[str], options: ReadOptions = ReadOptions()) -> Image.Image:
    """Decode the image in a file and turn it upright. The module's docstring says how each kind of file is treated.

    Args:
        data: the bytes of the file, or its path.
        options: what it becomes, and which files are refused.

    Returns:
        An image of mode "RGB", "L" or "RGBA", without metadata except `info["orientation"]`: how the pixels were
        turned, as one of EXIF's eight numbers.

    Raises:
        ImageError: when the file is not an image, is damaged, or exceeds a limit; the message is the reason.
    """
    if not isinstance(data, bytes):
        data = read_file(data)
    kind = format_of(data)
    errors: list[str] = []
    try:
        data = prepare(data, kind)
        with libtiff_errors() as errors:
            image = _open(data, kind)
            _check_size(image.size, options)
            image.load()
        if errors:
            raise ImageError(_libtiff_says(errors))
        if kind == "PNG" and "transparency" in image.info:
            _rescale_transparency(image, bit_depth=data[24])
        if kind == "TIFF" and image.mode == "P":
            _rescale_palette(image)
        # Read after `load`: PNG and WebP files may hold EXIF data after the pixels, and Pillow's TIFF reader turns the
        # image itself and removes the tag.
        orientation = _exif_orientation(image)
        profile = profile_of(image, data) if options.color == "srgb" else None
        image = _to_mode(image, profile, MODES[options.channels], options.background)
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # for a damaged file, Pillow's plugins raise exceptions of any class
        raise ImageError(_libtiff_says(errors) if errors else _reason(kind, error)) from error
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


def _open(data: bytes, kind: str) -> Image.Image:
    """Read the header.

    Pillow's plugins are called directly. `Image.open` would try unwanted formats, and compare the size with a limit
    that is global to the process. The plugin for JPEG is not the registered one, which also parses the list of further
    pictures of a multi-picture file.
    """
    Image.init()  # registers the plugins, once
    if kind not in Image.OPEN:
        raise ImageError(f"not supported: this Pillow has no {kind} decoder; need another build of Pillow")
    factory = JpegImageFile if kind == "JPEG" else Image.OPEN[kind][0]
    return factory(io.BytesIO(data), "")


def _exif_orientation(image: Image.Image) -> int:
    """The orientation of EXIF, or 1. Pillow would take that of XMP if EXIF has none; other readers do not."""
    for key in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF data raise exceptions of any class, and are no reason to refuse the pixels
        return 1


def _libtiff_says(errors: list[str]) -> str:
    return f"damaged TIFF file: libtiff says «{one_line(Exception(errors[0]))}»"


# What Pillow says when it lacks a feature, in the words of its plugins.
_UNSUPPORTED = re.compile(r"(?i)\b(unsupported|unknown|unimplemented|not supported|cannot handle|not installed)\b")


def _reason(kind: str, error: Exception) -> str:
    """Say in a sentence what an exception of Pillow's means."""
    text = one_line(error)
    if isinstance(error, NotImplementedError) or _UNSUPPORTED.search(text):
        return f"not supported: a kind of {kind} that Pillow does not read ({text}); convert to PNG or JPEG"
    if kind == "AVIF":
        return f"damaged AVIF file: libavif says «{text.removeprefix('Failed to decode image: ')}»"
    if "truncated" in text.lower() or isinstance(error, (EOFError, struct.error, IndexError)):
        return f"damaged {kind} file: truncated, it ends before the picture does"
    if "decoder error" in text or "decoding error" in text or "broken data stream" in text or "buffer overrun" in text:
        return f"damaged {kind} file: broken data stream, the pixels cannot be decoded"
    return f"damaged {kind} file: {text}"


def _check_size(size: tuple[int, int], options: ReadOptions) -> None:
    width, height = size
    max_pixels = options.max_pixels or MAX_PIXELS
    if width * height > max_pixels:
        raise ImageError(f"too large: {width} x {height} pixels, at most {max_pixels} in all are decoded")
    options.check_side(width, height)


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


def _rescale_palette(image: Image.Image) -> None:
    """Read a TIFF's palette as 8-bit numbers if all are below 256, as libtiff does: Pillow takes the high bytes."""
    assert isinstance(image, TiffImageFile)
    palette = image.tag_v2[COLORMAP]
    if max(palette) < 256:
        image.putpalette(bytes(palette), "RGB;L")


def _to_mode(image: Image.Image, profile: bytes | None, mode: str, background: tuple[int, int, int]) -> Image.Image:
    """Convert piece by piece: of a large image, little more than itself and the result is in memory."""
    deep = _deep_scale(image)
    if profile is not None:
        pixel = _to_8_bits(image.crop((0, 0, 1, 1)), deep)
        if to_srgb(pixel, profile) is pixel:  # sRGB's own, or one that cannot be used, which is said once an image
            profile = None
    if image.mode == mode and profile is None and not image.has_transparency_data:
        return image
    pieces = (_convert(_to_8_bits(band, deep), profile, mode, background) for band in _bands(image))
    first = next(pieces)
    if first.size == image.size:
        return first
    result = Image.new(mode, image.size)
    top = 0
    for piece in itertools.chain([first], pieces):
        result.paste(piece, (0, top))
        top += piece.height
    return result


def _to_8_bits(image: Image.Image, deep: _DeepScale | None) -> Image.Image:
    image = image if deep is None else deep.to_bytes(image)
    return image.convert("LA") if image.mode == "La" else image  # Pillow has no direct way from there to RGBA


def _convert(image: Image.Image, profile: bytes | None, mode: str, background: tuple[int, int, int]) -> Image.Image:
    if profile is not None:
        image = to_srgb(image, profile)
    if mode == "RGBA":
        return _straight(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.new("RGB", image.size, background)
        image.paste(rgba, mask=rgba)
    if mode == "L" and image.mode in ("1", "L"):
        return image.convert("L")
    image = image.convert("RGB") if image.mode != "RGB" else image
    return image.convert("L") if mode == "L" else image


def _straight(image: Image.Image) -> Image.Image:
    """As "RGBA". What is fully transparent becomes black, as when Pillow resizes: its colour was never meant."""
    if not image.has_transparency_data:
        return image.convert("RGB").convert("RGBA")  # Pillow has no direct way from CMYK and LAB
    rgba = image.convert("RGBA")
    visible = rgba.getchannel("A").point([0] + [255] * 255)
    return Image.composite(rgba, Image.new("RGBA", rgba.size, (0, 0, 0, 0)), visible)


@dataclass(frozen=True)
class _DeepScale:
    """How grey of more than 8 bits becomes bytes."""

    black: float  # the value that becomes 0
    white: float  # the value that becomes 255; less than `black` where a TIFF file says that zero is white
    unsigned: bool  # Pillow's "I" is signed, but 2^31 and more are meant if they seem negative

    def values(self, image: Image.Image) -> np.ndarray:
        """The numbers of an image, (H, W)."""
        values = np.asarray(image)
        return values.view(np.uint32) if self.unsigned else values

    def to_bytes(self, image: Image.Image) -> Image.Image:
        """Convert an image to "L", or to "LA" if one value is transparent."""
        values = self.values(image)
        gain = 255.0 / (self.white - self.black) if self.white != self.black else 0.0  # a single value becomes black
        deep = Image.fromarray(np.rint((values - self.black) * gain).astype(np.uint8))
        if "transparency" in image.info:
            alpha = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
            return Image.merge("LA", (deep, Image.fromarray(alpha)))
        return deep


def _deep_scale(image: Image.Image) -> _DeepScale | None:
    """The scale of an image of grey with more than 8 bits; None for another.

    Raises:
        ImageError: when there are NaN or infinite values.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return None
    bits, inverted, unsigned = 16, False, False
    if isinstance(image, TiffImageFile):
        (bits,) = image.tag_v2[BITSPERSAMPLE]
        inverted = image.tag_v2[PHOTOMETRIC_INTERPRETATION] == 0
        unsigned = image.mode == "I" and bits == 32 and image.tag_v2.get(SAMPLEFORMAT, (1,)) == (1,)
    scale = _DeepScale(0.0, 1.0, unsigned)
    low, high = np.inf, -np.inf
    for band in _bands(image):
        values = scale.values(band)
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        if not np.isfinite(low + high):
            raise ImageError("holds NaN or infinite values")
    full = 1.0 if image.mode == "F" else 2.0 ** min(bits, 16) - 1
    if low >= 0.0 and high <= full:
        low, high = 0.0, full
    if inverted:
        low, high = high, low
    return replace(scale, black=low, white=high)


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    """The image in pieces of about `_BAND_PIXELS` pixels, from top to bottom; the image itself if it is not larger."""
    rows = max(1, _BAND_PIXELS // image.width)
    if rows >= image.height:
        yield image
        return
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))
