"""What decoding costs at its peak, in bytes a pixel: docs/images.md states the bounds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_images import encode, png

SIDE = 2000
FIXED_BYTES = 8 * 2**20  # what decoders and Python take whatever the size of the image
# The peak above what the process holds before, as a multiple of the H·W·3 bytes that the image has in the end. Pillow
# keeps RGB in 4 bytes a pixel, so 4/3 is the least.
BOUNDS = {
    "16-bit grey PNG": 3.2,
    "16-bit RGB PNG": 2.0,
    "palette PNG": 2.6,
    "RGBA PNG": 3.6,
    "CMYK JPEG": 3.6,
    "progressive JPEG": 4.0,
}
MEASURE = """
import os, sys
from sdvae.data import read_image

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

for path in sys.argv[1:]:
    if os.fork() == 0:  # so that no file profits from memory that another has freed
        with open(path, "rb") as file:
            data = file.read()
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak counts from here
        before = status("VmRSS")
        image = read_image(data)
        print(status("VmHWM") - before, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def file_of(kind: str) -> bytes:
    ramp = np.add.outer(np.arange(SIDE), np.arange(SIDE))
    rgb = Image.fromarray(np.stack([ramp % 256, ramp // 20 % 256, np.full_like(ramp, 99)], 2).astype(np.uint8))
    if kind.startswith("16-bit"):
        channels = 1 if "grey" in kind else 3
        return png(SIDE, SIDE, 16, 0 if channels == 1 else 2, bytes((2 * channels * SIDE + 1) * SIDE))
    if kind.endswith("PNG"):
        return encode(rgb.quantize(64) if kind == "palette PNG" else rgb.convert("RGBA"), "PNG", compress_level=1)
    return encode(
        rgb.convert("CMYK") if kind == "CMYK JPEG" else rgb, "JPEG", progressive="prog" in kind, subsampling=0
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is measured through Linux's /proc")
def test_memory_of_decoding_is_bounded(tmp_path):
    for number, kind in enumerate(BOUNDS):
        (tmp_path / str(number)).write_bytes(file_of(kind))
    paths = [str(tmp_path / str(number)) for number in range(len(BOUNDS))]
    run = subprocess.run([sys.executable, "-c", MEASURE, *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    peaks = dict(zip(BOUNDS, map(int, run.stdout.split()), strict=True))
    ratios = {kind: (peak - FIXED_BYTES) / (SIDE * SIDE * 3) for kind, peak in peaks.items()}
    assert all(ratios[kind] <= BOUNDS[kind] for kind in BOUNDS), ratios
    assert all(peak > SIDE * SIDE * 4 for peak in peaks.values()), "the image itself was not counted"
