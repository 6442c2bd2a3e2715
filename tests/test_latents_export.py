"""Latent data sets in the formats of other trainers: every number comes back, and no name in the data escapes."""

from __future__ import annotations

import json
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from PIL import Image, ImageOps
from safetensors import safe_open

from sdvae import InputError, LatentDataset
from sdvae.io import printable, sha256_of, utf8
from sdvae.latents import convert as export_module
from sdvae.latents.config import EncodeConfig
from sdvae.latents.convert import _crop_ltrb, export_latents
from sdvae.latents.encode import encode
from sdvae.latents.folder import LatentFolder
from sdvae.latents.rows import LatentRow, table_of, to_bytes, value_columns
from sdvae.latents.scaling import config_scaling
from sdvae.latents.writer import LatentWriter
from sdvae.model import DiagonalGaussian
from sdvae.noise import sample_seed
from sdvae.runtime import DTYPES
from sdvae.statistics import LatentMoments

FORMATS = ("safetensors", "webdataset", "kohya")
SHAPES = ((4, 8, 8), (4, 6, 10), (4, 10, 6))
CARRIED = {
    "caption": (["a cat", None, "é\u2028\n", "", "x", "y", "z"], datasets.Value("string")),
    "label": ([3, 0, -1, 2, 2, 1, 0], datasets.ClassLabel(num_classes=4)),
    "votes": ([1, 2, 3, 4, 5, None, 7], datasets.Value("int32")),
    "score": ([0.1, float("nan"), 1e-30, 2.0, -1.5, 0.0, 3.0], datasets.Value("float64")),
    "raw": ([b"\x00\xff", b"", b"a", b"b", b"c", b"d", b"e"], datasets.Value("binary")),
}


def write(
    root: Path,
    names: list[str] | None = None,
    carried=CARRIED,
    factor: float | None = 0.18215,
    blocks: int = 4,
    channels: int = 4,
    heights: Sequence[int] = range(100, 107),
    orientations: Sequence[int] = (1,) * 7,
    **changes,
) -> Path:
    """A finished data set of random latents in two shards with rows and one without."""
    names = [f"{i}.png" for i in range(7)] if names is None else names
    config = EncodeConfig(source="", output=str(root), **{"mirror": True, **changes})
    dtype = DTYPES[config.dtype]
    folder = LatentWriter(root)
    vae = {"scaling_factor": factor, "latent_channels": channels, "block_out_channels": [8] * blocks}
    stored = {"what": config.store, "dtype": config.dtype, "mirror": config.mirror}
    images = {"sizes": [[64, 64], [48, 80], [80, 48]]}
    made_by = {"encoder_sha256": "0", "precision": "fp32"}
    fingerprint = {"vae": made_by, "stored": stored, "images": images, "shards": 3}
    folder.begin(fingerprint, "test", vae, config_scaling({"scaling_factor": factor or 1.0}))
    generator = torch.Generator().manual_seed(0)
    features = datasets.Features({name: feature for name, (_, feature) in carried.items()})
    first = 0
    for shard, count in enumerate((4, 0, len(names) - 4)):
        rows = []
        for i in range(first, first + count):
            shape = (channels, *SHAPES[i % 3][1:])
            values = {
                name: to_bytes(torch.randn(shape, generator=generator).to(dtype)) for name in value_columns(config)
            }
            size = (shape[1] * 8, shape[2] * 8)
            rows.append(LatentRow(10 * i + shard * 2**32, names[i], f"{i:064}", shape, (heights[i], 200), (0, i), size,
                                  orientations[i], values))  # fmt: skip
        others = {name: given[first : first + count] for name, (given, _) in carried.items()}
        table = table_of(rows, pa.table(others, schema=features.arrow_schema), features, config)
        folder.claim(shard)
        moments = LatentMoments(channels)
        moments.update(DiagonalGaussian(torch.randn(2, 2 * channels, 4, 4, generator=generator)))
        folder.write_shard(shard, table, 2**19, moments, [])  # two rows in a row group
        first += count
    assert folder.finish()
    return root


