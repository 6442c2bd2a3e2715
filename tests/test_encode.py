"""`sdvae encode`: what the rows are, compared with diffusers' class; and that nothing is lost."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from sdvae import InputError, load_vae, save_vae
from sdvae.cli import main
from sdvae.data import HubStream, ImageError, center_crop, read_image, to_tensor
from sdvae.latents.config import EncodeConfig
from sdvae.latents.dataset import LatentDataset
from sdvae.latents.encode import encode
from sdvae.latents.encoder import MomentEncoder
from sdvae.latents.pipeline import Pipeline
from sdvae.latents.task import EncodeTask, ImageReader
from sdvae.latents.writer import LatentWriter
from sdvae.model import DiagonalGaussian
from sdvae.statistics import LatentMoments
from tests.latents_tools import (
    content,
    draw,
    encode_in_process,
    in_process,
    killed_at,
    options,
    rows_of,
    tiny_vae,
)

HALF = 2**-11  # relative rounding of fp16


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("photos") / "photos", 23, sizes=((40, 40), (50, 36), (30, 44)))


def posterior_of(vae: Path, pixels: torch.Tensor):
    """By diffusers' own class."""
    with torch.no_grad():
        return load_vae(vae).to_diffusers().encode(pixels[None]).latent_dist


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=2 * HALF, atol=1e-4)


def test_rows_are_the_posteriors_that_diffusers_computes_of_the_centre_crops(vae, photos, tmp_path):
    encode(options(photos, tmp_path / "out", vae, mirror=True))
    rows = rows_of(tmp_path / "out")
    assert sorted(rows) == sorted(path.name for path in photos.iterdir())
    for name, row in rows.items():
        image = read_image(photos / name)
        pixels = to_tensor(center_crop(image, 32))
        for suffix, x in (("", pixels), ("_mirrored", pixels.flip(2))):
            posterior = posterior_of(vae, x)
            assert row[f"mean{suffix}"].shape == (4, 8, 8)
            assert close(row[f"mean{suffix}"], posterior.mean[0])
            assert close(row[f"logvar{suffix}"], posterior.logvar[0])
        assert not close(row["mean_mirrored"], row["mean"].flip(2)), "latents cannot be mirrored themselves"
        assert row["original_size"] == [image.height, image.width]
        assert row["target_size"] == [32, 32]


def test_the_statistics_are_those_of_all_rows_and_no_mirror_image(vae, photos, tmp_path):
    (folder,) = encode(options(photos, tmp_path / "out", vae, mirror=True))
    manifest = folder.manifest
    moments = LatentMoments(4)
    for row in rows_of(tmp_path / "out").values():
        moments.update(DiagonalGaussian(torch.cat([row["mean"], row["logvar"]])[None]))
    statistics = manifest["statistics"]
    assert statistics["scaling_factor"] == pytest.approx(1 / moments.std, rel=1e-4)
    assert statistics["shift_factor"] == pytest.approx(moments.mean, abs=1e-3)
    assert statistics["latents_mean"] == pytest.approx(moments.channel_mean.tolist(), abs=1e-3)
    assert statistics["latents_std"] == pytest.approx(moments.channel_std.tolist(), rel=1e-3)
    assert manifest["rows"] == 23
    assert sum(entry["rows"] for entry in folder.shards) == 23


def test_buckets_keep_the_aspect_ratio_and_say_what_was_cut(vae, tmp_path):
    photos = draw(tmp_path / "photos", 6, sizes=((120, 60), (60, 60), (50, 100)))
    changes = {"buckets": "area", "bucket_step": 16, "resolution": 64, "mirror": True, "batch_size": 2}
    encode(options(photos, tmp_path / "out", vae, **changes))
    rows = rows_of(tmp_path / "out")
    targets = {name: tuple(row["target_size"]) for name, row in rows.items()}
    assert targets["0000.png"] == (48, 80)  # 120 x 60: of 64x64, 48x80, 80x48, … the nearest to 1 : 2
    assert targets["0001.png"] == (64, 64)
    assert targets["0002.png"] == (80, 48)
    image = read_image(photos / "0000.png")
    cut = image.resize((96, 48), Image.Resampling.BICUBIC).crop((8, 0, 88, 48))
    assert close(rows["0000.png"]["mean"], posterior_of(vae, to_tensor(cut)).mean[0])
    assert rows["0000.png"]["crop_top_left"] == [0, 8]
    assert rows["0000.png"]["shape"] == [4, 12, 20]


