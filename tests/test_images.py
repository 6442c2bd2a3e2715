"""One file -> pixels: what each kind of file becomes, exactly, and that no bad file becomes anything."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, features

from sdvae.data import ImageError, ReadOptions, center_crop, color_jitter, random_crop, read_image, to_image, to_tensor
from sdvae.errors import InputError

LOSSLESS = ["PNG", "GIF", "TIFF", "BMP", "PPM", "QOI", "DDS", "PCX", "SGI", "ICO"]
FUZZED = ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "PPM", "QOI", "ICO", "ICNS", "DDS", "SGI", "PCX"]


def photo(width: int = 40, height: int = 28, seed: int = 0) -> Image.Image:
    """Smooth random colours, so that lossy formats have something to do."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, color: int, rows: bytes | None, extra: bytes = b"") -> bytes:
    """A PNG by hand: `color` 0 grey, 2 RGB, 3 palette, 4 grey + alpha; `rows` with their filter bytes, or no IDAT."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    pixels = b"" if rows is None else chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


def replace_at(data: bytes, position: int, new: bytes) -> bytes:
    return data[:position] + new + data[position + len(new) :]


def pixels(data: bytes, **options) -> np.ndarray:
    return np.asarray(read_image(data, ReadOptions(**options))).astype(int)


# ---- what each kind becomes ----


@pytest.mark.parametrize("kind", LOSSLESS)
def test_lossless_formats_keep_every_pixel(kind):
    image = photo(64, 64).quantize(64).convert("RGB")
    data = encode(image, kind, **({"sizes": [(64, 64)]} if kind == "ICO" else {}))
    np.testing.assert_array_equal(pixels(data), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "AVIF", "JPEG2000"])
def test_lossy_formats_decode_as_pillow_does(kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    data = encode(photo(), kind)
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_content_and_not_extension_names_the_format(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encode(photo(), "PNG"))
    np.testing.assert_array_equal(np.asarray(read_image(path)), np.asarray(photo()))
    np.testing.assert_array_equal(np.asarray(read_image(str(path))), np.asarray(photo()))


UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


@pytest.mark.parametrize("field", [(0x0132, 5, 1, 8), (0x0100, 9, 1, 0xFFFFFFFF), (0x010F, 2, 4000, 999999)])
@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_a_broken_exif_field_costs_neither_the_picture_nor_its_orientation(field):
    """A date that is a fraction, a width of -1, a maker beyond the end: all can be read, and not written again."""
    entries = [(0x0112, 3, 1, 6), field]
    exif = b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries))
    exif += b"".join(struct.pack("<HHLL", *entry) for entry in entries) + bytes(4)
    plain, turned = (read_image(encode(photo(), "JPEG", exif=data)) for data in (b"", exif))
    np.testing.assert_array_equal(np.asarray(turned), np.rot90(np.asarray(plain), -1))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied_once(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(photo(), kind, exif=exif.tobytes(), **options)
    stored = np.asarray(Image.open(io.BytesIO(encode(photo(), kind, **options))))
    image = read_image(data)
    np.testing.assert_array_equal(np.asarray(image), UPRIGHT[orientation](stored))
    assert image.getexif().get(0x0112, 1) == 1  # or whoever reads it next turns it again
    assert "exif" not in image.info


def over(front: np.ndarray, alpha: np.ndarray, background) -> np.ndarray:
    """Rounded, in integers: 510 is twice 255."""
    behind = np.broadcast_to(np.array(background), front.shape)
    return (2 * (front * alpha + behind * (255 - alpha)) + 255) // 510


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("background", [(255, 255, 255), (10, 128, 0)])
def test_alpha_is_composited_on_the_background(kind, background):
    rgba = np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    rgba[0, :, 3], rgba[1, :, 3] = 0, 255
    data = encode(Image.fromarray(rgba), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    expected = over(rgba[..., :3].astype(int), rgba[..., 3:].astype(int), background)
    np.testing.assert_array_equal(pixels(data, background=background), expected)
    np.testing.assert_array_equal(expected[0], np.broadcast_to(background, (16, 3)))


def test_grey_with_alpha_is_composited():
    la = np.random.default_rng(1).integers(0, 256, (9, 9, 2), dtype=np.uint8)
    grey_alpha = [Image.fromarray(la[..., band].copy()) for band in (0, 1)]
    data = encode(Image.merge("LA", grey_alpha), "PNG")
    grey = np.repeat(la[..., :1], 3, axis=2).astype(int)
    np.testing.assert_array_equal(
        pixels(data, background=(0, 0, 255)), over(grey, la[..., 1:].astype(int), (0, 0, 255))
    )


def test_premultiplied_alpha_is_composited():
    rgba = Image.new("RGBA", (4, 4), (100, 50, 0, 128))
    data = encode(rgba, "TIFF")
    tag = struct.pack("<HHI", 338, 3, 1)  # ExtraSamples: 2 is plain alpha, 1 premultiplied
    position = data.index(tag) + len(tag)
    assert data[position] == 2
    data = replace_at(data, position, b"\x01")
    # the stored colour already is colour · alpha, so only the background is to be weighted
    expected = np.array([100, 50, 0]) + 255 * 127 / 255
    assert np.abs(pixels(data) - expected).max() <= 1


def test_grey_with_alpha_in_a_palette_is_composited():
    image = Image.new("PA", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([(0, 255), (1, 0)])
    assert Image.open(io.BytesIO(encode(image, "TIFF"))).mode == "PA"
    np.testing.assert_array_equal(pixels(encode(image, "TIFF"))[0, 1], [255, 255, 255])


def palette_png(transparency: bytes) -> bytes:
    extra = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60, 70, 80, 90])) + chunk(b"tRNS", transparency)
    return png(3, 1, 8, 3, b"\0\0\1\2", extra)


def test_transparent_palette_entry_is_composited():
    np.testing.assert_array_equal(pixels(palette_png(b"\xff\x00"))[0], [[10, 20, 30], [255, 255, 255], [70, 80, 90]])


def test_half_transparent_palette_entries_are_composited():
    expected = over(np.array([[10, 20, 30], [40, 50, 60]]), np.array([[64], [200]]), (255, 0, 7))
    np.testing.assert_array_equal(pixels(palette_png(b"\x40\xc8"), background=(255, 0, 7))[0, :2], expected)


def test_transparent_gif_is_composited():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    np.testing.assert_array_equal(pixels(encode(image, "GIF", transparency=1))[0], [[10, 20, 30], [255, 255, 255]])


@pytest.mark.parametrize(
    ("depth", "rows", "transparent", "expected"),
    [
        (1, [0b01000000], 1, [0, 77, 0, 0]),
        (2, [0b00011011], 1, [0, 77, 170, 255]),
        (4, [0x01, 0x2F], 2, [0, 17, 77, 255]),
        (8, [0, 1, 200, 255], 200, [0, 1, 77, 255]),
    ],
)
def test_transparent_grey_of_any_depth_is_composited(depth, rows, transparent, expected):
    data = png(4, 1, depth, 0, bytes([0, *rows]), chunk(b"tRNS", struct.pack(">H", transparent)))
    np.testing.assert_array_equal(pixels(data, background=(77, 77, 77))[0, :, 0], expected)


def test_transparent_16_bit_grey_is_composited():
    rows = b"\0" + np.array([0, 1000, 65535], ">u2").tobytes()
    data = png(3, 1, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 1000)))
    np.testing.assert_array_equal(pixels(data, background=(1, 2, 3))[0], [[0, 0, 0], [1, 2, 3], [255, 255, 255]])


@pytest.mark.parametrize(("depth", "dtype", "red"), [(8, ">u1", 0x12), (16, ">u2", 0x1234)])
def test_transparent_rgb_is_composited(depth, dtype, red):
    rows = b"\0" + np.array([[0, 0, 0], [red, 0, 0], [0, (2**depth - 1) // 3, red]], dtype).tobytes()
    data = png(3, 1, depth, 2, rows, chunk(b"tRNS", struct.pack(">3H", red, 0, 0)))
    np.testing.assert_array_equal(pixels(data, background=(1, 2, 3))[0], [[0, 0, 0], [1, 2, 3], [0, 85, 0x12]])


ALL_16_BIT = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "TIFF big-endian"])
def test_16_bit_grey_is_scaled_and_rounded(kind):
    if kind == "TIFF big-endian":
        data = encode(Image.frombytes("I;16B", (256, 256), ALL_16_BIT.astype(">u2").tobytes()), "TIFF")
    else:
        data = encode(Image.fromarray(ALL_16_BIT), kind)
    expected = np.rint(ALL_16_BIT / 257).astype(int)
    np.testing.assert_array_equal(pixels(data, channels=1), expected)
    np.testing.assert_array_equal(pixels(data), np.repeat(expected[..., None], 3, axis=2))


def test_16_bit_colour_keeps_its_range_and_order():
    rows = np.repeat(ALL_16_BIT[..., None], 3, axis=2).astype(">u2")
    data = png(256, 256, 16, 2, b"".join(b"\0" + row.tobytes() for row in rows))
    got = pixels(data)[..., 1].ravel()
    assert got[0] == 0
    assert got[-1] == 255
    assert (np.diff(got) >= 0).all()
    assert np.abs(got - ALL_16_BIT.ravel() / 257).max() <= 1


def test_fractions_are_scaled_to_bytes():
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(values), "TIFF"), channels=1).ravel(), np.arange(256))
    half = pixels(encode(Image.fromarray(values / 2), "TIFF"), channels=1)
    assert half.max() == 128, "an image that is dark stays dark"


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_outside_the_usual_range_are_stretched_and_not_clipped(dtype):
    values = np.linspace(-1000, 100_000, 256).astype(dtype).reshape(16, 16)
    got = pixels(encode(Image.fromarray(values), "TIFF"), channels=1).ravel()
    np.testing.assert_array_equal(got, np.arange(256))


def test_constant_float_image_is_read():
    got = pixels(encode(Image.fromarray(np.full((4, 4), 7.5, np.float32)), "TIFF"))
    np.testing.assert_array_equal(got, np.zeros((4, 4, 3)))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colour_spaces_are_converted(mode):
    image = Image.merge(
        mode, [band.copy() for band in photo().split()] + [Image.new("L", (40, 28), 30)] * (mode == "CMYK")
    )
    data = encode(image, "TIFF", compression="tiff_lzw")  # Pillow 12.3 cannot read the plain YCbCr that it writes
    assert Image.open(io.BytesIO(data)).mode in (mode, "RGB")  # 12.3 converts YCbCr itself, by another rounding
    expected = np.asarray(image.convert("RGB"))
    assert expected.std() > 10
    np.testing.assert_allclose(pixels(data), expected, rtol=0, atol=1)
    np.testing.assert_allclose(pixels(data, channels=1), np.asarray(image.convert("RGB").convert("L")), rtol=0, atol=1)


def test_cmyk_jpeg_is_not_inverted():
    data = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    red, green, blue = pixels(data).mean((0, 1))
    assert red > 250
    assert max(green, blue) < 5


def test_black_and_white_and_grey_become_three_channels():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for image in (grey, grey.convert("1")):
        expected = np.asarray(image.convert("L")).astype(int)
        np.testing.assert_array_equal(pixels(encode(image, "PNG")), np.repeat(expected[..., None], 3, axis=2))
        np.testing.assert_array_equal(pixels(encode(image, "PNG"), channels=1), expected)


def test_colour_becomes_luma_where_grey_is_wanted():
    rgb = np.asarray(photo()).astype(float)
    luma = rgb @ [0.299, 0.587, 0.114]
    image = read_image(encode(photo(), "PNG"), ReadOptions(channels=1))
    assert image.mode == "L"
    assert np.abs(np.asarray(image) - luma).max() <= 1


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG", "MPO"])
def test_first_frame_is_taken(kind):
    frames = [Image.new("RGB", (24, 16), color) for color in ("red", "green", "blue")]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(pixels(data) - [255, 0, 0]).max() <= 4


# ---- what is refused ----


def bad_tiff_compression() -> bytes:
    data = encode(photo(), "TIFF")
    tag = struct.pack("<HHI", 259, 3, 1)
    return replace_at(data, data.index(tag) + len(tag), struct.pack("<H", 31337))


def bmp_with_size(width: int, height: int) -> bytes:
    return replace_at(encode(photo(), "BMP"), 18, struct.pack("<ii", width, height))


def png_of_other_pixels() -> bytes:
    """Its zlib stream is whole, so that only the chunk's checksum tells that these are not the pixels written."""
    written, other = (zlib.compress(bytes([0, 1, 2, last]), 0) for last in (3, 4))
    return png(3, 1, 8, 0, None, chunk(b"IDAT", written)).replace(written, other)


