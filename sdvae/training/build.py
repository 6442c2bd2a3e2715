"""Build the parts of a training run from its recipe: accelerator, VAE and perceptual loss."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    gather_object,
)
from torch import Tensor, nn

from sdvae.errors import InputError, require
from sdvae.metrics.features import FeatureDistance, Features, load_features
from sdvae.metrics.perceptual import Perceptual, load_perceptual
from sdvae.model import Autoencoder, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny, ConvolutionalVAE
from sdvae.model.config import shape_of
from sdvae.roundtrip import check_image_channels
from sdvae.runtime import accelerator_type, keep_freed_memory, resolve_precision
from sdvae.training.checkpoint import check_fit
from sdvae.training.config import DistilConfig, ModelConfig, TrainConfig
from sdvae.training.distil import build_student
from sdvae.training.encoded import check_latents
from sdvae.training.initialise import initialise
from sdvae.training.players import freeze_encoder
from sdvae.training.processes import everywhere, from_main, on_main
from sdvae.training.run_folder import RunFolder
from sdvae.tutorial.conditional import ConditionalAutoencoderKL
from sdvae.weights import load_kl, load_vae
from sdvae.weights.read import read_weights

if TYPE_CHECKING:
    from sdvae.metrics.fid import FrechetDistance

logger = logging.getLogger(__name__)

T = TypeVar("T")


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The Accelerator of a run.

    Raises:
        InputError: when a tracker is not installed, or the launcher's processes would not train together.
    """
    available = sorted(tracker.value for tracker in get_available_trackers())
    for name in config.trackers:
        if name not in available:
            raise InputError(
                f"tracker {name!r} is not installed (installed: {', '.join(available) or 'none'}); "
                f"pip install {name}, or choose none with --trackers=[]"
            )
    # Without cpu=True, accelerate runs torchrun's N processes as N separate trainings on a machine without a GPU.
    device_type = accelerator_type()
    precision = resolve_precision(config.mixed_precision, device_type or "cpu")
    # accelerate keeps one state for each process and refuses to change its precision. An earlier run in this process
    # may have had another precision, so the state is reset; accelerate has no public function for that.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        cpu=device_type is None,
        mixed_precision=precision,
        log_with=list(config.trackers) or None,
        project_dir=RunFolder(config.output_dir).root,
        # TrainStep divides the loss by the accumulation steps. With 1 here, accelerate does not divide it again, even
        # if `accelerate launch` was given a number of accumulation steps.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise InputError(
            f"the launcher started {launched} processes, of which {accelerator.num_processes} train together; "
            "on CPUs launch with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        )
    kind = accelerator.distributed_type
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise InputError(
            f"accelerate is set to {kind.value}; need plain data parallelism, which is enough for a VAE; choose it "
            "with `accelerate config`, or launch with torchrun"
        )
    return accelerator


def starting_vae(config: TrainConfig) -> tuple[ConvolutionalVAE, TrainConfig]:
    """The VAE before the first step, in fp32 on the CPU, and the recipe with a model section that describes it.

    Raises:
        InputError: when the VAE to be fine-tuned cannot be read, or does not fit the likelihood.
    """
    tune = config.fine_tune
    likelihood = "bernoulli" if config.loss.reconstruction == "bce" else "gaussian"
    if tune.source is None:
        vae = build_vae(config.model).train()
        vae.set_likelihood(likelihood)
        return vae, config
    vae = load_kl(tune.source, subfolder=tune.subfolder, config=tune.config, dtype=torch.float32)
    if likelihood == "bernoulli" and vae.config.in_channels != 1:
        raise InputError(
            f"got loss.reconstruction=bce for {tune.source}, whose images have {vae.config.in_channels} channels; need "
            "a VAE of grey images; take l1 or l2"
        )
    if tune.freeze_encoder:
        freeze_encoder(vae)
    if vae.likelihood != likelihood:
        logger.warning(
            "%s has a %s likelihood and loss.reconstruction=%s trains a %s one: its decoder must learn another output",
            *(tune.source, vae.likelihood, config.loss.reconstruction, likelihood),
        )
    vae.set_likelihood(likelihood)
    return vae.train(), describing(config, vae)


