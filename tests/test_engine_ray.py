"""`sdvae encode` on a Ray cluster of two nodes, and `LatentEncoder` in a pipeline of Ray Data."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sdvae import InputError, LatentEncoder, load_vae
from sdvae.cli import main
from sdvae.latents.encode import encode
from sdvae.storage import open_storage
from tests.latents_tools import content, draw, options
from tests.s3 import objects

pytestmark = pytest.mark.slow
SMALL = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def cluster(server):
    """Two nodes with one CPU each, which inherit the environment for the S3 server."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # tests need no network
    from ray.cluster_utils import Cluster

    running = Cluster(initialize_head=True, head_node_args={**SMALL, "include_dashboard": False})
    running.add_node(**SMALL)
    yield running
    running.shutdown()


@pytest.fixture(scope="module")
def clean(vae, tmp_path_factory):
    """Photographs of two shapes, and what one process with one thread makes of them."""
    root = tmp_path_factory.mktemp("clean")
    photos = draw(root / "photos", 200, sizes=((60, 40), (40, 40)))
    (photos / "0007.png").write_bytes(b"no image")
    (photos / "thesis.txt").write_text("not used")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    encode(bucketed(photos, root / "out", vae))
    torch.set_num_threads(threads)
    return photos, root / "out"


def bucketed(source, output, vae, **changes):
    return options(source, output, vae, buckets="area", bucket_step=8, batch_size=2, **changes)


def on(cluster, output, clean, vae):
    config = bucketed(clean[0], "", vae, engine="ray", ray_address=cluster.address)
    return dataclasses.replace(config, output=str(output))


def shards_done(output) -> int:
    return len(open_storage(output).sizes("data"))