def stored_rows(root: Path) -> list[dict]:
    """Every row, with the stored bits of its latents as a tensor."""
    folder = LatentWriter(root)
    folder.open()
    rows = []
    for path in sorted((root / "data").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            for name in row.keys() & {
                "mean",
                "logvar",
                "sample",
                "mean_mirrored",
                "logvar_mirrored",
                "sample_mirrored",
            }:
                row[name] = torch.frombuffer(bytearray(row[name]), dtype=folder.dtype).reshape(row["shape"])
            rows.append(row)
    return rows


def values_of(row: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in row.items() if isinstance(value, torch.Tensor)}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- safetensors ----


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("store", ["moments", "sample"])
def test_safetensors_hold_the_stored_bits_of_every_row_by_shard_and_shape(tmp_path, dtype, store):
    root = write(tmp_path / "latents", dtype=dtype, store=store)
    files = export_latents(root, tmp_path / "out", "safetensors")
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    wanted = {row["index"]: row for row in stored_rows(root)}
    seen = []
    for file in sorted((tmp_path / "out").glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        lines = [json.loads(line) for line in file.with_suffix(".jsonl").read_text("utf-8").split("\n")[:-1]]
        indices = tensors["index"].tolist()
        assert indices == sorted(indices) == [line["index"] for line in lines]
        seen += indices
        for i, index in enumerate(indices):
            row = wanted[index]
            for name, value in values_of(row).items():
                assert tensors[name].dtype == DTYPES[dtype]
                assert torch.equal(tensors[name][i], value)
            for name in ("original_size", "crop_top_left", "target_size", "label"):
                assert tensors[name][i].tolist() == row[name]
            assert {name: lines[i][name] for name in ("name", "sha256", "caption", "votes")} == {
                name: row[name] for name in ("name", "sha256", "caption", "votes")
            }
        assert (tensors["label"].dtype, tensors["original_size"].dtype) == (torch.int64, torch.int32)
        assert "votes" not in tensors, "a row has none, in another file"
        assert file.stem.endswith("x".join(map(str, wanted[indices[0]]["shape"])))
    assert sorted(seen) == sorted(wanted)
    stats = json.loads((tmp_path / "out" / "stats.json").read_text())
    assert stats["vae"]["scaling_factor"] == 0.18215
    assert stats["statistics"] == json.loads((root / "manifest.json").read_text())["statistics"]


# ---- webdataset ----


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_webdataset_gives_the_stored_values_captions_and_labels(tmp_path, dtype):
    names = ["a.b/c.png", "../x.png", "/etc/passwd", "0.png", "4", "é\n.png", "a.b/c.jpg"]
    root = write(tmp_path / "latents", names, dtype=dtype)
    files = export_latents(root, tmp_path / "out", "webdataset")
    assert [path.name for path in files] == ["train-00000-of-00002.tar", "train-00001-of-00002.tar"]
    found = webdataset.WebDataset([str(path) for path in files], shardshuffle=False).decode()
    wanted = stored_rows(root)
    samples = list(found)
    assert len(samples) == len(wanted)
    for sample, row in zip(samples, wanted, strict=True):
        assert sample["__key__"] == f"{row['index']:015d}"
        for name, value in values_of(row).items():
            assert sample[f"{name}.npy"].dtype == {"fp16": np.float16}.get(dtype, np.float32)
            assert np.array_equal(sample[f"{name}.npy"], value.float().numpy())
        assert sample["txt"] == (row["caption"] or "")
        assert sample["cls"] == row["label"]
        for name in ("index", "name", "sha256", "original_size", "crop_top_left", "target_size", "votes", "caption"):
            assert sample["json"][name] == row[name]
        assert sample["json"]["score"] == (None if np.isnan(row["score"]) else row["score"])
    assert samples[0]["json"]["raw"] == "AP8="


def test_webdataset_is_read_by_datasets_where_rows_lack_captions_and_labels(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    lacking = {**CARRIED, "label": ([None, 0, 1, 2, 2, 1, 0], datasets.Value("int64"))}
    root = write(tmp_path / "latents", carried=lacking)
    export_latents(root, tmp_path / "out", "webdataset")
    for streaming in (False, True):
        found = list(datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=streaming))
        for sample, row in zip(found, stored_rows(root), strict=True):
            assert np.array_equal(np.array(sample["mean.npy"], np.float32), row["mean"].float().numpy())
            assert sample["json"]["label"] == row["label"]
            assert "cls" not in sample, "the first row has none"


# ---- kohya ----


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_kohya_files_hold_a_sample_of_the_stored_moments_under_the_names_that_sd_scripts_looks_for(tmp_path, dtype):
    names = ["a/b.c.png", "a/d.jpg", "é.webp", "row-00000003", "e/f/g.png", "h.png", ".i"]
    stems = ["a/b.c", "a/d", "é", "row-00000003", "e/f/g", "h", ".i"]
    root = write(tmp_path / "latents", names, dtype=dtype)
    assert export_latents(root, tmp_path / "out", "kohya") == [tmp_path / "out"]
    wanted = {f"{stem}_0200x{100 + i:04d}_sd.npz": i for i, stem in enumerate(stems)}
    assert content(tmp_path / "out").keys() == wanted.keys()
    rows = stored_rows(root)
    for file, i in wanted.items():
        row = rows[i]
        with np.load(tmp_path / "out" / file) as arrays:
            found = dict(arrays)
        assert found.keys() == {"latents", "latents_flipped", "original_size", "crop_ltrb"}
        for suffix, name in (("", "latents"), ("_mirrored", "latents_flipped")):
            mean, logvar = row[f"mean{suffix}"].float(), row[f"logvar{suffix}"].float()
            generator = torch.Generator().manual_seed(sample_seed(0, 0, row["index"], f"kohya{suffix}"))
            noise = torch.randn((1, *row["shape"]), generator=generator)[0]
            assert found[name].dtype == np.float32
            assert np.array_equal(found[name], (mean + torch.exp(0.5 * logvar) * noise).numpy())
        assert found["original_size"].tolist() == [200, 100 + i]
        if i == 0:  # 200 x 100 for a square of 64
            assert found["crop_ltrb"].tolist() == [0, 16, 64, 48]


def test_kohya_files_hold_the_stored_sample_and_no_mirror_image_where_none_was_made(tmp_path):
    root = write(tmp_path / "latents", store="sample", mirror=False)
    export_latents(root, tmp_path / "out", "kohya")
    with np.load(tmp_path / "out" / "6_0200x0106_sd.npz") as arrays:
        assert set(arrays) == {"latents", "original_size", "crop_ltrb"}
        assert arrays["latents"].dtype == np.float32
        assert np.array_equal(arrays["latents"], stored_rows(root)[6]["sample"].float().numpy())


def test_kohya_files_of_sdxls_vae_are_named_so_and_another_factor_is_warned_of(tmp_path, caplog):
    for factor, suffix, warned in (
        (0.13025, "sdxl", []),
        (0.18215, "sd", []),
        (0.2, "sd", [0.2]),
        (None, "sd", [None]),
    ):
        caplog.clear()
        export_latents(write(tmp_path / f"{factor}", factor=factor), tmp_path / f"{factor}-out", "kohya")
        assert (tmp_path / f"{factor}-out" / f"0_0200x0100_{suffix}.npz").is_file()
        assert [record.args[1] for record in caplog.records if "multiplies" in record.msg] == warned


def test_kohya_crops_are_sd_scripts_own_and_stay_inside_when_it_flips_them():
    # (height, width) of image and target -> what BucketManager.get_crop_ltrb gives
    for original, target, wanted in (
        ((500, 1000), (512, 512), (0, 128, 512, 384)),
        ((1000, 500), (512, 512), (128, 0, 384, 512)),
        ((512, 512), (512, 512), (0, 0, 512, 512)),
        ((600, 1000), (448, 576), (0, 51, 576, 396.6)),
    ):
        left, top, right, bottom = _crop_ltrb(original, target)
        assert (left, top, right, bottom) == pytest.approx(wanted)
        assert target[1] - right >= 0, "sd-scripts' crop_left of the flipped image"


@pytest.mark.parametrize("change", [{"channels": 16}, {"blocks": 3}, {"blocks": 5}])
def test_kohya_refuses_latents_of_another_kind(tmp_path, change):
    with pytest.raises(InputError, match="4 at 1/8; choose another format"):
        export_latents(write(tmp_path / "latents", **change), tmp_path / "out", "kohya")
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


@pytest.mark.parametrize(
    "name",
    ["/tmp/x.png", "../x.png", "a/../../x.png", "a/..", "a/./x.png", "./x.png", "a//x.png", "a/", "", "..", "c:x.png",
     "C:/x.png", "..\\x.png", "a\\xff.png", "a\0b.png", "a" * 300 + ".png", "é" * 120],
)  # fmt: skip
def test_kohya_refuses_names_that_are_no_paths_below_the_target(tmp_path, name):
    for shard, names in enumerate(([name, *"123456"], [*"012345", name])):
        root = write(tmp_path / f"latents-{shard}", names)
        with pytest.raises(InputError, match="need relative paths") as raised:
            export_latents(root, tmp_path / "out", "kohya")
        assert f"'{printable(utf8(name))}'" in str(raised.value)
        assert "got 1 of 7 images" in str(raised.value)
        assert "\n" not in str(raised.value)
        assert not list(tmp_path.glob("*out*"))


def test_kohya_refuses_names_that_differ_in_the_extension_only_across_shards(tmp_path):
    root = write(tmp_path / "latents", ["x/a.png", "a.png", "b", "c.d.png", "c.png", "d", "x/a.jpg"])
    with pytest.raises(InputError, match=r"\('x/a.png', 'x/a.jpg'\)"):
        export_latents(root, tmp_path / "out", "kohya")
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_kohya_never_writes_over_a_file_where_case_does_not_count(tmp_path, monkeypatch):
    root = write(tmp_path / "latents", ["a", "1", "2", "3", "4", "5", "A"], heights=[100] * 7)
    export_latents(root, tmp_path / "out", "kohya")
    assert len(content(tmp_path / "out")) == 7
    monkeypatch.setattr(export_module, "_check_kohya", lambda source: None)
    monkeypatch.setattr(export_module, "_stem", str.lower)  # as such a file system opens it
    with pytest.raises(FileExistsError):
        export_latents(root, tmp_path / "other", "kohya")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("buckets", ["none", "area"])
def test_kohya_finds_the_latents_of_images_that_exif_turns_and_their_count_is_said(tmp_path, buckets, caplog):
    photos, upright = tmp_path / "photos", tmp_path / "upright"
    generator = np.random.default_rng(0)
    for folder in (photos, upright):
        folder.mkdir()
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((160, 80))
        image.save(photos / f"{orientation}.png", exif=exif.tobytes())
        ImageOps.exif_transpose(Image.open(photos / f"{orientation}.png")).save(upright / f"{orientation}.png")
    for name in ("photos", "upright"):
        encode(EncodeConfig(source=str(tmp_path / name), output=str(tmp_path / f"{name}-latents"), resolution=64,
                            buckets=buckets, bucket_step=16, device="cpu", store="sample"))  # fmt: skip
        export_latents(tmp_path / f"{name}-latents", tmp_path / f"{name}-kohya", "kohya")
    assert [row["exif_orientation"] for row in stored_rows(tmp_path / "photos-latents")] == [1, 3, 6, 8]
    assert {row["exif_orientation"] for row in stored_rows(tmp_path / "upright-latents")} == {1}
    assert [r.args[:2] for r in caplog.records if "EXIF orientation" in r.msg] == [(3, 4)]
    for orientation in (1, 3, 6, 8):
        header = Image.open((photos if buckets == "none" else upright) / f"{orientation}.png").size
        (theirs,) = (tmp_path / "upright-kohya").glob(f"{orientation}_*")
        name = f"{orientation}_{header[0]:04d}x{header[1]:04d}_sd.npz"
        with np.load(tmp_path / "photos-kohya" / name) as turned, np.load(theirs) as wanted:
            for array in ("latents", "original_size", "crop_ltrb"):
                assert np.array_equal(turned[array], wanted[array])
            # the bucket that sd-scripts chooses by the size in the name has the latents' aspect
            if buckets == "area":
                assert (header[0] > header[1]) == (turned["latents"].shape[2] > turned["latents"].shape[1])


def as_version_1(root: Path) -> Path:
    """A data set as it was written before rows had their orientation and files their record."""
    folder = LatentFolder(root)
    folder.open()
    entries = []
    for entry in folder.shards:
        path = root / entry["file"]
        pq.write_table(pq.read_table(path).drop_columns(["exif_orientation"]), path, row_group_size=2)
        entries.append({**entry, "bytes": path.stat().st_size, "sha256": sha256_of(path)})
    manifest = {**folder.manifest, "version": 1, "shards": entries}
    (root / "manifest.json").write_text(json.dumps(manifest))
    (root / "shards.jsonl").unlink()
    return root


@pytest.mark.parametrize("to", FORMATS)
def test_rows_without_an_orientation_are_converted_and_kohyas_warns(tmp_path, to, caplog):
    root = as_version_1(write(tmp_path / "latents"))
    assert export_latents(root, tmp_path / "out", to)
    said = [record for record in caplog.records if "before the EXIF orientation was stored" in record.msg]
    assert len(said) == (to == "kohya")
    assert len(LatentDataset(root)) == 7
    assert "exif_orientation" not in LatentDataset(root)[0]


def test_kohya_says_how_many_names_sd_scripts_does_not_look_for(tmp_path, caplog):
    root = write(tmp_path / "latents", ["a.png", "b.JPG", "c.tif", "row-00000003", "d.webp", "e.avif", "f"])
    export_latents(root, tmp_path / "out", "kohya")
    assert [record.args[:3] for record in caplog.records if "does not look for" in record.msg] == [(3, 7, "c.tif")]


# ---- all formats ----


@pytest.mark.parametrize("to", FORMATS)
def test_a_target_that_holds_something_is_left_as_it_is_and_an_empty_one_is_filled(tmp_path, to):
    root = write(tmp_path / "latents")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "full", tmp_path / "file", root):
        before = content(tmp_path)
        with pytest.raises(InputError, match="need a new or empty folder"):
            export_latents(root, target, to)
        assert content(tmp_path) == before
    (tmp_path / "empty").mkdir()
    export_latents(root, tmp_path / "empty", to)
    assert content(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "latents"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_failure_half_way_leaves_nothing(tmp_path, monkeypatch, to):
    root = write(tmp_path / "latents", ["a/0", "1", "2", "3", "4", "5", "a/6"])
    real, written = export_module._Source.rows, []

    def rows(self, shard):
        for number, row in enumerate(real(self, shard)):
            if shard == 2 and number == 1:
                written.extend(path for path in tmp_path.rglob("*") if path.is_file() and ".out.tmp-" in str(path))
                raise OSError(28, "No space left on device")
            yield row

    monkeypatch.setattr(export_module._Source, "rows", rows)
    with pytest.raises(OSError, match="No space left"):
        export_latents(root, tmp_path / "out", to)
    assert written, "some of it was on the disk"
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


@pytest.mark.parametrize("to", FORMATS)
def test_a_damaged_missing_or_unfinished_shard_is_refused_before_anything_is_written(tmp_path, to):
    root = write(tmp_path / "latents")
    shard = root / "data" / "train-00002-of-00003.parquet"
    whole = shard.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    footer = bytearray(whole)
    footer[-20] ^= 1
    for content_now in (bytes(flipped), bytes(footer), whole[:-9], None):
        shard.unlink()
        if content_now is not None:
            shard.write_bytes(content_now)
        else:
            shard.symlink_to("nowhere")
        with pytest.raises(InputError, match=r"train-00002.* (checksum|metadata|record|bytes|missing).*--repair"):
            export_latents(root, tmp_path / "out", to)
    folder = LatentWriter(root)
    folder.open()
    folder.undo([0])
    with pytest.raises(InputError, match="not complete"):
        export_latents(root, tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]


def test_an_unknown_format_and_a_folder_of_something_else_are_refused(tmp_path):
    with pytest.raises(InputError, match="need one of safetensors, webdataset, kohya"):
        export_latents(write(tmp_path / "latents"), tmp_path / "out", "parquet")
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"holds no manifest.json"):
        export_latents(tmp_path / "other", tmp_path / "out", "kohya")


@pytest.mark.parametrize("to", FORMATS)
def test_exports_at_two_times_are_the_same_to_the_byte(tmp_path, monkeypatch, to):
    root = write(tmp_path / "latents")
    export_latents(root, tmp_path / "one", to)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 1e6)
    torch.rand(3)
    export_latents(root, tmp_path / "two", to)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_what_encode_writes_of_photographs_in_buckets_goes_to_every_format(tmp_path):
    generator = np.random.default_rng(0)
    for i, size in enumerate(((70, 64), (120, 60), (64, 128), (64, 64))):
        folder = tmp_path / "photos" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    config = EncodeConfig(
        source=str(tmp_path / "photos"), output=str(tmp_path / "latents"), resolution=64, buckets="area",
        bucket_step=16, device="cpu", mirror=True,
    )  # fmt: skip
    encode(config)
    rows = stored_rows(tmp_path / "latents")
    assert len({tuple(row["shape"]) for row in rows}) > 1
    for to in FORMATS:
        export_latents(tmp_path / "latents", tmp_path / to, to)
    assert len(list((tmp_path / "safetensors").glob("*.safetensors"))) == len({tuple(row["shape"]) for row in rows})
    with tarfile.open(tmp_path / "webdataset" / "train-00000-of-00001.tar") as tar:
        assert [tar.extractfile(f"{i:015d}.txt").read().decode() for i in range(4)] == [row["caption"] for row in rows]
    for row in rows:
        height, width = row["original_size"]
        name = f"{Path(row['name']).with_suffix('')}_{width:04d}x{height:04d}_sd.npz"
        with np.load(tmp_path / "kohya" / name) as arrays:
            assert list(arrays["latents"].shape) == row["shape"]
            std = np.exp(0.5 * row["logvar"].float().numpy())
            assert np.abs(arrays["latents"] - row["mean"].float().numpy()).max() < 6 * std.max()
