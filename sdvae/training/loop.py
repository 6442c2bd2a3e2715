"""The training loop: steps, lines of the log, validations and checkpoints, and how a run is continued.

The order of samples is a function of (seed, epoch), a run's position is the number of samples that all
processes consumed together, and augmentation and posterior noise are keyed on (seed, epoch, index). So N
processes with batch B/N see what one process with batch B sees, and average to the same gradient; and a run
that is continued sees what it would have seen.
"""

from __future__ import annotations

import copy
import logging
import sys
import zlib
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from sdvae.data import BadImages, ImageSource, SampleOrder, subset
from sdvae.data.dataset import Batch
from sdvae.errors import InputError, one_line
from sdvae.io import flatten
from sdvae.model import AutoencoderKL
from sdvae.training.build import build_accelerator, build_perceptual, lay_out, starting_vae
from sdvae.training.checkpoint import (
    Checkpoint,
    checkpoint_name,
    prune,
    read_checkpoint,
    write_checkpoint,
)
from sdvae.training.config import TrainConfig
from sdvae.training.data import (
    evaluation_batches,
    labels_of,
    open_sources,
    stop_if_too_many_are_bad,
    training_batches,
    training_images,
)
from sdvae.training.meter import Meter
from sdvae.training.players import Players
from sdvae.training.preflight import check_recipe, probe
from sdvae.training.run_folder import RunFolder, plain
from sdvae.training.save import draw, keep_best, save_model
from sdvae.training.step import StepResult, train_step
from sdvae.training.stopping import StopSignal
from sdvae.training.trackers import Trackers
from sdvae.training.validation import ValidationResult, measure_latents, validate

logger = logging.getLogger(__name__)

# Not finite on every process as soon as it is on one, or a sum of other terms: they accuse nobody.
DERIVED = ("grad_norm", "discriminator_grad_norm", "gan_weight", "loss")


@torch.enable_grad()  # and given back as it was: what is raised inside a no_grad's own exit leaves gradients off
def train(config: TrainConfig) -> Path:
    """Run a recipe from its first step, or from the last checkpoint in output_dir, to the saved model.

    Under `torchrun` or `accelerate launch`, every process calls it.

    Returns: the folder of the saved VAE, `<output_dir>/model`.
    Raises:
        InputError: for what is wrong with the recipe or the data, before the first step where possible.
        Stopped: after SIGTERM or SIGINT, when the checkpoint is written.
        OSError: for a fault of the machine: a full disk, or a loader process that died, of hunger for memory mostly.
    """
    accelerator = build_accelerator(config)
    training = Training(config, accelerator)
    locked = training.run.locked() if accelerator.is_main_process else nullcontext()
    try:
        with locked, training.signals:
            training.begin()
            return training.run_to_the_end()
    except RuntimeError as error:  # raised wherever the main thread happens to be
        if "DataLoader worker" not in str(error):
            raise
        remedy = "the same command continues; lower data.num_workers if memory ran out"
        raise OSError(f"{one_line(error)}; {remedy}") from error


@dataclass
class Progress:
    """Where a run is; with weights and optimizers, all of its state.

    Attributes:
        step: steps done, skipped ones included.
        position: samples consumed by all processes together.
        skipped_in_a_row: steps at the end of those done.
        validated: whether the validation due at this step is done.
        best: metric, value and step of the best validation.
    """

    step: int = 0
    position: int = 0
    skipped_in_a_row: int = 0
    validated: bool = True
    best: dict[str, Any] = field(default_factory=dict)


