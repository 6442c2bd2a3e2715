"""Images: opening them, turning them into tensors, and the order in which training uses them."""

from sdvae.data.base import ImageSource, ImageStream
from sdvae.data.crops import (
    adm_center_crop,
    center_crop,
    color_jitter,
    cover,
    cover_box,
    random_crop,
    to_image,
    to_tensor,
)
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
    kinds_of,
    training_loader,
)
from sdvae.data.images import ImageError, read_image
from sdvae.data.order import SampleKey, SampleOrder, ShardedBatches
from sdvae.data.reading import ReadOptions
from sdvae.data.sources import (
    SKIMAGE_PHOTOGRAPHS,
    open_source,
    open_source_or_stream,
    open_stream,
    split_off,
    subset,
)
from sdvae.data.streams import HubStream

__all__ = [
    "SKIMAGE_PHOTOGRAPHS",
    "BadImages",
    "Batch",
    "EvaluationBatch",
    "EvaluationImages",
    "EvaluationSample",
    "HubStream",
    "ImageError",
    "ImageSource",
    "ImageStream",
    "ReadOptions",
    "Sample",
    "SampleKey",
    "SampleOrder",
    "ShardedBatches",
    "TrainingImages",
    "adm_center_crop",
    "center_crop",
    "collate_evaluation",
    "collate_training",
    "color_jitter",
    "cover",
    "cover_box",
    "evaluation_loader",
    "kinds_of",
    "open_source",
    "open_source_or_stream",
    "open_stream",
    "random_crop",
    "read_image",
    "split_off",
    "subset",
    "to_image",
    "to_tensor",
    "training_loader",
]
