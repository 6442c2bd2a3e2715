"""Decoding image files, and the crops of training and evaluation.

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
import torch
from PIL import Image
from PIL.Image import Resampling, Transpose
from torch import Tensor

from sdvae.data.color import profile_of, to_srgb
from sdvae.data.reading import MAX_PIXELS, ImageError, ReadOptions
from sdvae.errors import InputError, one_line

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "AVIF", "TIFF", "BMP", "JPEG2000", "PPM"),
    *("PSD", "QOI", "ICO", "ICNS", "DDS", "SGI", "PCX"),
)

# Pillow antialiases when it shrinks. Bicubic rings less than Lanczos, and an autoencoder learns to draw rings.
RESAMPLING = Resampling.BICUBIC

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
        An image of mode "RGB" or "L", without metadata.

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
    image.info = {}  # it may hold the EXIF orientation, by which a later reader would turn the image again
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


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an "RGB" or "L" image to a contiguous (C, H, W) float32 tensor; 0 becomes -1 and 255 becomes 1."""
    pixels = torch.from_numpy(np.array(image))  # (H, W, C) or (H, W) uint8
    pixels = pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def to_image(tensor: Tensor) -> Image.Image:
    """Convert a tensor to an "L" or "RGB" image.

    Args:
        tensor: (C, H, W) float in [-1, 1], C in {1, 3}. Values outside are clamped.

    Returns:
        The image, each value rounded to the nearest of 0..255.

    Raises:
        InputError: for another shape, or NaN, which has no colour.
    """
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise InputError(f"image tensor has shape {tuple(tensor.shape)}; need (C, H, W) with C 1 or 3")
    tensor = tensor.detach().float().cpu()
    if tensor.isnan().any():
        raise InputError("image tensor holds NaN; need numbers, look for what overflowed before this point")
    pixels = tensor.add(1.0).mul_(127.5).clamp_(0.0, 255.0).round_().to(torch.uint8)
    pixels = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    return Image.fromarray(pixels.contiguous().numpy())


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Cut out the largest centred square and resize it to size x size with antialiasing, as evaluation does.

    This is the same as resizing the short side to `size` and cropping the middle, except that both axes are scaled by
    exactly the same factor. An image whose short side is `size` already keeps its pixels.
    """
    return cover(image, size, size)


def adm_center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre crop of ADM (Dhariwal & Nichol 2021), with which ImageNet figures at 256x256 are published.

    A box filter halves the image while its short side is at least twice `size`; then the short side is resized to
    `size` (bicubic) and the middle is cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.width * scale), round(image.height * scale))
    image = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Cut out the largest centred part of this aspect ratio and resize it to width x height with antialiasing."""
    return image.resize((width, height), RESAMPLING, box=cover_box(image.size, width, height))


def cover_box(size: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int]:
    """The part that `cover` cuts out.

    Args:
        size: (width, height) of the image.
        width: width of the result, in pixels.
        height: height of the result, in pixels.

    Returns:
        (left, top, right, bottom) in whole pixels of the image.
    """
    w, h = size
    box_w = min(w, max(1, round(h * width / height)))
    box_h = min(h, max(1, round(w * height / width)))
    left, top = (w - box_w) // 2, (h - box_h) // 2
    return left, top, left + box_w, top + box_h


def random_crop(
    image: Image.Image,
    size: int,
    generator: np.random.Generator,
    scale: tuple[float, float] = (0.5, 1.0),
    flip: float = 0.5,
) -> Image.Image:
    """Cut out a random square, resize it to size x size with antialiasing, and perhaps mirror it.

    Args:
        image: "RGB" or "L".
        size: side of the result, in pixels.
        generator: the random generator; four numbers are drawn from it in every case.
        scale: the range of the square's side as a fraction of the short side, from which it is drawn uniformly. The
            side is at least `size` pixels if the image has them, so that nothing is enlarged. All places in the image
            are equally likely.
        flip: the probability of a left-right mirror image.

    Returns:
        An image of the same mode.
    """
    width, height = image.size
    short = min(width, height)
    u_side, u_left, u_top, u_flip = generator.random(4)
    side = round(short * (scale[0] + (scale[1] - scale[0]) * u_side))
    side = min(max(side, size, 1), short)
    left, top = int(u_left * (width - side + 1)), int(u_top * (height - side + 1))
    crop = image.resize((size, size), RESAMPLING, box=(left, top, left + side, top + side))
    return crop.transpose(Transpose.FLIP_LEFT_RIGHT) if u_flip < flip else crop


def color_jitter(image: Tensor, strength: float, generator: np.random.Generator) -> Tensor:
    """Change brightness, contrast and saturation at random, and sometimes the order of the channels.

    With values in [0, 1], brightness multiplies them, contrast multiplies their distance from the mean luma, and
    saturation their distance from each pixel's luma. Each factor is uniform in 1 ± `strength`. Then the channels get a
    random order with probability `strength`, and the result is clamped.

    torchvision's `adjust_brightness`, `adjust_contrast` and `adjust_saturation` clamp after each step and weigh luma
    differently. With them pixels, and so the losses of training, would be different.

    Args:
        image: (C, H, W) float in [-1, 1], C in {1, 3}; grey has no saturation and no order of channels.
        strength: a number in [0, 1]; 0 returns the image itself.
        generator: the random generator; four numbers and a permutation are drawn, or nothing if `strength` is 0.

    Returns:
        A new (C, H, W) tensor in [-1, 1].

    Raises:
        InputError: when `strength` is outside [0, 1].
    """
    if not 0.0 <= strength <= 1.0:
        raise InputError(f"color jitter has strength {strength}; need a number in [0, 1]")
    if strength == 0.0:
        return image
    brightness, contrast, saturation = 1.0 + strength * (2.0 * generator.random(3) - 1.0)
    permute = generator.random() < strength
    order = generator.permutation(3)

    x = (image + 1.0).mul_(0.5 * brightness)
    mean = _luma(x).mean()
    x = (x - mean).mul_(contrast).add_(mean)
    if len(x) == 3:
        luma = _luma(x)
        x = (x - luma).mul_(saturation).add_(luma)
        if permute:
            x = x[torch.from_numpy(order)]
    return x.mul_(2.0).sub_(1.0).clamp_(-1.0, 1.0)


def _luma(x: Tensor) -> Tensor:
    """The luma (1, H, W) of (3, H, W) or (1, H, W), with the weights of ITU-R 601-2, as in Pillow's "L"."""
    return x if len(x) == 1 else 0.299 * x[:1] + 0.587 * x[1:2] + 0.114 * x[2:]


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