def test_captions_labels_and_other_columns_come_along_with_their_types(vae, tmp_path):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "name": datasets.Value("string"),
            "tags": datasets.Sequence(datasets.Value("int32")),
        }
    )
    draw(tmp_path / "photos", 7)
    rows = {
        "image": [str(tmp_path / "photos" / f"{i:04}.png") for i in range(7)],
        "caption": [f"picture {i}" for i in range(6)] + [None],
        "label": [0, 1, 0, 1, 0, 1, 0],
        "name": list("abcdefg"),
        "tags": [[i] * i for i in range(7)],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    encode(options(tmp_path / "saved", tmp_path / "out", vae))
    found = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert found["caption"][:] == rows["caption"]
    assert found["label"][:] == rows["label"]
    assert found.features["label"].names == ["cat", "dog"]
    assert found["tags"][:] == rows["tags"]
    assert found["source_name"][:] == rows["name"], "a column of ours keeps its name"
    encode(options(tmp_path / "saved", tmp_path / "few", vae, columns=("label",)))
    assert all("caption" not in row and "label" in row for row in rows_of(tmp_path / "few").values())
    with pytest.raises(InputError, match=r"'lable'.*choose among"):
        encode(options(tmp_path / "saved", tmp_path / "none", vae, columns=("lable",)))
    assert not (tmp_path / "none").exists()


def test_a_folder_gives_captions_from_text_files_and_labels_from_folders(vae, tmp_path):
    for kind in ("cats", "dogs"):
        draw(tmp_path / "photos" / kind, 2, seed=len(kind))
    (tmp_path / "photos" / "dogs" / "0001.txt").write_text(" a dog\n", encoding="utf-8")
    encode(options(tmp_path / "photos", tmp_path / "out", vae))
    rows = rows_of(tmp_path / "out")
    assert {name: (row["label"], row["caption"]) for name, row in rows.items()} == {
        "cats/0000.png": (0, None),
        "cats/0001.png": (0, None),
        "dogs/0000.png": (1, None),
        "dogs/0001.png": (1, "a dog"),
    }


def test_a_stream_gives_the_rows_that_its_files_give(vae, photos, tmp_path):
    files = sorted(photos.iterdir())
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [str(path) for path in files], "label": [i % 3 for i in range(len(files))]}
    table = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "parquet").mkdir()
    for part in range(3):
        table.shard(3, part).to_parquet(tmp_path / "parquet" / f"part-{part}.parquet")
    stream = options(tmp_path / "parquet", tmp_path / "stream", vae, streaming=True, shard_rows=None)
    encode(stream)
    encode(options(tmp_path / "parquet", tmp_path / "files", vae))
    streamed, read = rows_of(tmp_path / "stream"), rows_of(tmp_path / "files")
    assert sorted(streamed) == sorted(read) == [str(path) for path in files]
    for name in read:
        assert close(streamed[name]["mean"], read[name]["mean"])
        assert streamed[name]["label"] == read[name]["label"]


def archives(folder: Path, files: list[Path]) -> Path:
    """Two .tar of images with captions and labels."""
    folder.mkdir()
    for part in range(2):
        with tarfile.open(folder / f"part-{part}.tar", "w") as tar:
            for i, path in enumerate(files[3 * part : 3 * part + 3]):
                members = {"png": path.read_bytes(), "txt": f"picture {i}".encode(), "cls": str(i).encode()}
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{path.stem}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def test_archives_give_captions_and_labels_and_a_stream_of_them_gives_the_same(vae, photos, tmp_path):
    files = sorted(photos.iterdir())[:6]
    tars = archives(tmp_path / "tars", files)
    encode(options(tars, tmp_path / "out", vae))
    rows = rows_of(tmp_path / "out")
    assert [Path(name).name for name in sorted(rows)] == [path.name for path in files]
    assert all(row["caption"] == f"picture {row['label']}" for row in rows.values())
    (stream,) = encode(options(tars, tmp_path / "stream", vae, streaming=True, shard_rows=None))
    assert stream.num_shards == 2
    streamed = rows_of(tmp_path / "stream")
    assert streamed.keys() == rows.keys()
    for name, row in rows.items():
        assert [streamed[name][key] for key in ("sha256", "caption", "label")] == [
            row[key] for key in ("sha256", "caption", "label")
        ]
        assert close(streamed[name]["mean"], row["mean"])


def test_image_files_are_not_streamed(vae, photos, tmp_path):
    with pytest.raises(InputError, match="read in place without streaming"):
        encode(options(photos, tmp_path / "stream", vae, streaming=True, shard_rows=None))


def test_a_webdataset_of_the_hub_streams_under_the_same_names(photos, tmp_path):
    tars = archives(tmp_path / "tars", sorted(photos.iterdir())[:6])
    data_files = {"train": [str(path) for path in sorted(tars.iterdir())]}
    hub = datasets.load_dataset("webdataset", data_files=data_files, split="train", streaming=True)
    stream = HubStream(hub.cast_column("png", datasets.Image(decode=False)), "png", "owner/name")
    assert stream.num_parts == 2
    assert set(stream.features) == {"caption", "label"}
    name, read, others = list(stream.part(1))[2]
    assert (name, others) == ("0005.png", {"caption": "picture 2", "label": 2})
    assert read() == (photos / "0005.png").read_bytes()


