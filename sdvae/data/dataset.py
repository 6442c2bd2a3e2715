"""The data sets of training and evaluation, and how they treat bad images.

Training replaces a bad image by another one, which the seed determines. Evaluation reports it. `BadImages` counts bad
images and ends a run that has too many.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sdvae.data.base import ImageSource
from sdvae.data.crops import center_crop, color_jitter, random_crop, to_tensor
from sdvae.data.images import ImageError, read_image
from sdvae.data.order import SampleKey, ShardedBatches
from sdvae.data.reading import ReadOptions
from sdvae.errors import InputError
from sdvae.io import printable
from sdvae.noise import sample_seed
from sdvae.runtime import keep_freed_memory

MAX_SUBSTITUTES = 32
NO_LABEL = -1  # as `datasets` stores it in splits without labels

logger = logging.getLogger(__name__)


class _LabelledSample(TypedDict, total=False):
    label: int  # where the data set has labels: the class, or NO_LABEL


class _LabelledBatch(TypedDict, total=False):
    label: Tensor  # (B,) int64, where the data set has labels: the class, or NO_LABEL


class Crop(TypedDict, total=False):
    """What is cut out of one image."""

    image: Tensor  # (C, R, R) float32 in [-1, 1]
    moments: Tensor  # (2·C_z, R/f, R/f) float32, where the image is encoded already: its posterior's parameters


class Sample(Crop, _LabelledSample):
    """One image for training."""

    index: int  # the key's, even if the image is a substitute
    epoch: int
    noise_seed: int  # of the posterior's noise, 63 bits
    bad: list[tuple[str, str]]  # (name, reason) of the bad images that were found on the way to this one


class _EncodedBatch(TypedDict, total=False):
    moments: Tensor  # (B, 2·C_z, R/f, R/f) float32, where the images are encoded already


class Batch(_EncodedBatch, _LabelledBatch):
    """Samples of training, stacked."""

    image: Tensor  # (B, C, R, R) float32 in [-1, 1]
    index: Tensor  # (B,) int64
    epoch: Tensor  # (B,) int64
    noise_seed: Tensor  # (B,) int64, not negative
    bad: list[tuple[str, str]]


class EvaluationSample(_LabelledSample):
    """One image for evaluation. If the file cannot be used, `image` is None and `bad` is the reason."""

    image: Tensor | None  # (C, R, R) float32 in [-1, 1]
    index: int  # in the data set
    name: str
    bad: str | None


class EvaluationBatch(_LabelledBatch):
    """The good images of a batch, stacked, and the bad ones. If all are bad, `image` has length 0."""

    image: Tensor  # (N, C, R, R) float32 in [-1, 1]
    index: list[int]  # of those N, in the data set
    name: list[str]  # of those N
    bad: list[tuple[str, str]]  # (name, reason)


class TrainingImages(Dataset[Sample]):
    """Random crops of a source, indexed by `SampleKey`. A sample depends only on its key and the seed.

    Args:
        source: the images.
        resolution: R, the side of the crops, in pixels; where keys ask for several, the largest.
        seed: the seed of crops, jitter, noise and substitutes, 0 .. 2^32 - 1.
        reading: how files are read; images that are too small are bad.
        crop_scale: the crop's side as a fraction of the short side; see `random_crop`.
        flip: probability of a mirror image.
        native_crop: probability that a crop is not resized.
        color_jitter: the `strength` of the function `color_jitter`; 0 turns it off.
        cache_mib: how many MiB of decoded images each worker keeps in memory, for small data sets. An image is never
            removed again, since in a shuffled order each one is equally likely to come next.
        labels: (N,) int64, the class of each image, NO_LABEL for none; see `read_labels`.
        label_dropout: probability that the label is replaced by NO_LABEL.

    Raises:
        InputError: for an empty source, or values that are out of range.
    """

    def __init__(
        self,
        source: ImageSource,
        *,
        resolution: int,
        seed: int,
        reading: ReadOptions = ReadOptions(),
        crop_scale: tuple[float, float] = (0.5, 1.0),
        flip: float = 0.5,
        native_crop: float = 0.0,
        color_jitter: float = 0.0,
        cache_mib: float = 0,
        labels: np.ndarray | None = None,
        label_dropout: float = 0.0,
    ):
        if len(source) == 0:
            raise InputError("the data set has no images; need at least 1")
        if not 0.0 < crop_scale[0] <= crop_scale[1] <= 1.0:
            raise InputError(f"crop_scale is {crop_scale}; need 0 < low <= high <= 1")
        if not 0.0 <= flip <= 1.0:
            raise InputError(f"flip is {flip}; need a probability in [0, 1]")
        self.source = source
        self.resolution = resolution
        self.seed = seed
        self.reading = reading.for_crops(resolution)
        self.crop_scale = crop_scale
        self.flip = flip
        self.native_crop = native_crop
        self.color_jitter = color_jitter
        self.labels = labels
        self.label_dropout = label_dropout
        self._bad: dict[int, str] = {}  # index -> reason, so that no bad image is decoded twice
        self._cache: dict[int, Image.Image] = {}
        self._cache_bytes_left = int(cache_mib * 2**20)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey) -> Sample:
        """The sample of a key.

        Raises:
            InputError: when the image and all its substitutes are bad.
        """
        epoch, index, resolution = key
        image, found, bad = self._good_image(epoch, index)
        generator = np.random.default_rng(sample_seed(self.seed, epoch, index, "augment"))
        sample = Sample(
            **self._crop(image, found, resolution or self.resolution, generator),
            index=index,
            epoch=epoch,
            noise_seed=sample_seed(self.seed, epoch, index, "posterior"),
            bad=bad,
        )
        if self.labels is not None:
            drop = np.random.default_rng(sample_seed(self.seed, epoch, index, "label")).random() < self.label_dropout
            sample["label"] = NO_LABEL if drop else int(self.labels[found])  # the substitute's, if there is one
        return sample

    def _crop(self, image: Image.Image, index: int, resolution: int, generator: np.random.Generator) -> Crop:
        """A random crop of the image at an index."""
        pixels = to_tensor(random_crop(image, resolution, generator, self.crop_scale, self.flip, self.native_crop))
        return Crop(image=color_jitter(pixels, self.color_jitter, generator))

    def _good_image(self, epoch: int, index: int) -> tuple[Image.Image, int, list[tuple[str, str]]]:
        """Find the image, or the first good one of its substitutes.

        Returns:
            The image, its index, and (name, reason) of the bad images before it.
        """
        bad: dict[str, str] = {}
        candidate = index
        for attempt in range(1 + MAX_SUBSTITUTES):
            try:
                return self._decode(candidate), candidate, list(bad.items())
            except ImageError as error:
                bad[self.source.name(candidate)] = str(error)
            candidate = sample_seed(self.seed, epoch, index, f"substitute-{attempt}") % len(self.source)
        last = "; ".join(f"{printable(name)}: {reason}" for name, reason in list(bad.items())[-3:])
        raise InputError(
            f"an image and its {MAX_SUBSTITUTES} substitutes are all bad ({last});"
            " need a data set of mostly good images; clean it"
        )

    def _decode(self, index: int) -> Image.Image:
        if index in self._bad:
            raise ImageError(self._bad[index])
        if index in self._cache:
            return self._cache[index]
        try:
            image = self._read(index)
        except ImageError as error:
            self._bad[index] = str(error)
            raise
        size = image.width * image.height * len(image.getbands())
        if size <= self._cache_bytes_left:
            self._cache_bytes_left -= size
            self._cache[index] = image.copy()  # the original may still refer to the file's bytes
        return image

    def _read(self, index: int) -> Image.Image:
        """Read the image at an index, from which crops are cut.

        Raises:
            ImageError: when it is bad.
        """
        return read_image(self.source.read(index), self.reading)


class EvaluationImages(Dataset[EvaluationSample]):
    """Centre crops of a source, in its order.

    Args:
        source: the images.
        resolution: R, the side of the crops, in pixels.
        reading: how files are read; images that are too small are bad.
        crop: the function that crops an image to R x R.
        labels: (N,) int64, the class of each image, NO_LABEL for none; see `read_labels`.
    """

    def __init__(
        self,
        source: ImageSource,
        resolution: int,
        reading: ReadOptions = ReadOptions(),
        *,
        crop: Callable[[Image.Image, int], Image.Image] = center_crop,
        labels: np.ndarray | None = None,
    ):
        self.source = source
        self.resolution = resolution
        self.reading = reading.for_crops(resolution)
        self.crop = crop
        self.labels = labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> EvaluationSample:
        if not 0 <= index < len(self.source):
            raise IndexError(f"image {index} of {len(self.source)}")  # without it a loop over the data set never ends
        name = self.source.name(index)
        try:
            image = read_image(self.source.read(index), self.reading)
        except ImageError as error:
            return EvaluationSample(image=None, index=index, name=name, bad=str(error))
        pixels = to_tensor(self.crop(image, self.resolution))
        sample = EvaluationSample(image=pixels, index=index, name=name, bad=None)
        if self.labels is not None:
            sample["label"] = int(self.labels[index])
        return sample


class BadImages:
    """The bad images of a run: each is logged once, and too many of them end it."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}  # name -> reason

    def __len__(self) -> int:
        return len(self.reasons)

    def add(self, bad: Iterable[tuple[str, str]]) -> None:
        """Record (name, reason) pairs. Each new name is logged as a warning."""
        for name, reason in bad:
            if name not in self.reasons:
                self.reasons[name] = reason
                logger.warning("bad image %s: %s", printable(name), reason)

    def items(self) -> list[tuple[str, str]]:
        """(name, reason) of each bad image, in the order in which they were found."""
        return list(self.reasons.items())

    def check(self, total: int, max_fraction: float) -> None:
        """Check that few enough images are bad.

        Args:
            total: images in the data set.
            max_fraction: the fraction of them that may be bad.

        Raises:
            InputError: when more are bad.
        """
        if len(self) > max_fraction * total:
            some = "; ".join(f"{printable(name)}: {reason}" for name, reason in list(self.reasons.items())[:3])
            raise InputError(
                f"{len(self)} of {total} images are bad, {len(self) / max(total, 1):.2%} ({some}); need at most"
                f" {max_fraction:.2%}; clean the data set or raise data.max_bad_fraction"
            )


