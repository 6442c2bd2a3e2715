"""Colours as sRGB, whatever colour space a file uses.

The numbers of a pixel mean a colour only together with a colour space. A file names it in one of these ways, of which
the first that is there decides:

- the cICP chunk of a PNG (Display P3, BT.2020), which stands above its profile;
- an ICC profile: of RGB, grey or CMYK;
- the nclx colours of an AVIF;
- EXIF's interoperability index R03: a camera that was set to Adobe RGB and wrote no profile (DCF 2.0).

Everything else is taken as sRGB, which is what files without a profile nearly always hold. A PNG's gAMA and cHRM chunks
are ignored, as libvips, OpenCV and Pillow ignore them: many programs wrote them with values that they did not mean.

Conversion is relative colorimetric with black point compensation, Photoshop's default: white becomes white, black
becomes black, and the colours that sRGB can show stay what they are; the others become the nearest on its border. For
profiles of three primaries, which most RGB profiles are, the other intents give the same.
"""

from __future__ import annotations

import io
import itertools
import logging
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from sdvae.data.reading import ImageError
from sdvae.errors import one_line

# A profile that changes no colour by more than this, in levels of 0..255, is taken as sRGB itself: the many variants of
# the sRGB profile differ by one level through rounding.
SAME = 1
PROFILES = 64  # transforms that are kept; those of CMYK take about 2 MB each

D65 = (0.3127, 0.3290)  # x, y
D50 = (0.9642, 1.0, 0.8249)  # X, Y, Z, as ICC rounds them
# ITU-T H.273, table 2: x and y of red, green and blue. All of these have the white point D65.
BT709 = ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060))
PRIMARIES = {
    1: BT709,
    2: BT709,  # «unspecified»
    5: ((0.640, 0.330), (0.290, 0.600), (0.150, 0.060)),
    6: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    7: ((0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),  # BT.2020
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),  # Display P3
}
ADOBE_RGB = ((0.640, 0.330), (0.210, 0.710), (0.150, 0.060))  # Adobe RGB (1998) color image encoding, 4.3.1
ADOBE_GAMMA = (563 / 256,)
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # IEC 61966-2-1, as ICC's function type 3
# H.273, table 3. Still images whose transfer is BT.709's are shown with sRGB's by browsers, and so they are read here.
CURVES = {1: SRGB_CURVE, 2: SRGB_CURVE, 4: (2.2,), 5: (2.8,), 6: SRGB_CURVE, 8: (1.0,), 13: SRGB_CURVE}
CURVES |= {14: SRGB_CURVE, 15: SRGB_CURVE}
HDR = {16: "PQ", 18: "HLG"}

_EXIF_IFD, _COLOR_SPACE, _INTEROP_IFD, _INTEROP_INDEX = 0x8769, 0xA001, 0xA005, 1
_SRGB = 1  # of _COLOR_SPACE
_SPACES = {"L": ("GRAY", "RGB "), "RGB": ("RGB ",), "CMYK": ("CMYK",)}  # of a profile, for each mode of an image

Point = tuple[float, float]

logger = logging.getLogger(__name__)
_unusable = itertools.count(1)


class _Conversion(NamedTuple):
    """What a profile does: nothing (it is sRGB's), `convert`, or nothing because of a `fault`."""

    convert: Callable[[Image.Image], Image.Image] | None = None
    fault: str = ""


def profile_of(image: Image.Image, data: bytes) -> bytes | None:
    """The ICC profile by which a file's colours are to be understood, made here if the file only names a colour space.

    Args:
        image: the loaded image, as Pillow's plugin returned it.
        data: the bytes of the file.

    Returns:
        The profile, or None if the colours are sRGB.

    Raises:
        ImageError: for HDR, whose colours sRGB cannot show.
    """
    codes = _png_codes(data) if image.format == "PNG" else None
    profile = image.info.get("icc_profile") if codes is None else None
    if profile:
        return profile
    if image.format == "JPEG2000":
        return next((box[3:] for box in _colr_boxes(data, b"jp2h") if box[:1] == b"\x02"), None)
    if image.format == "AVIF":
        boxes = _colr_boxes(data, b"meta", b"iprp", b"ipco")
        codes = next((struct.unpack_from(">HH", box, 4) for box in boxes if box[:4] == b"nclx" and len(box) >= 8), None)
    if codes is not None:
        return _coded_profile(*codes)
    return matrix_profile(ADOBE_RGB, ADOBE_GAMMA) if _is_adobe_rgb(image) else None


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an image of 8 bits to sRGB. Alpha is kept.

    Args:
        image: of any mode.
        profile: the ICC profile of its colours.

    Returns:
        The image itself if its profile is sRGB's or cannot be used, which is logged; otherwise one of mode "L", "RGB"
        or "RGBA".
    """
    if image.mode in ("1", "LAB"):  # black and white are the same everywhere; LAB has no need of a profile
        return image
    grey = image.getbands()[0] == "L"
    conversion = _conversion(profile, "L" if grey else "CMYK" if image.mode == "CMYK" else "RGB")
    if conversion.fault:
        _warn(conversion.fault)
    if conversion.convert is None:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        converted = conversion.convert(image.getchannel(0) if grey else image.convert("RGB")).convert("RGB")
        converted.putalpha(image.getchannel("A"))
        return converted
    return conversion.convert(image if image.mode in _SPACES else image.convert("RGB"))


@lru_cache(maxsize=PROFILES)  # safe in threads: at worst two of them build the same transform
def _conversion(profile: bytes, mode: str) -> _Conversion:
    """What a profile does to images of mode "L", "RGB" or "CMYK"."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = source.profile.xcolor_space
        if space not in _SPACES[mode]:
            return _Conversion(fault=f"it is one of {space.strip()}, and the image is {mode}")
        flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
        if mode == "L":  # 256 colours only: computed without lcms' tables, which are too coarse for steep curves
            flags |= ImageCms.Flags.NOOPTIMIZE
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}[space],
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags,
        )
        if mode == "CMYK":
            return _Conversion(transform.apply)
        greys = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        curve = np.asarray(transform.apply(greys.convert(transform.input_mode)))[0, :, 1]
        if mode == "L":
            if _same(curve, np.arange(256)):
                return _Conversion()
            return _Conversion(lambda image: image.point(curve.tolist()))
        steps = np.linspace(0, 255, 17).round().astype(np.uint8)
        colors = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        same = _same(curve, np.arange(256)) and _same(np.asarray(transform.apply(Image.fromarray(colors))), colors)
        return _Conversion(None if same else transform.apply)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return _Conversion(fault=f"it is damaged or not supported ({one_line(error)})")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return int(np.abs(a.astype(int) - b).max()) <= SAME