def test_folders_of_one_name_are_not_taken_for_each_other_by_the_cache_of_datasets(vae, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for place in ("a", "b"):
        pictures = [str(path) for path in sorted(draw(tmp_path / place / "pictures", 3, seed=ord(place)).iterdir())]
        table = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
        (tmp_path / place / "photos" / "data").mkdir(parents=True)
        table.to_parquet(tmp_path / place / "photos" / "data" / "train-00000-of-00001.parquet")
        card = "---\nconfigs:\n- config_name: default\n  data_files: data/train-*.parquet\n---\n"
        (tmp_path / place / "photos" / "README.md").write_text(card)
        encode(options(tmp_path / place / "photos", tmp_path / place / "latents", vae))
    for place in ("a", "b"):
        sums = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / place / "pictures").iterdir()}
        read = datasets.load_dataset(str(tmp_path / place / "latents"), split="train")
        assert set(read["sha256"][:]) == sums


def test_in_bf16_the_rows_are_near_those_of_fp32_and_the_precision_is_remembered(vae, photos, tmp_path):
    encode(options(photos, tmp_path / "fp32", vae))
    config = options(photos, tmp_path / "bf16", vae, precision="bf16")
    manifest = encode(config)[0].manifest
    assert manifest["fingerprint"]["vae"]["precision"] == "bf16"
    exact, rounded = rows_of(tmp_path / "fp32"), rows_of(tmp_path / "bf16")
    differences = torch.stack([rounded[name]["mean"] - row["mean"] for name, row in exact.items()])
    spread = torch.stack([row["mean"] for row in exact.values()]).std()
    assert 0 < float(differences.std() / spread) < 0.03
    encode(dataclasses.replace(config, verify=True))
    with pytest.raises(InputError, match="precision: bf16 -> fp32"):
        encode(dataclasses.replace(config, precision="fp32"))