class Training:
    """One process's part of a run. Made, it has read its input; `begin` is the first to write."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.given = config
        self.accelerator = accelerator
        self.run = RunFolder(config.output_dir)
        self.signals = StopSignal()
        self.images_per_step = config.batch_size * accelerator.num_processes * config.gradient_accumulation_steps

        if accelerator.is_main_process:
            self.run.check_ours()
        self.train_source, self.validation_source = open_sources(config.data, config.seed)
        self.measured = first_images(self.train_source, config.scale_images, config.seed)
        for source in (self.train_source, self.validation_source):
            labels_of(source, config)  # refuses what does not fit before anything is written
        self.bad_images = BadImages()
        torch.manual_seed(config.seed)  # of the initial weights: the same on every process
        self.vae, self.config = starting_vae(config)
        kept = self.vae.config.scaling_factor, self.vae.config.shift_factor
        self.factors = kept if config.fine_tune.freeze_encoder else None
        self.perceptual = build_perceptual(config, accelerator)
        self._check_best_metric()
        self.findings = check_recipe(
            self.config,
            images_per_step=self.images_per_step,
            train_images=len(self.train_source),
            validation_images=len(self.validation_source),
            parameters=sum(p.numel() for p in self.vae.parameters()),
        )
        self.meter = Meter()
        self.progress = Progress()
        self.last_good: tuple[Progress, dict[str, list[float]]] | None = None

    def begin(self) -> None:
        """Find out where the run stands, and make ready for its next step."""
        accelerator, run, vae = self.accelerator, self.run, self.vae
        found = [run.find(self.given, self.images_per_step) if accelerator.is_main_process else None]
        if accelerator.num_processes > 1:
            broadcast_object_list(found)
        (checkpoint,) = found
        self.config = lay_out(vae, self.config, accelerator)
        if checkpoint is None:
            self.findings += self._probe(vae)
        self.players = Players(vae, self.config, accelerator)
        if checkpoint is not None:
            self._restore(checkpoint)
        accelerator.wait_for_everyone()  # all have found their input in order: now something may be written
        if accelerator.is_main_process:
            run.open(self.given, self.progress.step)
        for finding in self.findings:
            logger.warning("check: %s", finding)
        self.trackers = Trackers(accelerator, run.TRACKER, self._recipe_for_trackers(), self.progress.step)
        self._announce(vae)

    def run_to_the_end(self) -> Path:
        config, progress = self.config, self.progress
        if progress.step >= config.steps and progress.validated:
            logger.info("%s is finished: %d steps; the VAE is in %s", self.run.root, progress.step, self.run.model)
            return self.run.model
        if not progress.validated:
            self._validate()
            self._checkpoint()
        bar_shown = progress_bar(progress.step, config.steps, show=self.accelerator.is_main_process)
        with closing(self._batches()) as batches, bar_shown as bar:
            while progress.step < config.steps:
                result = train_step(
                    progress.step,
                    self.players,
                    batches,
                    config,
                    self.accelerator,
                    self.perceptual,
                    waiting=self.meter.waiting,
                    stop=self.signals.was_received,
                )
                self._take(result)
                bar.update()
                self._log_if_due(result, bar)
                if result.stop:
                    self._stop()
                with self.meter.paused():
                    if not progress.validated:
                        self._validate()
                    if self._checkpoint_is_due():
                        self._checkpoint()
        if self.accelerator.is_main_process:
            logger.info(
                "reconstructions: %s   curves: %s   VAE: %s   best by %s: %s",
                *(self.run.images, self.run.curves, self.run.model),
                *(config.checkpoint.best_metric, self.run.best_model),
            )
        self.trackers.finish()
        return self.run.model

    def _take(self, result: StepResult) -> None:
        """Count a step; where it was skipped, say why, and after too many in a row give up."""
        progress = self.progress
        if result.skipped and progress.skipped_in_a_row == 0:
            self.last_good = copy.copy(progress), self.meter.state()
        progress.step += 1
        progress.position += self.images_per_step
        progress.validated = not (progress.step % self.config.validate_every == 0 or progress.step == self.config.steps)
        self.meter.count_images(self.images_per_step)
        if not result.skipped:
            progress.skipped_in_a_row = 0
            for values in result.values:
                self.meter.add(**values)
            return
        reason = self._who(result)
        # fp16's loss scale is found by overflowing gradients now and then; that is no news
        overflow = all("grad_norm" in culprit for culprit in result.culprits)
        calibrating = self.accelerator.scaler is not None and overflow
        (logger.info if calibrating else logger.warning)("step %d is skipped: %s", progress.step, reason)
        progress.skipped_in_a_row += 1
        if progress.skipped_in_a_row == self.config.max_skipped_steps:
            self._roll_back()
            self._checkpoint()
            raise InputError(
                f"{self.config.max_skipped_steps} steps in a row had no finite loss and gradient, the last with "
                f"{reason}; the checkpoint of before, {checkpoint_name(self.progress.step)}, is kept; lower "
                "optimizer.learning_rate, take mixed_precision=no, or look at those images"
            )

    def _who(self, result: StepResult) -> str:
        """«process 1: lpips_vgg nan on a.png, b.png» of every process with a culprit.

        Gradients and the GAN's weight are the same on all processes, so they tell who only when no term does.
        """
        names = ", ".join(self.train_source.name(index) for index in result.indices)
        own = [culprit for culprit in result.culprits if not culprit.startswith(DERIVED)]
        where = f"process {self.accelerator.process_index}: "
        accused = gather_object([f"{where}{', '.join(own)} on {names}"] if own else [])
        return "; ".join(accused or gather_object([f"{where}{', '.join(result.culprits)} on {names}"]))

    def _log_if_due(self, result: StepResult, bar: tqdm) -> None:
        step = self.progress.step
        if step % self.config.log_every and step != self.config.steps:
            return
        total = len(self.train_source) + len(self.validation_source)
        stop_if_too_many_are_bad(self.bad_images, total, self.config.data.max_bad_fraction)
        metrics, rates = self.meter.averages(self.accelerator), self.meter.rates()
        self._report("train", {**metrics, **result.state, **rates})
        if "loss" in metrics:
            text = f"loss {metrics['loss']:.4f}, {rates['images_per_second']:.1f} images/s"
            bar.set_postfix_str(text, refresh=False)
        self.meter.reset()

    def _report(self, kind: str, metrics: dict[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in metrics.items()}
        if self.accelerator.is_main_process:
            self.run.log({"step": self.progress.step, **named})
        self.trackers.log(named, self.progress.step)

    def _validate(self) -> None:
        """Measure, draw, and save model/ and perhaps best_model/."""
        config, accelerator, ema = self.config, self.accelerator, self.players.ema.model
        if config.validate_raw:
            self.players.vae.eval()
            self._report("validation_raw", self._measure(self.players.vae).metrics)
            self.players.vae.train()
        result = self._measure(ema)
        self._report("validation", result.metrics)
        factors = self.factors
        if factors is None:
            batches = evaluation_batches(self.measured, config, accelerator)
            moments = measure_latents(ema, batches, accelerator, self.bad_images)
            factors = moments.factors(with_shift=config.model.measure_shift)
        progress, name = self.progress, config.checkpoint.best_metric
        value = result.metrics[name]
        best = progress.best
        other = best.get("metric") != name  # none yet, or the recipe has another one now
        improved = other or (value < best["value"] if lower_is_better(name) else value > best["value"])
        if improved:
            progress.best = {"metric": name, "value": value, "step": progress.step}
        if accelerator.is_main_process:
            for complaint in result.health.complaints():
                logger.warning("latents: %s", complaint)
            grid = draw(result, self.run, progress.step)
            self.trackers.log_image("reconstructions", grid, progress.step)
            save_model(self.run, ema, config, result, factors, progress.step, progress.position)
            if improved:
                keep_best(self.run)
        progress.validated = True

    def _measure(self, vae: AutoencoderKL) -> ValidationResult:
        batches = evaluation_batches(self.validation_source, self.config, self.accelerator)
        seed = self.config.seed if self.config.loss.reconstruction == "bce" else None
        keep = self.config.grid_images
        return validate(vae, batches, self.accelerator, self.perceptual, self.bad_images, keep, bernoulli_seed=seed)

    def _roll_back(self) -> None:
        """To before the steps skipped last; they changed nothing but the counters."""
        if self.progress.skipped_in_a_row > 0 and self.last_good is not None:
            self.progress, meter = self.last_good
            self.meter.restore(meter, self.accelerator.device)

    def _stop(self) -> None:
        self._roll_back()
        self._checkpoint()
        where = checkpoint_name(self.progress.step)
        raise self.signals.stopped(f"stopped after step {self.progress.step}; the same command continues from {where}")

    def _checkpoint_is_due(self) -> bool:
        """Not while steps are skipped: if they come to too many, the run is continued from before the first."""
        step = self.progress.step
        healthy = self.progress.skipped_in_a_row == 0
        return step == self.config.steps or (healthy and step % self.config.checkpoint.every_steps == 0)

    def _checkpoint(self) -> None:
        """Every process calls it; the main one writes, and the old ones go when the new one is whole."""
        players, accelerator = self.players, self.accelerator
        meters = gather_object([self.meter.state()])
        bad = gather_object(self.bad_images.items())
        if accelerator.is_main_process:
            weights = {name: player.network.state_dict() for name, player in players}
            state = {
                **asdict(self.progress),
                "config": plain(self.given),
                "images_per_step": self.images_per_step,
                "train_images": len(self.train_source),
                "train_names": digest_of_names(self.train_source),
                "perceptual": self.perceptual.name if self.perceptual is not None else None,
                "ema_updates": players.ema.updates,
                "lecam": players.lecam.averages,
                "loss_scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "meters": meters,
                "bad_images": sorted(set(map(tuple, bad))),
            }
            optimizers = {name: player.optimizer.state_dict() for name, player in players}
            checkpoint = Checkpoint({**weights, "ema": players.ema.model.state_dict()}, optimizers, state)
            write_checkpoint(self.run.checkpoints / checkpoint_name(self.progress.step), checkpoint)
            prune(self.run.checkpoints, self.config.checkpoint.keep_last)
        accelerator.wait_for_everyone()

    def _restore(self, folder: Path) -> None:
        """Raises: InputError when the checkpoint does not fit, before anything of it is loaded."""
        checkpoint = read_checkpoint(folder)
        state, players = checkpoint.state, self.players
        targets = {**{name: player.network for name, player in players}, "ema": players.ema.model}
        for name, network in targets.items():
            if name not in checkpoint.weights:
                if name == "discriminator":
                    continue  # a changed recipe may add one
                raise InputError(f"{folder} lacks {name}.safetensors")
            check_fit(network.state_dict(), checkpoint.weights[name], f"{folder}/{name}.safetensors")
        if state["train_images"] != len(self.train_source):
            raise InputError(
                f"data.source has {len(self.train_source)} training images and had {state['train_images']} when the "
                "run began, so its order would be another; restore them, or start anew with --overwrite=true"
            )
        changed_names = state["train_names"] != digest_of_names(self.train_source)
        trunk = self.perceptual.name if self.perceptual is not None else None
        if not self.given.checkpoint.accept_changed_config:
            if changed_names:
                raise InputError(
                    "data.source has other images than when the run began, by their names; restore them, start anew "
                    "with --overwrite=true, or continue with --checkpoint.accept_changed_config=true"
                )
            if state["perceptual"] != trunk:
                raise InputError(
                    f"the run began with {state['perceptual']} and would go on with {trunk}; give the same trunk with "
                    "loss.perceptual.weights, or continue with --checkpoint.accept_changed_config=true"
                )
        moments = self._moments_that_fit(checkpoint)
        for name, network in targets.items():
            if name in checkpoint.weights:
                network.load_state_dict(checkpoint.weights[name])
        for name, player in players:
            if name in moments:
                settings = [
                    {k: v for k, v in group.items() if k not in ("params", "lr")}
                    for group in player.optimizer.param_groups
                ]
                player.optimizer.load_state_dict(moments[name])
                for group, own in zip(player.optimizer.param_groups, settings, strict=True):
                    group.update(own)  # the recipe's, where it was changed, and not the checkpoint's
        players.ema.updates = state["ema_updates"]
        players.lecam.averages = tuple(state["lecam"]) if state["lecam"] is not None else None
        if self.accelerator.scaler is not None and state["loss_scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["loss_scaler"])
        meters, rank = state["meters"], self.accelerator.process_index
        if len(meters) == self.accelerator.num_processes:
            self.meter.restore(meters[rank], self.accelerator.device)
        self.bad_images.add([(name, reason) for name, reason in state["bad_images"]])
        self.progress = Progress(**{key: state[key] for key in asdict(self.progress)})
        logger.info("continuing from %s", folder)

    def _moments_that_fit(self, checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
        """The optimizers' states; none where the recipe now has an optimizer that cannot take them.

        Raises: InputError when other parameters train than did.
        """
        kinds = {self.config.optimizer.kind, checkpoint.state["config"]["optimizer"]["kind"]}
        if len(kinds) > 1 and "adamw_8bit" in kinds:
            logger.warning("optimizer.kind is another: its moments start anew")
            return {}
        for name, player in self.players:
            if name in checkpoint.optimizers:
                groups = checkpoint.optimizers[name]["param_groups"]
                before, now = sum(len(group["params"]) for group in groups), len(player.trained)
                if before != now:
                    raise InputError(
                        f"{now} parameters of the {name} train and {before} did when the run began; start a new run "
                        "from its model with fine_tune.source"
                    )
        return checkpoint.optimizers

    def _probe(self, vae: AutoencoderKL) -> list[str]:
        """The same images on every process, so all come to the same findings."""
        images = training_images(self.train_source, self.config)
        order = SampleOrder(len(self.train_source), self.config.seed)
        samples = [images[order.at(i)] for i in range(min(self.config.batch_size, 4))]
        self.bad_images.add([pair for sample in samples for pair in sample["bad"]])
        batch = torch.stack([sample["image"] for sample in samples]).to(self.accelerator.device)
        seeds = torch.tensor([sample["noise_seed"] for sample in samples])
        labels = torch.tensor([sample["label"] for sample in samples]) if images.labels is not None else None
        return probe(vae, batch, seeds, self.config, self.perceptual, labels)

    def _batches(self) -> Generator[Batch, None, None]:
        """This process's micro-batches of the steps to do, their bad images noted. Closing it ends the loader."""
        steps = self.config.steps - self.progress.step
        start = self.progress.position
        for batch in training_batches(self.train_source, self.config, self.accelerator, start=start, steps=steps):
            self.bad_images.add(batch["bad"])
            yield batch

    def _check_best_metric(self) -> None:
        known = ["psnr", "ssim"] + ([self.perceptual.name] if self.perceptual is not None else [])
        known += ["nelbo"] if self.given.loss.reconstruction == "bce" else []
        name = self.given.checkpoint.best_metric
        if name not in known:
            raise InputError(f"got checkpoint.best_metric={name!r}; need one of {', '.join(known)}")

    def _recipe_for_trackers(self) -> dict[str, Any]:
        """Dotted keys, and values as trackers want them: numbers and strings."""
        flat = flatten(plain(self.config))
        return {key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in flat.items()}

    def _announce(self, vae: AutoencoderKL) -> None:
        trained = sum(p.numel() for p in vae.parameters() if p.requires_grad) / 1e6
        logger.info(
            "training %.2f M of %.2f M parameters on %d images, validating on %d; steps %d to %d of %d images; "
            "%d process(es) on %s in %s",
            trained,
            sum(p.numel() for p in vae.parameters()) / 1e6,
            len(self.train_source),
            len(self.validation_source),
            self.progress.step + 1,
            self.config.steps,
            self.images_per_step,
            self.accelerator.num_processes,
            self.accelerator.device.type,
            {"no": "fp32"}.get(self.accelerator.mixed_precision, self.accelerator.mixed_precision),
        )