def wait_for(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def workers(node, title):
    """The processes of a node whose title begins so. Ray names its processes after what they run."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == raylet and (folder / "cmdline").read_text().startswith(title):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
    return found


def killed_one(title, nodes, died) -> bool:
    """Kill one process whose title begins so, and add it to `died`. False if there is none at this moment."""
    for pid in (pid for node in nodes for pid in workers(node, title)):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it has ended by itself
            continue
        died.append(pid)
        return True
    return False


def test_encoders_decoders_and_a_node_die_and_the_files_are_those_of_a_clean_run(
    cluster, clean, vae, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    config = on(cluster, "out", clean, vae)  # a relative path
    faults, died = [], []

    def run():
        try:
            encode(config)
        except BaseException as error:
            faults.append(error)

    with caplog.at_level(logging.INFO, "sdvae"):
        encoding = threading.Thread(target=run)
        encoding.start()
        try:
            head, node = cluster.list_all_nodes()
            wait_for(lambda: shards_done("out") > 2 or faults)
            for title in ("ray::_decode", "ray::_Encoder"):
                wait_for(lambda title=title: faults or killed_one(title, [head, node], died))
            before = shards_done("out")
            wait_for(lambda: shards_done("out") > before + 2 or faults)
            cluster.remove_node(node, allow_graceful=False)
            done = shards_done("out")
        finally:
            encoding.join()
            cluster.add_node(**SMALL)
    assert not faults
    assert len(died) >= 2, "no decoder or no encoder was killed"
    assert done < 40, "everything was done before the node died"
    assert content(tmp_path / "out") == content(clean[1])
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("sdvae")]
    assert sum("not used: texts without an image" in line for line in lines) == 1, lines
    assert any("199 of 200 images have a row" in line for line in lines)


def test_the_command_is_killed_and_run_again_over_a_bucket(cluster, clean, vae, tmp_path):
    bucket = "s3://bucket/killed"
    config = on(cluster, bucket, clean, vae)
    names = ("source", "output", "vae", "resolution", "buckets", "bucket_step", "batch_size", "shard_rows", "precision")
    arguments = [f"--{name}={getattr(config, name)}" for name in (*names, "max_bad_fraction", "engine", "ray_address")]
    command = [sys.executable, "-m", "sdvae", "encode", *arguments]
    killed = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: shards_done(bucket) > 3)
    killed.kill()
    killed.wait()
    assert "shards.jsonl" not in objects(bucket)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert objects(bucket) == content(clean[1])
    assert not list(tmp_path.iterdir())
    said = [line for line in again.stderr.splitlines() if "images/s" not in line and line.strip()]
    assert not again.stdout
    assert [line for line in said if "(pid=" in line or "Traceback" in line] == []
    assert len(said) < 8, said


def test_several_resolutions_have_the_files_of_a_run_without_ray(cluster, clean, vae, tmp_path):
    config = dataclasses.replace(on(cluster, tmp_path / "ray", clean, vae), resolution=(32, 48), shard_rows=60)
    encode(config)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as a node of the cluster has CPUs
    encode(dataclasses.replace(config, output=str(tmp_path / "here"), engine=None, ray_address=None))
    torch.set_num_threads(threads)
    assert content(tmp_path / "ray") == content(tmp_path / "here")


def test_other_settings_and_other_faults_of_a_node_are_one_line(cluster, clean, vae, tmp_path):
    encode(dataclasses.replace(on(cluster, tmp_path / "out", clean, vae), engine=None, ray_address=None))
    with pytest.raises(InputError, match=r"made in another way.*stored\.dtype"):
        encode(dataclasses.replace(on(cluster, tmp_path / "out", clean, vae), dtype="fp32"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--ray_address=auto"], "without an engine"),
        (["--engine=ray", "--part=0/2"], "leave out part"),
        (["--engine=ray", "--verify=true"], "leave out the engine"),
        (["--engine=ray", "--device=cuda:1"], "which assigns GPUs"),
        (["--engine=ray", "--ray_address=127.0.0.1:9"], "got no Ray cluster at ray_address=127.0.0.1:9"),
        (["--engine=ray", "--ray_address=ray://127.0.0.1:9"], "got no Ray cluster"),
        (["--engine=ray", "--ray_address=somewhere"], "need auto, HOST:PORT"),
    ],
)
def test_options_that_cannot_be_are_one_line(tmp_path, capsys, changes, said):
    assert main(["encode", "--source=skimage", f"--output={tmp_path / 'out'}", *changes]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert said in line
    assert not (tmp_path / "out").exists()


def test_without_ray_the_package_works_and_the_engine_says_what_to_install(tmp_path):
    code = """
import importlib.util, sys

class WithoutRay:
    @staticmethod
    def find_spec(name, *rest):
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "ray" else find_spec(name, *rest)
sys.meta_path.insert(0, WithoutRay)
import sdvae.errors
sdvae.errors.find_spec = importlib.util.find_spec
from sdvae.cli import main
sys.exit(main(["encode", "--source=skimage", "--output=out", "--engine=ray"]))
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert 'pip install "sdvae[ray]"' in ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_pipeline_of_ray_data_gets_what_diffusers_encodes(cluster, vae):
    import ray

    images = np.random.default_rng(0).integers(0, 256, (10, 16, 24, 3), dtype=np.uint8)
    ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        dataset = ray.data.from_items([{"key": i, "image": image} for i, image in enumerate(images)])
        encoded = dataset.map_batches(
            LatentEncoder,
            fn_constructor_kwargs={"vae": str(vae), "dtype": "fp32", "precision": "fp32", "device": "cpu"},
            batch_size=4,
            concurrency=1,
        )
        rows = sorted(encoded.take_all(), key=lambda row: row["key"])
    finally:
        ray.shutdown()
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = load_vae(vae).to_diffusers().encode(x).latent_dist
    for name, want in (("mean", posterior.mean), ("logvar", posterior.logvar)):
        got = torch.from_numpy(np.stack([row[name] for row in rows]))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert [row["key"] for row in rows] == list(range(10))
    assert "image" not in rows[0]


def test_a_latent_encoder_is_pickled_without_its_weights(vae):
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    encoder = LatentEncoder(str(vae), device="cpu")
    small = pickle.dumps(encoder)
    first = encoder({"image": images})
    assert first["mean"].dtype == np.float16
    assert pickle.dumps(encoder) == small
    again = pickle.loads(small)({"image": images})
    assert all(np.array_equal(first[name], again[name]) for name in ("mean", "logvar"))


@pytest.mark.parametrize("shape", [(2, 16, 18, 3), (16, 16, 3), (2, 16, 16, 1)])
def test_a_latent_encoder_refuses_images_of_another_form(vae, shape):
    encoder = LatentEncoder(str(vae), device="cpu")
    for images in (np.zeros(shape, np.uint8), np.zeros((2, 16, 16, 3), np.float32)):
        with pytest.raises(InputError, match=r"need \(B, H, W, 3\), uint8, with H and W multiples of 4"):
            encoder({"image": images})
