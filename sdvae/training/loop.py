"""A training run from its first step to its last.

The order of samples is a function of (seed, epoch), the position in it is the number of samples that all processes
together have used, and augmentation and posterior noise are functions of (seed, epoch, index). So N processes with
batch B/N use the same samples in each step as one process with batch B, and their averaged gradient is the same. A run
that is continued uses the same samples as it would have used without the interruption.
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from sdvae.data import BadImages, ImageSource
from sdvae.data.dataset import Batch
from sdvae.errors import one_line
from sdvae.model import Autoencoder, ConvolutionalVAE
from sdvae.training.anchor import Anchor
from sdvae.training.build import (
    build_accelerator,
    build_alignment,
    build_discriminator_features,
    build_distances,
    build_feature_distance,
    build_perceptual,
    lay_out,
    load_discriminator,
    starting_student,
    starting_vae,
)
from sdvae.training.checkpoint import checkpoint_name
from sdvae.training.config import TrainConfig, check_used
from sdvae.training.data import (
    check_output_outside,
    conditioning_of,
    first_batch,
    labels_of,
    open_sources,
    stop_if_too_many_are_bad,
    training_batches,
    training_images,
)
from sdvae.training.distil import Teacher
from sdvae.training.encoded import EncodedImages, encoded_findings
from sdvae.training.log import Meter, RunLog, progress_bar
from sdvae.training.objective import Judges
from sdvae.training.players import Players
from sdvae.training.preflight import PROBED_IMAGES, check_main_is_newest, check_recipe, probe, probe_teacher
from sdvae.training.processes import check_same, everywhere, from_main, on_main
from sdvae.training.run_folder import FREE_ON_A_MACHINE, RunFolder, plain
from sdvae.training.save import Validator
from sdvae.training.skipped import SkippedSteps
from sdvae.training.state import Origin, Progress, RunState, digest_of_names
from sdvae.training.step import StepResult, TrainStep
from sdvae.training.stopping import StopSignal

logger = logging.getLogger(__name__)

WORKER_DIED = "DataLoader worker"  # in the text of torch's RuntimeError for this, which has no class of its own


@torch.enable_grad()  # restores the caller's setting at the end, even if an interruption left `no_grad` on
def train(config: TrainConfig) -> Path:
    """Train a VAE or a student by a recipe: from the start, or from the last checkpoint in output_dir.

    Under `torchrun` or `accelerate launch`, every process calls it. The run folder is on the machine of process 0.

    Args:
        config: the recipe.

    Returns:
        The folder of the saved VAE, `<output_dir>/model`.

    Raises:
        InputError: for faults of the recipe or the data, before the first step where possible.
        Stopped: after SIGTERM or SIGINT, when the checkpoint is written.
        OSError: for a fault of the machine, such as a full disk, or a loader process that died for lack of memory.
    """
    check_used(config)
    accelerator = build_accelerator(config)
    training = Training(config, accelerator)
    try:
        with ExitStack() as lock, training.signals:
            on_main(accelerator, lambda: lock.enter_context(training.run.locked()))
            training.begin()
            return training.run_to_the_end()
    except RuntimeError as error:
        if WORKER_DIED not in str(error):
            raise
        remedy = "the same command continues; lower data.num_workers if memory ran out"
        raise OSError(f"{one_line(error)}; {remedy}") from error


class Training:
    """One process's part of a run.

    `__init__` opens the input and writes nothing. `begin` prepares the run's first or next step. `run_to_the_end`
    trains.

    Attributes:
        recipe: the recipe as the user wrote it. It is stored, and compared when the run is continued.
        config: the recipe with what was decided on this machine: the model section of the VAE that is fine-tuned or
            the teacher's, and the memory format.
        vae: the VAE or student that learns.
        teacher: the VAE that a student learns from; None when a VAE learns.
        anchor: the encoder of the VAE that is fine-tuned, before its first step; None if none trains on.
        images: the crops that are trained on.
        latents: digest of the data set of their latents; None without one.
    """

    def __init__(self, recipe: TrainConfig, accelerator: Accelerator):
        self.recipe = recipe
        self.accelerator = accelerator
        self.run = RunFolder(recipe.output_dir)
        self.signals = StopSignal()
        self.images_per_step = recipe.images_per_step(accelerator.num_processes)

        # before all else, because what the processes do together depends on the recipe
        check_same(accelerator, plain(recipe), FREE_ON_A_MACHINE)
        on_main(accelerator, self.run.check_ours)
        self.train_source, self.validation_source = everywhere(accelerator, self._open)
        torch.manual_seed(recipe.seed)  # for the initial weights
        self.vae: Autoencoder
        self.teacher: Teacher | None = None
        self.anchor: Anchor | None = None
        if recipe.distil.teacher is None:
            self.vae, self.config = everywhere(accelerator, lambda: starting_vae(recipe))
        else:
            self.vae, teacher, self.config = everywhere(accelerator, lambda: starting_student(recipe))
            self.teacher = everywhere(accelerator, lambda: Teacher(teacher, accelerator))
        self.images = everywhere(accelerator, lambda: training_images(self.train_source, self.config))
        self.latents = self.images.digest if isinstance(self.images, EncodedImages) else None
        self._check_same_input()
        # a VAE that is read may have other weights on another machine, and DDP does not reach their average
        self.vae.load_state_dict(from_main(accelerator, self.vae.state_dict()))
        if self.teacher is not None:
            self.teacher.vae.load_state_dict(from_main(accelerator, self.teacher.vae.state_dict()))
        self.perceptual = build_perceptual(recipe, accelerator)
        alignment = build_alignment(recipe, accelerator)
        self.judges = Judges(self.perceptual, build_feature_distance(recipe, accelerator), alignment)
        self.distances = build_distances(recipe, accelerator)
        self.discriminator_features = build_discriminator_features(recipe, accelerator)
        self.findings = check_recipe(
            self.config,
            images_per_step=self.images_per_step,
            train_images=len(self.train_source),
            validation_images=len(self.validation_source),
            parameters=sum(p.numel() for p in self.vae.parameters()),
            compression_ratio=self.vae.spatial_compression_ratio,
            perceptual=self.perceptual.name if self.perceptual is not None else None,
        )
        if isinstance(self.images, EncodedImages):
            self.findings += encoded_findings(self.config, self.images)
        self.bad_images = BadImages()
        self.meter = Meter(accelerator)
        self.progress = Progress()

    def begin(self) -> None:
        """Load the checkpoint, if there is one, and prepare the next step."""
        accelerator, run, vae = self.accelerator, self.run, self.vae
        check_main_is_newest(run, accelerator)
        found = on_main(accelerator, lambda: run.find(self.recipe, self.images_per_step))
        if self.teacher is not None:
            lay_out(self.teacher.vae, self.config, accelerator)
        self.config = config = lay_out(vae, self.config, accelerator)
        tune = config.fine_tune
        if isinstance(vae, ConvolutionalVAE) and tune.source is not None and not tune.freeze_encoder:
            self.anchor = Anchor(vae, accelerator)  # before the weights of a checkpoint are loaded
        if found is None:
            self.findings += everywhere(accelerator, self._probe)
        aligned = self.judges.alignment
        feature_width = aligned.widths[-1] if aligned is not None else None
        players = Players(vae, config, accelerator, self.discriminator_features, feature_width)
        source = config.loss.discriminator.source
        if found is None and source is not None and players.discriminator is not None:
            load_discriminator(players.discriminator.network, source, accelerator)
        origin = Origin(
            config=plain(self.recipe),
            images_per_step=self.images_per_step,
            train_images=len(self.train_source),
            train_names=digest_of_names(self.train_source),
            perceptual=self.perceptual.name if self.perceptual is not None else None,
            teacher=self.teacher.sha256() if self.teacher is not None else None,
            latents=self.latents,
            anchor=self.anchor.sha256() if self.anchor is not None and tune.anchor_weight > 0 else None,
        )
        self.state = RunState(origin, players, self.progress, self.meter, self.bad_images, accelerator)
        if found is not None:
            self.state.load(*found, config)
        accelerator.wait_for_everyone()  # files are written from here on, after every process has passed all checks
        on_main(accelerator, lambda: run.open(self.recipe, self.progress.step))
        for finding in self.findings:
            logger.warning("check: %s", finding)
        self.log = RunLog(run, config, accelerator, self.progress.step)
        self.step = TrainStep(config, players, self.judges, accelerator, self.teacher, self.anchor)
        self.skipped = SkippedSteps(self.train_source, self.progress, self.meter, accelerator)
        self.validate = Validator(
            config,
            players,
            self.validation_source,
            self.train_source,
            self.perceptual,
            self.bad_images,
            run,
            self.log,
            accelerator,
            self.teacher,
            self.anchor,
            self.distances,
        )
        self._announce()

    def run_to_the_end(self) -> Path:
        """Do the remaining steps, with their validations and checkpoints.

        Returns:
            The folder of the saved VAE.
        """
        config, progress = self.config, self.progress
        if progress.step >= config.steps and progress.validated:
            logger.info("%s is finished: %d steps; the VAE is in %s", self.run.root, progress.step, self.run.model)
            return self.run.model
        if not progress.validated:
            self.validate(progress)
            self._checkpoint()
        bar_shown = progress_bar(progress.step, config.steps, show=self.accelerator.is_main_process)
        with closing(self._batches()) as batches, bar_shown as bar:
            while progress.step < config.steps:
                result = self.step(progress.step, batches, self.meter.waiting, self.signals.was_received)
                self._count(result)
                bar.update()
                self._log_if_due(result, bar)
                if result.stop:
                    self._stop()
                with self.meter.paused():
                    if not progress.validated:
                        self.validate(progress)
                    if self._checkpoint_is_due():
                        self._checkpoint()
        if self.accelerator.is_main_process:
            logger.info(
                "reconstructions: %s   curves: %s   VAE: %s   best by %s: %s",
                *(self.run.images, self.run.curves, self.run.model),
                *(config.checkpoint.best_metric, self.run.best_model),
            )
        self.log.finish()
        return self.run.model

    def _count(self, result: StepResult) -> None:
        """Count a step and the values that it reports. Too many skipped steps in a row end the run.

        Raises:
            InputError: after max_skipped_steps skipped steps in a row.
        """
        config, progress = self.config, self.progress
        if result.skipped:
            self.skipped.take_note(result)
        else:
            for values in result.values:
                self.meter.add(values)
        self.meter.count_images(self.images_per_step)
        step = progress.step + 1
        due = step % config.validate_every == 0 or step == config.steps
        progress.advance(self.images_per_step, skipped=result.skipped, validation_due=due)
        if progress.skipped_in_a_row == config.max_skipped_steps:
            self.skipped.roll_back()
            self._checkpoint()
            raise self.skipped.too_many(config.max_skipped_steps)

    def _log_if_due(self, result: StepResult, bar: tqdm) -> None:
        step = self.progress.step
        if step % self.config.log_every and step != self.config.steps:
            return
        total = len(self.train_source) + len(self.validation_source)
        stop_if_too_many_are_bad(self.bad_images, total, self.config.data.max_bad_fraction)
        averages, rates = self.meter.averages(), self.meter.rates()
        self.log.report("train", {**averages, **result.state, **rates}, step)
        if "loss" in averages:
            text = f"loss {averages['loss']:.4f}, {rates['images_per_second']:.1f} images/s"
            bar.set_postfix_str(text, refresh=False)
        self.meter.reset()

    def _stop(self) -> None:
        self.skipped.roll_back()
        self._checkpoint()
        where = checkpoint_name(self.progress.step)
        raise self.signals.stopped(f"stopped after step {self.progress.step}; the same command continues from {where}")

    def _checkpoint_is_due(self) -> bool:
        """Whether to write a checkpoint after this step.

        While steps are skipped, none is written, since after too many the run returns to the state before the first.
        """
        step = self.progress.step
        healthy = self.progress.skipped_in_a_row == 0
        return step == self.config.steps or (healthy and step % self.config.checkpoint.every_steps == 0)

    def _checkpoint(self) -> None:
        self.state.save(self.run.checkpoints, self.config.checkpoint.keep_last)

    def _open(self) -> tuple[ImageSource, ImageSource]:
        """Training and validation images. Raises for labels that do not fit, before anything is written."""
        check_output_outside(self.recipe)
        sources = open_sources(self.recipe.data, self.recipe.seed)
        for source in sources:
            labels_of(source, self.recipe)
        return sources

    def _check_same_input(self) -> None:
        """Check that all processes have the same images, by their names, the same kind of VAE and the same precision.

        For a student, also that they have the same kind of teacher and student, and scale the latents alike.

        Raises:
            InputError: on every process, if not.
        """
        sources = {"training images": self.train_source, "validation images": self.validation_source}
        images = {
            name: {"count": len(source), "digest of names": digest_of_names(source)} for name, source in sources.items()
        }
        facts = {**images, "model": plain(self.config)["model"], "precision": self.accelerator.mixed_precision}
        facts["digest of latents"] = self.latents
        if self.teacher is not None:
            scaling = self.teacher.scaling
            facts["scaling of latents"] = [part.flatten().tolist() for part in (scaling.shift, scaling.scale)]
            facts["student"] = {key: str(value) for key, value in self.vae.config.items() if not key.startswith("_")}
        check_same(self.accelerator, facts)

    def _probe(self) -> list[str]:
        """Findings from the first images of the run, which are the same on every process."""
        batch = first_batch(self.images, self.config, min(self.config.batch_size, PROBED_IMAGES))
        self.bad_images.add(batch["bad"])
        images = batch["image"].to(self.accelerator.device)
        if self.teacher is not None:
            return probe_teacher(self.teacher, images, self.config, **conditioning_of(batch))
        assert isinstance(self.vae, ConvolutionalVAE)
        return probe(self.vae, images, batch["noise_seed"], self.config, self.judges, **conditioning_of(batch))

    def _batches(self) -> Generator[Batch, None, None]:
        """This process's micro-batches of the remaining steps. Closing the generator ends the loader.

        Bad images are added to `bad_images`.
        """
        start, step = self.progress.position, self.progress.step
        for batch in training_batches(self.images, self.config, self.accelerator, start=start, first_step=step):
            self.bad_images.add(batch["bad"])
            yield batch

    def _announce(self) -> None:
        parameters = list(self.vae.parameters())
        logger.info(
            "training %.2f M of %.2f M parameters on %d images, validating on %d; steps %d to %d, each of %d images; "
            "%d process(es) on %s in %s",
            sum(p.numel() for p in parameters if p.requires_grad) / 1e6,
            sum(p.numel() for p in parameters) / 1e6,
            len(self.train_source),
            len(self.validation_source),
            self.progress.step + 1,
            self.config.steps,
            self.images_per_step,
            self.accelerator.num_processes,
            self.accelerator.device.type,
            {"no": "fp32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision),
        )