def check_fit(expected: dict[str, Tensor], found: dict[str, Tensor], origin: str) -> None:
    """Raises: InputError when names or shapes differ."""
    wrong = sorted(expected.keys() ^ found.keys())
    wrong += [key for key in expected.keys() & found.keys() if expected[key].shape != found[key].shape]
    if wrong:
        raise InputError(f"{origin} does not fit the recipe's network: {len(wrong)} weights differ, such as {wrong[0]}")


def digest_of_names(source: ImageSource) -> str:
    """Of up to 10,000 names spread over the source: enough to see that images came or went."""
    step = max(1, len(source) // 10_000)
    return f"{zlib.crc32(chr(10).join(source.name(i) for i in range(0, len(source), step)).encode()):08x}"


def lower_is_better(metric: str) -> bool:
    return metric.startswith("lpips") or metric == "nelbo"


@contextmanager
def progress_bar(done: int, steps: int, show: bool) -> Iterator[tqdm]:
    """Steps done, with time left; in a log file a line now and then instead of ten a second."""
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    settings: dict[str, Any] = {"unit": "step", "disable": not show, "dynamic_ncols": True, "mininterval": seconds}
    with tqdm(total=steps, initial=done, desc="train", **settings) as bar:
        yield bar


def first_images(source: ImageSource, count: int, seed: int) -> ImageSource:
    """`count` images of `source`, spread over it by the order of the first epoch."""
    order = SampleOrder(len(source), seed)
    return subset(source, [order.at(i).index for i in range(min(count, len(source)))])
