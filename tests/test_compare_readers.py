"""scripts/compare_readers.py: it sees agreement where there is, and the differences that it is meant to find."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from scripts import compare_readers
from tests.test_images import encode, photo

tifffile = pytest.importorskip("tifffile", reason="needs the extra `test`")
pytest.importorskip("imagecodecs", reason="needs the extra `test`")


def test_readers_are_compared_file_by_file(tmp_path, capsys, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encode(photo(), "PNG"))
    (tmp_path / "in" / "b.tif").write_bytes(encode(photo(), "TIFF"))
    (tmp_path / "c.png").write_bytes(encode(photo().convert("RGBA"), "PNG"))
    tifffile.imwrite(tmp_path / "wide.tif", np.ones((4, 4, 3), np.float32), photometric="rgb")
    (tmp_path / "text.txt").write_text("not an image")

    def wrong(data: bytes) -> np.ndarray:
        """A reader that turns every PNG."""
        if not data.startswith(b"\x89PNG"):
            raise ValueError("not read")
        return np.full((28, 40, 3), 9, np.uint8)

    readers = compare_readers.other_readers()
    assert {"tifffile", "imagecodecs"} <= set(readers)
    chosen = {"tifffile": readers["tifffile"], "imagecodecs": readers["imagecodecs"], "wrong": wrong}
    monkeypatch.setattr(compare_readers, "other_readers", lambda: chosen)
    compare_readers.main([str(tmp_path), "--differences", str(tmp_path / "differences.csv")])
    out = capsys.readouterr().out
    assert "| PNG | 2 | 2 | 0 of 0 | 2 of 2 | 0 of 2 |" in out
    assert "| TIFF | 1 | 1 | 1 of 1 | 0 of 0 | 0 of 0 |" in out
    assert "| not supported: N-bit float RGB TIFF; convert to N-bit PNG | 1 |" in out
    with open(tmp_path / "differences.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sorted((row["file"], row["reader"]) for row in rows) == [("c.png", "wrong"), ("in/a.png", "wrong")]


def test_alpha_and_depth_are_brought_to_8_bit_rgb_on_white():
    grey_alpha = np.array([[[0, 65535], [0, 0]]], np.uint16)
    np.testing.assert_array_equal(compare_readers.on_white(grey_alpha)[0], [[0, 0, 0], [255, 255, 255]])
    assert compare_readers.upright(np.zeros((2, 5, 3), np.uint8), 6).shape == (5, 2, 3)