def png_without_chunk(lost: int) -> bytes:
    stream = zlib.compress(b"".join(b"\0" + row.tobytes() for row in np.asarray(photo())))
    third = len(stream) // 3 + 1
    parts = [chunk(b"IDAT", stream[start : start + third]) for start in range(0, len(stream), third)]
    assert len(parts) == 3
    return png(40, 28, 8, 2, None, b"".join(part for number, part in enumerate(parts) if number != lost))


PNG, JPEG = encode(photo(), "PNG"), encode(photo(), "JPEG", quality=95)
BOMB = png(30_000, 30_000, 8, 2, b"\0")
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "text": (b"this is a caption, not an image\n", "not an image"),
    "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "HTML page"),
    "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not supported: SVG"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj", "not supported: PDF"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not supported: EPS"),
    "one byte": (b"\n", "not an image"),
    "zeros": (bytes(5000), "zero bytes"),
    "wrong magic": (b"\x88" + PNG[1:], "not an image"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "JPEG.*truncated"),
    "jpeg header alone": (JPEG[:30], "JPEG"),
    "jpeg half zeros": (JPEG[:20] + bytes(len(JPEG)), "JPEG"),
    "half a png": (PNG[: len(PNG) // 2], "PNG.*truncated"),
    "half a gif": (encode(photo(), "GIF")[:-600], "GIF.*truncated"),
    "half a webp": (encode(photo(), "WEBP")[:-60], "WEBP"),
    "half a tiff": (encode(photo(), "TIFF", compression="tiff_lzw")[:-300], "TIFF"),
    "half a bmp": (encode(photo(), "BMP")[:-60], "BMP.*truncated"),
    "half a jpeg 2000": (encode(photo(), "JPEG2000")[:-200], "JPEG2000"),
    "half a qoi": (encode(photo(), "QOI")[:-200], "QOI"),
    "png: garbage behind the signature": (PNG[:8] + np.random.default_rng(0).bytes(400), "PNG"),
    "png: broken zlib stream": (
        png(4, 4, 8, 2, None, chunk(b"IDAT", b"\x78\x9c" + b"\xff" * 50)),
        "PNG.*broken data stream",
    ),
    "png: header checksum": (replace_at(PNG, 29, b"\0\0\0\0"), "PNG.*checksum|PNG.*broken"),
    "png: pixel checksum": (png_of_other_pixels(), "PNG.*checksum of the pixel data"),
    "png: no pixels": (png(4, 4, 8, 2, None), "PNG"),
    "png: first pixels lost": (png_without_chunk(0), "PNG"),
    "png: middle pixels lost": (png_without_chunk(1), "PNG"),
    "png: last pixels lost": (png_without_chunk(2), "PNG.*truncated"),
    "png: no palette": (png(2, 2, 8, 3, b"\0\0\0\0\0\0"), "PNG"),
    "png: 0 x 0": (png(0, 0, 8, 2, b""), "0 x 0|PNG"),
    "png: bomb": (BOMB, "too large: 30000 x 30000"),
    "bmp: bomb": (bmp_with_size(2**30, 2**30), "too large"),
    "bmp: negative width": (bmp_with_size(-40, 28), "too large|too small|BMP"),
    "bmp: no height": (bmp_with_size(40, 0), "too small|BMP"),
    "tiff: unknown compression": (bad_tiff_compression(), "TIFF"),
    "tiff: NaN": (encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "NaN"),
    "ico: garbage": (b"\0\0\1\0\1\0" + b"\xff" * 200, "ICO"),
    "icns: garbage": (b"icns" + struct.pack(">I", 300) + b"\x11" * 292, "ICNS"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_bad_file_is_refused_with_its_reason(kind):
    data, reason = BAD_FILES[kind]
    with pytest.raises(ImageError, match=reason) as error:
        read_image(data)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_palette_index_beyond_the_palette_is_refused_or_some_colour():
    data = png(2, 1, 8, 3, b"\0\0\xff", chunk(b"PLTE", b"\x0a\x14\x1e"))
    assert outcome(data) in ("image", "ImageError")


def test_small_image_is_refused_by_either_side():
    data = encode(photo(40, 28), "PNG")
    assert read_image(data, ReadOptions(min_side=28)).size == (40, 28)
    for size in [(40, 28), (28, 40)]:
        with pytest.raises(ImageError, match=r"too small: \d+ x \d+ pixels, the shorter side needs 29"):
            read_image(encode(photo(*size), "PNG"), ReadOptions(min_side=29))
    with pytest.raises(ImageError, match="too small: 1 x 1"):
        read_image(encode(photo(1, 1), "PNG"), ReadOptions(min_side=2))


@pytest.mark.parametrize("name", ["folder.png", "missing.png"])
def test_unreadable_path_is_an_image_error(tmp_path, name):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageError, match="cannot be read"):
        read_image(tmp_path / name)


def test_pixel_limit_is_ours_and_not_pillows(monkeypatch):
    """Pillow's limits do not apply, its warnings do not appear, and neither is changed."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(encode(photo(), "PNG")).size == (40, 28)
    with pytest.raises(ImageError, match="too large: 40 x 28 pixels, at most 1119"):
        read_image(encode(photo(), "PNG"), ReadOptions(max_pixels=40 * 28 - 1))
    assert Image.MAX_IMAGE_PIXELS == 10


def test_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match="too large"):
        read_image(BOMB)


def ico_of(picture: bytes) -> bytes:
    """An icon whose directory claims 16 x 16."""
    return struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(picture), 22) + picture


def icns_of(picture: bytes) -> bytes:
    """An icon whose only entry is for 16 x 16."""
    entry = b"icp4" + struct.pack(">I", 8 + len(picture)) + picture
    return b"icns" + struct.pack(">I", 8 + len(entry)) + entry


@pytest.mark.filterwarnings("ignore:Image was not the expected size")
@pytest.mark.parametrize("icon_of", [ico_of, icns_of])
def test_icon_cannot_hide_a_larger_picture(icon_of):
    assert read_image(icon_of(encode(photo(16, 16), "PNG")), ReadOptions(max_pixels=10_000)).size == (16, 16)
    with pytest.raises(ImageError, match=r"too large: 256 x 256|not one of the allowed sizes"):
        read_image(icon_of(encode(photo(256, 256), "PNG")), ReadOptions(max_pixels=10_000))


def test_running_out_of_memory_is_not_the_files_fault(monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(MemoryError):
        read_image(encode(photo(), "BMP"))


def test_wrong_number_of_channels_is_the_callers_fault():
    with pytest.raises(InputError, match="channels is 2") as error:
        read_image(PNG, ReadOptions(channels=2))
    assert not isinstance(error.value, ImageError)


def outcome(data: bytes) -> str:
    """Anything but an image or an `ImageError` fails the test that asks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = read_image(data, ReadOptions(max_pixels=1_000_000))
        except ImageError:
            return "ImageError"
    assert image.mode == "RGB"
    assert len(image.tobytes()) == image.width * image.height * 3
    return "image"


@pytest.mark.parametrize("kind", FUZZED)
def test_flipped_bits_give_an_image_or_an_image_error(kind):
    image = photo(32, 32)
    data = encode(image, kind, **({"sizes": [(32, 32)]} if kind in ("ICO", "ICNS") else {}))
    if kind == "ICNS":
        data = data[:4000]
    generator = np.random.default_rng(len(kind))
    seen = set()
    for trial in range(120):
        damaged = bytearray(data)
        reach = 64 if trial % 2 else len(data)  # half of them in the header, where decoders trip
        for _ in range(generator.integers(1, 6)):
            damaged[generator.integers(min(reach, len(data)))] ^= 1 << generator.integers(8)
        seen.add(outcome(bytes(damaged)))
    assert "ImageError" in seen


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "JPEG2000", "QOI", "TIFF"])
def test_no_truncation_passes_for_a_whole_image(kind):
    """Up to its last twentieth: the very last bytes of some formats only say «the end»."""
    data = encode(photo(64, 48), kind)
    for length in np.linspace(1, len(data) * 0.95, 40).astype(int):
        assert outcome(data[:length]) == "ImageError", f"{length} of {len(data)} bytes"


