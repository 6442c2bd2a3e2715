"""Every layout of a file becomes the right pixels, or is refused by name: nothing is read as something else.

The files are written by tifffile and imagecodecs, or by hand, so that Pillow does not check itself.
"""

from __future__ import annotations

import io
import itertools
import re
import struct

import numpy as np
import pytest
from PIL import Image, features

from sdvae.data import ImageError, ReadOptions, read_image
from tests.test_images import encode, photo, png, replace_at

tifffile = pytest.importorskip("tifffile", reason="needs the extra `test`")
imagecodecs = pytest.importorskip("imagecodecs", reason="needs the extra `test`")

RNG = np.random.default_rng(0)
SIZE = (37, 43)  # (H, W), multiples of nothing
DTYPES = ("bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "f2", "f4", "f8")
CHANNELS = {"minisblack": 1, "miniswhite": 1, "rgb": 3, "separated": 4, "palette": 1}


def tiff(values: np.ndarray, photometric: str, planar: str, extra: str | None, **options) -> bytes:
    """(H, W, C) values as a TIFF file."""
    if planar == "separate":
        values = np.moveaxis(values, 2, 0)
    if values.shape[-1] == 1:
        values = values[..., 0]
    else:
        options["planarconfig"] = planar
    if extra is not None:
        options["extrasamples"] = [extra]
    file = io.BytesIO()
    tifffile.imwrite(file, np.ascontiguousarray(values), photometric=photometric, metadata=None, **options)
    return file.getvalue()


def random_values(dtype: str, channels: int) -> np.ndarray:
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return RNG.random((*SIZE, channels)).astype(kind)
    if kind.kind == "b":
        return RNG.integers(0, 2, (*SIZE, channels)).astype(bool)
    limits = np.iinfo(kind)
    return RNG.integers(limits.min, limits.max, (*SIZE, channels), dtype=kind, endpoint=True)


def in_levels(values: np.ndarray) -> np.ndarray:
    """The levels 0..255 that numbers of a type stand for; those without an agreed range are stretched."""
    x = values.astype(np.float64)
    if values.dtype in (np.int16, np.int32, np.uint32):
        return (x - x.min()) / (x.max() - x.min()) * 255
    full = {"b": 1.0, "f": 1.0}.get(values.dtype.kind) or float(np.iinfo(values.dtype).max)
    return x / full * 255


def expected_rgb(values: np.ndarray, photometric: str, extra: str | None, palette: np.ndarray | None) -> np.ndarray:
    if palette is not None:
        return palette.T[values[..., 0]] / 257
    levels = in_levels(values)
    color, alpha = np.split(levels, [CHANNELS[photometric]], axis=2)
    if photometric == "miniswhite":
        color = 255 - color
    if photometric == "separated":
        color = (255 - color[..., :3]) * (255 - color[..., 3:]) / 255
    if extra == "unassalpha":
        color = color * alpha / 255 + 255 - alpha
    return np.broadcast_to(color, (*SIZE, 3))


def image_or_reason(data: bytes) -> Image.Image | str:
    try:
        return read_image(data)
    except ImageError as error:
        return str(error)


@pytest.mark.parametrize("photometric", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tiff_layout_is_right_or_refused_by_name(dtype, photometric):
    """Number type x colour x planes x further channel x compression x byte order x tiles x predictor."""
    if photometric == "palette" and dtype != "u1":
        pytest.skip("tifffile writes palettes for bytes alone")
    palette = RNG.integers(0, 65536, (3, 256), dtype=np.uint16) if photometric == "palette" else None
    layouts = itertools.product(
        ("contig", "separate") if CHANNELS[photometric] > 1 else ("contig",),
        (None, "unspecified", "unassalpha") if photometric in ("rgb", "minisblack") else (None,),
        (None, "lzw", "packbits", "zlib"),
        "<>",
        (None, (16, 16)),
        (False, True),
    )
    read = 0
    for planar, extra, compression, order, tile, predictor in layouts:
        if predictor and (compression not in ("lzw", "zlib") or dtype == "bool"):
            continue
        if photometric == "minisblack" and planar == "contig" and extra is not None and dtype == "bool":
            continue
        values = random_values(dtype, CHANNELS[photometric] + (extra is not None))
        options = {"byteorder": order, "compression": compression, "tile": tile, "predictor": predictor or None}
        if palette is not None:
            options["colormap"] = palette
        try:
            data = tiff(values, photometric, planar, extra, **options, rowsperstrip=None if tile else 10)
        except Exception:  # tifffile does not write all of them
            continue
        layout = (dtype, photometric, planar, extra, options)
        image = image_or_reason(data)
        if isinstance(image, str):
            assert re.fullmatch("not supported: .*TIFF.*; convert to 8-bit PNG", image), (layout, image)
            continue
        wrong = np.abs(np.asarray(image) - expected_rgb(values, photometric, extra, palette)).max()
        assert wrong <= 2.5, (layout, wrong)  # the high byte of 16 bits is off by one, a product of two by two
        read += 1
    if (dtype, photometric) in [
        ("u1", "minisblack"),
        ("u1", "rgb"),
        ("u2", "rgb"),
        ("u1", "separated"),
        ("bool", "miniswhite"),
    ]:
        assert read >= 12


def test_16_bit_grey_where_zero_is_white_is_not_a_negative():
    values = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8, 1)
    got = np.asarray(read_image(tiff(values, "miniswhite", "contig", None), ReadOptions(channels=1)))
    np.testing.assert_array_equal(got, np.rint((65535 - values[..., 0]) / 257.0))


def test_unsigned_32_bit_grey_does_not_wrap():
    values = np.array([[0, 2**31 - 1, 2**31, 2**32 - 1]], np.uint32)[..., None]
    got = np.asarray(read_image(tiff(values, "minisblack", "contig", None, byteorder="<"), ReadOptions(channels=1)))
    np.testing.assert_array_equal(got, [[0, 127, 128, 255]])


def test_12_bit_grey_reaches_white():
    values = np.repeat(np.arange(0, 4096, 16, dtype=np.uint16), 2).reshape(16, 32, 1)
    data = tiff(values, "minisblack", "contig", None, bitspersample=12)
    np.testing.assert_array_equal(
        np.asarray(read_image(data, ReadOptions(channels=1))), np.rint(values[..., 0] / 4095 * 255)
    )


def test_a_palette_of_8_bit_numbers_in_a_tiff_is_not_black():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    palette = np.stack([np.arange(256), np.arange(256)[::-1], np.full(256, 7)]).astype(np.uint16)
    got = np.asarray(read_image(tiff(values, "palette", "contig", None, colormap=palette)))
    np.testing.assert_array_equal(got.reshape(256, 3), palette.T)


def with_tag(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF file in which a SHORT is another."""
    entry = struct.pack("<HHI", tag, 3, 1)
    return replace_at(data, data.index(entry) + len(entry), struct.pack("<H", value))


GREY_TIFF = tiff(random_values("u1", 1), "minisblack", "contig", None, byteorder="<")


@pytest.mark.parametrize(
    ("data", "reason"),
    {
        "float colour": (
            tiff(random_values("f4", 3), "rgb", "contig", None),
            "not supported: 32-bit float RGB TIFF; convert to 8-bit PNG",
        ),
        "planes of 16 bits": (
            tiff(random_values("u2", 3), "rgb", "separate", None),
            "not supported: uncompressed 16-bit RGB TIFF with separate planes; convert to 8-bit PNG",
        ),
        "jpeg 2000 inside": (
            with_tag(GREY_TIFF, 259, 34712),
            "not supported: TIFF compressed with JPEG 2000; convert to 8-bit PNG",
        ),
        "an unknown method": (
            with_tag(GREY_TIFF, 259, 50013),
            "not supported: TIFF compressed with method 50013; convert to 8-bit PNG",
        ),
        "unknown colour": (with_tag(GREY_TIFF, 262, 999), "not supported: 8-bit unknown TIFF; convert to 8-bit PNG"),
        "big-endian BigTIFF": (
            tiff(random_values("u1", 1), "minisblack", "contig", None, byteorder=">", bigtiff=True),
            "not supported: big-endian BigTIFF; convert to 8-bit PNG",
        ),
        "signed bytes": (
            tiff(random_values("i1", 1), "minisblack", "contig", None),
            "not supported: 8-bit signed grey TIFF; convert to 8-bit PNG",
        ),
    }.values(),
)
def test_an_unsupported_tiff_is_named(data, reason):
    with pytest.raises(ImageError) as error:
        read_image(data)
    assert str(error.value) == reason


def test_little_endian_bigtiff_is_read():
    values = random_values("u1", 3)
    data = tiff(values, "rgb", "contig", None, byteorder="<", bigtiff=True)
    np.testing.assert_array_equal(np.asarray(read_image(data)), values)


def test_a_raw_photograph_is_not_its_thumbnail():
    """DNG, NEF and ARW begin with a thumbnail and keep the photograph in a sub-directory."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        writer.write(random_values("u1", 3), photometric="rgb", subifds=1, subfiletype=1, metadata=None)
        writer.write(np.zeros((400, 400), np.uint16), photometric="minisblack", metadata=None)
    with pytest.raises(ImageError, match="a camera's raw file"):
        read_image(file.getvalue())


# ---- BMP ----


def bmp(rows: bytes, compression: int, bits: int, palette: bytes, width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(rows), 0, 0, len(palette) // 4, 0)
    offset = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(rows), 0, 0, offset) + info + palette + rows


COLORS = bytes([0, 0, 255, 0, 0, 255, 0, 0, 255, 0, 0, 0, 9, 8, 7, 0])  # red, green, blue, and nearly black, as BGR0


def test_8_bit_run_lengths_are_read():
    """Runs, literal pixels with padding, a jump, ends of lines."""
    rows = bytes([3, 0, 2, 1, 0, 0]) + bytes([0, 3, 1, 2, 3, 0, 2, 2, 0, 1])
    got = np.asarray(read_image(bmp(rows, 1, 8, COLORS, 5, 2)))
    table = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [7, 8, 9]])
    np.testing.assert_array_equal(got, table[[[1, 2, 3, 2, 2], [0, 0, 0, 1, 1]]])


