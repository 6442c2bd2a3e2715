"""Time `sdvae encode` against the encoder alone and a plain loop, watch its memory, or time the reader of its result.

    python scripts/benchmark_encode.py --images FOLDER                          # the packaged VAE, 256x256
    python scripts/benchmark_encode.py --images FOLDER --config configs/sd_f8c4.yaml --count 12 --batch 4
    python scripts/benchmark_encode.py --images FOLDER --count 1024 --ray true  # also through Ray, on this machine
    python scripts/benchmark_encode.py --memory_rows 1000000
    python scripts/benchmark_encode.py --reader_rows 8192
    python scripts/benchmark_encode.py --shards 250000

- bare encoder: the same weights, precision and batches, with images already decoded in memory; nothing is written.
- plain loop: diffusers' class as loaded, torchvision's transforms, a DataLoader, and torch.save of one file per image.

- through Ray: `sdvae encode --engine ray` on a cluster of this machine alone, from the moment at which its processes
  have started and have encoded one shard for each worker. On either side a shard has 64 images.

Each repetition runs all of them, one after the other, and the ratios are taken within a repetition.

--memory_rows N encodes N synthetic images of 16x16 pixels with a tiny VAE and prints the resident memory ten times.

--reader_rows N times one epoch of `LatentDataset.loader` over N latents of 4x32x32, one thread and no workers, against
a loop that does only what cannot be left out: it takes rows out of a memory-mapped array of moments and draws a sample
of each. The loop has one generator for a batch, so its noise depends on the batch, and it reads no names or sizes.

--shards N times what is done with the list of shards: a data set of N shards is continued, finished and opened, and a
row is read. Each file has the record of a shard but only one row, so it needs about N * 8 KiB of disk.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import diffusers
import numpy as np
import pyarrow as pa
import torch
from benchmark_gpu import where
from jsonargparse.typing import PositiveInt
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from sdvae import AutoencoderKL, LatentDataset, keep_freed_memory, load_vae, save_vae
from sdvae.cli import parse_train_config
from sdvae.data import open_source, subset
from sdvae.errors import exit_code
from sdvae.latents.config import EncodeConfig
from sdvae.latents.pipeline import Pipeline
from sdvae.latents.shards import RangeShards
from sdvae.latents.task import EncodeTask
from sdvae.latents.writer import LatentWriter
from sdvae.training.build import build_vae

SHARD_ROWS = 64


class Files(Dataset[tuple[torch.Tensor, str]]):
    """Images prepared by torchvision's transforms, with their names."""

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths = paths
        steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
        self.transform = transforms.Compose([*steps, transforms.Normalize([0.5], [0.5])])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return self.transform(Image.open(self.paths[index]).convert("RGB")), self.paths[index].stem


@torch.no_grad()
def plain_loop(vae: diffusers.AutoencoderKL, files: Files, batch: int, workers: int, output: Path) -> None:
    device = next(vae.parameters()).device
    for images, names in DataLoader(files, batch_size=batch, num_workers=workers):
        latents = vae.encode(images.to(device)).latent_dist.sample().cpu()
        for latent, name in zip(latents, names, strict=True):
            torch.save(latent.clone(), output / f"{name}.pt")