def test_png_with_any_flipped_pixel_bit_is_refused():
    start = PNG.index(b"IDAT") + 4
    generator = np.random.default_rng(0)
    for position in generator.integers(start, len(PNG) - 12, 60):
        damaged = bytearray(PNG)
        damaged[position] ^= 1 << generator.integers(8)
        assert outcome(bytes(damaged)) == "ImageError"


# ---- tensors and crops ----


def test_every_byte_survives_the_tensor():
    rgb = (
        np.stack([np.arange(256), np.arange(255, -1, -1), np.arange(256) ^ 85], -1).astype(np.uint8).reshape(16, 16, 3)
    )
    tensor = to_tensor(Image.fromarray(rgb))
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert (tensor.min(), tensor.max()) == (-1.0, 1.0)
    assert tensor[0, 0, 3] == 3 / 127.5 - 1
    np.testing.assert_array_equal(np.asarray(to_image(tensor)), rgb)


def test_grey_survives_the_tensor():
    grey = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(8, 32))
    assert to_tensor(grey).shape == (1, 8, 32)
    assert to_image(to_tensor(grey)).tobytes() == grey.tobytes()
    assert to_image(to_tensor(grey)).mode == "L"


def test_to_image_rounds_and_clamps():
    values = torch.tensor([-3.0, -1.0, 0.6 / 127.5 - 1, 1.4 / 127.5 - 1, 254.6 / 127.5 - 1, 9.0, float("inf")])
    assert np.asarray(to_image(values[None, None])).ravel().tolist() == [0, 0, 1, 1, 255, 255, 255]


