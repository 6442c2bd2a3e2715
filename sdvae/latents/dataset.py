"""A latent data set for training a diffusion model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from sdvae.data import SampleKey
from sdvae.errors import InputError
from sdvae.io import changed_fields
from sdvae.latents.folder import LatentFolder
from sdvae.latents.reader import WINDOW, Reader, RowGroup
from sdvae.latents.rows import from_bytes
from sdvae.latents.scaling import (
    LatentScaling,
    batch_norm_scaling,
    channel_scaling,
    config_scaling,
    identity_scaling,
)
from sdvae.model import DiagonalGaussian
from sdvae.model.config import LOGVAR_RANGE
from sdvae.model.patches import patched
from sdvae.noise import sample_seeds

logger = logging.getLogger(__name__)

NUMBERS = ("index", "mirrored", "original_size", "crop_top_left", "target_size")


class LatentDataset(Dataset[dict[str, Any]]):
    """The rows of a folder that `sdvae encode` wrote: `dataset[i]`, or batches by `loader`.

    A row is a dict with `latents` (C, h, w) fp32, scaled; `index`, `name` and `sha256` of the image; `mirrored`;
    `original_size`, `crop_top_left` and `target_size` (as (height, width) and (top, left), for SDXL's conditioning);
    `exif_orientation`; and the columns that were copied from the source.

    Args:
        folder: the folder of a finished data set.
        scaling: how `latents` is scaled. «vae»: by the factors in the VAE's config, as pipelines do; «measured»: by
            the factors that were measured on these latents; «channels»: each channel to mean 0 and standard deviation
            1; «none»: not at all. The first two give FLUX.2's latents as patches, (4·C, h/2, w/2), by its batch norm or
            by the mean and variance measured here; the last two leave its latents (C, h, w).
        sample: draw a new z from the posterior each time (Kingma & Welling 2014, section 2.4); False takes the
            posterior's mode. This has no effect if the data set stores samples instead of moments. If it stores means
            alone, `latents` is the mean, and True gives a warning.
        mirror: probability of the mirror image; by default 1/2 if mirror images were encoded, else 0.
        seed: the seed for samples, mirror images and order.

    Attributes:
        has_mirrors: whether the mirror image of each image was encoded too.
        scaling: the `LatentScaling` in use; its `denormalize` turns scaled latents into those that the VAE decodes.

    Raises:
        InputError: when the folder is not a finished data set, or when `mirror` is above 0 and no mirror images were
            encoded.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        scaling: Literal["vae", "measured", "channels", "none"] = "vae",
        sample: bool = True,
        mirror: float | None = None,
        seed: int = 0,
    ):
        self._folder = LatentFolder(folder)
        self._folder.open(finished=True)
        manifest = self._folder.manifest
        stored = manifest["fingerprint"]["stored"]
        self.has_mirrors: bool = stored["mirror"]
        self.mirror = (0.5 if self.has_mirrors else 0.0) if mirror is None else mirror
        if not 0 <= self.mirror <= 1 or (self.mirror > 0 and not self.has_mirrors):
            have = "has mirror images" if self.has_mirrors else "has no mirror images; encode with --mirror true"
            raise InputError(f"got mirror={mirror}; need a probability, and {folder} {have}")
        self.scaling = _scaling(scaling, self._folder)
        self.sample = sample
        self.seed = seed
        self._column = "sample" if stored["what"] == "sample" else "mean"
        self._has_variance = stored["what"] == "moments"
        if sample and stored["what"] == "mean":
            logger.warning("%s stores means without variances, so latents are not sampled: sample=False", folder)
        self._groups = _row_groups(self._folder.shards)
        self._starts = np.array([group[2] for group in self._groups], dtype=np.int64)
        self._reader = Reader(self._folder)

    def __len__(self) -> int:
        return self._folder.manifest["rows"]

    def __getitem__(self, key: int | SampleKey) -> dict[str, Any]:
        """A row.

        Args:
            key: the row's place in the data set, or a `SampleKey`. With a place, noise and mirroring come from torch's
                default generator; with a `SampleKey`, they follow from the key and the seed.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[int | SampleKey]) -> list[dict[str, Any]]:
        """Several rows, which a DataLoader asks for as a batch: the same, to the bit, as one by one, in less time.

        The latents of rows of one size are views of one tensor.

        Args:
            keys: as for `__getitem__`.
        """
        places = [key.index if isinstance(key, SampleKey) else key for key in keys]
        for place in places:
            if not -len(self) <= place < len(self):
                raise IndexError(f"row {place} of {len(self)}")
        found = list(self._find(np.array(places, np.int64) % len(self)))
        of_shape: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (group, offset) in enumerate(found):
            of_shape[group.shapes[offset]].append(number)
        # one tensor for each shape: in the end that of the latents, and until then that of their noise
        drawn = {shape: torch.empty(len(numbers), *shape) for shape, numbers in of_shape.items()}
        latents: list[Any] = [None] * len(keys)
        for shape, numbers in of_shape.items():
            for number, own in zip(numbers, drawn[shape].unbind(), strict=True):
                latents[number] = own

        keyed = [key for key in keys if isinstance(key, SampleKey)]
        seeds = iter(sample_seeds(self.seed, [key.epoch for key in keyed], [key.index for key in keyed], "latents"))
        generator = torch.Generator()
        suffixes = []
        for key, own in zip(keys, latents, strict=True):
            random = generator.manual_seed(next(seeds)) if isinstance(key, SampleKey) else None
            mirrored = self.mirror > 0 and float(torch.rand((), generator=random)) < self.mirror
            suffixes.append("_mirrored" if mirrored else "")
            if self._has_variance and self.sample:
                own.normal_(generator=random)

        for shape, numbers in of_shape.items():
            z = self._finished(drawn[shape], [(*found[number], suffixes[number]) for number in numbers])
            for number, own in zip(numbers, z.unbind(), strict=True):
                latents[number] = own
        return [
            {"latents": own, "mirrored": suffix != "", **group.row(offset)}
            for own, suffix, (group, offset) in zip(latents, suffixes, found, strict=True)
        ]

    def _finished(self, z: Tensor, rows: Sequence[tuple[RowGroup, int, str]]) -> Tensor:
        """Scaled latents from noise, which they overwrite. The arithmetic is that of `DiagonalGaussian.sample`.

        Args:
            z: (N, C, h, w) fp32, noise for as many rows of one shape. It is used only to sample a posterior.
            rows: for each, its row group, its place in it, and the end of its columns' names.

        Returns:
            (N, C, h, w); with patches (N, C·p·q, h/p, w/q).
        """

        def stored(column: str) -> Tensor:
            data = np.concatenate([group.value(column + suffix, offset) for group, offset, suffix in rows])
            return torch.from_numpy(data).view(self._folder.dtype).float().reshape(z.shape)

        if self._has_variance and self.sample:
            std = stored("logvar").clamp_(*LOGVAR_RANGE).mul_(0.5).exp_()
            z.mul_(std).add_(stored("mean"))
        else:
            z.copy_(stored(self._column))
        return patched(z, self.scaling.patch_size).sub_(self.scaling.shift).mul_(self.scaling.scale)

    def loader(
        self,
        batch_size: int,
        *,
        epoch: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        num_workers: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> LatentLoader:
        """A loader for the batches of one epoch of this process. All latents of a batch have the same size.

        Its `state_dict` and `load_state_dict` continue an interrupted epoch.

        Do not pass it to `Accelerator.prepare`, which would divide the batches among the processes a second time.

        Args:
            batch_size: rows in a batch of this process.
            epoch: the number of the epoch, from 0. `LatentBatches` describes all these arguments in full.
            shuffle: whether the order is random.
            drop_last: whether only full batches are given.
            num_workers: the number of processes that read.
            rank: the rank of this process; by default the launcher's.
            world_size: the number of processes; by default the launcher's.
        """
        batches = LatentBatches(
            self,
            batch_size,
            epoch=epoch,
            shuffle=shuffle,
            drop_last=drop_last,
            rank=rank,
            world_size=world_size,
        )
        return LatentLoader(self, batches, num_workers)

    @property
    def identity(self) -> dict[str, Any]:
        """What determines the order of the rows and the values drawn from them, as JSON can hold it."""
        files = [(shard["rows"], shard["sha256"]) for shard in self._folder.shards]
        return {
            "data": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
            "rows": len(self),
            "seed": self.seed,
            "sample": self.sample,
            "mirror": self.mirror,
            "shift": self.scaling.shift.flatten().tolist(),
            "scale": self.scaling.scale.flatten().tolist(),
        }

    @property
    def row_groups(self) -> list[tuple[int, int]]:
        """(first row, number of rows) of each group that is read at once, in the order of the rows."""
        return [(first, rows) for _, _, first, rows in self._groups]

    @property
    def where(self) -> str:
        """The folder or URL."""
        return str(self._folder.storage)

    def skipped(self) -> dict[str, str]:
        """The name of each image that has no row, as `sdvae.io.utf8` writes it, and the reason."""
        lines = sum(self._folder.skipped_lines().values(), [])
        return {line["name"]: line["reason"] for line in lines}

    def names(self) -> Iterator[str]:
        """The name of each row's image, as `sdvae.io.utf8` writes it, in the order of the rows."""
        return self._reader.names(sorted({group[0] for group in self._groups}))

    def origin(self, place: int) -> tuple[str, tuple[int, int]]:
        """The SHA-256 of the file of a row's image, and height and width of the crop that was encoded, in pixels."""
        ((group, offset),) = self._find(np.array([place]))
        height, width = group.pairs["target_size"][offset].tolist()
        return group.items[offset]["sha256"], (height, width)

    def posterior(self, place: int, *, mirrored: bool = False) -> DiagonalGaussian:
        """The posterior in a row, over unscaled latents (1, C, h, w) in fp32; without variance if only means are kept.

        Args:
            place: the row's place in the data set.
            mirrored: take that of the mirror image.
        """
        ((group, offset),) = self._find(np.array([place]))
        mean, logvar = (
            from_bytes(
                group.value(column + "_mirrored" * mirrored, offset).tobytes(), self._folder.dtype, group.shapes[offset]
            )
            for column in ("mean", "logvar" if self._has_variance else "mean")
        )
        if not self._has_variance:
            return DiagonalGaussian.point(mean[None])
        return DiagonalGaussian(torch.cat([mean, logvar])[None])

    def size_numbers(self) -> np.ndarray:
        """(N,) int: rows with the same number have images, and latents, of the same size."""
        if len(self._folder.manifest["fingerprint"]["images"]["sizes"]) == 1:
            return np.zeros(len(self), dtype=np.int64)
        shards = sorted({group[0] for group in self._groups})
        height, width = self._reader.pairs(shards, "target_size").astype(np.int64).T
        return np.unique(height << 32 | width, return_inverse=True)[1]

    def _find(self, places: np.ndarray) -> Iterator[tuple[RowGroup, int]]:
        """The row group of each row, and the row's place in it."""
        numbers = np.searchsorted(self._starts, places, side="right") - 1
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            shard, group, first, _ = self._groups[number]
            yield self._reader.group(shard, group), place - first