def kinds_of(reasons: Iterable[str]) -> str:
    """How many images are bad for which reason, the most frequent first: «too large: 12, damaged PNG file: 3».

    Args:
        reasons: of bad images; the kind of a reason is the text before its first colon.
    """
    counts = Counter(reason.partition(":")[0] for reason in reasons).most_common()
    others = [f"other reasons: {sum(count for _, count in counts[3:])}"] if len(counts) > 3 else []
    return ", ".join([f"{kind}: {count}" for kind, count in counts[:3]] + others)


def collate_training(samples: Sequence[Sample]) -> Batch:
    """Stack samples, and join their lists of bad images."""
    batch = Batch(
        image=torch.stack([sample["image"] for sample in samples]),
        index=torch.tensor([sample["index"] for sample in samples]),
        epoch=torch.tensor([sample["epoch"] for sample in samples]),
        noise_seed=torch.tensor([sample["noise_seed"] for sample in samples]),
        bad=[pair for sample in samples for pair in sample["bad"]],
    )
    if "label" in samples[0]:
        batch["label"] = torch.tensor([sample["label"] for sample in samples])
    if "moments" in samples[0]:
        batch["moments"] = torch.stack([sample["moments"] for sample in samples])
    return batch


def collate_evaluation(samples: Sequence[EvaluationSample]) -> EvaluationBatch:
    """Stack the good samples and list the bad ones."""
    images = [sample["image"] for sample in samples if sample["image"] is not None]
    batch = EvaluationBatch(
        image=torch.stack(images) if images else torch.empty(0, 0, 0, 0),
        index=[sample["index"] for sample in samples if sample["bad"] is None],
        name=[sample["name"] for sample in samples if sample["bad"] is None],
        bad=[(sample["name"], sample["bad"]) for sample in samples if sample["bad"] is not None],
    )
    labels = [sample["label"] for sample in samples if "label" in sample]
    if labels:
        batch["label"] = torch.tensor(labels)
    return batch