def test_to_image_takes_half_precision_that_needs_grad():
    tensor = torch.zeros(3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    assert to_image(tensor).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("tensor", [torch.zeros(4, 4), torch.zeros(2, 4, 4), torch.full((3, 4, 4), torch.nan)])
def test_to_image_refuses_what_is_no_image(tensor):
    with pytest.raises(InputError, match="image tensor"):
        to_image(tensor)


@pytest.mark.parametrize("size", [(451, 300), (300, 451)])
def test_center_crop_keeps_pixels_where_nothing_is_to_be_resized(size):
    image = photo(*size)
    left, top = (75, 0) if size[0] > size[1] else (0, 75)
    expected = np.asarray(image)[top : top + 300, left : left + 300]
    np.testing.assert_array_equal(np.asarray(center_crop(image, 300)), expected)


def test_shrinking_does_not_alias():
    """Stripes of one pixel must become grey; a resize without antialias gives black, white or moiré."""
    stripes = np.zeros((240, 240), np.uint8)
    stripes[:, ::2] = 255
    image = Image.fromarray(stripes)
    for crop in (center_crop(image, 48), random_crop(image, 48, np.random.default_rng(0), scale=(1.0, 1.0))):
        inner = np.asarray(crop)[:, 4:-4].astype(int)
        assert np.abs(inner - 127.5).max() < 12


def test_random_crop_spans_its_scale_and_all_places():
    """On a ramp of coordinates, a crop tells where it was and how large."""
    x, y = np.meshgrid(np.arange(200), np.arange(100))
    image = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    generator = np.random.default_rng(0)
    crops = [np.asarray(random_crop(image, 10, generator, (0.5, 1.0), flip=0.0)).astype(float) for _ in range(400)]
    sides = np.array([(crop[0, -1, 0] - crop[0, 0, 0]) * 10 / 9 for crop in crops])
    lefts = np.array([crop[0, 0, 0] for crop in crops])
    assert 48 < sides.min() < 54
    assert 96 < sides.max() < 102
    assert abs(sides.mean() - 75) < 3
    assert lefts.min() < 12
    assert lefts.max() > 130
    assert all((np.diff(crop[0, :, 0]) > 0).all() for crop in crops), "none is mirrored"


def test_random_crop_does_not_enlarge_where_pixels_suffice():
    image = photo(120, 100)
    crop = np.asarray(random_crop(image, 90, np.random.default_rng(0), (0.5, 0.6), flip=0.0))
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(image), (90, 90, 3))[:, :, 0]
    assert (windows == crop).all((2, 3, 4)).any(), "90 x 90 pixels of the image, unchanged"