class LatentBatches(Sampler[list[SampleKey]]):
    """The batches of one epoch, as lists of keys: a `batch_sampler` for a DataLoader.

    All latents of a batch have the same size. The order follows from (seed, epoch): row groups come in a random order,
    and the rows of `WINDOW` successive groups are shuffled, so that the disk is read nearly in sequence. Rows that do
    not fill a batch within a window are left to the next one. Batch m goes to process
    (m - done) mod world_size.

    Args:
        dataset: the same in all processes.
        batch_size: rows in a batch of each process.
        epoch: the number of the epoch, from 0.
        shuffle: False keeps the order of the rows, except that rows of one size are brought together within a window.
        drop_last: all processes get the same number of full batches; the few rows that are left out differ from epoch
            to epoch. False gives every row once; then the last batch of each size may be smaller, and some processes
            may get one batch more than others.
        rank: the rank of this process; by default the environment variable RANK, which launchers set.
        world_size: the number of processes; by default the environment variable WORLD_SIZE.
        done: batches of all processes together to leave out at the beginning, to continue an epoch.

    Raises:
        InputError: for numbers that are out of range, or when the rows do not fill a batch for each process.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        batch_size: int,
        *,
        epoch: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        done: int = 0,
    ):
        self.rank = int(os.environ.get("RANK", "0")) if rank is None else rank
        self.world_size = int(os.environ.get("WORLD_SIZE", "1")) if world_size is None else world_size
        if batch_size < 1 or not 0 <= self.rank < self.world_size or done < 0 or epoch < 0:
            raise InputError(
                f"batches of {batch_size}, rank {self.rank} of {self.world_size}, epoch {epoch}, done {done};"
                " need batch_size >= 1, 0 <= rank < world_size, and no negative counts"
            )
        self._groups = dataset.row_groups
        self._size_of = dataset.size_numbers()
        self.batch_size = batch_size
        self.seed = dataset.seed
        self.epoch = epoch
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.done = done
        if drop_last and len(self) == 0 and done == 0:
            raise InputError(
                f"{len(dataset)} rows make less than {self.world_size} batches of {batch_size}; need more rows, a"
                " smaller batch_size, or drop_last=False"
            )

    def __len__(self) -> int:
        counts = np.bincount(self._size_of)
        if self.drop_last:
            return max(0, int((counts // self.batch_size).sum()) - self.done) // self.world_size
        total = int((-(-counts // self.batch_size)).sum())
        return len(range(self.done + self.rank, total, self.world_size))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        mine = islice(self._all(), self.done + self.rank, None, self.world_size)
        for rows in islice(mine, len(self)):
            yield [SampleKey(self.epoch, int(row)) for row in rows]

    def _all(self) -> Iterator[np.ndarray]:
        """The batches of all processes, in order."""
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self.seed, self.epoch])))
        order = generator.permutation(len(self._groups)) if self.shuffle else np.arange(len(self._groups))
        left: dict[int, np.ndarray] = {}
        for start in range(0, len(order), WINDOW):
            groups = [self._groups[number] for number in order[start : start + WINDOW]]
            rows = np.concatenate([np.arange(first, first + count) for first, count in groups])
            if self.shuffle:
                generator.shuffle(rows)
            batches = []
            for size in np.unique(self._size_of[rows]):
                of_size = np.concatenate([left.pop(size, rows[:0]), rows[self._size_of[rows] == size]])
                full = len(of_size) // self.batch_size * self.batch_size
                batches += list(of_size[:full].reshape(-1, self.batch_size))
                left[size] = of_size[full:]
            yield from self._mixed(batches, generator)
        if not self.drop_last:
            yield from self._mixed([rows for _, rows in sorted(left.items()) if len(rows)], generator)

    def _mixed(self, batches: list[np.ndarray], generator: np.random.Generator) -> Iterator[np.ndarray]:
        order = generator.permutation(len(batches)) if self.shuffle else range(len(batches))
        for number in order:
            yield batches[number]


class LatentLoader(DataLoader[dict[str, Any]]):
    """The batches of one epoch of one process, which can be continued in its middle.

    `state_dict` and `load_state_dict` follow the convention of torchdata's StatefulDataLoader: the state is that after
    the last batch that the loop received, whatever the workers have read ahead, and after loading it the next iteration
    gives the remaining batches. They are the same to the bit, also on another number of processes. For that, all
    processes must have received the same number of batches; the state of any of them then serves for all.

    Args:
        dataset: the data set.
        batches: the batches of this process.
        num_workers: the number of processes that read.
    """

    VERSION = 1  # of the order of rows and of their noise: a state of another version does not give the same batches

    def __init__(self, dataset: LatentDataset, batches: LatentBatches, num_workers: int):
        super().__init__(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate_latents)
        self._batches = batches
        self._identity = dataset.identity
        self._received = 0
        self._loaded = False  # whether the next iteration continues from a state

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        if not self._loaded:  # a second iteration begins the epoch anew
            self._batches.done = 0
        self._received, self._loaded = 0, False
        for batch in super().__iter__():
            self._received += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch received, which JSON can hold."""
        batches = self._batches
        return {
            "version": self.VERSION,
            **self._identity,
            "batch_size": batches.batch_size,
            "shuffle": batches.shuffle,
            "drop_last": batches.drop_last,
            "epoch": batches.epoch,
            "done": batches.done + self._received * batches.world_size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue after the batches that a state counts: the next iteration gives the others of its epoch.

        Raises:
            InputError: when the data set or an option has changed, so that the batches would be others.
        """
        place = frozenset({"epoch", "done"})
        changes = changed_fields(state, self.state_dict(), place)
        if changes or not place <= state.keys():
            raise InputError(
                f"got the state of an epoch with other batches ({'; '.join(changes) or 'no epoch or place'}); need the "
                "same data set and options; begin the epoch anew"
            )
        self._batches.epoch, self._batches.done = state["epoch"], state["done"]
        self._received, self._loaded = 0, True


def collate_latents(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack rows: latents to (B, C, h, w), numbers and sizes to tensors; everything else becomes a list."""
    batch: dict[str, Any] = {"latents": torch.stack([row["latents"] for row in rows])}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name in NUMBERS:
            batch[name] = torch.tensor(values)
        elif name != "latents":
            is_number = all(isinstance(value, (int, float)) for value in values)
            batch[name] = default_collate(values) if is_number else values
    return batch


def _scaling(kind: str, folder: LatentFolder) -> LatentScaling:
    statistics = folder.manifest["statistics"]
    if kind == "vae":
        return folder.scaling
    if kind == "measured":
        if "patches_mean" in statistics:
            eps = folder.manifest["vae_config"]["batch_norm_eps"]
            patches = statistics["patches_mean"], statistics["patches_var"]
            return batch_norm_scaling(*patches, eps, folder.scaling.patch_size)
        return config_scaling({key: statistics[key] for key in ("scaling_factor", "shift_factor")})
    if kind == "channels":
        return channel_scaling(statistics)
    if kind == "none":
        return identity_scaling()
    raise InputError(f"got scaling={kind!r}; need vae, measured, channels or none")


def _row_groups(shards: Sequence[dict[str, Any]]) -> list[tuple[int, int, int, int]]:
    """(shard, row group, first row, rows) of every row group."""
    groups, first = [], 0
    for shard, entry in enumerate(shards):
        step = entry["row_group_rows"]
        for group, start in enumerate(range(0, entry["rows"], step)):
            rows = min(step, entry["rows"] - start)
            groups.append((shard, group, first + start, rows))
        first += entry["rows"]
    return groups
