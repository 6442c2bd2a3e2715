"""Building the batches of training and validation from the recipe's data section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader

from sdvae.data import (
    BadImages,
    EvaluationImages,
    ImageSource,
    ReadOptions,
    SampleOrder,
    ShardedBatches,
    TrainingImages,
    evaluation_loader,
    open_source,
    split_off,
    subset,
    training_loader,
)
from sdvae.data.dataset import Batch, collate_training, read_labels
from sdvae.errors import InputError
from sdvae.io import is_inside
from sdvae.latents.dataset import LatentDataset
from sdvae.noise import sample_seed
from sdvae.training.config import DataConfig, TrainConfig
from sdvae.training.encoded import EncodedImages


def open_sources(config: DataConfig, seed: int) -> tuple[ImageSource, ImageSource]:
    """Training and validation images. If both come from one source, no image is in both.

    Args:
        config: the recipe's data section.
        seed: the seed of the choice of validation images.

    Raises:
        InputError: when a source cannot be opened or is too small to be divided.
    """
    if not config.source:
        raise InputError("data.source is not set; give a folder of images, a data set, or «skimage» for a first try")
    source = open_source(config.source, split=config.split, image_column=config.image_column)
    if config.validation_source is None:
        names = list(config.validation_names) or None
        return split_off(source, names=names, count=config.validation_count, seed=seed)
    validation = open_source(
        config.validation_source, split=config.validation_split, image_column=config.image_column, or_all=True
    )
    if len(validation) > config.validation_count:
        _, validation = split_off(validation, names=None, count=config.validation_count, seed=seed)
    return source, validation


def check_output_outside(config: TrainConfig) -> None:
    """Refuse a run folder among the images: its own pictures would become training images.

    Raises:
        InputError: when output_dir is one of the folders that images are read from, or lies below one.
    """
    for key, source in (("source", config.data.source), ("validation_source", config.data.validation_source)):
        if source and is_inside(config.output_dir, source):
            raise InputError(
                f"got output_dir={config.output_dir} inside data.{key}={source}, so that the run's own pictures would "
                "be read as images; choose a folder outside"
            )


def training_batches(
    images: TrainingImages, config: TrainConfig, accelerator: Accelerator, *, start: int = 0, first_step: int = 0
) -> DataLoader:
    """This process's micro-batches, in order.

    Args:
        images: the images of `training_images`.
        config: the recipe.
        accelerator: the run's Accelerator.
        start: position of the first sample, counted over all processes.
        first_step: the step, counted from 0, to which the first micro-batch belongs.
    """
    micro_batches = config.gradient_accumulation_steps
    several = len(config.data.training_resolutions) > 1
    batches = ShardedBatches(
        SampleOrder(len(images), config.seed),
        config.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start=start,
        num_batches=(config.steps - first_step) * micro_batches,
        resolution_of=(lambda batch: resolution_at(first_step + batch // micro_batches, config)) if several else None,
    )
    workers = config.data.num_workers
    pin_memory = accelerator.device.type == "cuda"
    return training_loader(images, batches, num_workers=workers, pin_memory=pin_memory)


def resolution_at(step: int, config: TrainConfig) -> int:
    """Side in pixels of the crops of step `step`, counted from 0: the same on every process."""
    data = config.data
    if data.final_resolution is not None and step >= config.steps - round(data.final_part * config.steps):
        return data.final_resolution
    if not data.mixed_resolutions:
        return data.resolution
    return data.mixed_resolutions[sample_seed(config.seed, 0, step, "resolution") % len(data.mixed_resolutions)]


def training_images(source: ImageSource, config: TrainConfig) -> TrainingImages:
    """The crops of the training images; with distil.latents_folder those that were encoded, with their posteriors.

    Raises:
        InputError: when they were not all encoded.
    """
    data, folder = config.data, config.distil.latents_folder
    if folder is not None:
        return EncodedImages(
            source,
            LatentDataset(folder, sample=False, mirror=0.0),
            resolution=data.training_resolutions[-1],
            seed=config.seed,
            reading=reading_of(config),
            flip=data.flip,
            cache_mib=data.cache_mib,
        )
    return TrainingImages(
        source,
        resolution=data.training_resolutions[-1],
        seed=config.seed,
        reading=reading_of(config),
        crop_scale=data.crop_scale,
        flip=data.flip,
        native_crop=data.native_crop,
        color_jitter=data.color_jitter,
        cache_mib=data.cache_mib,
        labels=labels_of(source, config),
        label_dropout=data.label_dropout,
    )


def reading_of(config: TrainConfig) -> ReadOptions:
    """How the recipe reads image files."""
    data = config.data
    return ReadOptions(
        channels=config.model.in_channels,
        background=data.background,
        min_side=data.min_side,
        max_pixels=data.max_pixels,
        color=data.color,
    )


def first_batch(images: TrainingImages, config: TrainConfig, count: int) -> Batch:
    """The first `count` training images of the run, the same on every process."""
    order = SampleOrder(len(images), config.seed)
    return collate_training([images[order.at(i)] for i in range(count)])


def first_images(source: ImageSource, count: int, seed: int) -> ImageSource:
    """`count` images spread over `source`: the first ones in the order of the first epoch."""
    order = SampleOrder(len(source), seed)
    return subset(source, [order.at(i).index for i in range(min(count, len(source)))])


def labels_of(source: ImageSource, config: TrainConfig) -> np.ndarray | None:
    """The class of each image, or None if the VAE takes no labels.

    Raises:
        InputError: when the source has no such labels.
    """
    if config.model.num_classes == 0:
        return None
    return read_labels(source, config.data.label_column, config.model.num_classes)


def conditioning_of(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Inputs of the forward pass besides images and noise, on the CPU.

    `labels`, (B,) int64, for a conditional VAE, which can check them there without waiting for the device; `moments`,
    the parameters of the teacher's posteriors, where a student's images are encoded already.
    """
    names = {"label": "labels", "moments": "moments"}
    return {name: batch[key] for key, name in names.items() if key in batch}


def evaluation_batches(source: ImageSource, config: TrainConfig, accelerator: Accelerator) -> DataLoader:
    """Centre crops of this process's share of `source`: every num_processes-th image, once."""
    images = EvaluationImages(
        source,
        resolution=config.data.evaluation_resolution,
        reading=reading_of(config),
        labels=labels_of(source, config),
    )
    share = list(range(accelerator.process_index, len(source), accelerator.num_processes))
    return evaluation_loader(images, share, batch_size=config.batch_size, num_workers=min(2, config.data.num_workers))


def stop_if_too_many_are_bad(bad_images: BadImages, total: int, max_fraction: float) -> None:
    """End the run, on every process, when all processes together have met too many bad images.

    Args:
        bad_images: the bad images of this process, to which those of the others are added.
        total: the number of images, of training and validation together.
        max_fraction: the fraction of them that may be bad.

    Raises:
        InputError: with some of the bad images.
    """
    bad_images.add(gather_object(bad_images.items()))
    bad_images.check(total, max_fraction)