def test_native_crops_are_pixels_of_the_image_and_as_frequent_as_asked_for():
    pixels = np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (16, 16, 3)).reshape(-1, 16, 16, 3)

    def is_native(crop: Image.Image) -> bool:
        return bool((windows == np.asarray(crop)).all(axis=(1, 2, 3)).any())

    generator = np.random.default_rng(0)
    found = [is_native(random_crop(image, 16, generator, (0.5, 1.0), flip=0.0, native=0.3)) for _ in range(200)]
    assert 40 <= sum(found) <= 80
    # without the option nothing is drawn for it, so that older runs go on as they began
    a, b = np.random.default_rng(3), np.random.default_rng(3)
    random_crop(image, 16, a, native=0.0)
    b.random(4)
    assert a.random() == b.random()
    small = image.resize((12, 20))
    assert random_crop(small, 16, generator, native=1.0).size == (16, 16)


def test_random_crop_mirrors_with_its_probability():
    ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8), (64, 1)))
    generator = np.random.default_rng(0)
    mirrored = [np.asarray(random_crop(ramp, 16, generator, flip=0.25))[0] for _ in range(600)]
    fraction = np.mean([row[0] > row[-1] for row in mirrored])
    assert 0.19 < fraction < 0.31


def test_random_crop_of_a_small_image_has_the_size_asked_for():
    assert random_crop(photo(20, 12), 32, np.random.default_rng(0)).size == (32, 32)


