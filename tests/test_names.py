"""Names of files that are no plain text pass through every command, stay distinct, and never break a line."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from pathlib import Path

import markupsafe
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from sdvae import LatentDataset, save_vae
from sdvae.cli import main
from sdvae.io import printable, utf8
from sdvae.training import save
from sdvae.training.checkpoint import checkpoints
from tests.conftest import tiny_arguments, tiny_vae
from tests.faults import blank

STRANGE = [
    b"caf\xe9.png",
    rb"caf\xe9.png",  # a backslash, x, e, 9: what the name above becomes if bytes are only replaced
    rb"caf\\xe9.png",
    b"back\\slash.png",
    b"line\nbreak.png",
    b"tab\t.png",
    b"bell\x07\x1b[31m.png",
    b'<b>&amp;".png',
    b"=cmd|.png",
    "café.png".encode(),
    unicodedata.normalize("NFD", "café.png").encode(),
    "\u202egnp.exe.png".encode(),
    b"n" * 246 + b".png",
]


def test_different_names_have_different_texts():
    parts = (b"\\", b"x", b"e9", b"\xe9", b"\xc3\xa9", b"n", b"\n")
    names = {b"".join((a, b, c, d)) for a in parts for b in parts for c in parts for d in (b"", *parts)}
    texts = [utf8(os.fsdecode(name)) for name in names]
    assert len(set(texts)) == len(names)
    for text in texts:
        text.encode("utf-8")


@pytest.mark.parametrize("name", ["a/b.png", "é/\n.png", "back\\slash.png", "\\", ""])
def test_a_name_that_is_text_stays_as_it_is(name):
    assert utf8(name) == name


def test_a_printable_name_has_one_line_and_no_character_that_a_terminal_obeys():
    for name in map(os.fsdecode, STRANGE):
        assert printable(name).isprintable()
        printable(name).encode("utf-8")
    assert printable(os.fsdecode(b"caf\xe9\n\x1b.png")) == "caf\\xe9\\n\\x1b.png"
    assert printable("C:\\xmas é") == "C:\\xmas é"


def photographs(folder: bytes, names: list[bytes]) -> Path:
    """Different smooth pictures, of which some are damaged, in a folder with as strange a name."""
    os.makedirs(folder)
    generator = np.random.default_rng(0)
    for name in names:
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        with open(os.path.join(folder, name), "wb") as file:
            if not name.startswith(b"bad"):
                coarse.resize((48, 40), Image.Resampling.BICUBIC).save(file, format="PNG")
    return Path(os.fsdecode(folder))


def text_of(capfd, caplog) -> str:
    """What a command printed and logged. Each message must be one line without control characters."""
    out, err = capfd.readouterr()
    for record in caplog.records:
        if record.name.startswith("sdvae"):
            assert record.getMessage().isprintable(), record.getMessage()
    assert not set(out + err) & set("\x07\x1b\t"), "no control character reaches the terminal"
    said = "\n".join(record.getMessage() for record in caplog.records)
    caplog.clear()
    return out + err + said


@pytest.mark.slow
def test_strange_names_pass_through_every_command(tmp_path, capfd, caplog, monkeypatch):
    monkeypatch.setattr(save, "draw", blank)
    bad = [b"bad\xe9\n.png"]
    data = photographs(os.fsencode(tmp_path) + b"/d\xe9 \n<i>|", STRANGE + bad)
    names = {utf8(os.fsdecode(name)) for name in STRANGE}
    run = tmp_path / "run|<b>"

    arguments = tiny_arguments(
        data, run, steps="3", checkpoint__every_steps="2", validate_every="3", data__max_bad_fraction="0.5",
        trackers='["tensorboard"]',
    )  # fmt: skip
    assert main(["train", *arguments]) == 0
    said = text_of(capfd, caplog)
    assert "tracker" not in said, "no tracker was left out"
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert checkpoints(run / "checkpoints")
    assert main(["train", *arguments, "--steps=4", "--checkpoint.accept_changed_config=true"]) == 0
    assert "continu" in text_of(capfd, caplog)

    vae = tmp_path / "vae"
    save_vae(tiny_vae(block_out_channels=(8, 8, 8, 8), latent_channels=4), vae)
    latents = tmp_path / "latents"
    encoding = ["--source", str(data), "--output", str(latents), "--vae", str(vae), "--resolution", "32",
                "--device", "cpu", "--max_bad_fraction", "0.5", "--shard_rows", "5"]  # fmt: skip
    assert main(["encode", *encoding]) == 0
    assert main(["encode", *encoding, "--verify", "true"]) == 0
    text_of(capfd, caplog)
    rows = pq.read_table(latents / "data").to_pylist()
    assert {row["name"] for row in rows} == names
    assert [json.loads(line)["name"] for line in (latents / "skipped.jsonl").read_text().splitlines()] == [
        utf8(os.fsdecode(name)) for name in bad
    ]
    assert sum(line.startswith("# ") for line in (latents / "README.md").read_text(encoding="utf-8").splitlines()) == 1
    assert {row["name"] for row in LatentDataset(latents)} == names

    for to, code in (("safetensors", 0), ("webdataset", 0), ("kohya", 2)):
        assert main(["convert", str(latents), str(tmp_path / to), "--to", to]) == code
    said = text_of(capfd, caplog)
    unsafe = [name for name in names if "\\" in name or len(os.fsencode(name)) > 230]
    assert f"got {len(unsafe)} of {len(names)} images with such names as" in said
    assert not (tmp_path / "kohya").exists()
    lines = [json.loads(line) for path in (tmp_path / "safetensors").glob("*.jsonl") for line in path.open()]
    assert {line["name"] for line in lines} == names

    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/out\xe9"))
    images = ["--resolution", "32", "--lpips", "none"]
    assert main(["evaluate", str(vae), "--data", str(data), "--output", str(out), *images]) == 0
    with (out / "per_image.csv").open(encoding="utf-8", newline="") as file:
        assert len(file.read().splitlines()) == 1 + len(STRANGE)
        file.seek(0)
        assert len({row["name"] for row in csv.DictReader(file)}) == len(STRANGE)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert list(results["skipped"]) == [utf8(os.fsdecode(name)) for name in bad]
    assert results["config"]["data"] == str(data)

    assert main(["report", str(vae), "--data", str(data), "--output", str(tmp_path / "report.html"), *images]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<b>&amp;amp;" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;&amp;amp;" in page
    for name in STRANGE:
        assert str(markupsafe.escape(printable(os.fsdecode(name)))) in page
    assert (
        main(
            [
                "explore",
                "pca",
                "--vae",
                str(vae),
                "--data",
                str(data),
                "--resolution",
                "32",
                "--output",
                str(tmp_path / "pca"),
            ]
        )
        == 0
    )
    files = [os.fsdecode(os.path.join(os.fsencode(data), name)) for name in STRANGE[:6]]
    assert main(["reconstruct", *files, "--vae", str(vae), "--output", str(tmp_path / "reconstructed")]) == 0
    assert main(["reconstruct", os.path.join(data, os.fsdecode(bad[0])), "--vae", str(vae)]) == 2
    text_of(capfd, caplog)