@pytest.mark.parametrize("dtype", ["fp16", "fp32", "bf16"])
def test_rows_can_be_read_with_numpy_alone(vae, tmp_path, dtype):
    encode(options(draw(tmp_path / "photos", 1), tmp_path / "out", vae, dtype=dtype))
    (file,) = (tmp_path / "out" / "data").iterdir()
    (row,) = pq.read_table(file).to_pylist()
    readers = {
        "fp16": lambda data: np.frombuffer(data, "<f2"),
        "fp32": lambda data: np.frombuffer(data, "<f4"),
        "bf16": lambda data: (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4"),
    }
    wanted = LatentDataset(tmp_path / "out", sample=False, scaling="none")[0]["latents"]
    np.testing.assert_array_equal(readers[dtype](row["mean"]).reshape(row["shape"]), wanted.numpy())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_encoder_leaves_the_callers_vae_as_it_was_and_copies_no_decoder(precision):
    vae = tiny_vae().half().train()
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    kinds = [type(module) for module in vae.modules()]
    encoder = MomentEncoder(vae, torch.device("cpu"), precision, mirror=False)
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    exact = encoder.again(pixels)
    assert [type(module) for module in vae.modules()] == kinds
    assert vae.training
    assert all(torch.equal(weight, before[name]) for name, weight in vae.state_dict().items())

    owned = {id(weight) for weight in vae.parameters()}
    models = {value for value in vars(encoder).values() if isinstance(value, torch.nn.Module)}
    names = [name for model in models for name, weight in model.named_parameters() if id(weight) not in owned]
    assert names
    assert not [name for name in names if name.startswith("decoder")]
    assert len(names) == len(set(names)) * (1 if precision == "fp32" else 2), "once for bf16 and once for fp32"

    with torch.no_grad():
        x = (pixels.permute(0, 3, 1, 2) / 127.5 - 1).float()
        wanted = vae.to_diffusers().float().encode(x).latent_dist.parameters
    torch.testing.assert_close(exact[0], wanted, rtol=1e-4, atol=1e-4)


def test_a_stored_sample_is_the_posteriors_and_the_same_each_time(vae, photos, tmp_path):
    for output, seed in (("one", 0), ("two", 0), ("other", 1)):
        encode(options(photos, tmp_path / output, vae, store="sample", seed=seed, dtype="fp32"))
    encode(options(photos, tmp_path / "moments", vae, dtype="fp32"))
    one, two, other, moments = (rows_of(tmp_path / name) for name in ("one", "two", "other", "moments"))
    noise = []
    for name, row in one.items():
        assert torch.equal(row["sample"], two[name]["sample"])
        assert not torch.equal(row["sample"], other[name]["sample"])
        noise.append((row["sample"] - moments[name]["mean"]) / (0.5 * moments[name]["logvar"]).exp())
    noise = torch.stack(noise)
    assert abs(float(noise.mean())) < 0.05  # 23 · 256 numbers: their mean has std 0.013
    assert float(noise.std()) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_one_process_and_three_make_the_same_files(vae, photos, tmp_path):
    encode(options(photos, tmp_path / "one", vae))
    processes = [encode_in_process(options(photos, tmp_path / "three", vae)) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    encode(options(photos, tmp_path / "three", vae))  # whoever came last has finished it: nothing is left to do
    assert content(tmp_path / "three") == content(tmp_path / "one")


@pytest.mark.slow
def test_processes_that_finish_at_the_same_moment_do_not_disturb_each_other(vae, tmp_path):
    photos = draw(tmp_path / "photos", 4)
    encode(options(photos, tmp_path / "one", vae, shard_rows=2))
    for number in range(8):
        output = tmp_path / f"several-{number}"
        for process in [encode_in_process(options(photos, output, vae, shard_rows=2)) for _ in range(4)]:
            process.join()
            assert process.exitcode == 0
        assert content(output) == content(tmp_path / "one")


@pytest.mark.parametrize("batches_in_flight", [2, 7])
def test_batches_in_flight_change_no_file(vae, tmp_path, batches_in_flight):
    """Seven batches span shards of two or three, some of them with images that cannot be read."""
    photos = draw(tmp_path / "photos", 23, sizes=((60, 40), (40, 40)))
    for number in (4, 10, 11, 12, 13, 14):  # the third shard has no good image at all
        (photos / f"{number:04}.png").write_bytes(b"no image")
    config = options(photos, tmp_path / "one", vae, buckets="area", bucket_step=8, batch_size=2)
    encode(config)
    task = EncodeTask(dataclasses.replace(config, output=str(tmp_path / "several")))
    task.begin()
    Pipeline(task, batches_in_flight).run()
    assert task.targets[0].folder.is_complete
    assert content(tmp_path / "several") == content(tmp_path / "one")


@pytest.mark.slow
def test_killed_ten_times_and_continued_by_other_numbers_of_processes_it_equals_a_clean_run(vae, tmp_path, monkeypatch):
    photos = draw(tmp_path / "photos", 60)
    config = options(photos, tmp_path / "killed", vae, shard_rows=2, batch_size=2, mirror=True)
    encode(dataclasses.replace(config, output=str(tmp_path / "clean")))
    decode, randomness = ImageReader.decode, random.Random(0)
    kills = 0
    while kills < 10:
        left = iter(range(randomness.randint(1, 9), 0, -1))

        def dying(self, row, left=left):
            if next(left, 0) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return decode(self, row)

        with monkeypatch.context() as patch:
            patch.setattr(ImageReader, "decode", dying)  # in the child processes, each with its own count
            processes = [encode_in_process(config) for _ in range(1 + kills % 3)]
            for process in processes:
                process.join()
                kills += process.exitcode == -signal.SIGKILL
        assert any(process.exitcode for process in processes), "finished before it was killed ten times"
    done = len(list((tmp_path / "killed" / "data").glob("*.parquet")))
    assert 0 < done < 30, "some shards are done and some are not"
    encode(config)
    assert content(tmp_path / "killed") == content(tmp_path / "clean")


@pytest.mark.slow
def test_killed_before_any_file_operation_it_equals_a_clean_run(vae, tmp_path):
    photos = draw(tmp_path / "photos", 3)
    config = options(photos, tmp_path / "killed", vae, shard_rows=2)
    encode(dataclasses.replace(config, output=str(tmp_path / "clean")))
    wanted = content(tmp_path / "clean")
    boundary = 0
    while killed_at(boundary, dataclasses.replace(config, output=str(tmp_path / f"killed-{boundary}"))):
        encode(dataclasses.replace(config, output=str(tmp_path / f"killed-{boundary}")))
        assert content(tmp_path / f"killed-{boundary}") == wanted, f"killed before file operation {boundary}"
        boundary += 1
    assert boundary > 20


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"resolution": 40, "min_side": 16}, "images.sizes"),
        ({"dtype": "bf16"}, "stored.dtype: fp16 -> bf16"),
        ({"mirror": True}, "stored.mirror"),
        ({"store": "sample"}, "stored.what"),
        ({"vae": "other"}, "vae.encoder_sha256"),
        ({"shard_rows": 7}, "source.shard_rows"),
        ({"source": "other"}, "source.names_sha256"),
    ],
)
def test_a_folder_of_other_latents_is_refused_and_left_alone(vae, photos, tmp_path, change, field):
    draw(tmp_path / "photos", 4)
    if "vae" in change:
        save_vae(tiny_vae(seed=1), tmp_path / "vae")
        change = {"vae": tmp_path / "vae"}
    if "source" in change:
        change = {"source": draw(tmp_path / "others", 5)}
    base = {"source": tmp_path / "photos", "vae": vae}
    encode(options(output=tmp_path / "out", **base))
    before = content(tmp_path / "out")
    with pytest.raises(InputError, match=field):
        encode(options(output=tmp_path / "out", **{**base, **change}))
    assert content(tmp_path / "out") == before


