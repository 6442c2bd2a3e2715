"""The training loop.

The order of samples is a function of (seed, epoch), a run's position is the number of samples that all
processes consumed together, and augmentation and posterior noise are keyed on (seed, epoch, index). So N
processes with batch B/N see what one process with batch B sees, and average to the same gradient.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    gather_object,
    parse_flag_from_env,
)
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from sdvae.data import BadImages, ImageSource, SampleOrder, subset
from sdvae.errors import InputError
from sdvae.evaluation import Perceptual, load_perceptual
from sdvae.model import AutoencoderKL
from sdvae.training.batches import evaluation_batches, open_sources, stop_if_too_many_are_bad, training_batches
from sdvae.training.config import ModelConfig, OptimizerConfig, TrainConfig
from sdvae.training.ema import WeightAverage
from sdvae.training.initialise import initialise
from sdvae.training.meter import Meter
from sdvae.training.objective import kl_weight_at, loss_terms, posterior_generators
from sdvae.training.precision import resolve_precision
from sdvae.training.run_folder import RunFolder
from sdvae.training.save import draw, save_model
from sdvae.training.validation import measure_latents, validate

logger = logging.getLogger(__name__)

MAX_SKIPPED_STEPS = 20  # halvings of fp16's loss scale from 65536: far below 1, nothing is left to try


def train(config: TrainConfig) -> Path:
    """Run a recipe from the first step to the saved model.

    Under `torchrun` or `accelerate launch`, every process calls it.

    Returns: the folder of the saved VAE, `<output_dir>/model`.
    Raises: InputError for what is wrong with the recipe or the data, before the first step where possible.
    """
    accelerator = build_accelerator(config)
    run = RunFolder(config.output_dir)
    run.check_free(config.overwrite)
    train_source, validation_source = open_sources(config.data, config.seed)
    measured = first_images(train_source, config.scale_images, config.seed)
    num_images = len(train_source) + len(validation_source)
    bad_images = BadImages()

    torch.manual_seed(config.seed)  # of the initial weights: the same on every process
    vae = build_vae(config.model).to(accelerator.device)
    if config.channels_last:
        vae.to(memory_format=torch.channels_last)
    perceptual = build_perceptual(config, accelerator)
    ema = WeightAverage(vae, config.optimizer.ema_decay)  # a copy, so before anything wraps the original
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    if config.compile:
        vae.encoder.compile()
        vae.decoder.compile()
    adamw, scheduler = build_optimizer(vae, config.optimizer, config.steps)
    model, optimizer = accelerator.prepare(vae, adamw)

    accelerator.wait_for_everyone()  # every process has found the run folder free
    if accelerator.is_main_process:
        run.create(config)
    if config.trackers:
        accelerator.init_trackers(run.TRACKER, config=_scalars(config))
    micro_steps = config.gradient_accumulation_steps
    global_micro_batch = config.batch_size * accelerator.num_processes
    logger.info(
        "training %.2f M parameters on %d images, validating on %d; %d steps of %d images; %d process(es) on %s in %s",
        sum(p.numel() for p in vae.parameters()) / 1e6,
        len(train_source),
        len(validation_source),
        config.steps,
        global_micro_batch * micro_steps,
        accelerator.num_processes,
        accelerator.device.type,
        {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision),
    )

    def report(step: int, kind: str, metrics: dict[str, float]) -> None:
        named = {f"{kind}/{name}": value for name, value in metrics.items()}
        accelerator.log(named, step=step)
        if accelerator.is_main_process:
            run.log({"step": step, **named})

    def validate_and_save(step: int) -> None:
        batches = evaluation_batches(validation_source, config, accelerator)
        result = validate(ema.model, batches, accelerator, perceptual, bad_images, keep=config.grid_images)
        report(step, "validation", result.metrics)
        batches = evaluation_batches(measured, config, accelerator)
        moments = measure_latents(ema.model, batches, accelerator, bad_images)
        if accelerator.is_main_process:
            grid = draw(result, run, step)
            log_image(accelerator, "reconstructions", grid, step)
            save_model(run, ema.model, config, result, moments, step, step * micro_steps * global_micro_batch)

    batches = iter(training_batches(train_source, config, accelerator))
    meter = Meter()
    skipped_in_a_row = 0
    with progress_bar(config.steps, show=accelerator.is_main_process) as progress:
        for step in range(config.steps):
            kl_weight = kl_weight_at(step, config.loss)
            for micro_step in range(micro_steps):
                with meter.waiting():
                    batch = next(batches)
                bad_images.add(batch["bad"])
                images = batch["image"].to(accelerator.device, non_blocking=True)
                if config.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                # DDP sums gradients over processes in the backward pass of the last micro-step only
                with nullcontext() if micro_step == micro_steps - 1 else accelerator.no_sync(model):
                    output = model(images, sample_posterior=True, generator=posterior_generators(batch["noise_seed"]))
                    terms = loss_terms(images, output.sample, output.posterior, config.loss, perceptual)
                    loss = terms.total(config.loss, kl_weight)
                    accelerator.backward(loss / micro_steps)
                meter.add(global_micro_batch, loss=loss, **terms.logged(perceptual))
            grad_norm = accelerator.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip_norm)
            # fp16's loss scaler skips such a step by itself and lowers its scale
            if accelerator.scaler is None and not torch.isfinite(grad_norm):
                parts = ", ".join(f"{name} {value:.4g}" for name, value in terms.logged(perceptual).items())
                raise InputError(
                    f"the gradient's norm became {grad_norm.item()} in step {step + 1} ({parts}); "
                    "lower optimizer.learning_rate or lengthen optimizer.warmup_steps"
                )
            learning_rate = scheduler.get_last_lr()[0]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if accelerator.optimizer_step_was_skipped:
                skipped_in_a_row += 1
                if skipped_in_a_row == MAX_SKIPPED_STEPS:
                    raise InputError(
                        f"{MAX_SKIPPED_STEPS} steps in a row had no finite gradient in fp16, up to step {step + 1}; "
                        "set mixed_precision=bf16 or lower optimizer.learning_rate"
                    )
            else:
                skipped_in_a_row = 0
                meter.add(grad_norm=grad_norm)
                scheduler.step()
                ema.update(vae)
            progress.update()

            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                stop_if_too_many_are_bad(bad_images, num_images, config.data.max_bad_fraction)
                metrics, rates = meter.averages(accelerator), meter.rates()
                state = {"learning_rate": learning_rate, "kl_weight": kl_weight}
                report(done, "train", {**metrics, **state, **rates})
                progress.set_postfix_str(
                    f"loss {metrics['loss']:.4f}, {rates['images_per_second']:.1f} images/s", refresh=False
                )
                meter.reset()
            if done % config.validate_every == 0 and done < config.steps:
                with meter.paused():
                    validate_and_save(done)

    validate_and_save(config.steps)
    stop_if_too_many_are_bad(bad_images, num_images, config.data.max_bad_fraction)
    if accelerator.is_main_process:
        logger.info("reconstructions: %s   curves: %s   VAE: %s", run.images, run.curves, run.model)
    accelerator.end_training()
    return run.model


def progress_bar(steps: int, show: bool) -> tqdm:
    """Steps done, with time left; in a log file a line now and then instead of ten a second."""
    seconds = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(total=steps, desc="train", unit="step", disable=not show, dynamic_ncols=True, mininterval=seconds)


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Raises: InputError when a tracker is missing, or the launcher's processes would not train together."""
    available = sorted(tracker.value for tracker in get_available_trackers())
    for name in config.trackers:
        if name not in available:
            raise InputError(
                f"tracker {name!r} is not installed; need one of {', '.join(available)}, or pip install it"
            )
    # Left to itself, accelerate runs torchrun's N processes as N separate trainings on a machine without a GPU.
    use_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision=resolve_precision(config.mixed_precision, "cpu" if use_cpu else _accelerator_type()),
        log_with=list(config.trackers) or None,
        project_dir=RunFolder(config.output_dir).root,
        # Ours is the only division by accumulation steps; accelerate's would come on top, from its launcher's option.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise InputError(
            f"the launcher started {launched} processes, of which {accelerator.num_processes} train together; "
            "on CPUs launch with ACCELERATE_USE_CPU=true torchrun --nproc_per_node N"
        )
    return accelerator


