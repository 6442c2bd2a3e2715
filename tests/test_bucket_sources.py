"""Images out of a bucket: an S3 server, reached over HTTP, gives what the same files on a disk give."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import os
import pickle
import re
import signal
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sdvae import InputError
from sdvae.cli import main
from sdvae.data import (
    ImageError,
    ImageStream,
    SampleOrder,
    ShardedBatches,
    TrainingImages,
    open_source,
    open_source_or_stream,
    open_stream,
    training_loader,
)
from sdvae.latents.encode import encode
from sdvae.latents.folder import LatentFolder
from sdvae.latents.pipeline import Pipeline
from sdvae.latents.task import EncodeTask
from sdvae.latents.writer import LatentWriter
from sdvae.storage import LocalStorage, StorageError
from tests.latents_tools import content, draw, in_process, options
from tests.s3 import forget_connections, s3_server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(server, tmp_path_factory):
    """Kind -> a folder on the disk and the URL of its copy in the bucket."""
    root = tmp_path_factory.mktemp("sources")
    made = {kind: make(root / kind) for kind, make in KINDS.items()}
    return {kind: (folder, upload(folder, f"s3://bucket/sources/{kind}")) for kind, folder in made.items()}


@pytest.fixture
def nothing_local(tmp_path, monkeypatch):
    """Fails if anything is written to the working directory or to the cache of `datasets`."""
    here, cache = tmp_path / "here", tmp_path / "cache"
    here.mkdir()
    cache.mkdir()
    monkeypatch.chdir(here)
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, cache)
    yield
    assert not list(here.iterdir())
    assert not list(cache.iterdir())


def upload(folder: Path, url: str) -> str:
    system, root = fsspec.url_to_fs(url)
    for name, data in content(folder).items():
        system.pipe_file(f"{root}/{name}", data)
    return url


def images(folder: Path) -> Path:
    """Two splits and two classes, some captions, and what is not used."""
    for split, count in (("train", 9), ("test", 3)):
        for kind in ("cat", "dog"):
            draw(folder / split / kind, count, seed=count)
    (folder / "train/cat/0003.txt").write_text("a cat\r\non a mat")
    (folder / "train/dog/0002.caption").write_text("a dog")
    (folder / "train/cat/0001.png").write_bytes(b"no image")
    (folder / "train/cat/.hidden.png").write_bytes(b"")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX/a.png").write_bytes(b"")
    (folder / "train/notes.heic").write_bytes(b"")
    return folder


def with_metadata(folder: Path) -> Path:
    draw(folder / "photos", 6)
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["file_name", "caption", "score"]] + [[f"photos/{i:04}.png", f"picture {i}", i / 3] for i in range(5)]
        )
    return folder


def archives(folder: Path) -> Path:
    """Three archives; one .json, one label that is no number, one sample without an image."""
    folder.mkdir()
    photos = sorted(draw(folder / "photos", 12).iterdir())
    for part in range(3):
        with tarfile.open(folder / f"train-{part}.tar", "w") as tar:
            for i, path in enumerate(photos[part * 4 : part * 4 + 4]):
                members = {
                    "png": path.read_bytes(),
                    "txt": f"picture {i}".encode(),
                    "cls": b"x" if i == 2 else b"%d" % i,
                }
                if part == 1 and i == 1:
                    members["json"] = b"{}"
                    members["npy"] = b"1"
                add(tar, path.stem, members)
            add(tar, "alone", {"txt": b"without an image"})
    for path in photos:
        path.unlink()
    (folder / "photos").rmdir()
    return folder


def add(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    for field, data in members.items():
        info = tarfile.TarInfo(f"{key}.{field}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def rows(folder: Path) -> datasets.Dataset:
    photos = sorted(draw(folder / "photos", 11).iterdir())
    values = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in photos],
        "label": [i % 3 for i in range(11)],
        "words": [[f"word {i}"] * (i % 3) for i in range(11)],
        "other": [{"bytes": path.read_bytes(), "path": None} for path in photos],
    }
    for path in photos:
        path.unlink()
    (folder / "photos").rmdir()
    kinds = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["a", "b", "c"]),
        "words": datasets.Sequence(datasets.Value("string")),
        "other": datasets.Image(),
    }
    return datasets.Dataset.from_dict(values, features=datasets.Features(kinds))


def tables(folder: Path) -> Path:
    table = rows(folder)
    for part in range(3):
        table.shard(3, part).to_parquet(folder / f"train-{part}.parquet", batch_size=2)
    table.select(range(2)).to_parquet(folder / "test-0.parquet")
    return folder


def arrow(folder: Path) -> Path:
    rows(folder).save_to_disk(folder, num_shards=2)
    return folder


def paths_in_tables(folder: Path) -> Path:
    for path in draw(folder / "photos", 4).iterdir():
        path.rename(path.with_suffix(""))  # otherwise it would be a folder of images
    pq.write_table(pa.table({"file": [f"photos/{i:04}" for i in range(5)]}), folder / "list.parquet")
    return folder


KINDS = {
    "images": images,
    "metadata": with_metadata,
    "tars": archives,
    "tables": tables,
    "arrow": arrow,
    "paths": paths_in_tables,
}
COLUMN = {"tables": "image", "arrow": "image", "paths": "file"}


def encode_both(sources, kind: str, vae: Path, tmp_path: Path) -> tuple[LatentFolder, LatentFolder]:
    """The latents of the source on the disk, and of that in the bucket."""
    folder, url = sources[kind]
    stream = {} if kind in ("images", "metadata") else {"shard_rows": None, "image_column": COLUMN.get(kind)}
    (here,) = encode(options(folder, tmp_path / "latents-here", vae, streaming=bool(stream), **stream))
    config = options(folder, tmp_path / "latents-there", vae, **stream)
    (there,) = encode(dataclasses.replace(config, source=url))
    return here, there


@pytest.mark.parametrize("kind", KINDS)
def test_a_bucket_is_encoded_to_the_bytes_of_the_same_files_on_a_disk(sources, kind, vae, tmp_path, nothing_local):
    here, there = encode_both(sources, kind, vae, tmp_path)
    assert here.manifest["fingerprint"] == there.manifest["fingerprint"]
    assert there.manifest["rows"] > 3
    one, other = content(tmp_path / "latents-here"), content(tmp_path / "latents-there")
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name not in ("manifest.json", "README.md"))


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"arrow"}))
def test_single_images_of_a_bucket_are_those_of_the_disk(sources, kind, nothing_local, tmp_path, monkeypatch):
    folder, url = sources[kind]
    there = pickle.loads(pickle.dumps(open_source(url, image_column=COLUMN.get(kind))))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another")
    here = open_source(str(folder), image_column=COLUMN.get(kind))
    assert len(here) == len(there) > 3
    assert here.features == there.features
    order = [*range(0, len(here), 2), *reversed(range(1, len(here), 2))]
    assert here.columns(order).to_pylist() == there.columns(order).to_pylist()
    for index in order:
        assert here.name(index) == there.name(index)
        try:
            data = here.read(index)
        except ImageError:
            with pytest.raises(ImageError, match="cannot be read"):
                there.read(index)
        else:
            assert data == there.read(index)


def test_splits_patterns_and_single_files_mean_what_they_mean_on_a_disk(sources, caplog, tmp_path):
    folder, url = sources["images"]

    def named(spec, **others):
        source = open_source(spec, **others)
        return [source.name(i) for i in range(len(source))], source.columns(range(len(source))).to_pylist()

    caplog.set_level(logging.INFO)
    for below, split in [("", "test"), ("/**/*.png", "train"), ("/train/*/000[12].png", "train")]:
        assert named(f"{folder}{below}", split=split) == named(f"{url}{below}", split=split)
    assert named(f"{url}/train/cat/0003.png") == (["0003.png"], [{"caption": "a cat\non a mat"}])
    assert named(f"file://{folder}", split="test") == named(str(folder), split="test")
    said = {record.getMessage().partition(": not used: ")[::2] for record in caplog.records}
    here, there = ({text for where, text in said if where == spec} for spec in (str(folder), url))
    assert here == {text.replace("__MACOSX/a.png", "__MACOSX") for text in there}  # a bucket has no folders
    with pytest.raises(InputError, match="no split 'validation'; need one of"):
        open_source(url, split="validation")
    mixed = draw(tmp_path / "mixed/x", 2).parent
    (mixed / "y.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"holds 2 images and 1 tables.*pattern such as 's3://bucket/mixed/x/\*\.png'"):
        open_source(upload(mixed, "s3://bucket/mixed"))


def test_empty_objects_that_stand_for_folders_are_no_files(server):
    system, _ = fsspec.url_to_fs("s3://bucket")
    for key in ("placeholders/", "placeholders/sub.png/", "placeholders/sub.png/a.png"):
        system.call_s3("put_object", Bucket="bucket", Key=key, Body=b"")
    source = open_source("s3://bucket/placeholders")
    assert [source.name(i) for i in range(len(source))] == ["sub.png/a.png"]


def test_archives_and_tables_of_a_bucket_are_streams_and_images_are_not(sources):
    for kind, (_, url) in sources.items():
        is_stream = isinstance(open_source_or_stream(url, image_column=COLUMN.get(kind)), ImageStream)
        assert is_stream is (kind not in ("images", "metadata"))
    with pytest.raises(InputError, match="image files are read in place"):
        open_stream(sources["images"][1])


def test_in_memory_files_are_a_source_too(tmp_path):
    upload(draw(tmp_path / "photos", 3), "memory://photos")
    assert len(open_source("memory://photos")) == 3


def test_an_archive_is_not_read_before_its_turn(tmp_path, monkeypatch):
    """Only the first archive is opened to plan the shards, and no archive is read twice."""
    folder = archives(tmp_path / "tars")
    opened = []
    own = LocalStorage.open
    monkeypatch.setattr(LocalStorage, "open", lambda self, name: opened.append(name) or own(self, name))
    stream = open_stream(str(folder))
    stream.identity()
    assert opened == ["train-0.tar"]
    assert len(list(stream.part(2))) == 4
    assert opened == ["train-0.tar", "train-2.tar"]


def test_members_of_a_sample_that_lie_apart_are_refused_by_a_stream(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        photo = next(draw(tmp_path / "photos", 1).iterdir()).read_bytes()
        for key, members in (("a", {"png": photo}), ("b", {"png": photo}), ("a", {"txt": b"words"})):
            add(tar, key, members)
    assert len(open_source(str(tmp_path / "a.tar"))) == 2
    with pytest.raises(InputError, match=r"members of 'a' do not follow each other.*leave out --streaming"):
        list(open_stream(str(tmp_path / "a.tar")).part(0))


def test_columns_that_come_late_in_a_stream_are_said(tmp_path, caplog):
    photo = next(draw(tmp_path / "photos", 1).iterdir()).read_bytes()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for i in range(150):
            add(tar, str(i), {"png": photo, **({"txt": b"words"} if i == 140 else {})})
    stream = open_stream(str(tmp_path / "a.tar"))
    assert not stream.features
    assert len(list(stream.part(0))) == 150
    assert "140.png has a .txt, which none of the first samples has" in caplog.text


def broken_tar(data: bytes) -> bytes:
    return data[: len(data) // 2 // 512 * 512 - 512 * 3]


def broken_table(data: bytes) -> bytes:
    return data[:-100]


@pytest.mark.parametrize("kind", ["tars", "tables"])
def test_a_file_that_is_damaged_or_gone_is_named_and_the_others_are_encoded(
    sources, kind, vae, tmp_path, server, caplog
):
    folder, _ = sources[kind]
    ending, damage = {"tars": ("tar", broken_tar), "tables": ("parquet", broken_table)}[kind]
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name, data in content(folder).items():
        (damaged / name).write_bytes(damage(data) if name == f"train-1.{ending}" else data)
    url = upload(damaged, f"s3://bucket/damaged-{kind}")
    config = options(folder, tmp_path / "out", vae, shard_rows=None, image_column=COLUMN.get(kind))
    config = dataclasses.replace(config, source=url)
    begun = EncodeTask(config)
    begun.begin()
    fsspec.url_to_fs(url)[0].rm_file(f"bucket/damaged-{kind}/train-2.{ending}")
    Pipeline(begun).run()
    skipped = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert [line["name"] for line in skipped] == [f"train-{part}.{ending}" for part in (1, 2)]
    assert all("cannot be read, or not to its end" in line["reason"] for line in skipped)
    assert skipped[1]["reason"].endswith("to its end: No such file or directory")
    assert caplog.text.count("what follows in it is skipped") == 2
    assert begun.targets[0].folder.is_complete


def test_an_image_that_is_gone_after_the_listing_is_skipped_with_its_reason(vae, tmp_path, server):
    url = upload(draw(tmp_path / "photos", 8), "s3://bucket/gone")
    task = EncodeTask(dataclasses.replace(options(tmp_path, tmp_path / "out", vae), source=url))
    task.begin()
    fsspec.url_to_fs(url)[0].rm_file("bucket/gone/0006.png")
    Pipeline(task).run()
    (skipped,) = [json.loads(line) for line in (tmp_path / "out/skipped.jsonl").read_text().splitlines()]
    assert skipped["name"] == "0006.png"
    assert skipped["reason"] == "cannot be read: No such file or directory"


@pytest.mark.parametrize("kind", ["images", "tars", "tables"])
def test_two_parts_of_which_one_is_killed_give_the_whole(sources, kind, vae, tmp_path):
    folder, url = sources[kind]
    given = {} if kind == "images" else {"shard_rows": None, "image_column": COLUMN.get(kind)}
    config = dataclasses.replace(options(folder, tmp_path / "out", vae, **given), source=url)

    def dying() -> None:
        own = LatentWriter.write_shard

        def killed(self, shard, *arguments):
            if shard:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(self, shard, *arguments)

        LatentWriter.write_shard = killed
        encode(dataclasses.replace(config, part="0/2"))

    for run, code in (
        (dying, -signal.SIGKILL),
        (lambda: encode(dataclasses.replace(config, part="1/2")) and None, 0),
        (lambda: encode(dataclasses.replace(config, part="0/2")) and None, 0),
    ):
        process = in_process(run)
        process.join()
        assert process.exitcode == code
    clean = dataclasses.replace(config, output=str(tmp_path / "clean"))
    encode(clean)
    encode(dataclasses.replace(clean, verify=True))
    assert content(tmp_path / "out") == content(tmp_path / "clean")


@pytest.mark.parametrize("kind", ["images", "tars", "tables"])
def test_a_server_that_stays_away_ends_the_command_and_the_same_command_continues(
    kind, vae, tmp_path, monkeypatch, capsys
):
    """The server dies when the first shard is written, while the second one is read."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    folder = KINDS[kind](tmp_path / kind)
    arguments = ["--source=s3://bucket/x", f"--vae={vae}", f"--output={tmp_path / 'out'}", "--device=cpu"]
    arguments += ["--resolution=32", "--batch_size=2", "--num_workers=1", "--max_bad_fraction=1"]
    arguments += [f"--image_column={COLUMN[kind]}"] if kind in COLUMN else []
    arguments += ["--shard_rows=4"] if kind == "images" else []
    own = LatentWriter.write_shard
    with s3_server() as server:
        upload(folder, "s3://bucket/x")

        def killing(self, *arguments):
            server.kill()
            server.wait()
            return own(self, *arguments)

        monkeypatch.setattr(LatentWriter, "write_shard", killing)
        assert main(["encode", *arguments]) == 1
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert "s3://bucket/x" in line
    monkeypatch.setattr(LatentWriter, "write_shard", own)
    written = set(os.listdir(tmp_path / "out/data"))
    assert all(re.fullmatch(r"train-\d{5}-of-\d{5}\.parquet", name) for name in written)
    assert not (tmp_path / "out/skipped.jsonl").exists()
    with s3_server():
        upload(folder, "s3://bucket/x")
        assert main(["encode", *arguments]) == 0
        clean = [f"--output={tmp_path / 'clean'}" if "--output" in argument else argument for argument in arguments]
        assert main(["encode", *clean]) == 0
    assert content(tmp_path / "out") == content(tmp_path / "clean")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://nowhere/photos", r"no such folder or file: 's3://nowhere/photos' .*bucket"),
        ("s3://bucket/nothing", r"no such folder or file: 's3://bucket/nothing'; need an existing one"),
        ("s3://bucket/nothing/*.png", "no file matches"),
        ("s3://", "need the name of a bucket"),
        ("s3:/bucket/photos", "need two slashes"),
        ("foo://bucket/photos", r"need a path, or a URL that begins with one of .*s3://"),
        ("https://example.com/photos.tar", r"need a path, or a URL that begins with one of .*s3://"),
        ("gs://bucket/photos", r'pip install "sdvae\[gs\]"'),
        ("file:///nowhere/photos", "no such folder or file: '/nowhere/photos'"),
    ],
)
def test_a_source_that_cannot_be_is_one_line(server, vae, tmp_path, capsys, url, said, nothing_local):
    arguments = [f"--source={url}", f"--vae={vae}", f"--output={tmp_path / 'out'}", "--device=cpu"]
    assert main(["encode", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert re.search(said, line), line
    assert not (tmp_path / "out").exists()


class _Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


def test_a_bucket_that_is_not_allowed_is_one_line(vae, tmp_path, monkeypatch, capsys):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "wrong")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    forget_connections()
    try:
        assert main(["encode", "--source=s3://secret/photos", f"--vae={vae}", f"--output={tmp_path / 'out'}"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert "got no access to s3://secret/photos" in line
        assert "need credentials that allow it" in line
    finally:
        server.shutdown()
        server.server_close()
        forget_connections()


def test_latents_inside_the_source_are_refused(vae, server, tmp_path):
    url = upload(draw(tmp_path / "photos", 1), "s3://bucket/inside")
    with pytest.raises(InputError, match="inside the source"):
        encode(dataclasses.replace(options(tmp_path, "", vae), source=url, output=f"{url}/latents"))


@pytest.mark.parametrize("kind", ["images", "tables"])
def test_workers_make_the_same_training_batches_from_a_bucket(sources, kind):
    def batches(spec):
        dataset = TrainingImages(open_source(str(spec), image_column=COLUMN.get(kind)), resolution=32, seed=1)
        order = ShardedBatches(SampleOrder(len(dataset), 1), 3, rank=0, world_size=1, start=0, num_batches=5)
        return list(training_loader(dataset, order, num_workers=2))

    for here, there in zip(*map(batches, sources[kind]), strict=True):
        assert here.keys() == there.keys()
        assert torch.equal(here["image"], there["image"])
        assert [name for name, _ in here["bad"]] == [name for name, _ in there["bad"]]


def test_a_server_that_stays_away_ends_training_and_makes_no_image_bad(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with s3_server() as server:
        source = open_source(upload(draw(tmp_path / "photos", 4), "s3://bucket/x"))
        assert source.read(0)
        server.kill()
        server.wait()
        with pytest.raises(StorageError, match=r"s3://bucket/x/0001\.png"):
            source.read(1)
