"""`sdvae encode`: a data set of images -> a data set of latents.

    claim a shard -> read, decode, resize (threads) -> batches of one size -> encoder -> rows -> writer (a thread)

All stages work at once, and the next shard is begun while the last one is written. Processes share nothing but the
folder: each takes any shard that is neither done nor taken (`LatentFolder.claim`), so there may be any number of them,
on any number of machines, and each may die at any time. What a shard holds depends on none of that: batches are made
within a shard, in the order of its rows.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from sdvae.data import ImageError, cover, open_source, open_stream, read_image
from sdvae.errors import InputError
from sdvae.io import utf8
from sdvae.latents.buckets import Placement, Size, bucket_sizes, place
from sdvae.latents.config import EncodeConfig
from sdvae.latents.encoder import Encoded, MomentEncoder, choose_device, choose_precision, encoder_sha256
from sdvae.latents.rows import LatentRow, posterior_values, row_bytes, table_of, to_bytes
from sdvae.latents.shards import RangeShards, Row, Shards, StreamShards, raise_if_passing, rows_per_shard
from sdvae.latents.store import LatentFolder
from sdvae.model import AutoencoderKL, DiagonalGaussian
from sdvae.noise import sample_seed
from sdvae.runtime import DTYPES
from sdvae.statistics import LatentMoments
from sdvae.weights import load_vae

logger = logging.getLogger(__name__)

BATCHES_IN_FLIGHT = 2  # launched on the device and not yet read back


@dataclass(frozen=True)
class Pixels:
    """An image as the encoder gets it, and where it was cut out."""

    pixels: np.ndarray  # (H, W, C) uint8
    sha256: str  # of the file
    original_size: Size
    placement: Placement


@dataclass
class Job:
    """A shard that this process encodes."""

    shard: int
    lock: FileLock
    moments: LatentMoments
    rows: list[tuple[LatentRow, Row]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)


class Encoding:
    """One process's part in encoding a data set.

    Raises: InputError when VAE, source or folder do not fit the options, before anything is written.
    """

    def __init__(self, config: EncodeConfig):
        self.config = config
        # in the file's dtype, of which the fingerprint is made
        vae = load_vae(config.vae, subfolder=config.subfolder, config=config.vae_config, dtype="file")
        self.sizes = bucket_sizes(config, vae.spatial_compression_ratio)
        self.device = choose_device(config.device)
        self.precision = choose_precision(config.precision, self.device)
        self.channels = vae.config.in_channels
        self.min_side = max(1, config.resolution // 2) if config.min_side is None else config.min_side
        self.latent_channels = vae.config.latent_channels
        self.row_bytes = row_bytes(self.sizes, vae.spatial_compression_ratio, self.latent_channels, config)
        self.shards = self._open_source()
        self.vae_config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
        self.fingerprint = self._fingerprint(vae)
        self.encoder = MomentEncoder(vae, self.device, self.precision, config.mirror)
        self.folder = LatentFolder(config.output)
        self._num_skipped = 0
        self._held: dict[int, Job] = {}  # shards whose lock this process has

    def begin(self) -> None:
        self.folder.begin(self.fingerprint, utf8(self.config.source), self.vae_config)

    def run(self) -> None:
        """Encode all shards that nobody else encodes, and finish the data set if nothing is left.

        Raises: OSError when the disk is full. What is done stays; the same command goes on.
        """
        is_main = os.environ.get("RANK", "0") == "0"
        done = self._rows_done()
        bar = tqdm(total=self.shards.total, initial=done, unit=" images", disable=not is_main, smoothing=0.05)
        with bar, ThreadPoolExecutor(self.config.num_workers) as decoders, ThreadPoolExecutor(1) as writer:
            written: deque[Future[None]] = deque()
            try:
                for job in self._encoded(decoders, bar):
                    written.append(writer.submit(self._write, job))
                    while len(written) > 1 or (written and written[0].done()):
                        written.popleft().result()
                while written:
                    written.popleft().result()
            finally:
                decoders.shutdown(cancel_futures=True)
                writer.shutdown()
                for job in self._held.values():
                    job.lock.release()
        self._finish(is_main)

    def decode(self, row: Row) -> Pixels:
        """Raises: ImageError when the image cannot be used."""
        data = row.read()
        image = read_image(data, channels=self.channels, background=self.config.background, min_side=self.min_side)
        size = (image.height, image.width)
        placement = place(size, self.sizes)
        height, width = placement.target_size
        pixels = np.asarray(cover(image, width, height))
        pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
        return Pixels(pixels, hashlib.sha256(data).hexdigest(), size, placement)

    @torch.inference_mode()
    def latents_of(self, encoded: Encoded, indices: list[int]) -> tuple[list[dict[str, bytes] | None], Tensor]:
        """The stored values of each image of a batch, or None for what is finite in no precision; and the moments.

        Returns: the columns of each image, and (B, 2·latent_channels, h, w) fp32, of the images themselves.
        """
        moments = encoded.moments()  # (V, B, 2C, h, w)
        values: list[dict[str, bytes] | None] = []
        for i, index in enumerate(indices):
            columns = self._columns(moments[:, i], index)
            if columns is None:
                moments[:, i] = self.encoder.again(encoded.pixels[i : i + 1])[:, 0]
                columns = self._columns(moments[:, i], index)
            values.append(columns)
        return values, moments[0]

    def _columns(self, moments: Tensor, index: int) -> dict[str, bytes] | None:
        """What is stored of an image, or None where it is not finite as it is stored.

        Args: moments: (V, 2·latent_channels, h, w), of the image and its mirror image.
        """
        dtype = DTYPES[self.config.dtype]
        columns: dict[str, Tensor] = {}
        for view, suffix in zip(moments, ("", "_mirrored"), strict=False):
            posterior = DiagonalGaussian(view[None])
            if self.config.store == "moments":
                columns |= posterior_values(posterior, dtype, suffix)
            else:
                seed = sample_seed(self.config.seed, 0, index, f"latents{suffix}")
                columns[f"sample{suffix}"] = posterior.sample(torch.Generator().manual_seed(seed)).to(dtype)
        if not all(values.isfinite().all() for values in columns.values()):
            return None
        return {name: to_bytes(values) for name, values in columns.items()}

    def _encoded(self, decoders: ThreadPoolExecutor, bar: tqdm) -> Iterator[Job]:
        """Shards as they are encoded."""
        in_flight: deque[tuple[Job, list[tuple[Row, Pixels]], Encoded] | Job] = deque()

        def collect(down_to: int) -> Iterator[Job]:
            while sum(isinstance(entry, tuple) for entry in in_flight) > down_to or (
                in_flight and isinstance(in_flight[0], Job)
            ):
                entry = in_flight.popleft()
                if isinstance(entry, Job):
                    yield entry
                else:
                    self._collect(*entry, bar)

        for entry in self._batches(decoders, bar):
            if isinstance(entry, Job):
                in_flight.append(entry)
            else:
                job, batch = entry
                in_flight.append((job, batch, self.encoder.launch([decoded.pixels for _, decoded in batch])))
            depth = BATCHES_IN_FLIGHT - 1 if self.device.type == "cuda" else 0
            yield from collect(down_to=depth)
        yield from collect(down_to=0)

    def _collect(self, job: Job, batch: list[tuple[Row, Pixels]], encoded: Encoded, bar: tqdm) -> None:
        values, moments = self.latents_of(encoded, [row.index for row, _ in batch])
        kept = [i for i, value in enumerate(values) if value is not None]
        job.moments.update(DiagonalGaussian(moments[kept]))
        self._count(bar, len(kept), skipped=len(batch) - len(kept))
        for (row, decoded), value in zip(batch, values, strict=True):
            if value is None:
                job.skipped.append(
                    _skipped(row, f"its latents are not finite as {self.config.dtype}, computed in fp32 either")
                )
                continue
            latents = LatentRow(
                index=row.index,
                name=row.name,
                sha256=decoded.sha256,
                shape=(self.latent_channels, moments.shape[2], moments.shape[3]),
                original_size=decoded.original_size,
                crop_top_left=decoded.placement.crop_top_left,
                target_size=decoded.placement.target_size,
                values=value,
            )
            job.rows.append((latents, replace(row, read=bytes)))  # a stream's row holds its file

    def _batches(self, decoders: ThreadPoolExecutor, bar: tqdm) -> Iterator[tuple[Job, list[tuple[Row, Pixels]]] | Job]:
        """Batches of images of one size and shard, full ones as they come and the rest at the shard's end; then the
        shard."""
        waiting: dict[Size, list[tuple[Row, Pixels]]] = defaultdict(list)
        for job, row, future in self._ahead(self._tasks(decoders)):
            if row is None or future is None:
                for size in sorted(waiting):
                    yield job, waiting[size]
                waiting.clear()
                yield job
                continue
            try:
                decoded = future.result()
            except ImageError as error:
                raise_if_passing(error)
                job.skipped.append(_skipped(row, str(error)))
                self._count(bar, 0, skipped=1)
                continue
            batch = waiting[decoded.placement.target_size]
            batch.append((row, decoded))
            if len(batch) == self.config.batch_size:
                yield job, waiting.pop(decoded.placement.target_size)

    def _tasks(self, decoders: ThreadPoolExecutor) -> Iterator[tuple[Job, Row | None, Future[Pixels] | None]]:
        """The rows of every shard that can be claimed, each handed to a decoder, and None after a shard's last."""
        count = len(self.shards)
        first = int(os.environ.get("RANK", "0")) * count // int(os.environ.get("WORLD_SIZE", "1"))
        for shard in [*range(first, count), *range(first)]:
            lock = self.folder.claim(shard)
            if lock is None:
                continue
            job = self._held[shard] = Job(shard, lock, LatentMoments(self.latent_channels))
            for row in self.shards.rows(shard):
                yield job, row, decoders.submit(self.decode, row)
            yield job, None, None

    def _ahead(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """The same, with enough of them taken from the iterator ahead to keep the decoders busy."""
        window: deque[Any] = deque()
        for task in tasks:
            window.append(task)
            if len(window) > self.config.batch_size + 2 * self.config.num_workers:
                yield window.popleft()
        yield from window

    def _write(self, job: Job) -> None:
        rows = sorted(job.rows, key=lambda pair: pair[0].index)
        others = self.shards.columns([row for _, row in rows])
        table = table_of([latents for latents, _ in rows], others, self.shards.features, self.config)
        skipped = sorted(job.skipped, key=lambda line: line["index"])
        self.folder.write_shard(job.shard, table, self.row_bytes, job.moments, skipped)
        job.lock.release()
        del self._held[job.shard]

    def _count(self, bar: tqdm, encoded: int, skipped: int) -> None:
        bar.update(encoded + skipped)
        if skipped:
            self._num_skipped += skipped
            bar.set_postfix(skipped=self._num_skipped, refresh=False)

    def _finish(self, is_main: bool) -> None:
        if self.folder.finish():
            manifest = self.folder.manifest
            if is_main:
                skipped = f", {manifest['skipped']} skipped (see skipped.jsonl)" if manifest["skipped"] else ""
                factors = manifest["statistics"]
                logger.info("%s: %d rows%s", self.config.output, manifest["rows"], skipped)
                logger.info("scaling_factor %s, shift_factor %s", factors["scaling_factor"], factors["shift_factor"])
        elif is_main:
            left = sum(self.folder.record(shard) is None for shard in range(len(self.shards)))
            logger.info("%d of %d shards are still being encoded by other processes", left, len(self.shards))

    def _rows_done(self) -> int:
        records = [self.folder.record(shard) for shard in range(len(self.shards))]
        return sum(record["rows"] + record["skipped"] for record in records if record is not None)

    def _open_source(self) -> Shards:
        config = self.config
        source_folder, output = Path(config.source).expanduser().resolve(), Path(config.output).expanduser().resolve()
        if source_folder.is_dir() and (output == source_folder or source_folder in output.parents):
            raise InputError(f"got output {config.output} inside the source {config.source}; choose another folder")
        arguments: dict[str, Any] = {"split": config.split, "image_column": config.image_column}
        if config.streaming:
            if config.shard_rows is not None:
                raise InputError("got shard_rows with streaming; a stream is divided by its files; leave one out")
            return StreamShards(open_stream(config.source, **arguments), config.columns, config.source)
        source = open_source(config.source, **arguments)
        rows = config.shard_rows or rows_per_shard(len(source), self.row_bytes)
        return RangeShards(source, config.columns, rows)

    def _fingerprint(self, vae: AutoencoderKL) -> dict[str, Any]:
        """All that decides what the rows are, but for rounding: batch size and number of threads are left out."""
        config = self.config
        shape = {key: self.vae_config[key] for key in ("norm_num_groups", "act_fn")}  # the rest, the weights tell
        return {
            "vae": {"encoder_sha256": encoder_sha256(vae), **shape, "precision": self.precision},
            "stored": {
                "what": config.store,
                "dtype": config.dtype,
                "mirror": config.mirror,
                **({"seed": config.seed} if config.store == "sample" else {}),
            },
            "images": {
                "sizes": [list(size) for size in self.sizes],
                "background": list(config.background),
                "min_side": self.min_side,
            },
            "source": {"split": config.split, "image_column": config.image_column, **self.shards.identity()},
            "shards": len(self.shards),
        }


def encode(config: EncodeConfig) -> LatentFolder:
    """Encode a data set, go on with one, or verify one, as the options say.

    Raises:
        InputError: for bad options, another data set in the folder, or what a verification found.
        OSError: when the disk does not take a shard. What is done stays.
    """
    encoding = Encoding(config)
    rereading = config.verify or config.repair
    if rereading:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("got verify or repair in several processes; need one; start it without a launcher")
        encoding.folder.open()  # there must be something to reread
    encoding.begin()
    if rereading:
        from sdvae.latents.verify import verify

        verify(encoding, repair=config.repair)
        if not config.repair:
            return encoding.folder
    if encoding.folder.is_complete:
        logger.info("%s is complete: %d rows", config.output, encoding.folder.manifest["rows"])
    else:
        encoding.run()
    return encoding.folder


def _skipped(row: Row, reason: str) -> dict[str, Any]:
    return {"index": row.index, "name": utf8(row.name), "reason": reason}