def _accelerator_type() -> str:
    device = torch.accelerator.current_accelerator()
    assert device is not None  # torch.accelerator.is_available() was true
    return device.type


def build_vae(config: ModelConfig) -> AutoencoderKL:
    """A new VAE; its scaling factor is measured when training ends."""
    levels = len(config.block_out_channels)
    vae = AutoencoderKL(
        in_channels=config.in_channels,
        out_channels=config.in_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        act_fn=config.act_fn,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        sample_size=config.sample_size,
        force_upcast=config.force_upcast,
        use_quant_conv=config.use_quant_conv,
        use_post_quant_conv=config.use_quant_conv,
        mid_block_add_attention=config.mid_block_add_attention,
    )
    if config.initialisation == "pass_through":
        initialise(vae)
    return vae


def build_perceptual(config: TrainConfig, accelerator: Accelerator) -> Perceptual | None:
    if config.loss.lpips_weight == 0:
        return None
    settings = config.loss.perceptual
    with accelerator.local_main_process_first():  # the others find the download in torch hub's cache
        perceptual = load_perceptual(settings.net, settings.weights, settings.heads, settings.allow_random)
    names = set(gather_object([perceptual.name]))
    if len(names) > 1:  # one process could download the trunk, another could not
        raise InputError(
            f"the processes have different trunks: {', '.join(sorted(names))}; give loss.perceptual.weights"
        )
    return perceptual.to(accelerator.device)


def build_optimizer(vae: nn.Module, config: OptimizerConfig, steps: int) -> tuple[torch.optim.AdamW, Any]:
    adamw = torch.optim.AdamW(
        vae.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    name = {"constant": "constant_with_warmup", "cosine": "cosine"}[config.schedule]
    return adamw, get_scheduler(name, adamw, num_warmup_steps=config.warmup_steps, num_training_steps=steps)


def first_images(source: ImageSource, count: int, seed: int) -> ImageSource:
    """`count` images of `source`, spread over it by the order of the first epoch."""
    order = SampleOrder(len(source), seed)
    return subset(source, [order.at(i).index for i in range(min(count, len(source)))])


def log_image(accelerator: Accelerator, name: str, image: Image.Image, step: int) -> None:
    """Show a picture in every tracker that takes pictures."""
    for tracker in accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(image)[None]}, step=step, **layout)


def _scalars(config: TrainConfig) -> dict[str, Any]:
    """The recipe with dotted keys, as trackers want it: numbers and strings."""

    def walk(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value if isinstance(value, (int, float, str, bool)) else str(value)

    return dict(walk(dataclasses.asdict(config)))
