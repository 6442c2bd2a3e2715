"""Latent data sets in a bucket: an S3 server, reached over HTTP."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sdvae import InputError, LatentDataset
from sdvae.cli import main
from sdvae.latents.convert import export_latents
from sdvae.latents.encode import encode
from sdvae.latents.task import EncodeTask
from sdvae.latents.writer import LatentWriter
from sdvae.storage import BucketStorage, StorageError, open_storage
from tests.latents_tools import content, draw, in_process, options
from tests.s3 import objects, s3_server

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(server, request):
    return f"s3://bucket/{request.node.name}"


@pytest.fixture(scope="module")
def clean(vae, tmp_path_factory):
    """Photographs, and what one process makes of them in a folder."""
    root = tmp_path_factory.mktemp("clean")
    photos = draw(root / "photos", 23)
    (photos / "0007.png").write_bytes(b"no image")
    encode(options(photos, root / "out", vae))
    return photos, root / "out"


def to(bucket, clean, vae, **changes):
    return dataclasses.replace(options(clean[0], "", vae, **changes), output=bucket)


def encoding(config):
    """A new process that encodes."""
    return in_process(lambda: encode(config) and None)


def test_a_bucket_gets_the_bytes_of_a_folder_and_this_disk_gets_nothing(bucket, clean, vae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert encode(to(bucket, clean, vae))[0].is_complete
    assert objects(bucket) == content(clean[1])
    assert not list(tmp_path.iterdir())


def test_the_loader_reads_a_bucket_as_it_reads_a_folder(bucket, clean, vae):
    encode(to(bucket, clean, vae))
    for num_workers in (0, 1):
        there = LatentDataset(bucket).loader(5, num_workers=num_workers)
        here = LatentDataset(clean[1]).loader(5)
        for a, b in zip(there, here, strict=True):
            assert torch.equal(a["latents"], b["latents"])
            assert a["name"] == b["name"]


@pytest.mark.parametrize("form", ["safetensors", "webdataset", "kohya"])
def test_convert_reads_a_bucket(bucket, clean, vae, tmp_path, form):
    encode(to(bucket, clean, vae))
    if form == "kohya":  # which needs SD's shape of latents, and says so
        with pytest.raises(InputError, match="choose another format"):
            export_latents(bucket, tmp_path / "out", form)
        return
    export_latents(bucket, tmp_path / "there", form)
    export_latents(clean[1], tmp_path / "here", form)
    assert content(tmp_path / "there") == content(tmp_path / "here")


def test_verify_finds_a_broken_shard_and_repair_does_that_one_again(bucket, clean, vae):
    config = to(bucket, clean, vae)
    encode(config)
    encode(dataclasses.replace(config, verify=True))
    storage = open_storage(bucket)
    name = "data/train-00001-of-00005.parquet"
    data = bytearray(storage.read(name))
    data[len(data) // 2] ^= 1
    storage.replace(name, bytes(data))
    storage.remove("data/train-00003-of-00005.parquet")
    with pytest.raises(InputError, match=r"2 of 5 shards.*00001.*checksum.*00003.*is missing.*--repair"):
        encode(dataclasses.replace(config, verify=True))
    encode(dataclasses.replace(config, repair=True))
    assert objects(bucket) == content(clean[1])


def test_processes_take_their_parts_and_a_killed_one_leaves_its_part_to_be_done_again(bucket, clean, vae):
    def dying() -> None:
        write = LatentWriter.write_shard

        def killed(self, shard, *arguments):
            if shard == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, shard, *arguments)

        LatentWriter.write_shard = killed
        encode(to(bucket, clean, vae, part="0/3"))

    process = in_process(dying)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert set(open_storage(bucket).sizes("data")) == {"train-00000-of-00005.parquet"}
    for other in [encoding(to(bucket, clean, vae, part=part)) for part in ("1/3", "2/3")]:
        other.join()
        assert other.exitcode == 0
    found = objects(bucket)
    assert "manifest.json" in found
    assert "shards.jsonl" not in found
    assert encode(to(bucket, clean, vae, part="0/3"))[0].is_complete
    assert objects(bucket) == content(clean[1])


def test_launched_processes_take_their_rank_for_their_part(bucket, clean, vae, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        encode(to(bucket, clean, vae))
    monkeypatch.undo()
    assert objects(bucket) == content(clean[1])


def test_of_sixteen_writers_at_once_one_wins(bucket):
    storage = open_storage(bucket)
    with ThreadPoolExecutor(16) as threads:
        won = list(threads.map(lambda number: storage.create("shard", b"%d" % number * 100_000), range(16)))
    assert sum(won) == 1
    assert storage.read("shard") == b"%d" % won.index(True) * 100_000


def test_two_processes_that_encode_every_shard_at_once_make_one_data_set(bucket, clean, vae):
    for process in [encoding(to(bucket, clean, vae, part="0/1")) for _ in range(2)]:
        process.join()
        assert process.exitcode == 0
    assert objects(bucket) == content(clean[1])


def test_other_settings_are_refused(bucket, clean, vae):
    encode(to(bucket, clean, vae))
    with pytest.raises(InputError, match=r"made in another way.*stored\.dtype"):
        encode(to(bucket, clean, vae, dtype="fp32"))
    open_storage(f"{bucket}/other").create("thesis.txt", b"mine")
    with pytest.raises(InputError, match=r"holds other files \(thesis\.txt\)"):
        encode(to(f"{bucket}/other", clean, vae))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://nowhere/latents", "bucket does not exist"),
        ("foo://bucket/latents", "need a path"),
        ("gs://bucket/latents", r'pip install "sdvae\[gs\]"'),
        ("https://example.com/latents", "need a path on this machine, or a URL that begins with one of"),
    ],
)
def test_an_output_that_cannot_be_is_one_line_and_no_folder(
    server, clean, vae, tmp_path, monkeypatch, capsys, url, said
):
    monkeypatch.chdir(tmp_path)
    arguments = [f"--source={clean[0]}", f"--vae={vae}", f"--output={url}", "--resolution=32", "--device=cpu"]
    assert main(["encode", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert url.partition("/latents")[0] in line
    assert re.search(said, line), line
    assert not list(tmp_path.iterdir())


def test_a_reader_of_no_data_set_says_so(bucket):
    with pytest.raises(InputError, match=r"s3://.* holds no manifest\.json"):
        LatentDataset(bucket)


def test_a_storage_goes_to_other_processes_by_its_url(bucket):
    storage = open_storage(bucket)
    storage.create("a/b", b"1")
    again = pickle.loads(pickle.dumps(storage))
    assert isinstance(again, BucketStorage)
    assert again.read("a/b") == b"1"
    assert again.sizes("a") == {"b": 1}
    assert again.exists("a/b")
    assert not again.exists("a")


def test_a_server_that_goes_away_for_a_moment_is_asked_again_and_one_that_stays_away_is_a_fault(clean, vae):
    with s3_server() as server:
        config = to("s3://bucket/gone", clean, vae)
        task = EncodeTask(config)
        task.begin()
        os.kill(server.pid, signal.SIGSTOP)
        waking = threading.Timer(2, lambda: os.kill(server.pid, signal.SIGCONT))
        waking.start()
        start = time.monotonic()
        assert task.targets[0].folder.storage.create("data/x", b"1")
        assert time.monotonic() - start > 1
        task.targets[0].folder.storage.remove("data/x")
        server.kill()
        server.wait()
        with pytest.raises(StorageError, match="s3://bucket/gone/data/x"):
            task.targets[0].folder.storage.create("data/x", b"1")