def compare(arguments: argparse.Namespace, scratch: Path) -> None:
    if arguments.config is None:
        vae = load_vae(dtype=torch.float32)
    else:
        vae = build_vae(parse_train_config(["--config", arguments.config]).model)
    save_vae(vae, scratch / "vae")
    source = open_source(arguments.images)
    count = min(arguments.count, len(source))
    paths = [Path(arguments.images) / source.name(index) for index in range(count)]
    files = Files(paths, arguments.size)
    task = prepared(arguments, scratch / "ours", str(scratch / "vae"))
    stock = vae.to_diffusers().eval().to(task.device)
    images = task.shards.images(0)
    pixels = [task.reader.decode(image)[0].pixels for image in islice(images, arguments.batch)]
    whole = count // arguments.batch * arguments.batch

    def ours() -> float:
        shutil.rmtree(scratch / "ours", ignore_errors=True)
        once = prepared(arguments, scratch / "ours", str(scratch / "vae"))
        once.begin()
        start = time.perf_counter()
        Pipeline(once).run()
        return count / (time.perf_counter() - start)

    def bare() -> float:  # runs right after `ours` and reuses the memory that it freed
        start = time.perf_counter()
        for _ in range(whole // arguments.batch):
            task.encoder.launch(pixels).moments()
        return whole / (time.perf_counter() - start)

    def plain() -> float:
        (scratch / "plain").mkdir(exist_ok=True)
        keep_freed_memory(False)  # `sdvae encode` keeps it, for the two sides above as well
        start = time.perf_counter()
        plain_loop(stock, files, arguments.batch, arguments.workers, scratch / "plain")
        return count / (time.perf_counter() - start)

    task.encoder.launch(pixels).moments()  # warm-up
    runs = {"sdvae encode": ours, "bare encoder": bare, "plain loop": plain}
    if arguments.ray:
        runs["through Ray"] = lambda: through_ray(arguments, paths, scratch)
    sides: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            sides[name].append(run())
    parameters = sum(p.numel() for p in vae.parameters()) / 1e6
    print(
        f"\n{arguments.config or 'packaged VAE'}: {parameters:.2f} M parameters, {count} images at {arguments.size}², "
        f"batch {arguments.batch}, {task.precision}, {where(task.device)}, torch {torch.__version__}, diffusers "
        f"{diffusers.__version__}\n"
    )
    print("| | images/s, median | sdvae encode against it, median | range |\n|---|---|---|---|")
    for name, rates in sides.items():
        ratios = [a / b for a, b in zip(sides["sdvae encode"], rates, strict=True)]
        spread = f"{min(ratios):.2f} – {max(ratios):.2f}"
        print(f"| {name} | {statistics.median(rates):.2f} | {statistics.median(ratios):.2f} | {spread} |")


def through_ray(arguments: argparse.Namespace, paths: Sequence[Path], scratch: Path) -> float:
    """Images per second through Ray, without the start of its processes."""
    import ray

    from sdvae.latents.engine import encode_all, start_encoders

    shutil.rmtree(scratch / "engine", ignore_errors=True)
    (scratch / "engine" / "images").mkdir(parents=True)
    for path in paths:
        (scratch / "engine" / "images" / path.name).symlink_to(path.resolve())
    config = EncodeConfig(
        source=str(scratch / "engine" / "images"),
        output=str(scratch / "engine" / "out"),
        vae=str(scratch / "vae"),
        resolution=arguments.size,
        batch_size=arguments.batch,
        num_workers=arguments.workers,
        device=arguments.device,
        shard_rows=SHARD_ROWS,
        engine="ray",
    )
    ray.init("local", log_to_driver=False, logging_level="ERROR")
    try:
        encoders = start_encoders(config)
        ray.get(encoders[0].begin.remote())
        shards = range(-(-len(paths) // SHARD_ROWS))
        first = len(encoders) * arguments.workers
        list(encode_all(encoders, set(shards[:first]), arguments.workers))
        start = time.perf_counter()
        reports = list(encode_all(encoders, set(shards[first:]), arguments.workers))
        return sum(report.encoded for report in reports) / (time.perf_counter() - start)
    finally:
        ray.shutdown()


def prepared(arguments: argparse.Namespace, output: Path, vae: str) -> EncodeTask:
    """`sdvae encode` on the first `count` images, ready to run."""
    config = EncodeConfig(
        source=arguments.images,
        output=str(output),
        vae=vae,
        resolution=arguments.size,
        batch_size=arguments.batch,
        num_workers=arguments.workers,
        device=arguments.device,
    )
    task = EncodeTask(config)
    first = subset(open_source(arguments.images), range(min(arguments.count, task.shards.total or 0)))
    task.shards = RangeShards(first, None, SHARD_ROWS)
    task.targets[0].fingerprint["shards"] = len(task.shards)
    return task


class Synthetic:
    """Any number of square images of one colour each."""

    def __init__(self, count: int, side: int):
        self.count = count
        self.side = side

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"{index:09d}"

    def read(self, index: int) -> bytes:
        data = io.BytesIO()
        Image.fromarray(np.full((self.side, self.side, 3), index % 256, dtype=np.uint8)).save(data, "BMP")
        return data.getvalue()

    @property
    def features(self) -> datasets.Features:
        return datasets.Features({})

    def columns(self, indices: Sequence[int]) -> pa.Table:
        return pa.table({}, schema=self.features.arrow_schema)


def watch_memory(rows: int, scratch: Path) -> None:
    """Print the resident memory of this process after every tenth of the rows."""
    task = synthetic_task(rows, 16, scratch)
    write, done, start = task.targets[0].folder.write_shard, 0, time.perf_counter()
    print("| rows | resident MiB | rows/s |\n|---|---|---|")

    def watched(shard: int, table: pa.Table, *rest: Any) -> None:
        nonlocal done
        write(shard, table, *rest)
        before, done = done, done + table.num_rows
        if done * 10 // rows > before * 10 // rows or before == 0:
            print(f"| {done} | {resident_mib():.0f} | {done / (time.perf_counter() - start):.0f} |", flush=True)

    task.targets[0].folder.write_shard = watched  # type: ignore[method-assign]
    Pipeline(task).run()


def synthetic_task(rows: int, side: int, scratch: Path) -> EncodeTask:
    """`sdvae encode` on synthetic images with a tiny VAE, whose latents are 4 x side/2 x side/2, ready to run."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
    )
    save_vae(vae, scratch / "vae")
    config: dict[str, Any] = {"resolution": side, "batch_size": 256, "num_workers": 2, "device": "cpu"}
    task = EncodeTask(EncodeConfig(source="skimage", output=str(scratch / "out"), vae=str(scratch / "vae"), **config))
    task.shards = RangeShards(Synthetic(rows, side), None, 4096)
    task.targets[0].fingerprint["shards"] = len(task.shards)
    task.begin()
    return task


def time_shards(count: int, scratch: Path) -> None:
    """Print the seconds that a data set of `count` shards takes to continue, finish and open."""
    task = synthetic_task(1, 16, scratch)
    Pipeline(task).run()
    shard = (scratch / "out" / "data" / "train-00000-of-00001.parquet").read_bytes()
    begun = {**task.targets[0].fingerprint, "shards": count}
    folder = LatentWriter(scratch / "many", part=(0, 1))
    folder.begin(begun, "synthetic", task.vae_config, task.scaling)
    (scratch / "many" / "data").mkdir()
    for number in range(count):
        (scratch / "many" / folder.shard_name(number)).write_bytes(shard)
    memory = resident_mib()

    def continued() -> None:
        LatentWriter(scratch / "many", part=(0, 1)).begin(begun, "synthetic", task.vae_config, task.scaling)

    def finished() -> None:
        assert folder.finish()

    def opened() -> None:
        rows = LatentDataset(scratch / "many")
        assert len(rows) == count
        assert rows[count // 2]["latents"].isfinite().all()

    print(f"| {count} shards | seconds |\n|---|---|")
    for what, run in {"continue": continued, "finish": finished, "open and read a row": opened}.items():
        start = time.perf_counter()
        run()
        print(f"| {what} | {time.perf_counter() - start:.2f} |", flush=True)
    print(f"\n{resident_mib() - memory:.0f} MiB of memory more than before")


def compare_readers(rows: int, batch: int, repeats: int, scratch: Path) -> None:
    """Print the rows a second of `LatentDataset.loader` and of a plain loop over a memory-mapped array."""
    Pipeline(synthetic_task(rows, 64, scratch)).run()
    latents = LatentDataset(scratch / "out")
    shape, moments = (4, 32, 32), scratch / "moments.npy"
    table = datasets.load_dataset(str(scratch / "out"), split="train", cache_dir=str(scratch / "cache"))
    array = np.lib.format.open_memmap(moments, "w+", np.float16, (rows, 2, *shape))
    for place, row in enumerate(table):
        array[place] = [np.frombuffer(row[name], np.float16).reshape(shape) for name in ("mean", "logvar")]
    array.flush()
    torch.set_num_threads(1)

    def ours() -> float:
        start, seen = time.perf_counter(), 0
        for drawn in latents.loader(batch, epoch=0):
            seen += len(drawn["latents"])
        return seen / (time.perf_counter() - start)

    def memmap() -> float:
        start, seen = time.perf_counter(), 0
        mapped = np.load(moments, mmap_mode="r")
        order = np.random.default_rng(0).permutation(rows)
        for places in order[: rows // batch * batch].reshape(-1, batch):
            mean, logvar = torch.from_numpy(mapped[places]).float().unbind(1)
            z = mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * torch.randn(mean.shape)
            seen += len(latents.scaling.normalize(z))
        return seen / (time.perf_counter() - start)

    ours(), memmap()  # warm-up: the files come into memory
    pairs = [(ours(), memmap()) for _ in range(repeats)]
    ratios = [a / b for a, b in pairs]
    print(f"\n{rows} latents of 4x32x32 in fp16, batches of {batch}, one thread, torch {torch.__version__}\n")
    print("| | rows/s, median | loader against it, median | range |\n|---|---|---|---|")
    print(f"| LatentDataset.loader | {statistics.median(a for a, _ in pairs):.0f} | 1.00 | |")
    spread = f"{min(ratios):.2f} – {max(ratios):.2f}"
    print(
        f"| memmap loop | {statistics.median(b for _, b in pairs):.0f} | {statistics.median(ratios):.2f} | {spread} |"
    )


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default=None, help="folder of photographs")
    parser.add_argument("--config", default=None, help="recipe whose model is timed; default: the packaged VAE")
    parser.add_argument("--size", type=PositiveInt, default=256, help="side of the images in pixels")
    parser.add_argument("--count", type=PositiveInt, default=192, help="images")
    parser.add_argument("--batch", type=PositiveInt, default=8)
    parser.add_argument("--workers", type=int, default=2, help="processes or threads that read images, on either side")
    parser.add_argument("--repeats", type=PositiveInt, default=3)
    parser.add_argument("--device", default=None, help="cuda or cpu; default: a GPU if there is one")
    parser.add_argument("--ray", type=lambda text: text == "true", default=False, help="true: also through Ray")
    parser.add_argument(
        "--memory_rows",
        type=PositiveInt,
        default=None,
        help="instead, encode this many synthetic images and print the memory",
    )
    parser.add_argument(
        "--reader_rows", type=PositiveInt, default=None, help="instead, time reading this many synthetic latents"
    )
    parser.add_argument(
        "--shards",
        type=PositiveInt,
        default=None,
        help="instead, time a list of this many shards",
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.memory_rows is not None:
            watch_memory(arguments.memory_rows, Path(scratch))
        elif arguments.reader_rows is not None:
            compare_readers(arguments.reader_rows, arguments.batch, arguments.repeats, Path(scratch))
        elif arguments.shards is not None:
            time_shards(arguments.shards, Path(scratch))
        elif arguments.images is None:
            parser.error("give --images FOLDER, --memory_rows N, --reader_rows N or --shards N")
        elif arguments.ray and arguments.count < 4 * SHARD_ROWS * arguments.workers:
            least = 4 * SHARD_ROWS * arguments.workers
            parser.error(f"--ray needs a count of {least} or more, 4 shards for each worker")
        else:
            compare(arguments, Path(scratch))


if __name__ == "__main__":
    sys.exit(exit_code("benchmark_encode", main))