def test_4_bit_run_lengths_are_refused():
    with pytest.raises(ImageError, match="not supported: run-length encoded 4-bit BMP"):
        read_image(bmp(bytes([5, 0x01, 0, 1]), 2, 4, COLORS, 5, 1))


# ---- JPEG 2000 ----


def test_a_jpeg_2000_with_a_palette_is_refused():
    """Pillow merges entries of the same colour, and the others move."""
    data = encode(photo(), "JPEG2000")
    header = data.index(b"jp2h") - 4
    length = struct.unpack_from(">I", data, header)[0]
    palette = b"pclr" + struct.pack(">HB3B", 2, 3, 7, 7, 7) + bytes(6)
    box = struct.pack(">I", 4 + len(palette)) + palette
    end = header + length
    data = data[:header] + struct.pack(">I", length + len(box)) + data[header + 4 : end] + box + data[end:]
    with pytest.raises(ImageError, match="not supported: JPEG 2000 with a palette"):
        read_image(data)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_jpeg_2000_of_any_depth_reaches_white(bits):
    values = (np.arange(4096).reshape(64, 64) * (2**bits - 1) // 4095).astype(np.uint8 if bits == 8 else np.uint16)
    data = imagecodecs.jpeg2k_encode(values, level=0, bitspersample=bits, reversible=True)
    got = np.asarray(read_image(data, ReadOptions(channels=1))).astype(int)
    assert np.abs(got - values / (2**bits - 1) * 255).max() <= 1


# ---- AVIF ----


avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


def transformed_avif(irot: int | None, imir: int | None, clap: bool = False) -> bytes:
    """An AVIF file of `photo()` whose first picture has these properties, appended to what Pillow wrote."""
    data = encode(photo(), "AVIF", quality=90, subsampling="4:4:4")
    new = []
    if clap:
        new.append(b"clap" + struct.pack(">8i", 20, 1, 14, 1, 0, 1, 0, 1))
    if irot is not None:
        new.append(b"irot" + bytes([irot]))
    if imir is not None:
        new.append(b"imir" + bytes([imir]))
    boxes = b"".join(struct.pack(">I", 4 + len(box)) + box for box in new)
    at = {kind: data.index(kind) - 4 for kind in (b"meta", b"iprp", b"ipco", b"ipma", b"iloc")}
    size = {kind: struct.unpack_from(">I", data, position)[0] for kind, position in at.items()}
    # ipma: version and flags, number of items; id of the first item and its number of properties; one byte a property
    entry = at[b"ipma"] + 16
    assert data[at[b"ipma"] + 8 : entry] == bytes(4) + struct.pack(">I", 1), "one item, one byte a property"
    count = data[entry + 2]
    first = 1 + count_boxes(data[at[b"ipco"] + 8 : at[b"ipco"] + size[b"ipco"]])
    links = bytes(0x80 | first + number for number in range(len(new)))
    grown = len(boxes) + len(links)
    out = bytearray(data)
    for kind in (b"meta", b"iprp"):
        struct.pack_into(">I", out, at[kind], size[kind] + grown)
    struct.pack_into(">I", out, at[b"ipco"], size[b"ipco"] + len(boxes))
    struct.pack_into(">I", out, at[b"ipma"], size[b"ipma"] + len(links))
    out[entry + 2] = count + len(new)
    # iloc: the one extent moves by what the boxes grew
    offset = data.index(struct.pack(">I", data.index(b"mdat") + 4), at[b"iloc"])
    struct.pack_into(">I", out, offset, data.index(b"mdat") + 4 + grown)
    end_of_links = at[b"ipma"] + size[b"ipma"]
    end_of_boxes = at[b"ipco"] + size[b"ipco"]
    assert end_of_boxes <= end_of_links
    return bytes(out[:end_of_boxes]) + boxes + bytes(out[end_of_boxes:end_of_links]) + links + bytes(out[end_of_links:])


def count_boxes(data: bytes) -> int:
    number, position = 0, 0
    while position < len(data):
        position += struct.unpack_from(">I", data, position)[0]
        number += 1
    return number


@avif
def test_an_avif_crop_box_is_refused():
    with pytest.raises(ImageError, match="not supported: AVIF with a crop box"):
        read_image(transformed_avif(None, None, clap=True))


@avif
@pytest.mark.parametrize("irot", [None, 1, 2, 3])
@pytest.mark.parametrize("imir", [None, 0, 1])
def test_avif_is_turned_first_and_mirrored_then(irot, imir):
    """ISO/IEC 23008-12, 6.5.10 and 6.5.12: quarters anticlockwise; `imir` 0 exchanges top and bottom."""
    plain = np.asarray(read_image(transformed_avif(None, None)))
    expected = np.rot90(plain, irot or 0)
    if imir is not None:
        expected = expected[::-1] if imir == 0 else expected[:, ::-1]
    np.testing.assert_array_equal(np.asarray(read_image(transformed_avif(irot, imir))), expected)


@avif
def test_exif_does_not_turn_an_avif():
    """MIAF: the properties do, so that nothing is turned twice. A file can say both."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(), "AVIF", exif=exif.tobytes())
    assert b"irot" in data  # Pillow wrote the EXIF orientation as a property
    assert read_image(data).size == (28, 40)
    assert data.count(b"irot\3") == 1
    assert read_image(data.replace(b"irot\3", b"irot\0")).size == (40, 28)


# ---- PNG ----


def test_a_png_of_apples_variant_is_named():
    data = png(4, 4, 8, 2, bytes(13 * 4))
    start = data.index(b"IHDR") - 4
    with pytest.raises(ImageError, match="not supported: Apple's variant of PNG"):
        read_image(data[:start] + struct.pack(">I", 4) + b"CgBI" + bytes(8) + data[start:])


# ---- JPEG ----


@pytest.mark.parametrize(
    ("marker", "bits", "components", "reason"),
    [
        (0xC5, 8, 3, "hierarchical JPEG"),
        (0xC9, 8, 3, "arithmetic-coded JPEG"),
        (0xF7, 8, 3, "JPEG-LS"),
        (0xC1, 12, 3, "12-bit JPEG"),
        (0xC0, 8, 2, "JPEG with 2 components"),
    ],
)
def test_kinds_of_jpeg_that_are_not_read_are_named(marker, bits, components, reason):
    data = encode(photo(), "JPEG")
    frame = data.index(b"\xff\xc0")
    data = replace_at(data, frame + 1, bytes([marker]))
    data = replace_at(replace_at(data, frame + 4, bytes([bits])), frame + 9, bytes([components]))
    with pytest.raises(ImageError, match=f"not supported: {reason}; convert to 8-bit PNG"):
        read_image(data)
