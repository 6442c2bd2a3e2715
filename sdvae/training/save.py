"""The results of a validation: figures in the log, pictures, model/ and best_model/."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from sdvae.data import BadImages, ImageSource
from sdvae.errors import InputError
from sdvae.io import replacing
from sdvae.metrics.perceptual import Perceptual
from sdvae.model import Autoencoder, AutoencoderKLFlux2, AutoencoderTiny, ConvolutionalVAE
from sdvae.pictures import latent_plot, reconstruction_grid, student_grid, training_curves
from sdvae.previews import preview_of
from sdvae.statistics import LatentMoments
from sdvae.training.anchor import Anchor
from sdvae.training.checkpoint import write_weights
from sdvae.training.config import ModelConfig, TrainConfig
from sdvae.training.data import evaluation_batches, first_images
from sdvae.training.discriminator import discriminator_learns_at
from sdvae.training.distil import Teacher
from sdvae.training.log import RunLog
from sdvae.training.model_card import GRID_NAME, model_card, student_card
from sdvae.training.players import Players
from sdvae.training.processes import on_main
from sdvae.training.run_folder import RunFolder
from sdvae.training.state import Progress, digest_of_names
from sdvae.training.validation import Distances, ValidationResult, measure_latents, validate, validate_student
from sdvae.weights.read import check_tensors

if TYPE_CHECKING:
    from sdvae.metrics.fid import FrechetDistance  # which needs an extra

logger = logging.getLogger(__name__)

SMALLEST_TILE = 96  # pixels: room for a caption


@dataclass
class Validator:
    """Validates the moving average of the weights of a VAE or student, and saves it.

    Attributes:
        config: the recipe, with the model section of the VAE that is trained.
        players: the run's players.
        source: validation images.
        train_source: training images. The scaling factor is measured on the first of them, in the order of the first
            epoch.
        perceptual: LPIPS; None if the loss has none.
        bad_images: images that cannot be read are added to it.
        run: the folder of pictures and models.
        log: the log of the figures.
        accelerator: the run's Accelerator.
        teacher: the VAE that a student learns from; None when a VAE is validated.
        anchor: the encoder of the VAE that is fine-tuned, before its first step; None if none trains on.
        distances: `rfid` and `rfdd`, those that are wanted.
    """

    config: TrainConfig
    players: Players
    source: ImageSource
    train_source: ImageSource
    perceptual: Perceptual | None
    bad_images: BadImages
    run: RunFolder
    log: RunLog
    accelerator: Accelerator
    teacher: Teacher | None = None
    anchor: Anchor | None = None
    distances: Mapping[str, FrechetDistance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        config, source = self.config, self.source
        self._measured = first_images(self.train_source, config.scale_images, config.seed)
        resolution = config.data.evaluation_resolution
        self._originals_counted = False  # by the distances, which keep their features
        self._measured_on = f"{len(source)} images at {resolution} pixels, {digest_of_names(source)}"

    def __call__(self, progress: Progress) -> None:
        """Measure, draw, and save model/. If the model is the best so far, save best_model/ too.

        Every process must call it.

        Raises:
            InputError: on every process, when the VAE has weights that are not finite.
            OSError: on every process, when writing fails.
        """
        config, step, average = self.config, progress.step, self.players.ema.model
        if config.validate_raw:
            self.players.vae.eval()
            self.log.report("validation_raw", self._validate(self.players.vae).metrics, step)
            self.players.vae.train()
        result = self._validate(average)
        self.log.report("validation", result.metrics, step)
        # a frozen encoder keeps the latents and so the factors, and a student's latents are scaled
        if isinstance(average, ConvolutionalVAE) and not config.fine_tune.freeze_encoder:
            batches = evaluation_batches(self._measured, config, self.accelerator)
            moments = measure_latents(average, batches, self.accelerator, self.bad_images)
            write_scaling(average, moments, config.model)
        name = config.checkpoint.best_metric
        improved = is_better(result.metrics, progress.best, name, self._measured_on)
        if improved:
            progress.best = {"metric": name, "value": result.metrics[name], "step": step, "on": self._measured_on}

        def write() -> None:
            for complaint in result.health.complaints() if result.health is not None else ():
                logger.warning("latents: %s", complaint)
            self.log.picture("reconstructions", draw(result, self.run, step), step)
            save_model(self.run, average, config, result, step, progress.position)
            if improved:
                keep_best(self.run)
            discriminator = self.players.discriminator
            if discriminator is not None and discriminator_learns_at(step - 1, config.loss.discriminator):
                save_discriminator(self.run, discriminator.network)

        on_main(self.accelerator, write)
        progress.validated = True

    def _validate(self, vae: Autoencoder) -> ValidationResult:
        batches = evaluation_batches(self.source, self.config, self.accelerator)
        keep, seed = self.config.grid_images, self.config.seed
        given = (batches, self.accelerator, self.perceptual, self.bad_images, keep)
        counted = Distances(self.distances, with_originals=not self._originals_counted)
        self._originals_counted = True
        if isinstance(vae, ConvolutionalVAE):
            return validate(vae, *given, seed, anchor=self.anchor, distances=counted)
        assert isinstance(vae, AutoencoderTiny)
        assert self.teacher is not None
        return validate_student(vae, self.teacher, *given, distances=counted)


def write_scaling(vae: ConvolutionalVAE, patches: LatentMoments, model: ModelConfig) -> None:
    """Write how diffusion models are to scale the latents: as factors into the config, or into the batch norm.

    Args:
        vae: the VAE.
        patches: the moments of the channels of patches of its latents.
        model: says which factors.

    Raises:
        InputError: when the latents, or one of their channels if each is scaled by itself, do not vary.
    """
    moments = patches.over_patches(math.prod(vae.patch_size))
    keys = moments.config_keys(by_channel=model.measure_channels, with_shift=model.measure_shift)
    if isinstance(vae, AutoencoderKLFlux2):
        vae.set_statistics(patches.channel_mean, patches.channel_std.square())
    else:
        vae.register_to_config(**keys)


def is_better(metrics: dict[str, float], best: dict[str, Any], name: str, measured_on: str) -> bool:
    """Whether a validation is better than the best so far; true if none so far measured the same.

    Args:
        metrics: the metrics of the validation.
        best: `Progress.best`. One that an earlier version wrote does not say what it was measured on, and counts as
            measured on the same images.
        name: the metric to compare.
        measured_on: the images and their size.
    """
    if best.get("metric") != name or best.get("on", measured_on) != measured_on:
        return True
    return metrics[name] < best["value"] if lower_is_better(name) else metrics[name] > best["value"]


def lower_is_better(metric: str) -> bool:
    return metric.startswith("lpips") or metric in ("nelbo", "rfid", "rfdd")


def draw(result: ValidationResult, run: RunFolder, step: int) -> Image.Image:
    """Draw the reconstruction grid and the latents of this step, and the curves so far.

    Returns:
        The grid.
    """
    grid = grid_of(result)
    grid.save(run.images / f"step-{step:08d}.png")
    if result.health is not None:
        latent_plot(result.health).save(run.images / f"latents-{step:08d}.png")
    training_curves(run.metrics, run.curves)
    return grid


def grid_of(result: ValidationResult) -> Image.Image:
    """The reconstruction grid; for a student with its teacher's. Small images, such as MNIST's, are enlarged."""
    times = -(-SMALLEST_TILE // result.images.shape[-1])

    def larger(x: Tensor) -> Tensor:
        return x.repeat_interleave(times, 2).repeat_interleave(times, 3)

    images, reconstructions = larger(result.images), larger(result.reconstructions)
    if result.pictures is None:
        return reconstruction_grid(images, reconstructions)
    return student_grid(images, larger(result.pictures), reconstructions)


def save_model(
    run: RunFolder,
    vae: Autoencoder,
    config: TrainConfig,
    result: ValidationResult,
    step: int,
    images_seen: int,
) -> None:
    """Write model/, completely or not at all: weights, config.json, model card, reconstruction grid, RGB factors.

    There are no RGB factors if they cannot be fitted, since all validation images have one colour; that is said.

    Raises:
        InputError: when a weight is not finite.
    """
    check_tensors(vae.state_dict(), "the trained VAE")
    if isinstance(vae, ConvolutionalVAE):
        card = model_card(config, vae, result, step=step, images_seen=images_seen)
    else:
        assert isinstance(vae, AutoencoderTiny)
        card = student_card(config, vae, result, step=step, images_seen=images_seen)
    with replacing(run.model) as folder:
        vae.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        grid_of(result).save(folder / GRID_NAME)
        try:
            preview = preview_of(vae, result.colours, len(result.per_image), config.data.evaluation_resolution)
        except InputError as error:
            logger.warning("no latent RGB factors: %s", error)
        else:
            preview.write_beside(folder)


def save_discriminator(run: RunFolder, network: nn.Module) -> None:
    """Write discriminator.safetensors, from which another run can start with `loss.discriminator.source`."""
    with replacing(run.discriminator) as file:
        write_weights(file, network.state_dict())


def keep_best(run: RunFolder) -> None:
    """Copy model/ to best_model/."""
    with replacing(run.best_model) as folder:
        shutil.copytree(run.model, folder)