def test_color_jitter_changes_colours_within_range_and_leaves_its_input():
    image = to_tensor(photo())
    before = image.clone()
    changed = [color_jitter(image, 0.3, np.random.default_rng(seed)) for seed in range(20)]
    assert torch.equal(image, before)
    assert all(bool((x.abs() <= 1).all()) and x.shape == image.shape for x in changed)
    assert len({x.sum().item() for x in changed}) == 20
    assert torch.equal(changed[3], color_jitter(image, 0.3, np.random.default_rng(3)))


def test_color_jitter_is_off_at_zero():
    image = to_tensor(photo())
    assert torch.equal(color_jitter(image, 0.0, np.random.default_rng(0)), image)


def test_color_jitter_permutes_channels_as_often_as_its_strength_says():
    image = torch.stack([torch.full((4, 4), value) for value in (-0.5, 0.0, 0.5)])
    orders = [
        color_jitter(image, 0.4, np.random.default_rng(seed)).mean((1, 2)).argsort().tolist() for seed in range(400)
    ]
    fraction = np.mean([order != [0, 1, 2] for order in orders])
    assert abs(fraction - 0.4 * 5 / 6) < 0.08, "one permutation in six is none"


def test_color_jitter_takes_grey():
    grey = to_tensor(photo().convert("L"))
    assert color_jitter(grey, 0.5, np.random.default_rng(0)).shape == grey.shape