def read_labels(source: ImageSource, column: str, num_classes: int) -> np.ndarray:
    """Read the class of each image.

    Args:
        source: N images.
        column: the column of the labels.
        num_classes: how many classes there are.

    Returns:
        (N,) int64, NO_LABEL where an image has no label.

    Raises:
        InputError: when there is no such column, or it holds anything except 0 .. num_classes - 1, NO_LABEL and null.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if column not in source.features:
        known = ", ".join(source.features) or "none"
        raise InputError(f"the images have no column {column!r} of labels; need one of: {known}; set data.label_column")
    values = source.columns(range(len(source))).column(column)
    if not pa.types.is_integer(values.type):
        raise InputError(f"column {column!r} holds {values.type}; need integers, the numbers of the classes")
    labels = pc.fill_null(values, NO_LABEL).to_numpy().astype(np.int64)
    low, high = int(labels.min()), int(labels.max())
    if low < NO_LABEL or high >= num_classes:
        raise InputError(
            f"column {column!r} holds {low} .. {high}; need 0 .. {num_classes - 1}, or {NO_LABEL} for no label; "
            f"set model.num_classes={high + 1} if these are the classes"
        )
    return labels


def training_loader(
    dataset: TrainingImages, batches: ShardedBatches, *, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """A loader that yields a `Batch` for each of `batches`, in order, with the same bits for any number of workers.

    Do not pass it to `Accelerator.prepare`, which would divide the batches among the processes a second time.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate_training,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,  # so that a worker keeps its cache
        prefetch_factor=4 if num_workers > 0 else None,
        worker_init_fn=_start_worker,
    )


def evaluation_loader(
    dataset: EvaluationImages, indices: Sequence[int], *, batch_size: int, num_workers: int, pin_memory: bool = False
) -> DataLoader:
    """A loader that yields the images at `indices` in batches, in order. The last batch may be smaller."""
    batches = [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate_evaluation,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
    )


def _start_worker(worker_id: int) -> None:
    # Ctrl-C sends its signal to the whole process group. A worker in its own group does not get it, so the main process
    # can finish its step and save. Windows has no such groups.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    keep_freed_memory(False)  # many workers with images of many sizes would keep too much
