"""Compare the pixels that sdvae reads from image files with what other readers make of them.

Example:

    python scripts/compare_readers.py FOLDER --differences differences.csv

Every file below the folder is read by `sdvae.data.read_image` and by those of pyvips, OpenCV, tifffile and imagecodecs
that are installed (`pip install "pyvips[binary]" opencv-python-headless tifffile imagecodecs`). All results are brought
to upright 8-bit RGB on white, without colour management. Two results agree if their sizes are the same and their
pixels differ by at most `--tolerance` levels of 255 on average: lossy decoders differ by about one level in rounding
and in the filter that enlarges the colour channels, and readers differ by one in how they make 8 bits of 16.

Printed are two tables: how many files of each format sdvae reads and how many of those agree with each reader, and how
often each reason for a refusal occurs. The CSV file lists each file on which two readers differ, and each that sdvae
refuses although another reader opens it; docs/images.md sums up such a run.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from sdvae.data import ImageError, ReadOptions, read_image

Reader = Callable[[bytes], np.ndarray]  # a file's bytes -> (H, W, 3) uint8, or any exception


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tolerance", type=float, default=2.0, help="mean difference that still agrees, of 255 levels")
    parser.add_argument("--differences", type=Path, help="CSV file to write: file, kind, reader, what differs")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")

    readers = other_readers()
    if not readers:
        sys.exit("no other reader is installed; need pyvips, opencv-python-headless, tifffile or imagecodecs")
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    refusals: Counter[str] = Counter()
    rows = []
    for path in sorted(path for path in options.folder.rglob("*") if path.is_file()):
        data, name = path.read_bytes(), str(path.relative_to(options.folder))
        kind = kind_of(data)
        count = counts[kind]
        count["files"] += 1
        ours: np.ndarray | str
        try:
            ours = np.asarray(read_image(data, ReadOptions(color="raw")))
            count["read"] += 1
        except ImageError as error:
            ours = str(error)
            refusals[re.sub(r"\d+", "N", ours.split(": starts with")[0])] += 1
        for reader, read in readers.items():
            try:
                theirs = read(data)
            except Exception:
                continue
            difference = compare(ours, theirs)
            if isinstance(ours, np.ndarray):
                count[f"{reader} reads"] += 1
                count[f"{reader} agrees"] += isinstance(difference, float) and difference <= options.tolerance
            if isinstance(difference, str) or difference > options.tolerance:
                rows.append((name, kind, reader, difference))

    table(["format", "files", "read", *(f"agree: {reader}" for reader in readers)], counts, list(readers))
    print("\n| refused because | files |\n|---|---:|")
    for reason, number in refusals.most_common():
        print(f"| {reason} | {number} |")
    if options.differences is not None:
        with open(options.differences, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file", "format", "reader", "difference"), *rows])


def table(header: list[str], counts: dict[str, Counter[str]], readers: list[str]) -> None:
    print("| " + " | ".join(header) + " |\n|---|" + "---:|" * (len(header) - 1))
    for kind in sorted(counts):
        count = counts[kind]
        agree = [f"{count[f'{reader} agrees']} of {count[f'{reader} reads']}" for reader in readers]
        print("| " + " | ".join([kind, str(count["files"]), str(count["read"]), *agree]) + " |")


def compare(ours: np.ndarray | str, theirs: np.ndarray) -> float | str:
    """The mean absolute difference, or in words why there is none."""
    if isinstance(ours, str):
        return f"refused by sdvae: {ours}"
    if ours.shape != theirs.shape:
        return f"size {ours.shape[1]} x {ours.shape[0]}, {theirs.shape[1]} x {theirs.shape[0]} there"
    return float(np.abs(ours.astype(np.int16) - theirs).mean())


def kind_of(data: bytes) -> str:
    """The format by Pillow's opinion, or "other"."""
    try:
        return Image.open(io.BytesIO(data)).format or "other"
    except Exception:
        return "other"


