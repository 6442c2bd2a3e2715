"""`sdvae report`: measure a VAE, which may be that of a run folder, and write the page."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sdvae.data import BadImages, EvaluationImages, ReadOptions, evaluation_loader, open_source
from sdvae.errors import InputError
from sdvae.evaluation.diffusability import Diffusability, check_count, check_size, collect, fault_of, warn_of_few
from sdvae.evaluation.diffusability import measure as measure_diffusability
from sdvae.io import make_folder, printable, replacing
from sdvae.metrics import SMALLEST_SIDE
from sdvae.metrics.perceptual import Perceptual, perceptual_if_any
from sdvae.model import AnyAutoencoder
from sdvae.pictures import read_curves
from sdvae.roundtrip import check_image_channels, compute_device
from sdvae.runtime import accelerator_type
from sdvae.studio.report.measure import BATCH_SIZE, SAMPLE_SEED, Measured, measure
from sdvae.studio.report.page import Subject, render
from sdvae.studio.report.robustness import deltas, drift
from sdvae.studio.settings import ReportOptions
from sdvae.training.data import open_sources, reading_of
from sdvae.training.recipe import read_recipe
from sdvae.training.run_folder import RunFolder
from sdvae.weights import load_autoencoder

logger = logging.getLogger(__name__)

PACKAGED = "packaged VAE"
RESOLUTION = 256  # pixels, if neither the user nor a run gives a resolution


def write_report(options: ReportOptions) -> Path:
    """Measure a VAE on the first images of some data, write the page, and print its size.

    Args:
        options: the options of `sdvae report`. An existing file at `output` is replaced when the new one is complete.

    Returns:
        The written file.

    Raises:
        InputError: for a VAE, images or options that do not fit, before anything is written.
    """
    vae, subfolder, output = options.vae, options.subfolder, options.output
    if options.count < 1:
        raise InputError(f"got count={options.count}; need at least 1")
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise InputError(f"got output {output}; need the name of a file that ends in .html; see --output")
    run = _run_folder(vae)
    if run is not None and subfolder is not None:
        raise InputError(f"got subfolder={subfolder} with a run folder, whose model/ is used; leave subfolder out")
    curves = {} if run is None else read_curves(run.metrics)
    model = load_autoencoder(vae if run is None else run.model, subfolder=subfolder, dtype=torch.float32)
    check_image_channels(model, vae, alpha=True)
    images, data = _photographs(run, options, model.config.in_channels)
    perceptual = perceptual_if_any(options.lpips, options.lpips_weights, options.lpips_heads)
    bad_images = BadImages()
    if options.diffusability:
        check_size(model, "this VAE", images.resolution)
        check_count(min(options.count, len(images)))
    make_folder(output.parent)

    measured = _measured(model, images, options.count, perceptual, bad_images)
    learned = _diffusability(model, images, options) if options.diffusability else None
    subject = Subject(
        name=PACKAGED if vae is None else printable(_name(vae)),
        model=model,
        data=printable(data),
        resolution=images.resolution,
        lpips_name=None if perceptual is None else perceptual.name,
        bad_images=[(printable(name), reason) for name, reason in bad_images.items()],
        curves=curves,
        recipe=None if run is None else run.config.read_text(encoding="utf-8"),
    )
    logger.info("repeated round trips, half precision and strips, of the first %d images", len(measured.first))
    first = measured.first.to(model.device)
    page = render(subject, measured, drift(model, first), deltas(model, first), learned).encode()
    with replacing(output) as temporary:
        temporary.write_bytes(page)
    print(f"wrote {output}: {measured.images} images, {len(page) / 1e6:.1f} MB")
    return output


def _run_folder(vae: str | None) -> RunFolder | None:
    """The run folder, if `vae` is one.

    Raises:
        InputError: for a run that has not saved a VAE yet.
    """
    if vae is None:
        return None
    run = RunFolder(vae)
    if not (run.config.is_file() and run.metrics.is_file()):
        return None
    if not run.model.is_dir():
        raise InputError(f"{run.root} has no model/ yet; need a run that has validated once; wait for its validation")
    return run


def _photographs(run: RunFolder | None, options: ReportOptions, channels: int) -> tuple[EvaluationImages, str]:
    """The images to reconstruct, and the name of their source for the page.

    They come from `options.data`, by default from those that the run held out, or from scikit-image if there is no run.
    """
    data = "skimage" if options.data is None and run is None else options.data
    color, resolution = options.color, options.resolution
    if run is None:
        reading = ReadOptions(color=color or "srgb")
        resolution = RESOLUTION if resolution is None else resolution
    else:
        recipe = read_recipe(run.config)
        reading = reading_of(recipe) if data is None else ReadOptions(color=recipe.data.color)
        reading = reading if color is None else dataclasses.replace(reading, color=color)
        resolution = recipe.data.evaluation_resolution if resolution is None else resolution
    if resolution < SMALLEST_SIDE:
        raise InputError(f"got resolution={resolution}; need at least {SMALLEST_SIDE} for SSIM")
    if data is not None:
        source, name = open_source(data), data
    else:
        _, source = open_sources(recipe.data, recipe.seed)
        name = recipe.data.validation_source or f"{recipe.data.source} (held out of training)"
    return EvaluationImages(source, resolution, dataclasses.replace(reading, channels=channels)), name


def _measured(
    model: AnyAutoencoder, images: EvaluationImages, count: int, perceptual: Perceptual | None, bad_images: BadImages
) -> Measured:
    """Move VAE and LPIPS to the accelerator, if there is one, and measure there."""
    device = torch.device(accelerator_type() or "cpu")
    model.to(device)  # type: ignore[arg-type]
    if perceptual is not None:
        perceptual.to(device)
    return measure(model, _batches(images, count, "reconstructing"), perceptual, bad_images)


def _diffusability(model: AnyAutoencoder, images: EvaluationImages, options: ReportOptions) -> Diffusability | None:
    """How well a diffusion model can learn the latents; None, with a warning, if they have a fault."""
    batches = _batches(images, options.count, "encoding")
    found = collect(model, (batch for batch in batches if batch["name"]), SAMPLE_SEED)
    check_count(len(found))
    fault = fault_of(found)
    if fault is not None:
        logger.warning("diffusability is left out: %s", fault)
        return None
    warn_of_few(len(found))
    device = compute_device(model)
    return measure_diffusability(
        found, probe_steps=options.probe_steps, seed=SAMPLE_SEED, device=device, name="diffusability"
    )


def _batches(images: EvaluationImages, count: int, name: str) -> Iterator[dict[str, Any]]:
    """Batches of the first images, with a progress bar."""
    loader = evaluation_loader(images, range(min(count, len(images))), batch_size=BATCH_SIZE, num_workers=0)
    yield from tqdm(loader, name, unit="batch", file=sys.stderr, leave=False)


def _name(vae: str) -> str:
    """The name of a VAE at a path: «quickstart» for runs/quickstart/model. An id on the hub is returned unchanged."""
    path = Path(vae).expanduser()
    if not path.exists():
        return vae
    path = path.resolve()
    return path.parent.name if path.name in ("model", "best_model", "vae") else path.name