def starting_student(config: TrainConfig) -> tuple[AutoencoderTiny, ConvolutionalVAE, TrainConfig]:
    """A student before its first step, its teacher, and the recipe with a model section that describes the teacher.

    Both are in fp32 on the CPU.

    Raises:
        InputError: when the teacher cannot be read, when the student's shape does not fit it, or when the latents in
            distil.latents_folder cannot be used.
    """
    settings = config.distil
    assert settings.teacher is not None
    teacher = load_kl(settings.teacher, subfolder=settings.subfolder, config=settings.config, dtype="file")
    check_image_channels(teacher, settings.teacher)  # a student of images with alpha is not trained
    if isinstance(teacher, AutoencoderKLFlux2):
        logger.warning(
            "%s has a batch norm, which its pipelines read and a student has not: the student serves for previews "
            "(sdvae.Previews), and not as pipe.vae",
            settings.teacher,
        )
    if settings.latents_folder is not None:
        check_latents(config, teacher)  # before the conversion, since the latents name the weights in the file's dtype
    nn.Module.to(teacher, torch.float32)  # diffusers' own is untyped
    student = build_student(settings, teacher) if settings.student is None else load_student(settings, teacher)
    return student.train(), teacher, describing(config, teacher)


def load_student(config: DistilConfig, teacher: ConvolutionalVAE) -> AutoencoderTiny:
    """The student that the recipe starts from.

    Raises:
        InputError: when it cannot be read, is not a student, or does not fit the teacher's images and latents.
    """
    assert config.student is not None
    student = load_vae(config.student, dtype=torch.float32)
    if not isinstance(student, AutoencoderTiny):
        raise InputError(f"got distil.student={config.student}, which is no AutoencoderTiny; need a student, or null")
    for what in ("in_channels", "out_channels", "latent_channels"):
        if student.config[what] != teacher.config[what]:
            raise InputError(
                f"got distil.student={config.student} with {student.config[what]} {what}; need {teacher.config[what]}, "
                f"those of {config.teacher}"
            )
    if student.spatial_compression_ratio != teacher.spatial_compression_ratio:
        raise InputError(
            f"got distil.student={config.student}, which compresses by {student.spatial_compression_ratio}; need "
            f"{teacher.spatial_compression_ratio}, as {config.teacher} does"
        )
    logger.info("the student has the shape of %s; widths and blocks in the recipe are not used", config.student)
    return student


def describing(config: TrainConfig, vae: ConvolutionalVAE) -> TrainConfig:
    """The recipe with a model section that describes an existing VAE."""
    shape = shape_of(vae.config)
    is_scaled = vae.config.get("latents_mean") is not None and vae.config.get("latents_std") is not None
    by_channel = (config.model.measure_channels or is_scaled) and not config.fine_tune.freeze_encoder
    with_shift = vae.config.get("shift_factor") is not None and not by_channel
    model = ModelConfig(**shape, measure_shift=with_shift, measure_channels=by_channel)
    return replace(config, model=model)


def build_vae(config: ModelConfig) -> ConvolutionalVAE:
    """A VAE with new weights. Its scaling factor, or its batch norm's statistics, are measured at each validation."""
    kind: type[ConvolutionalVAE] = ConditionalAutoencoderKL if config.num_classes else AutoencoderKL
    vae = (AutoencoderKLFlux2 if config.batch_norm else kind)(**config.to_diffusers())
    if config.initialisation == "pass_through":
        initialise(vae)
    return vae


def lay_out(vae: Autoencoder, config: TrainConfig, accelerator: Accelerator) -> TrainConfig:
    """Move a VAE or student to its device, and give it the memory format and the kernels with which it is fastest.

    Returns:
        The recipe, with `channels_last` as it was chosen here.
    """
    vae.to(accelerator.device)
    if accelerator.device.type == "cpu":
        keep_freed_memory()  # each step needs the memory that the last one freed
    if config.fast_convolutions and accelerator.device.type == "cpu":
        from sdvae.kernels.speed import speed_up, takes_winograd

        dtype = torch.float32 if accelerator.mixed_precision == "no" else torch.bfloat16
        speed_up(vae, dtype)
        config = replace(config, channels_last=not takes_winograd(vae, dtype))
    elif config.channels_last:
        nn.Module.to(vae, memory_format=torch.channels_last)  # diffusers' own is untyped
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return config


def build_perceptual(config: TrainConfig, accelerator: Accelerator) -> Perceptual | None:
    """LPIPS on the accelerator's device, or None if its weight in the loss is 0.

    Raises:
        InputError: when the trunk's weights cannot be loaded, or when the processes loaded different ones.
    """
    if config.loss.lpips_weight == 0:
        return None
    settings = config.loss.perceptual
    perceptual = _downloaded(
        accelerator, lambda: load_perceptual(settings.net, settings.weights, settings.heads, settings.allow_random)
    )
    names = set(gather_object([perceptual.name]))
    if len(names) > 1:  # some processes could download the trunk, and others could not
        raise InputError(
            f"the processes have different trunks: {', '.join(sorted(names))}; give loss.perceptual.weights"
        )
    perceptual.load_state_dict(from_main(accelerator, perceptual.state_dict()))  # files may differ between machines
    return perceptual.to(accelerator.device)