def test_a_folder_with_other_files_is_refused(vae, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"thesis\.txt"):
        encode(options(photos, tmp_path / "out", vae))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_on_a_full_disk_what_is_done_stays_and_the_exit_code_is_one(vae, photos, tmp_path):
    config = options(photos, tmp_path / "full", vae)
    encode(dataclasses.replace(config, output=str(tmp_path / "clean")))
    codes = tmp_path / "code"

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # the shards have more bytes, the last one fewer
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        arguments = [f"--{k}={v}" for k, v in dataclasses.asdict(config).items() if k in ("source", "output", "vae")]
        arguments += ["--resolution=32", "--batch_size=4", "--shard_rows=5", "--device=cpu", "--precision=fp32"]
        codes.write_text(str(main(["encode", *arguments])))

    in_process(limited).join()
    assert codes.read_text() == "1"
    assert not list((tmp_path / "full").rglob("*.parquet"))
    assert not [path for path in (tmp_path / "full").rglob("*") if ".tmp-" in path.name]
    encode(config)
    assert content(tmp_path / "full") == content(tmp_path / "clean")


def test_too_many_skipped_images_are_an_error_after_all_others_are_encoded(vae, tmp_path, capsys):
    photos = draw(tmp_path / "photos", 6)
    (photos / "0004.png").write_bytes(b"")
    Image.new("RGB", (12, 12)).save(photos / "0005.png")
    arguments = [f"--source={photos}", f"--output={tmp_path / 'out'}", f"--vae={vae}", "--resolution=32"]
    said = "4 of 6 images have a row, and 2 have none (the file is empty: 1, too small: 1; see skipped.jsonl)"
    for again in ([], [], ["--verify=true"], ["--repair=true"]):  # every later run says it too
        assert main(["encode", *arguments, *again]) == 2
        assert f"{said}; need at most 1.00% skipped; raise max_bad_fraction" in capsys.readouterr().err
        assert len(rows_of(tmp_path / "out")) == 4
    assert main(["encode", *arguments, "--max_bad_fraction=0.34", "--verify=true"]) == 0


def test_bad_images_are_listed_with_their_reason_and_the_others_are_not_touched(vae, tmp_path):
    photos = draw(tmp_path / "photos", 6)
    encode(options(photos, tmp_path / "clean", vae))
    whole = (photos / "0002.png").read_bytes()
    (photos / "0002.png").write_bytes(whole[: len(whole) // 2])
    (photos / "0004.png").write_bytes(b"")
    Image.new("RGB", (12, 12)).save(photos / "0005.png")
    manifest = encode(options(photos, tmp_path / "out", vae))[0].manifest
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["index"], line["name"]) for line in lines] == [(2, "0002.png"), (4, "0004.png"), (5, "0005.png")]
    assert "damaged" in lines[0]["reason"]
    assert lines[1]["reason"] == "the file is empty"
    assert "too small" in lines[2]["reason"]
    assert (manifest["rows"], manifest["skipped"]) == (3, 3)
    clean = rows_of(tmp_path / "clean")
    for name, row in rows_of(tmp_path / "out").items():
        assert close(row["mean"], clean[name]["mean"])


