"""Metadata never cost a picture: broken, oversized or contradictory, the pixels are those of the file without them."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, features

from sdvae.data import ImageError, read_image
from tests.test_images import chunk, encode, photo, png, replace_at

PNG, JPEG, WEBP = encode(photo(), "PNG"), encode(photo(), "JPEG"), encode(photo(), "WEBP", lossless=True)
TIFF = encode(photo(), "TIFF", compression="tiff_lzw")
GARBAGE = np.random.default_rng(0).bytes(300)


def bad_checksum(kind: bytes, content: bytes) -> bytes:
    return chunk(kind, content)[:-4] + b"\0\0\0\0"


PNG_CHUNKS = {
    "eXIf of garbage": chunk(b"eXIf", GARBAGE),
    "eXIf with a wrong checksum": bad_checksum(b"eXIf", GARBAGE),
    "2 MB of text": chunk(b"tEXt", b"comment\0" + b"a" * 2_000_000),
    "text that decompresses to 20 MB": chunk(b"zTXt", b"comment\0\0" + zlib.compress(bytes(20_000_000))),
    "text of an unknown compression": chunk(b"zTXt", b"comment\7abc"),
    "text named like Pillow's own notes": chunk(b"tEXt", b"transparency\0abc") + chunk(b"tEXt", b"exif\0abc"),
    "EXIF as text, not in hexadecimal": chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 4\nxyz!"),
    "iCCP that breaks off": chunk(b"iCCP", b"profile\0\0" + zlib.compress(GARBAGE)[:-20]),
    "iCCP of an unknown compression": chunk(b"iCCP", b"profile\1" + zlib.compress(GARBAGE)),
    "iCCP of one byte": chunk(b"iCCP", b"p"),
    "a profile of 3 MB": chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
    "tIME of two bytes": chunk(b"tIME", b"ab"),
    "pHYs of two bytes": chunk(b"pHYs", b"ab"),
    "sRGB, gAMA and cHRM of no bytes": chunk(b"sRGB", b"") + chunk(b"gAMA", b"") + chunk(b"cHRM", b"abc"),
    "a private chunk with a wrong checksum": bad_checksum(b"prVt", GARBAGE),
    "an animation's header of no bytes": chunk(b"acTL", b"") + chunk(b"fcTL", b""),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", PNG_CHUNKS)
def test_png_is_read_whatever_its_metadata(kind, place):
    position = PNG.index(b"IDAT" if place == "before" else b"IEND") - 4
    data = PNG[:position] + PNG_CHUNKS[kind] + PNG[position:]
    np.testing.assert_array_equal(np.asarray(read_image(data)), np.asarray(photo()))


@pytest.mark.parametrize("place", ["before", "after"])
def test_png_orientation_stands_before_or_after_the_pixels(place):
    exif = Image.Exif()
    exif[0x0112] = 6
    position = PNG.index(b"IDAT" if place == "before" else b"IEND") - 4
    data = PNG[:position] + chunk(b"eXIf", exif.tobytes()[6:]) + PNG[position:]
    np.testing.assert_array_equal(np.asarray(read_image(data)), np.rot90(np.asarray(photo()), -1))


@pytest.mark.parametrize("transparency", [b"", bytes(4), b"\xff\x00\xff"])
def test_transparency_that_the_standard_does_not_allow_is_ignored(transparency):
    """More entries than the palette has, or behind the pixels: libpng ignores it, Pillow does not."""
    palette = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60]))
    rows = b"\0\0\1"
    plain = np.asarray(read_image(png(2, 1, 8, 3, rows, palette)))
    np.testing.assert_array_equal(
        np.asarray(read_image(png(2, 1, 8, 3, rows, palette + chunk(b"tRNS", transparency)))), plain
    )
    late = png(2, 1, 8, 3, rows, palette).replace(chunk(b"IEND", b""), chunk(b"tRNS", b"\0\0") + chunk(b"IEND", b""))
    np.testing.assert_array_equal(np.asarray(read_image(late)), plain)


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


JPEG_SEGMENTS = {
    "EXIF of garbage": segment(0xE1, b"Exif\0\0" + GARBAGE),
    "EXIF of nothing": segment(0xE1, b"Exif\0\0"),
    "XMP of garbage": segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + GARBAGE),
    "a list of pictures of garbage": segment(0xE2, b"MPF\0" + GARBAGE),
    "a list of pictures of nothing": segment(0xE2, b"MPF\0II*\0"),
    "Photoshop's blocks, cut off": segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed"),
    "JFIF of three bytes": segment(0xE0, b"JFIF"),
    "Adobe of three bytes": segment(0xEE, b"Adobe"),
    "a profile's part without a number": segment(0xE2, b"ICC_PROFILE\0"),
    "a comment": segment(0xFE, GARBAGE),
    "FlashPix": segment(0xE2, b"FPXR\0" + GARBAGE),
}


@pytest.mark.parametrize("kind", JPEG_SEGMENTS)
def test_jpeg_is_read_whatever_its_metadata(kind):
    data = JPEG[:2] + JPEG_SEGMENTS[kind] + JPEG[2:]
    np.testing.assert_array_equal(np.asarray(read_image(data)), np.asarray(read_image(JPEG)))


def test_the_first_exif_segment_of_a_jpeg_counts():
    exif = []
    for orientation in (6, 3):
        entry = Image.Exif()
        entry[0x0112] = orientation
        exif.append(segment(0xE1, b"Exif\0\0" + entry.tobytes()[6:]))
    data = JPEG[:2] + exif[0] + exif[1] + JPEG[2:]
    np.testing.assert_array_equal(np.asarray(read_image(data)), np.rot90(np.asarray(read_image(JPEG)), -1))


def with_webp_chunks(extra: dict[bytes, bytes], flags: int) -> bytes:
    """The extended form of the file: ICC profile, picture, EXIF and XMP."""
    pixels = WEBP[12:]
    size = b"".join((value - 1).to_bytes(3, "little") for value in photo().size)
    parts = [b"VP8X" + struct.pack("<I", 10) + bytes([flags, 0, 0, 0]) + size]
    chunks = {kind: kind + struct.pack("<I", len(content)) + content for kind, content in extra.items()}
    parts += [chunks.get(b"ICCP", b""), pixels, chunks.get(b"EXIF", b""), chunks.get(b"XMP ", b"")]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_webp_is_read_whatever_its_metadata():
    data = with_webp_chunks({b"ICCP": GARBAGE, b"EXIF": GARBAGE, b"XMP ": GARBAGE}, flags=0x20 | 0x08 | 0x04)
    np.testing.assert_array_equal(np.asarray(read_image(data)), np.asarray(photo()))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_whatever_its_exif():
    exif = Image.Exif()
    exif[0x0131] = "a program"
    plain, whole = encode(photo(), "AVIF"), encode(photo(), "AVIF", exif=exif.tobytes())
    header = exif.tobytes()[6:14]
    assert whole.count(header) == 1
    broken = whole.replace(header, GARBAGE[:8])
    np.testing.assert_array_equal(np.asarray(read_image(broken)), np.asarray(read_image(plain)))


def with_tiff_tags(entries: list[tuple[int, int, int, int]]) -> bytes:
    """The file with a new directory at its end: (tag, type, count, value or offset) are added or replaced."""
    start = struct.unpack_from("<I", TIFF, 4)[0]
    count = struct.unpack_from("<H", TIFF, start)[0]
    old = [struct.unpack_from("<HHII", TIFF, start + 2 + 12 * number) for number in range(count)]
    new = {entry[0]: entry for entry in [*old, *entries]}
    directory = (
        struct.pack("<H", len(new)) + b"".join(struct.pack("<HHII", *new[tag]) for tag in sorted(new)) + bytes(4)
    )
    return replace_at(TIFF, 4, struct.pack("<I", len(TIFF))) + directory


TIFF_TAGS = {
    "private tags of unknown types": [(tag, 99, 3, 7) for tag in range(60000, 60050)],
    "private tags beyond the file": [(tag, 2, 10**6, 10**8) for tag in range(60000, 60050)],
    "EXIF beyond the file": [(34665, 4, 1, 10**8)],
    "XMP of garbage": [(700, 1, 100, 8)],
    "a profile beyond the file": [(34675, 7, 10**6, 10**8)],
    "a profile that is a number": [(34675, 3, 1, 7)],
    "a resolution that is text": [(282, 2, 20, 8), (283, 2, 20, 8), (296, 2, 4, 7)],
    "a date of a wrong type": [(306, 12, 1, 8)],
    "Photoshop's blocks of garbage": [(34377, 7, 200, 8)],
}


@pytest.mark.parametrize("kind", TIFF_TAGS)
def test_tiff_is_read_whatever_its_metadata(kind, capfd):
    np.testing.assert_array_equal(np.asarray(read_image(with_tiff_tags(TIFF_TAGS[kind]))), np.asarray(photo()))
    assert capfd.readouterr().err == ""


def test_a_profile_of_a_tiff_is_kept_for_colour_management(monkeypatch):
    """Metadata are left out before decoding; profiles are not metadata."""
    seen = []
    original = Image.Image.load

    def load(self):
        seen.append(self.info.get("icc_profile"))
        return original(self)

    profile = b"icc" * 50
    monkeypatch.setattr(Image.Image, "load", load)
    for kind in ("TIFF", "PNG", "JPEG", "WEBP"):
        data = encode(photo(), kind, icc_profile=profile)
        seen.clear()
        read_image(data)
        assert profile in seen, kind


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description tiff:Orientation="6" xmlns:tiff="http://ns.adobe.com/tiff/1.0/"/></rdf:RDF></x:xmpmeta>'
)
XMP_FILES: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: PNG.replace(chunk(b"IEND", b""), chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP) + PNG[-12:]),
    "JPEG": lambda: JPEG[:2] + segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP) + JPEG[2:],
    "TIFF": lambda: encode(photo(), "TIFF", tiffinfo={700: XMP}),
    "WEBP": lambda: encode(photo(), "WEBP", lossless=True, xmp=XMP),
}


@pytest.mark.parametrize("kind", XMP_FILES)
def test_orientation_in_xmp_alone_does_not_turn_the_picture(kind):
    data = XMP_FILES[kind]()
    assert Image.open(io.BytesIO(data)).getexif().get(0x0112) == 6 or kind == "PNG", "Pillow falls back to XMP"
    assert read_image(data).size == photo().size


def test_random_metadata_never_change_the_pixels():
    generator = np.random.default_rng(3)
    plain = np.asarray(read_image(JPEG))
    names = [b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"MPF\0", b"Photoshop 3.0\0", b"FPXR\0", b"Ducky", b""]
    for _ in range(200):
        content = names[generator.integers(len(names))] + b"MM\0*" * generator.integers(2) + generator.bytes(60)
        marker = int(generator.choice([0xE1, 0xE2, 0xE3, 0xEC, 0xED, 0xEF, 0xFE]))
        image = read_image(JPEG[:2] + segment(marker, content) + JPEG[2:])
        np.testing.assert_array_equal(np.asarray(image), plain)


# ---- libtiff's messages ----


def broken_fax() -> bytes:
    """A fax-compressed TIFF whose code words are damaged. Pillow returns an image of it."""
    data = bytearray(encode(photo(200, 200).convert("1"), "TIFF", compression="group4"))
    offset = struct.unpack_from("<I", data, 4)[0]
    start = 8 if offset > 8 else offset + 200
    for position in range(start + 40, start + 60):
        data[position] ^= 0x5A
    return bytes(data)


def test_what_libtiff_reports_is_the_files_fault_and_not_on_stderr(capfd):
    with pytest.raises(ImageError, match="damaged TIFF file: libtiff says «"):
        read_image(broken_fax())
    assert capfd.readouterr().err == ""
    assert read_image(TIFF).size == photo().size, "one file's message is not the next one's"


# ---- other files that lie among images ----


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "a Git LFS pointer.*git lfs pull"),
        (b"/annex/objects/SHA256E-s1--ab.jpg\n", "a git-annex pointer"),
        (b"\xef\xbb\xbf\n<!doctype html><title>403</title>", "an HTML page, not an image; the download failed"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML error message"),
        (b'{"error": "not found"}', "a JSON text, not an image; the download failed"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "not supported: HEIC; convert to PNG or JPEG"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "not supported: HEIF"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "not supported: CR3 .a camera's raw file.; develop"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(30), "not supported: CR2"),
        (b"FUJIFILMCCD-RAW 0201", "not supported: RAF"),
        (b"\0\0\0\x20ftypisom\0\0\2\0isomiso2", "not supported: MP4 or QuickTime video; extract its frames"),
        (b"\x1a\x45\xdf\xa3" + bytes(20), "not supported: Matroska or WebM video"),
        (b"RIFF\0\0\0\0AVI LIST", "not supported: AVI video"),
        (b"\xff\x0a" + bytes(20), "not supported: JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "not supported: JPEG XL"),
        (b'<?xml version="1.0"?>\n<!-- drawn -->\n<svg width="9"/>', "not supported: SVG"),
        (b"8BPS\0\1" + bytes(20), "not supported: PSD; convert to PNG or JPEG"),
        (b"\x76\x2f\x31\x01" + bytes(20), "not supported: OpenEXR"),
        (b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n", "not supported: Radiance HDR"),
        (bytes(128) + b"DICM", "not supported: DICOM"),
        (bytes(4096), "zero bytes"),
        (b"PK\3\4" + bytes(20), "an archive"),
        (b"\0\0\2\0" + bytes(40) + b"TRUEVISION-XFILE.\0", "not supported: TGA"),
    ],
)
def test_other_files_are_called_what_they_are(data, reason):
    with pytest.raises(ImageError, match=reason):
        read_image(data)