def _warn(fault: str) -> None:
    """Log the 1st, 10th, 100th … image of this process whose colour profile is not used."""
    count = next(_unusable)
    if count == 10 ** (len(str(count)) - 1):
        images = "an image" if count == 1 else f"{count} images so far"
        logger.warning("the colour profile of %s is ignored, and the colours taken as sRGB: %s", images, fault)


def _png_codes(data: bytes) -> tuple[int, int] | None:
    """Primaries and transfer of a PNG's cICP chunk, which stands before the pixels."""
    start = 8
    while (kind := data[start + 4 : start + 8]) not in (b"", b"IDAT"):
        if kind == b"cICP":
            return (data[start + 8], data[start + 9]) if len(data) > start + 9 else None
        start += 12 + int.from_bytes(data[start : start + 4], "big")
    return None


def _colr_boxes(data: bytes, *path: bytes) -> Iterator[bytes]:
    """The contents of the colr boxes in a file of boxes (ISO 14496-12, as AVIF and JPEG 2000 are)."""
    start, end = 0, len(data)
    wanted = (*path, b"colr")
    while start + 8 <= end and wanted:
        size, kind = struct.unpack_from(">I4s", data, start)
        header = 8
        if size == 1 and start + 16 <= end:  # the size stands in 64 bits behind the kind
            size, header = struct.unpack_from(">Q", data, start + 8)[0], 16
        stop = end if size == 0 else start + size
        if size and size < header:
            return
        if kind == wanted[0] == b"colr":
            yield data[start + header : min(stop, end)]
        if kind == wanted[0] != b"colr":  # go into the box; meta has four bytes of version and flags before its boxes
            start, end, wanted = start + header + (4 if kind == b"meta" else 0), min(stop, end), wanted[1:]
        else:
            start = stop


def _coded_profile(primaries: int, transfer: int) -> bytes | None:
    """The profile for codes of ITU-T H.273, or None for sRGB."""
    if transfer in HDR:
        raise ImageError(
            f"not supported: HDR ({HDR[transfer]}), which sRGB cannot show; convert it to 8-bit sRGB by a tone curve"
        )
    if primaries not in PRIMARIES or transfer not in CURVES:
        _warn(f"primaries {primaries} with transfer {transfer} of ITU-T H.273 are not supported")
        return None
    if PRIMARIES[primaries] is BT709 and CURVES[transfer] is SRGB_CURVE:
        return None
    return matrix_profile(PRIMARIES[primaries], CURVES[transfer])


def _is_adobe_rgb(image: Image.Image) -> bool:
    """Whether EXIF says R03. `ColorSpace` must not say sRGB, as it does where an editor converted the colours."""
    try:
        exif = image.getexif()
        index = exif.get_ifd(_INTEROP_IFD).get(_INTEROP_INDEX)
        return str(index).rstrip("\0") == "R03" and exif.get_ifd(_EXIF_IFD).get(_COLOR_SPACE) != _SRGB
    except Exception:  # Pillow raises exceptions of any class for damaged metadata, which must not cost the picture
        return False


@lru_cache(maxsize=PROFILES)
def matrix_profile(primaries: tuple[Point, Point, Point], curve: tuple[float, ...]) -> bytes:
    """An ICC profile (version 4) of an RGB space with white point D65.

    Args:
        primaries: x and y of red, green and blue.
        curve: from a value to light in [0, 1]: (gamma,), or the five numbers g, a, b, c, d of ICC's function type 3,
            (a·x + b)^g from x = d on, and c·x below.
    """
    white = _xyz(D65)
    columns = np.array([_xyz(point) for point in primaries]).T
    columns = columns * np.linalg.solve(columns, white)  # so that their sum is white
    # ICC's colours are relative to D50; Bradford's matrix is that of ICC.1:2022, annex E.
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    gains = (bradford @ np.array(D50)) / (bradford @ white)
    columns = np.linalg.inv(bradford) @ np.diag(gains) @ bradford @ columns
    curve_tag = struct.pack(">4s4xHxx", b"para", 0 if len(curve) == 1 else 3) + _fixed(*curve)
    tags = {
        name: struct.pack(">4s4x", b"XYZ ") + _fixed(*xyz)
        for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns.T, strict=True)
    }
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve_tag)
    table, body = struct.pack(">I", len(tags)), b""
    first = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, first + len(body), len(content))
        body += content
    size = first + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"", 0x04300000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    return (header.ljust(68, b"\0") + _fixed(*D50)).ljust(128, b"\0") + table + body


def _xyz(point: Point) -> np.ndarray:
    x, y = point
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _fixed(*values: float) -> bytes:
    """ICC's s15Fixed16 numbers."""
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))