def test_with_no_good_image_at_all_there_is_an_error_and_no_data_set(vae, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no image")
    arguments = [f"--source={tmp_path / 'photos'}", f"--output={tmp_path / 'out'}", f"--vae={vae}", "--resolution=32"]
    assert main(["encode", *arguments]) == 2
    assert "none of the 1 images could be encoded" in capsys.readouterr().err


def test_a_latent_that_overflows_is_computed_again_in_fp32_and_else_reported(vae, tmp_path, monkeypatch):
    photos = draw(tmp_path / "photos", 5)
    encode(options(photos, tmp_path / "clean", vae))
    launch, again = EncodeTask.__init__, []

    def overflowing(self, config):
        launch(self, config)
        start, retry = self.encoder.launch, self.encoder.again

        def spoilt(pixels):
            encoded = start(pixels)
            encoded._moments[0, 0, 0, 0, 0] = float("inf")  # the first image of each batch
            return encoded

        def counting(pixels):
            again.append(len(pixels))
            moments = retry(pixels)
            if len(again) == 2:
                moments[:] = float("nan")
            return moments

        self.encoder.launch, self.encoder.again = torch.inference_mode()(spoilt), torch.inference_mode()(counting)

    monkeypatch.setattr(EncodeTask, "__init__", overflowing)
    manifest = encode(options(photos, tmp_path / "out", vae))[0].manifest
    assert again == [1, 1]  # batches of four and one
    assert (manifest["rows"], manifest["skipped"]) == (4, 1)
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["name"] == "0004.png"
    assert "not finite as fp16" in line
    clean = rows_of(tmp_path / "clean")
    for name, row in rows_of(tmp_path / "out").items():
        assert close(row["mean"], clean[name]["mean"])
    statistics = manifest["statistics"]
    assert all(np.isfinite(statistics["latents_mean"])), "what is skipped is not counted"


def test_names_from_the_data_write_nothing_outside_the_folder(vae, tmp_path):
    picture = (draw(tmp_path / "photos", 1) / "0000.png").read_bytes()
    names = ["../../evil.png", "/tmp/evil.png", "a/same.png", "b/same.png", "bad-\udcff.png"]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "images.tar", "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(picture)
            tar.addfile(member, io.BytesIO(picture))
    before = set(tmp_path.rglob("*"))
    encode(options(tmp_path / "tars", tmp_path / "out", vae, shard_rows=2))
    new = set(tmp_path.rglob("*")) - before
    assert all(path == tmp_path / "out" or tmp_path / "out" in path.parents for path in new)
    assert all(
        path.name.startswith(("train-", "manifest", "skipped", "README", "shards", "data", "out")) for path in new
    )
    table = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["index"][:] == [0, 1, 2, 3, 4]
    assert table["name"][4] == "images.tar/bad-\\xff.png"


def broken_shard(folder: Path) -> Path:
    return sorted((folder / "data").iterdir())[1]


def break_byte(folder: Path, photos: Path) -> None:
    data = bytearray(broken_shard(folder).read_bytes())
    data[len(data) // 2] ^= 1
    broken_shard(folder).write_bytes(data)


def break_length(folder: Path, photos: Path) -> None:
    broken_shard(folder).write_bytes(broken_shard(folder).read_bytes()[:-9])


def remove(folder: Path, photos: Path) -> None:
    broken_shard(folder).unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "said"), [(break_byte, "another checksum"), (break_length, "bytes instead of"), (remove, "is missing")]
)
def test_verify_finds_a_broken_shard_and_repair_does_that_one_again(vae, photos, tmp_path, damage, said):
    config = options(photos, tmp_path / "out", vae)
    encode(config)
    wanted = content(tmp_path / "out")
    encode(dataclasses.replace(config, verify=True))
    assert content(tmp_path / "out") == wanted
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "data").iterdir()}
    name = broken_shard(tmp_path / "out").name
    damage(tmp_path / "out", photos)
    with pytest.raises(InputError, match=rf"1 of 5 shards.*{name} .*{said}.*--repair"):
        encode(dataclasses.replace(config, verify=True))
    encode(dataclasses.replace(config, repair=True))
    assert content(tmp_path / "out") == wanted
    for path, time_ns in kept.items():
        assert (path.stat().st_mtime_ns == time_ns) == (path.name != name), "only the broken one is done again"


def test_verify_sees_latents_that_another_vae_made_although_all_checksums_fit(vae, photos, tmp_path):
    config = options(photos, tmp_path / "out", vae, verify_rows=23)
    encode(config)
    save_vae(tiny_vae(seed=1), tmp_path / "other")
    encode(dataclasses.replace(config, vae=str(tmp_path / "other"), output=str(tmp_path / "theirs")))
    name = broken_shard(tmp_path / "out").name
    (tmp_path / "theirs" / "data" / name).replace(tmp_path / "out" / "data" / name)
    ours, theirs = ((tmp_path / f / "shards.jsonl").read_text().splitlines() for f in ("out", "theirs"))
    (tmp_path / "out" / "shards.jsonl").write_text("\n".join([ours[0], theirs[1], *ours[2:]]))
    with pytest.raises(InputError, match=rf"1 of 5 shards.*{name} row 5 .*differs by .* std"):
        encode(dataclasses.replace(config, verify=True))


