"""What a file is, by its first bytes and never by its name."""

from __future__ import annotations

import re

from sdvae.data.reading import ImageError

# Formats that `read_image` reads, by the names of Pillow's plugins. `....` stands for any four bytes.
_READ: tuple[tuple[str, bytes], ...] = (
    ("JPEG", rb"\xff\xd8\xff"),
    ("PNG", rb"\x89PNG\r\n\x1a\n"),
    ("WEBP", rb"RIFF....WEBP"),
    ("GIF", rb"GIF8[79]a"),
    ("AVIF", rb"....ftyp(?:avif|avis)"),
    ("AVIF", rb"....ftyp(?:mif1|msf1|miaf)(?:....)+?(?:avif|avis)"),
    ("TIFF", rb"II[*+]\0(?!....CR\x02)|MM\0[*+]"),
    ("BMP", rb"BM"),
    ("JPEG2000", rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"),
    ("PPM", rb"P[1-6](?=[\s#])|P[fyF](?=\s)|P0CMYK"),
    ("QOI", rb"qoif"),
    ("ICO", rb"\0\0\x01\0(?!\0\0)"),
    ("ICNS", rb"icns"),
    ("DDS", rb"DDS "),
    ("SGI", rb"\x01\xda[\0\x01][\x01\x02]"),
    ("PCX", rb"\n[\0\x02\x03\x05][\0\x01]"),
)

_PNG_OR_JPEG = "convert to PNG or JPEG"
_RAW = "not supported: {} (a camera's raw file); develop it to PNG or JPEG"
_VIDEO = "not supported: {} video; extract its frames as PNG or JPEG"
_OTHER = "not supported: {}; " + _PNG_OR_JPEG

# Other files that lie among images, and what to say of them.
_REFUSED: tuple[tuple[str, bytes], ...] = (
    ("a Git LFS pointer: run «git lfs pull» to get the image", rb"version https://git-lfs\.github\.com/spec/"),
    ("a git-annex pointer, not the image; run `git annex get`", rb"/annex/objects/"),
    (
        "an HTML page, not an image; the download failed",
        rb"(?i)\s*(?:<!--.{0,400}?-->\s*)?<(?:!doctype html|html|head|body)",
    ),
    ("an XML error message, not an image; the download failed", rb"\s*<\?xml[^>]*>\s*<(?:Error|html)"),
    ("a JSON text, not an image; the download failed", rb'\s*\{\s*"'),
    (_OTHER.format("SVG"), rb"(?i)\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*(?:<!doctype svg.*?>\s*)?<svg[\s>]"),
    (_OTHER.format("PDF"), rb".{0,64}?%PDF-"),
    (_OTHER.format("EPS or PostScript"), rb"%!PS|\xc5\xd0\xd3\xc6"),
    (_OTHER.format("WMF or EMF"), rb"\xd7\xcd\xc6\x9a|\x01\0\x09\0\0\x03|\x01\0\0\0.{36} EMF"),
    (_RAW.format("CR3"), rb"....ftypcrx "),
    (_RAW.format("CR2"), rb"II\*\0....CR\x02"),
    (_RAW.format("RAF"), rb"FUJIFILMCCD-RAW"),
    (_RAW.format("ORF"), rb"IIR[OS]|MMOR"),
    (_RAW.format("RW2"), rb"IIU\0"),
    (_RAW.format("MRW"), rb"\0MRM"),
    (_RAW.format("X3F"), rb"FOVb"),
    (_OTHER.format("HEIC"), rb"....ftyp(?:hei[cxms]|hev[cxms])"),
    (_OTHER.format("HEIF"), rb"....ftyp(?:mif[12]|msf1|miaf)"),
    (_OTHER.format("JPEG XL"), rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n"),
    (_OTHER.format("JPEG XR"), rb"II\xbc"),
    (_OTHER.format("JPEG XS"), rb"\xff\x10\xff\x50|\0\0\0\x0cJXS "),
    (_VIDEO.format("MP4 or QuickTime"), rb"....(?:ftyp|moov|mdat|wide)"),
    (_VIDEO.format("Matroska or WebM"), rb"\x1a\x45\xdf\xa3"),
    (_VIDEO.format("AVI"), rb"RIFF....AVI "),
    (_VIDEO.format("MPEG"), rb"\0\0\x01[\xb3\xba]"),
    (_OTHER.format("MNG or JNG"), rb"\x8aMNG|\x8bJNG"),
    (_OTHER.format("PSD"), rb"8BPS"),  # readers differ in which channels are alpha, and in what the layers show
    (_OTHER.format("XCF"), rb"gimp xcf"),
    (_OTHER.format("OpenEXR, which has no range of white"), rb"\x76\x2f\x31\x01"),
    (_OTHER.format("Radiance HDR, which has no range of white"), rb"#\?R(?:ADIANCE|GBE)"),
    (_OTHER.format("FITS"), rb"SIMPLE  ="),
    (_OTHER.format("DICOM"), rb".{128}DICM"),
    ("begins with zero bytes, as files do whose download or copy broke off", rb"\0{16}"),
    (_OTHER.format("a NumPy array"), rb"\x93NUMPY"),
    (_OTHER.format("PAM"), rb"P7\n"),
    (_OTHER.format("XBM or XPM"), rb"#define \S+_width|/\* XPM \*/"),
    (_OTHER.format("Sun raster"), rb"\x59\xa6\x6a\x95"),
    (_OTHER.format("KTX"), rb"\xabKTX"),
    (_OTHER.format("BPG"), rb"BPG\xfb"),
    (_OTHER.format("a cursor"), rb"\0\0\x02\0[^\0]\0"),
    ("an archive, not an image; unpack it", rb"PK\x03\x04|\x1f\x8b|Rar!|7z\xbc\xaf|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd"),
)
_READ_PATTERNS = tuple((name, re.compile(pattern, re.DOTALL)) for name, pattern in _READ)
_REFUSED_PATTERNS = tuple((message, re.compile(pattern, re.DOTALL)) for message, pattern in _REFUSED)
_REACH = 1024  # bytes that the patterns may look at: comments and declarations precede `<svg`
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def format_of(data: bytes) -> str:
    """The format of a file, by the name of Pillow's plugin for it.

    Raises:
        ImageError: when the file is empty, or nothing that `read_image` reads; the message says what it is, if it is
            something known, and what to do.
    """
    if not data:
        raise ImageError("the file is empty")
    head = data[:_REACH]
    for name, pattern in _READ_PATTERNS:
        if pattern.match(head):
            return name
    head = head.removeprefix(_BYTE_ORDER_MARK)
    for message, pattern in _REFUSED_PATTERNS:
        if pattern.match(head):
            raise ImageError(message)
    if data[-18:-2] == b"TRUEVISION-XFILE":
        raise ImageError(_OTHER.format("TGA"))
    raise ImageError(f"not an image of a known format: starts with {data[:12]!r}")
