"""Encoding the shards of a data set in one process, with all stages running at the same time.

    claim a shard -> read, decode, resize (threads) -> batches of one size -> encoder -> rows -> write (a thread)

The images of the next shard are decoded while the last one is encoded and written. Processes share nothing except the
folder or bucket (`sdvae/latents/writer.py` says how they divide the shards), so there may be any number of processes on
any number of machines, and each may die at any time. What a shard holds does not depend on that: batches are made
within a shard, in the order of its images.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tqdm import tqdm

from sdvae.data import ImageError
from sdvae.io import utf8
from sdvae.latents.buckets import Size
from sdvae.latents.encoder import PendingMoments
from sdvae.latents.rows import LatentRow, table_of
from sdvae.latents.shards import SourceImage, raise_if_passing
from sdvae.latents.summary import is_of_student
from sdvae.latents.task import DecodedImage, EncodeTask
from sdvae.latents.writer import Claim, LatentWriter
from sdvae.statistics import LatentMoments

logger = logging.getLogger(__name__)


@dataclass
class ClaimedShard:
    """A shard of one resolution that this process has claimed and encodes.

    Attributes:
        place: the place of the resolution among those of the task.
        pending: batches that were started and not yet collected.
        is_read: all of its images are in a batch or skipped.
    """

    place: int
    number: int
    claim: Claim
    moments: LatentMoments
    rows: list[tuple[LatentRow, SourceImage]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)
    pending: int = 0
    is_read: bool = False

    def skip(self, image: SourceImage, reason: str) -> None:
        self.skipped.append({"index": image.index, "name": utf8(image.name), "reason": reason})


class Turn(NamedTuple):
    """An image that a thread decodes, for a shard of each resolution. If `image` is None, it stands for their end."""

    shards: list[ClaimedShard]
    image: SourceImage | None = None
    decoded: Future[list[DecodedImage | ImageError]] | None = None


class Batch(NamedTuple):
    """Images whose encoding was started."""

    shard: ClaimedShard
    images: list[tuple[SourceImage, DecodedImage]]
    moments: PendingMoments


class Pipeline:
    """One process's part in encoding a data set: all of it with `run`, or shards decoded elsewhere with `encode`.

    Args:
        task: what to encode.
        batches_in_flight: the number of batches that are started before the first of them is read back. By default 2
            on a GPU, so that it always has work, else 1.
        may_double: whether another process may encode the same shard on purpose; otherwise that is warned of.
    """

    def __init__(self, task: EncodeTask, batches_in_flight: int | None = None, may_double: bool = False):
        self.task = task
        self._is_main = os.environ.get("RANK", "0") == "0"
        self._batches_in_flight = batches_in_flight or (2 if task.device.type == "cuda" else 1)
        # by the resolution's place and the crop's size, until a batch is full
        self._waiting: dict[tuple[int, Size], list[tuple[SourceImage, DecodedImage]]] = defaultdict(list)
        self._in_flight: deque[Batch] = deque()
        self._written: deque[Future[None]] = deque()
        self._held: dict[
            tuple[int, int], ClaimedShard
        ] = {}  # place, number -> the shards that this process has claimed
        self._num_skipped = 0
        self._has_warned = may_double
        self._bar = tqdm(disable=True)

    def run(self) -> None:
        """Encode all shards that no other process encodes, and finish the data sets of which nothing is left.

        Raises:
            OSError: when the disk is full. Finished shards stay, and the same command continues.
        """
        self._bar = tqdm(
            total=self.task.crops_in_all,
            initial=self.task.crops_done(),
            unit=" images",
            disable=not self._is_main,
            smoothing=0.05,
        )
        with self._bar, ThreadPoolExecutor(self.task.config.num_workers) as decoders:
            try:
                self.encode(self._ahead(self._turns(decoders)))
            finally:
                decoders.shutdown(cancel_futures=True)
                for shard in self._held.values():
                    shard.claim.release()
        for target in self.task.targets:
            if not target.folder.is_complete:
                finish(target.folder, is_main=self._is_main)

    def claim(self, number: int) -> list[ClaimedShard]:
        """Take a shard for each resolution for which it is neither done nor left to another process."""
        claimed = []
        for place, target in enumerate(self.task.targets):
            claim = target.folder.claim(number)
            if claim is not None:
                shard = ClaimedShard(place, number, claim, LatentMoments(self.task.patch_channels))
                self._held[place, number] = shard
                claimed.append(shard)
        return claimed

    def encode(self, turns: Iterable[Turn]) -> None:
        """Encode the images of claimed shards, and write each shard when it has ended.

        Args:
            turns: the images of each shard in order, and its end.

        Raises:
            OSError: when a shard cannot be written.
        """
        with ThreadPoolExecutor(1) as self._writer:
            for turn in turns:
                if turn.image is None or turn.decoded is None:
                    self._end(turn.shards)
                else:
                    self._add(turn.shards, turn.image, turn.decoded)
            self._collect(down_to=0)
            while self._written:
                self._written.popleft().result()

    def _turns(self, decoders: ThreadPoolExecutor) -> Iterator[Turn]:
        """Claim shards, give each of their images to a thread, and yield the images and the end of each shard.

        Processes begin at different places, so that they seldom try to claim the same shard.
        """
        count = len(self.task.shards)
        first = int(os.environ.get("RANK", "0")) * count // int(os.environ.get("WORLD_SIZE", "1"))
        for number in [*range(first, count), *range(first)]:
            shards = self.claim(number)
            if not shards:
                continue
            for image in self.task.shards.images(number):
                yield Turn(shards, image, decoders.submit(self.task.reader.decode, image))
            yield Turn(shards)

    def _ahead(self, turns: Iterable[Turn]) -> Iterator[Turn]:
        """The same turns, taken from the iterator early enough that all threads have work."""
        config = self.task.config
        window: deque[Turn] = deque()
        for turn in turns:
            window.append(turn)
            if len(window) > config.batch_size + 2 * config.num_workers:
                yield window.popleft()
        yield from window

    def _add(
        self, shards: list[ClaimedShard], image: SourceImage, future: Future[list[DecodedImage | ImageError]]
    ) -> None:
        """Put an image into the batches of its sizes, and start those that are full."""
        crops: Sequence[DecodedImage | ImageError]
        try:
            crops = future.result()
        except ImageError as error:
            raise_if_passing(error)
            crops = [error] * len(self.task.targets)
        for shard in shards:
            decoded = crops[shard.place]
            if isinstance(decoded, ImageError):
                shard.skip(image, str(decoded))
                self._count(encoded=0, skipped=1)
                continue
            key = shard.place, decoded.placement.target_size
            self._waiting[key].append((image, decoded))
            if len(self._waiting[key]) == self.task.config.batch_size:
                self._launch(shard, self._waiting.pop(key))

    def _end(self, shards: list[ClaimedShard]) -> None:
        """Start the batches that did not become full. The next shard's images are not added to them."""
        at_place = {shard.place: shard for shard in shards}
        for place, size in sorted(self._waiting):
            self._launch(at_place[place], self._waiting[place, size])
        self._waiting.clear()
        for shard in shards:
            shard.is_read = True
            self._write_if_encoded(shard)

    def _launch(self, shard: ClaimedShard, images: list[tuple[SourceImage, DecodedImage]]) -> None:
        moments = self.task.encoder.launch([decoded.pixels for _, decoded in images])
        shard.pending += 1
        self._in_flight.append(Batch(shard, images, moments))
        self._collect(down_to=self._batches_in_flight - 1)

    def _collect(self, down_to: int) -> None:
        """Make rows of the oldest batches, waiting for them, until only `down_to` batches are in flight."""
        while len(self._in_flight) > down_to:
            batch = self._in_flight.popleft()
            self._make_rows(batch)
            batch.shard.pending -= 1
            self._write_if_encoded(batch.shard)

    def _make_rows(self, batch: Batch) -> None:
        shard, config = batch.shard, self.task.config
        values, moments = self.task.stored_values(batch.moments, [image.index for image, _ in batch.images])
        kept = [i for i, value in enumerate(values) if value is not None]
        shard.moments.update(self.task.posterior(moments[kept]).patched(self.task.scaling.patch_size))
        self._count(encoded=len(kept), skipped=len(values) - len(kept))
        for (image, decoded), value in zip(batch.images, values, strict=True):
            if value is None:
                shard.skip(image, f"its latents are not finite as {config.dtype}, even when computed in fp32")
                continue
            row = LatentRow(
                index=image.index,
                name=image.name,
                sha256=decoded.sha256,
                shape=(self.task.latent_channels, moments.shape[2], moments.shape[3]),
                original_size=decoded.original_size,
                crop_top_left=decoded.placement.crop_top_left,
                target_size=decoded.placement.target_size,
                exif_orientation=decoded.exif_orientation,
                values=value,
            )
            shard.rows.append((row, replace(image, read=bytes)))  # an image of a stream holds its file's bytes

    def _write_if_encoded(self, shard: ClaimedShard) -> None:
        if not shard.is_read or shard.pending:
            return
        self._written.append(self._writer.submit(self._write, shard))
        while len(self._written) > 1 or (self._written and self._written[0].done()):
            self._written.popleft().result()  # no more than one shard waits in memory; a full disk is seen early

    def _write(self, shard: ClaimedShard) -> None:
        task, target = self.task, self.task.targets[shard.place]
        rows = sorted(shard.rows, key=lambda pair: pair[0].index)
        others = task.shards.columns([image for _, image in rows])
        table = table_of([row for row, _ in rows], others, task.shards.features, task.config)
        skipped = sorted(shard.skipped, key=lambda line: line["index"])
        is_new = target.folder.write_shard(shard.number, table, target.crops.row_bytes, shard.moments, skipped)
        if not is_new and not self._has_warned:
            self._has_warned = True
            why = "although this one had locked it" if shard.claim.is_locked else "while this one encoded it"
            logger.warning(
                "another process wrote shard %d %s, so shards are encoded twice; give each process its own part, "
                "--part i/n",
                shard.number,
                why,
            )
        shard.claim.release()
        del self._held[shard.place, shard.number]

    def _count(self, encoded: int, skipped: int) -> None:
        self._bar.update(encoded + skipped)
        if skipped:
            self._num_skipped += skipped
            self._bar.set_postfix(skipped=self._num_skipped, refresh=False)


def finish(folder: LatentWriter, *, is_main: bool = True) -> None:
    """Finish the data set if every shard is done, and say how far it is if this is the main process."""
    is_finished = folder.finish()
    if not is_main:
        return
    if is_finished:
        logger.info("%s: %s", folder.storage, folder.counts())
        if not is_of_student(folder.manifest["vae_config"]):
            factors, scaling = folder.manifest["statistics"], folder.scaling
            logger.info("scaling_factor %s, shift_factor %s", factors["scaling_factor"], factors["shift_factor"])
            if scaling.patch_size != (1, 1):
                logger.info(
                    "stored are the encoder's latents, of %d channels; LatentDataset gives those of the diffusion "
                    "model, of %d: %s",
                    *(len(factors["latents_mean"]), len(scaling.shift), scaling.formula),
                )
    else:
        folder.refresh()
        left = sum(not folder.is_done(shard) for shard in range(folder.num_shards))
        logger.info("%d of %d shards are left to other processes", left, folder.num_shards)