def test_verify_sees_that_an_image_was_exchanged(vae, tmp_path):
    photos = draw(tmp_path / "photos", 70)
    named = os.fsencode(photos) + b"/0011\xe9\n.png"
    os.rename(photos / "0011.png", named)
    config = options(photos, tmp_path / "out", vae, shard_rows=20, verify_rows=70)
    encode(config)
    draw(tmp_path / "others", 1, seed=1)
    os.replace(tmp_path / "others" / "0000.png", named)  # none of the 64 that tell sources apart
    with pytest.raises(InputError, match=r"0011\\xe9\\n\.png.*another image file"):
        encode(dataclasses.replace(config, verify=True))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--source=X", "--output=Y", "--mirrror=true"], "unknown key 'mirrror'.*did you mean 'mirror'"),
        (["--output=Y"], "source"),
        (["--source=/nowhere/at/all", "--output=Y"], "no such folder"),
        (
            ["--source=skimage", "--output=Y", "--resolution=100"],
            "100 x 100; need multiples of 8.*choose resolution 96",
        ),
        (
            ["--source=skimage", "--output=Y", "--buckets=area", "--resolution=100"],
            "a resolution that the step divides",
        ),
        (["--source=skimage", "--output=Y", "--precision=fp16", "--device=cpu"], "need a GPU for fp16"),
        (["--source=skimage", "--output=Y", "--device=warp"], "got device 'warp'"),
        (["--source=skimage", "--output=Y", "--batch_size=0"], "batch_size=0; need at least 1"),
        (["--source=skimage", "--output=Y", "--verify=true"], "holds no manifest.json"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["encode", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.search(said, line), line
    assert not list(tmp_path.iterdir())


def test_the_measured_factors_go_into_the_vaes_config(vae, photos, tmp_path, capsys):
    statistics = encode(options(photos, tmp_path / "out", vae))[0].manifest["statistics"]
    arguments = ["export", str(vae), str(tmp_path / "exported"), "--latents", str(tmp_path / "out")]
    assert main(arguments) == 0
    exported = load_vae(tmp_path / "exported")
    assert exported.config.scaling_factor == statistics["scaling_factor"]
    assert exported.config.shift_factor is None, "a VAE without a shift stays without"
    arguments[2] = str(tmp_path / "half")
    assert main([*arguments, "--dtype=fp16"]) == 0
    half = load_vae(tmp_path / "half", dtype="file")
    assert half.dtype == torch.float16
    assert half.config.scaling_factor == statistics["scaling_factor"]
    save_vae(load_vae(), tmp_path / "packaged")  # it has other widths
    arguments[1:3] = [str(tmp_path / "packaged"), str(tmp_path / "none")]
    assert main(arguments) == 2
    assert "made by another encoder" in capsys.readouterr().err


def test_convert_is_a_command(vae, photos, tmp_path, capsys):
    encode(options(photos, tmp_path / "out", vae))
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "tars"), "--to", "webdataset"]) == 0
    assert "wrote 5 files" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "tars"), "--to", "webdataset"]) == 2
    assert "need a new or empty folder" in capsys.readouterr().err


def test_another_source_with_the_same_names_is_refused(vae, tmp_path):
    config = options(draw(tmp_path / "photos", 6), tmp_path / "out", vae)
    encode(config)
    with pytest.raises(InputError, match="samples_sha256"):
        encode(dataclasses.replace(config, source=str(draw(tmp_path / "others", 6, seed=1))))
    (tmp_path / "photos").rename(tmp_path / "moved")
    encode(dataclasses.replace(config, source=str(tmp_path / "moved")))


