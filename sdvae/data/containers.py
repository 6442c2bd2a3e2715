"""The structure of image files: what is checked there, and what is hidden from the decoder.

`prepare` looks at a file before it is decoded. It refuses layouts whose pixels Pillow gets wrong, or which it does not
read, with a sentence that says so. And it leaves out metadata: a broken comment, thumbnail or private tag must not cost
the picture. What is kept is what decides on pixels, EXIF (for the orientation) and the ICC profile.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator

from sdvae.data.reading import ImageError

CONVERT = "convert to 8-bit PNG"


def prepare(data: bytes, kind: str) -> bytes:
    """Check the structure of a file, and leave out metadata.

    Args:
        data: the bytes of the file.
        kind: its format, from `format_of`.

    Returns:
        The bytes to decode: `data` itself if nothing is left out.

    Raises:
        ImageError: when the layout is not supported or the damage can be seen here.
    """
    checks = {"PNG": _png, "JPEG": _jpeg, "TIFF": _tiff, "AVIF": _avif, "JPEG2000": _jpeg2000, "BMP": _bmp}
    check = checks.get(kind)
    return data if check is None else check(data)


# ---- PNG ----

_PNG_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))
_PNG_LONGEST_PROFILE = 2**20  # bytes; Pillow refuses a file with a longer one


def _png(data: bytes) -> bytes:
    """Compare the checksums of the chunks that hold pixels, which Pillow does not do, and leave out other chunks.

    The frames of an animation are among the others, so what remains is the picture that readers without animations
    show. Left out, too, is transparency that the standard does not allow: other readers ignore it.
    """
    view = memoryview(data)
    kept, start, kind, seen = [view[:8]], 8, b"", {b"IHDR": b"", b"PLTE": b""}
    while start + 8 <= len(data) and kind != b"IEND":
        length, kind = int.from_bytes(view[start : start + 4], "big"), bytes(view[start + 4 : start + 8])
        end = start + 12 + length  # length, kind, content; then 4 bytes of checksum over kind and content
        whole = end <= len(data)
        good = whole and zlib.crc32(view[start + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")
        if kind == b"CgBI":
            raise ImageError("not supported: Apple's variant of PNG; convert to PNG")
        if kind in _PNG_PIXELS:
            if whole and not good and kind != b"IEND":
                what = "pixel data" if kind == b"IDAT" else f"{kind.decode()} chunk"
                raise ImageError(f"damaged PNG file: wrong checksum of the {what}")
            content = b"" if kind == b"IDAT" else bytes(view[start + 8 : end - 4])
            if kind != b"tRNS" or (b"IDAT" not in seen and _transparency_fits(content, seen[b"IHDR"], seen[b"PLTE"])):
                kept.append(view[start:end])  # the last chunk even if it is cut off: the decoder says so
            seen[kind] = content
        elif good and (
            kind == b"eXIf"
            or (kind == b"cICP" and length == 4)
            or (kind == b"iCCP" and _profile_opens(view[start + 8 : end - 4]))
        ):
            kept.append(view[start:end])
        elif not kind.isalpha():
            if b"IDAT" not in seen:
                raise ImageError("damaged PNG file: something else where a chunk should begin")
            break
        start = end
    return data if sum(map(len, kept)) == len(data) else b"".join(kept)


def _transparency_fits(transparency: bytes, header: bytes, palette: bytes) -> bool:
    """Whether a tRNS chunk has a length that the image type allows: one color, or up to one byte a palette entry."""
    color_type = header[9] if len(header) > 9 else -1
    lengths = {0: range(2, 3), 2: range(6, 7), 3: range(1, len(palette) // 3 + 1)}
    return len(transparency) in lengths.get(color_type, ())


def _profile_opens(content: memoryview) -> bool:
    """Whether an iCCP chunk can be decompressed: name, 0, method 0, zlib stream."""
    name, _, rest = bytes(content).partition(b"\0")
    try:
        stream = zlib.decompressobj()
        stream.decompress(rest[1:], _PNG_LONGEST_PROFILE)
        return len(name) > 0 and rest[:1] == b"\0" and stream.eof
    except zlib.error:
        return False


# ---- JPEG ----

_JPEG_PROCESSES = {  # by the marker of the frame; "" is read
    **dict.fromkeys((0xC0, 0xC1, 0xC2, 0xC3), ""),  # baseline, extended, progressive, lossless
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE), "hierarchical JPEG"),
    **dict.fromkeys((0xC9, 0xCA, 0xCB, 0xCF), "arithmetic-coded JPEG"),
    **dict.fromkeys((0xF7, 0xF9), "JPEG-LS"),
}


def _jpeg(data: bytes) -> bytes:
    """Refuse the kinds of JPEG that are not read, and leave out comments and the segments of most applications."""
    view = memoryview(data)
    kept, start, exif = [view[:2]], 2, False
    while start + 4 <= len(data) and view[start] == 0xFF:
        marker = view[start + 1]
        if marker == 0xFF:  # fill bytes may precede a marker
            start += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD9:  # markers without a length: the header is not as it should be
            break
        end = start + 2 + int.from_bytes(view[start + 2 : start + 4], "big")
        content = view[start + 4 : end]
        if marker in _JPEG_PROCESSES and len(content) >= 6:
            _check_jpeg_frame(_JPEG_PROCESSES[marker], bits=content[0], components=content[5])
        if marker == 0xE1 and bytes(content[:6]) == b"Exif\0\0":
            needed, exif = not exif, True
        elif marker == 0xE0:
            needed = len(content) >= 14  # libjpeg, too, knows JFIF and Adobe by these lengths
        elif marker == 0xE2:
            needed = bytes(content[:12]) == b"ICC_PROFILE\0" and len(content) >= 14
        elif marker == 0xEE:
            needed = bytes(content[:5]) == b"Adobe" and len(content) >= 12
        else:
            needed = not (0xE0 <= marker <= 0xEF or marker == 0xFE)
        if needed:
            kept.append(view[start:end])
        start = end
        if marker == 0xDA:
            break
    kept.append(view[start:])
    return data if sum(map(len, kept)) == len(data) else b"".join(kept)


def _check_jpeg_frame(process: str, bits: int, components: int) -> None:
    if process or bits != 8 or components not in (1, 3, 4):
        what = process or (f"{bits}-bit JPEG" if bits != 8 else f"JPEG with {components} components")
        raise ImageError(f"not supported: {what}; {CONVERT}")


# ---- TIFF ----

_TIFF_TAGS_KEPT = frozenset(
    (
        *(256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284),  # baseline, with the orientation
        *(292, 293, 317, 320, 322, 323, 324, 325, 332, 338, 339),  # fax, predictor, palette, tiles, inks, samples
        *(347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),  # JPEG and YCbCr
        34675,  # ICC profile
    )
)
_TIFF_COLORS = {0: "grey", 1: "grey", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "LAB", 9: "ICCLAB"}
_TIFF_COLORS |= {10: "ITULAB", 32803: "CFA", 32844: "LogL", 32845: "LogLuv", 34892: "LinearRaw"}
_TIFF_FORMATS = {1: "-bit", 2: "-bit signed", 3: "-bit float", 5: "-bit complex integer", 6: "-bit complex"}
_TIFF_CHANNELS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}
_TIFF_DEPTHS = {  # (colour, sample format) -> the numbers of bits that are read
    (0, 1): (1, 2, 4, 8, 16),
    (1, 1): (1, 2, 4, 8, 12, 16, 32),
    (1, 2): (16, 32),
    (1, 3): (32,),
    (2, 1): (8, 16),
    (3, 1): (1, 2, 4, 8),
    (5, 1): (8, 16),
    (6, 1): (8,),
    (8, 1): (8,),
}
_TIFF_EXTRA = {(1, 8): 1, (2, 8): 3, (2, 16): 1, (3, 8): 1, (5, 8): 2}  # (colour, bits) -> further channels, at most
_TIFF_LITTLE_ENDIAN_ONLY = {(0, 1, 16), (1, 1, 12), (1, 1, 32)}  # (colour, sample format, bits)
_TIFF_COMPRESSIONS = {1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32946, 34925, 50000}  # none, fax, LZW, JPEG, zlib, …
_TIFF_COMPRESSIONS_UNREAD = {34712: "JPEG 2000", 33003: "JPEG 2000", 33005: "JPEG 2000", 34887: "LERC", 34661: "JBIG"}
_TIFF_COMPRESSIONS_UNREAD |= {22610: "JPEG XR", 34934: "JPEG XR", 50002: "JPEG XL", 52546: "JPEG XL", 32809: "Thunder"}
_TIFF_COMPRESSIONS_UNREAD |= {34676: "LogLuv", 34677: "LogLuv", 32766: "NeXT", 34892: "lossy JPEG of DNG"}
_TIFF_COMPRESSIONS_UNREAD |= {50001: "WebP"}
_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_TIFF_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}


class _Tiff:
    """The first directory of a TIFF file: what the picture is made of.

    Raises:
        ImageError: when there is none.
    """

    def __init__(self, data: bytes):
        self._data = data
        self.big_endian = data[:2] == b"MM"
        self._order = ">" if self.big_endian else "<"
        big = 43 in data[2:4]  # BigTIFF
        try:
            (self.start,) = self._unpack("Q" if big else "I", 8 if big else 4)
            (count,) = self._unpack("Q" if big else "H", self.start)
            self.head = 8 if big else 2  # the length of that count
            size = 20 if big else 12
            first = self.start + self.head
            if count == 0 or first + count * size > len(data):
                raise ImageError("damaged TIFF file: cut off before the directory that says where the pixels are")
        except (struct.error, OverflowError) as error:
            raise ImageError("damaged TIFF file: cut off before the directory of its contents") from error
        self.pointer = 8 if big else 4  # the length of an offset
        self.entries: dict[int, tuple[int, int, int]] = {}  # tag -> type, count, position of the value
        self.raw: dict[int, bytes] = {}  # tag -> the whole entry
        for position in range(first, first + count * size, size):
            tag, kind, number = self._unpack("HHQ" if big else "HHI", position)
            bytes_needed = number * _TIFF_SIZES.get(kind, 1)
            value = position + size - self.pointer
            if bytes_needed > self.pointer:
                (value,) = self._unpack("Q" if big else "I", value)
            if tag not in self.entries and value + bytes_needed <= len(data):
                self.entries[tag] = kind, number, value
                self.raw[tag] = data[position : position + size]

    def integers(self, tag: int, default: tuple[int, ...]) -> tuple[int, ...]:
        """The first values of a tag, at most 32; the default if it is missing or holds no integers."""
        kind, number, position = self.entries.get(tag, (0, 0, 0))
        if kind not in _TIFF_INTEGERS or number == 0:
            return default
        return self._unpack(f"{min(number, 32)}{_TIFF_INTEGERS[kind]}", position)

    def with_tags(self, tags: frozenset[int]) -> bytes:
        """The file with these tags alone, and without further pages."""
        entries = [entry for tag, entry in self.raw.items() if tag in tags]
        directory = len(entries).to_bytes(self.head, "big" if self.big_endian else "little")
        directory += b"".join(entries) + bytes(self.pointer)
        end = self.start + len(directory)
        return b"".join((self._data[: self.start], directory, self._data[end:]))

    def _unpack(self, layout: str, position: int) -> tuple[int, ...]:
        return struct.unpack_from(self._order + layout, self._data, position)


def _tiff(data: bytes) -> bytes:
    """Refuse layouts that Pillow reads wrongly or not at all, and leave out other tags, which libtiff complains of."""
    if data[:4] == b"MM\0+":
        raise ImageError(f"not supported: big-endian BigTIFF; {CONVERT}")
    tiff = _Tiff(data)
    if 50706 in tiff.entries or (330 in tiff.entries and tiff.integers(254, (0,))[0] & 1):
        # The first directory of DNG, NEF and ARW is a thumbnail; the photograph is one of its sub-directories.
        raise ImageError("not supported: DNG, NEF or ARW (a camera's raw file); develop it to PNG or JPEG")
    (compression,) = tiff.integers(259, (1,))[:1]
    if compression not in _TIFF_COMPRESSIONS:
        method = _TIFF_COMPRESSIONS_UNREAD.get(compression, f"method {compression}")
        raise ImageError(f"not supported: TIFF compressed with {method}; {CONVERT}")
    color = 6 if compression == 6 else tiff.integers(262, (0,))[0]  # old JPEG is YCbCr
    samples = tiff.integers(277, (3 if compression == 6 else 1,))[0]
    bits = tiff.integers(258, (1,))[:samples]
    sample_formats = tiff.integers(339, (1,))[:samples]
    depth, sample_format = max(bits, default=1), max(sample_formats, default=1)
    extra = samples - _TIFF_CHANNELS.get(color, samples)
    raw, planar = compression == 1, samples > 1 and tiff.integers(284, (1,))[0] == 2

    unsupported = f"{depth}{_TIFF_FORMATS.get(sample_format, '-bit untyped')} {_TIFF_COLORS.get(color, 'unknown')} TIFF"
    if len(set(bits)) > 1 or len(set(sample_formats)) > 1:
        unsupported = "TIFF whose channels are of different types"
    elif depth not in _TIFF_DEPTHS.get((color, sample_format), ()):
        pass
    elif extra > _TIFF_EXTRA.get((color, depth), 0):
        unsupported += f" with {extra} further channel{'s' if extra > 1 else ''}"
    elif color == 5 and tiff.integers(332, (1,))[0] != 1:
        unsupported = "TIFF of inks other than CMYK"
    elif color == 1 and extra == 1 and tiff.integers(338, (0,))[0] != 2:
        unsupported += " with a further channel that is not alpha"
    elif tiff.big_endian and (color, sample_format, depth) in _TIFF_LITTLE_ENDIAN_ONLY:
        unsupported = f"big-endian {unsupported}"
    elif sample_format != 1 and tiff.big_endian and not raw:
        unsupported = f"compressed big-endian {unsupported}"
    elif raw and planar and (depth == 16 or extra > 0):
        unsupported = f"uncompressed {unsupported} with separate planes"
    elif raw and color == 6 and samples > 1:
        unsupported = f"uncompressed {unsupported}"
    elif 322 in tiff.entries and 324 not in tiff.entries:
        unsupported = "TIFF whose tiles are listed as strips"
    else:
        return tiff.with_tags(_TIFF_TAGS_KEPT)
    raise ImageError(f"not supported: {unsupported}; {CONVERT}")


# ---- AVIF and JPEG 2000, which consist of boxes ----


def _avif(data: bytes) -> bytes:
    """Refuse crop boxes, which Pillow ignores, and hide EXIF: in AVIF the properties `irot` and `imir` turn the image.

    Pillow parses the EXIF data on opening, and broken ones would cost the picture.
    """
    for start, end in _boxes(data, (0, len(data)), b"meta"):
        meta = (start + 4, end)  # version and flags precede the boxes inside
        if any(_boxes(data, meta, b"iprp", b"ipco", b"clap")):
            raise ImageError("not supported: AVIF with a crop box; convert to PNG or JPEG")
        for first, last in _boxes(data, meta, b"iinf"):
            data = data[:first] + data[first:last].replace(b"Exif", b"none") + data[last:]
    return data


def _jpeg2000(data: bytes) -> bytes:
    """Refuse palettes: Pillow merges entries of the same colour, so that the others move."""
    if any(_boxes(data, (0, len(data)), b"jp2h", b"pclr")):
        raise ImageError(f"not supported: JPEG 2000 with a palette; {CONVERT}")
    return data


def _boxes(data: bytes, within: tuple[int, int], kind: bytes, *inner: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the contents of the boxes of a kind, and of the boxes inside them of the kinds that follow.

    ISO/IEC 14496-12, 4.2, and ISO/IEC 15444-1, I.4.
    """
    start, limit = within
    while start + 8 <= limit:
        length, head = int.from_bytes(data[start : start + 4], "big"), 8
        if length == 1:
            length, head = int.from_bytes(data[start + 8 : start + 16], "big"), 16
        elif length == 0:
            length = limit - start
        if length < head or start + length > limit:
            return
        if data[start + 4 : start + 8] == kind:
            content = (start + head, start + length)
            if inner:
                yield from _boxes(data, content, *inner)
            else:
                yield content
        start += length


# ---- BMP ----


def _bmp(data: bytes) -> bytes:
    """Refuse run lengths of 4 bits, which Pillow garbles."""
    header = int.from_bytes(data[14:18], "little")
    if header >= 40 and int.from_bytes(data[30:34], "little") == 2:
        raise ImageError(f"not supported: run-length encoded 4-bit BMP; {CONVERT}")
    return data