def on_white(pixels: np.ndarray) -> np.ndarray:
    """Convert (H, W) or (H, W, C <= 4) of uint8, uint16 or bool to (H, W, 3) uint8; the last of 2 or 4 is alpha."""
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype == np.uint16:
        pixels = np.rint(pixels / 257).astype(np.uint8)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(f"{pixels.dtype} of shape {pixels.shape} has no agreed conversion to RGB")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    color, alpha = np.split(pixels, [pixels.shape[2] - 1 + pixels.shape[2] % 2], axis=2)
    if color.shape[2] not in (1, 3):
        raise ValueError(f"{pixels.shape[2]} channels")
    color = np.broadcast_to(color, (*color.shape[:2], 3)).astype(np.float32)
    if alpha.size:
        weight = alpha / np.float32(255)
        color = color * weight + 255 * (1 - weight)
    return np.rint(color).astype(np.uint8)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels)
    image.info["exif"] = exif.tobytes()
    return np.asarray(ImageOps.exif_transpose(image))


def other_readers() -> dict[str, Reader]:
    """Those that are installed. Each tries every format, and raises an exception for what it does not read."""
    readers: dict[str, Reader] = {}
    try:
        import pyvips

        def read_with_vips(data: bytes) -> np.ndarray:
            image = pyvips.Image.new_from_buffer(data, "", fail_on="error").autorot()
            if image.format in ("float", "double", "int", "uint", "char", "short", "complex"):
                raise ValueError("no agreed range")
            image = image.colourspace("srgb")
            if image.hasalpha():
                image = image.flatten(background=255)
            return on_white(image.cast("uchar").numpy())

        readers["libvips"] = read_with_vips
    except ImportError:
        pass
    try:
        import cv2

        def read_with_opencv(data: bytes) -> np.ndarray:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            if pixels is None or pixels.dtype not in (np.uint8, np.uint16):
                raise ValueError("not read")
            if pixels.ndim == 3 and pixels.shape[2] == 4:  # this way OpenCV does not turn the image
                return on_white(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA))
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            if pixels is None:
                raise ValueError("not read")
            return pixels

        readers["OpenCV"] = read_with_opencv
    except ImportError:
        pass
    try:
        import tifffile

        def read_with_tifffile(data: bytes) -> np.ndarray:
            with tifffile.TiffFile(io.BytesIO(data)) as file:
                page = file.pages[0]
                pixels = page.asarray()
                if page.photometric.name not in ("MINISBLACK", "MINISWHITE", "RGB"):
                    raise ValueError("tifffile does not convert this to RGB")
                if page.planarconfig.name == "SEPARATE" and pixels.ndim == 3:
                    pixels = np.moveaxis(pixels, 0, 2)
                if pixels.dtype == np.uint8 and page.bitspersample < 8:
                    pixels = np.rint(pixels * (255 / (2**page.bitspersample - 1))).astype(np.uint8)
                if page.photometric.name == "MINISWHITE":
                    pixels = ~pixels
                extra = page.extrasamples
                if extra and extra[0] not in (1, 2):  # none of them is alpha
                    pixels = pixels[..., : -len(extra)]
                orientation = page.tags.valueof("Orientation", default=1)
            return upright(on_white(np.ascontiguousarray(pixels)), orientation)

        readers["tifffile"] = read_with_tifffile
    except ImportError:
        pass
    try:
        import imagecodecs

        CODECS = ("png", "jpeg8", "webp", "avif", "jpeg2k", "qoi", "gif")

        def read_with_imagecodecs(data: bytes) -> np.ndarray:
            for codec in CODECS:
                if getattr(imagecodecs, f"{codec}_check")(data[:16]):
                    pixels = getattr(imagecodecs, f"{codec}_decode")(data)
                    return on_white(pixels[0] if pixels.ndim == 4 else pixels)
            raise ValueError("not read")

        readers["imagecodecs"] = read_with_imagecodecs
    except ImportError:
        pass
    return readers


if __name__ == "__main__":
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
    main()