def test_a_fault_of_the_machine_is_no_bad_image(vae, tmp_path, monkeypatch):
    config = options(draw(tmp_path / "photos", 6), tmp_path / "out", vae)
    decode = ImageReader.decode

    def failing(self, row):
        if row.index == 3:
            raise ImageError("cannot be read") from OSError(errno.EMFILE, "Too many open files")
        return decode(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(ImageReader, "decode", failing)
        with pytest.raises(OSError, match="Too many open files"):
            encode(config)
    assert encode(config)[0].manifest["skipped"] == 0


def test_columns_named_as_ours_get_a_free_name(vae, tmp_path):
    draw(tmp_path / "photos", 3)
    columns = {name: [f"{name} {i}" for i in range(3)] for name in ("latents", "mirrored", "name", "source_name")}
    features = {"image": datasets.Image(), **{name: datasets.Value("string") for name in columns}}
    pictures = [str(path) for path in sorted((tmp_path / "photos").iterdir())]
    table = datasets.Dataset.from_dict({"image": pictures, **columns}, features=datasets.Features(features))
    table.save_to_disk(tmp_path / "saved")
    encode(options(tmp_path / "saved", tmp_path / "out", vae))
    row = LatentDataset(tmp_path / "out", sample=False)[1]
    assert row["latents"].shape == (4, 8, 8)
    assert row["mirrored"] is False
    assert (row["source_latents"], row["source_mirrored"]) == ("latents 1", "mirrored 1")
    assert sorted(value for key, value in row.items() if "source" in key and "name" in key) == [
        "name 1",
        "source_name 1",
    ]


def test_a_shard_without_a_good_image_reads_as_empty(vae, tmp_path):
    photos = draw(tmp_path / "photos", 6)
    for name in ("0002.png", "0003.png"):
        (photos / name).write_bytes(b"no image")
    encode(options(photos, tmp_path / "out", vae, shard_rows=2))
    read = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert read["name"][:] == ["0000.png", "0001.png", "0004.png", "0005.png"]
    assert [LatentDataset(tmp_path / "out")[i]["name"] for i in range(4)] == read["name"][:]
    encode(options(photos, tmp_path / "out", vae, shard_rows=2, verify=True))


def test_repair_finishes_a_data_set_that_was_killed_before_its_manifest(vae, photos, tmp_path):
    config = options(photos, tmp_path / "out", vae)
    finish, LatentWriter.finish = LatentWriter.finish, lambda self: False
    encode(config)
    LatentWriter.finish = finish
    assert encode(dataclasses.replace(config, repair=True))[0].is_complete


def test_verify_needs_the_list_of_what_was_skipped(vae, tmp_path):
    photos = draw(tmp_path / "photos", 4)
    (photos / "0002.png").write_bytes(b"no image")
    config = options(photos, tmp_path / "out", vae)
    encode(config)
    wanted = content(tmp_path / "out")
    (tmp_path / "out" / "skipped.jsonl").unlink()
    with pytest.raises(InputError, match=r"1 skipped images, of which skipped\.jsonl names 0"):
        encode(dataclasses.replace(config, verify=True))
    encode(dataclasses.replace(config, repair=True))
    assert content(tmp_path / "out") == wanted


def test_an_output_inside_the_source_is_refused(vae, tmp_path):
    photos = draw(tmp_path / "photos", 3)
    with pytest.raises(InputError, match="inside the source"):
        encode(options(photos, photos / "latents", vae))
    assert not (photos / "latents").exists()


def test_a_shard_that_is_removed_before_the_end_is_encoded_again(vae, photos, tmp_path, monkeypatch):
    encode(options(photos, tmp_path / "clean", vae))
    config = options(photos, tmp_path / "out", vae)
    with monkeypatch.context() as patch:
        patch.setattr(LatentWriter, "finish", lambda self: False)
        encode(config)
    broken_shard(tmp_path / "out").unlink()
    encode(config)
    assert content(tmp_path / "out") == content(tmp_path / "clean")


def test_parts_write_the_bytes_of_one_process_and_the_last_one_finishes(vae, photos, tmp_path):
    encode(options(photos, tmp_path / "clean", vae))
    config = options(photos, tmp_path / "out", vae)
    for number in (2, 0):
        assert not encode(dataclasses.replace(config, part=f"{number}/3"))[0].is_complete
    assert sorted(path.name[6:11] for path in (tmp_path / "out" / "data").iterdir()) == ["00000", "00002", "00003"]
    assert encode(dataclasses.replace(config, part="1/3"))[0].is_complete
    assert content(tmp_path / "out") == content(tmp_path / "clean")


def test_two_writers_of_one_shard_leave_the_file_of_the_first(vae, photos, tmp_path, monkeypatch, caplog):
    """Locks that do not reach the other machine: both processes get every lock."""
    config = options(photos, tmp_path / "out", vae)
    write = LatentWriter.write_shard

    def second(self, shard, *arguments):
        other = LatentWriter(config.output)
        other.open()
        assert write(other, shard, *arguments)
        monkeypatch.setattr(LatentWriter, "write_shard", write)
        return write(self, shard, *arguments)

    monkeypatch.setattr(LatentWriter, "write_shard", second)
    assert encode(config)[0].is_complete
    assert "although this one had locked it, so shards are encoded twice" in caplog.text
    encode(options(photos, tmp_path / "clean", vae))
    assert content(tmp_path / "out") == content(tmp_path / "clean")


def test_a_disk_without_locks_is_refused_with_the_way_out(vae, photos, tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    config = options(photos, tmp_path / "out", vae)
    with pytest.raises(InputError, match=r"no file locks.*--part 0/1"):
        encode(config)
    assert encode(dataclasses.replace(config, part="0/1"))[0].is_complete


@pytest.mark.parametrize("part", ["3/3", "1", "-1/2", "a/b", "0/0"])
def test_a_part_that_is_none_is_refused(part):
    with pytest.raises(InputError, match=r"need i/n, with i from 0 to n - 1"):
        EncodeConfig(source="x", output="y", part=part)


def test_the_record_in_a_shards_file_covers_all_its_rows(vae, photos, tmp_path):
    (folder,) = encode(options(photos, tmp_path / "out", vae))
    for shard, entry in enumerate(folder.shards):
        with folder.parquet(shard) as file:
            groups = [file.metadata.row_group(i) for i in range(file.num_row_groups)]
        ends = [
            group.column(i).data_page_offset + group.column(i).total_compressed_size
            for group in groups
            for i in range(group.num_columns)
            if not group.column(i).has_dictionary_page
        ]
        assert 4 < max(ends) <= entry["data_bytes"] < entry["bytes"]
