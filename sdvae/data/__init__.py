"""Images: files -> tensors, where they come from, and in which order. Knows no model."""

from sdvae.data.dataset import (
    BadImages,
    Batch,
    EvaluationBatch,
    EvaluationImages,
    EvaluationSample,
    Sample,
    TrainingImages,
    collate_evaluation,
    collate_training,
    evaluation_loader,
    training_loader,
)
from sdvae.data.images import (
    ImageError,
    center_crop,
    color_jitter,
    random_crop,
    read_image,
    to_image,
    to_tensor,
)
from sdvae.data.order import SampleKey, SampleOrder, ShardedBatches, sample_seed
from sdvae.data.sources import SKIMAGE_PHOTOGRAPHS, ImageSource, open_source, split_off, subset

__all__ = [
    "SKIMAGE_PHOTOGRAPHS",
    "BadImages",
    "Batch",
    "EvaluationBatch",
    "EvaluationImages",
    "EvaluationSample",
    "ImageError",
    "ImageSource",
    "Sample",
    "SampleKey",
    "SampleOrder",
    "ShardedBatches",
    "TrainingImages",
    "center_crop",
    "collate_evaluation",
    "collate_training",
    "color_jitter",
    "evaluation_loader",
    "open_source",
    "random_crop",
    "read_image",
    "sample_seed",
    "split_off",
    "subset",
    "to_image",
    "to_tensor",
    "training_loader",
]
