"""`sdvae encode --resolution A B`: each data set is what the same command with one resolution makes."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from sdvae import InputError, LatentDataset
from sdvae.cli import main
from sdvae.data import read_image
from sdvae.latents import task as task_module
from sdvae.latents.config import EncodeConfig
from sdvae.latents.encode import encode
from sdvae.latents.task import EncodeTask
from sdvae.options import parse_options
from tests.latents_tools import content, draw, encode_in_process, killed_at, options

RESOLUTIONS = (32, 48)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """18 images, of which one is damaged, one is too small for both resolutions, and two only for the larger one."""
    folder = draw(tmp_path_factory.mktemp("photos") / "photos", 14, sizes=((70, 50), (50, 50), (40, 66)))
    (folder / "0003.png").write_bytes(b"no image")
    Image.new("RGB", (12, 15)).save(folder / "small.png")
    Image.new("RGB", (20, 30), "red").save(folder / "middle.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # upright, it is 22 wide and 60 high
    Image.new("RGB", (60, 22), "blue").save(folder / "turned.jpg", exif=exif)
    return folder


def alone(photos: Path, vae: Path, output: Path, **changes) -> dict[str, dict[str, bytes]]:
    """Resolution -> files, each made by a command of its own."""
    made = {}
    for resolution in RESOLUTIONS:
        folder = output / str(resolution)
        encode(options(photos, folder, vae, **{**changes, "resolution": resolution}))
        made[str(resolution)] = content(folder)
    return made


def files(output: Path) -> dict[str, dict[str, bytes]]:
    return {str(resolution): content(output / str(resolution)) for resolution in RESOLUTIONS}


@pytest.mark.parametrize(
    "changes",
    [{}, {"buckets": "area", "bucket_step": 16, "batch_size": 2}, {"mirror": True, "store": "sample"}],
    ids=["squares", "buckets", "mirrored samples"],
)
def test_each_folder_has_the_bytes_of_a_run_with_one_resolution(vae, photos, tmp_path, changes):
    several = options(photos, tmp_path / "out", vae, **{**changes, "resolution": RESOLUTIONS})
    folders = encode(several)
    assert [str(folder.storage) for folder in folders] == [str(tmp_path / "out" / str(r)) for r in RESOLUTIONS]
    assert files(tmp_path / "out") == alone(photos, vae, tmp_path / "alone", **changes)
    too_small = [(tmp_path / "out" / str(r) / "skipped.jsonl").read_text().count("too small") for r in RESOLUTIONS]
    assert too_small == [1, 3]


def test_each_image_is_read_and_decoded_once(vae, photos, tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(task_module, "read_image", lambda *given: decoded.append(1) or read_image(*given))
    encode(options(photos, tmp_path / "out", vae, resolution=RESOLUTIONS))
    assert len(decoded) == len(list(photos.iterdir()))


def test_a_stream_of_archives_gives_each_folder_too(vae, photos, tmp_path):
    archives = tmp_path / "tars"
    archives.mkdir()
    for number in range(2):
        with tarfile.open(archives / f"{number}.tar", "w") as tar:
            for path in sorted(photos.iterdir())[number::2]:
                header = tarfile.TarInfo(f"{path.stem}{path.suffix}")
                header.size = path.stat().st_size
                tar.addfile(header, io.BytesIO(path.read_bytes()))
    changes = {"streaming": True, "shard_rows": None}
    encode(options(archives, tmp_path / "out", vae, resolution=RESOLUTIONS, **changes))
    assert files(tmp_path / "out") == alone(archives, vae, tmp_path / "alone", **changes)


@pytest.mark.slow
def test_killed_at_any_file_it_is_continued_by_any_number_of_processes(vae, photos, tmp_path):
    """One folder may be complete when the other is not."""
    clean = alone(photos, vae, tmp_path / "alone")
    config = options(photos, tmp_path / "out", vae, resolution=RESOLUTIONS)
    for boundary in (5, 16, 27, 38):
        assert killed_at(boundary, config)
    workers = [encode_in_process(config) for _ in range(2)]
    for worker in workers:
        worker.join()
    encode(config)
    assert files(tmp_path / "out") == clean


def test_a_folder_that_one_resolution_made_is_continued_by_several(vae, photos, tmp_path):
    encode(options(photos, tmp_path / "out" / "32", vae))
    before = content(tmp_path / "out" / "32")
    encode(options(photos, tmp_path / "out", vae, resolution=RESOLUTIONS))
    assert content(tmp_path / "out" / "32") == before
    assert LatentDataset(tmp_path / "out" / "48")


def test_parts_and_repair(vae, photos, tmp_path):
    config = options(photos, tmp_path / "out", vae, resolution=RESOLUTIONS)
    for part in ("1/2", "0/2"):
        encode(dataclasses.replace(config, part=part))
    whole = files(tmp_path / "out")
    encode(dataclasses.replace(config, verify=True))
    for resolution, shard in ((32, 0), (48, 2)):
        broken = tmp_path / "out" / str(resolution) / f"data/train-{shard:05d}-of-00004.parquet"
        broken.write_bytes(broken.read_bytes()[:-9] + bytes(9))
    with pytest.raises(InputError, match=r"1 of 4 shards of .*/32 are broken .*; 1 of 4 shards of .*/48 are broken"):
        encode(dataclasses.replace(config, verify=True))
    encode(dataclasses.replace(config, repair=True))
    assert files(tmp_path / "out") == whole


def test_shards_hold_the_latents_of_all_resolutions_within_the_limit(vae, photos, tmp_path):
    """Both are in memory at the same time, and the shards are the same for both."""
    config = options(photos, tmp_path / "out", vae, resolution=(1024, 2048), shard_rows=None, min_side=1)
    task = EncodeTask(config)
    rows = task.shards._shard_rows
    assert rows * sum(target.crops.row_bytes for target in task.targets) <= 128 * 2**20
    assert {json.dumps(target.fingerprint["source"]) for target in task.targets} == {
        json.dumps(task.targets[0].fingerprint["source"])
    }


@pytest.mark.parametrize(
    ("arguments", "resolution"),
    [
        (["--resolution", "32"], 32),
        (["--resolution=32"], 32),
        (["--resolution", "32", "48", "--seed", "1"], (32, 48)),
        (["--resolution=[32, 48]"], (32, 48)),
        (["--resolution", "[32]"], (32,)),
    ],
)
def test_the_command_line_takes_one_or_several(arguments, resolution):
    parsed = parse_options(EncodeConfig, ["--source", "a", "--output", "b", *arguments], "sdvae encode")
    assert parsed.resolution == resolution


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["32", "32"], "got resolution=[32, 32]; need one or several, each of them once"),
        (["32", "0"], "got resolution=[32, 0]; need at least 1"),
        (["32", "50"], "got images of 50 x 50; need multiples of 4"),
        (["32", "wide"], "need a whole number or several as in --key A B"),
    ],
)
def test_bad_resolutions_are_one_line_and_write_nothing(vae, photos, tmp_path, capsys, given, said):
    arguments = [f"--source={photos}", f"--output={tmp_path / 'out'}", f"--vae={vae}", "--resolution", *given]
    assert main(["encode", *arguments]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert said in error[0]
    assert not (tmp_path / "out").exists()


def test_a_folder_of_one_data_set_is_not_filled_with_others(vae, photos, tmp_path):
    encode(options(photos, tmp_path / "out", vae))
    with pytest.raises(InputError, match="holds the latents of one resolution"):
        encode(options(photos, tmp_path / "out", vae, resolution=RESOLUTIONS))
    assert not (tmp_path / "out" / "32").exists()


def test_the_folder_of_several_is_refused_with_the_name_of_one(vae, photos, tmp_path):
    encode(options(photos, tmp_path / "out", vae, resolution=RESOLUTIONS))
    with pytest.raises(InputError, match=r"holds those of several resolutions; choose .*/out/32"):
        LatentDataset(tmp_path / "out")