def build_feature_distance(config: TrainConfig, accelerator: Accelerator) -> FeatureDistance | None:
    """The second perceptual term on the accelerator's device, or None if its weight in the loss is 0.

    Raises:
        InputError: when its network cannot be loaded, or when the images that it compares are too small for it.
    """
    settings = config.loss.features
    if settings.weight == 0:
        return None
    side = config.data.training_resolutions[0] * config.loss.equivariance.smallest_scale
    features = _features_for(settings.net, settings.weights, "loss.features.net", side, config, accelerator)
    return FeatureDistance(features).to(accelerator.device)


def build_alignment(config: TrainConfig, accelerator: Accelerator) -> Features | None:
    """The network with whose features latents are aligned, on the accelerator's device; None if none is wanted.

    Raises:
        InputError: when it cannot be loaded, or is no transformer.
    """
    settings = config.loss.alignment
    if settings.weight == 0:
        return None
    features = _shared_features(settings.net, None, accelerator)
    if features.multiple == 1:
        raise InputError(
            f"got loss.alignment.net={settings.net}; need a vision transformer, whose patches stand for the positions "
            "of latents, such as facebook/dinov2-large"
        )
    return features.to(accelerator.device)


def build_distances(config: TrainConfig, accelerator: Accelerator) -> dict[str, FrechetDistance]:
    """The Fréchet distances of validation that are wanted, on the accelerator's device.

    Raises:
        InputError: when torch-fidelity is not installed, or when weights cannot be loaded.
    """
    wanted = config.validation
    if not (wanted.fid or wanted.fdd):
        return {}
    require("torch_fidelity", "rFID" if wanted.fid else "rFDD", "fid")  # before what needs it is imported
    from sdvae.metrics.fid import frechet_distances

    options = (wanted.fid, wanted.inception, wanted.fdd, wanted.dinov2)
    return _downloaded(accelerator, lambda: frechet_distances(*options, accelerator.device))


def build_discriminator_features(config: TrainConfig, accelerator: Accelerator) -> Features | None:
    """The frozen network of a discriminator that has one, on the CPU.

    Raises:
        InputError: when it cannot be loaded, or when the training images are too small for it.
    """
    settings = config.loss.discriminator
    name, weights = settings.features, settings.features_weights
    if settings.weight == 0 or name is None:
        return None
    side = config.discriminator_side
    return _features_for(name, weights, "loss.discriminator.features", side, config, accelerator)


def _features_for(
    name: str, weights: str | None, key: str, side: float, config: TrainConfig, accelerator: Accelerator
) -> Features:
    """The network that `key` names, if images of `side` pixels are large enough for it."""
    features = _shared_features(name, weights, accelerator)
    if side < features.smallest_side:
        raise InputError(
            f"got training crops of {config.data.training_resolutions[0]} pixels with {key}={name}, which then sees "
            f"images of {side:g} pixels; need {features.smallest_side} or more; take larger crops"
        )
    return features


def _shared_features(name: str, weights: str | None, accelerator: Accelerator) -> Features:
    """A frozen network with the main process's weights on every process, since files may differ between machines."""
    features = _downloaded(accelerator, lambda: load_features(name, weights))
    features.load_state_dict(from_main(accelerator, features.state_dict()))
    return features


def _downloaded(accelerator: Accelerator, load: Callable[[], T]) -> T:
    """What `load` returns, where one process of each machine comes first, and the others find what it downloaded."""
    early = everywhere(accelerator, lambda: load() if accelerator.is_local_main_process else None)
    return everywhere(accelerator, lambda: load() if early is None else early)


def load_discriminator(network: nn.Module, source: str, accelerator: Accelerator) -> None:
    """Start a discriminator from the discriminator.safetensors of another run, which the main process reads.

    Raises:
        InputError: on every process, when the file cannot be read or is of a discriminator of another shape.
    """

    def read() -> dict[str, Tensor]:
        weights = read_weights(Path(source))
        check_fit(network.state_dict(), weights, source)
        return weights

    network.load_state_dict(on_main(accelerator, read))
