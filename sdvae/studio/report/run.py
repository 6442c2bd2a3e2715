"""`sdvae report`: measure a VAE, which may be that of a run folder, and write the page."""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sdvae.data import BadImages, EvaluationImages, ImageSource, ReadOptions, evaluation_loader, open_source
from sdvae.data.reading import Color
from sdvae.errors import InputError
from sdvae.io import make_folder, replacing, utf8
from sdvae.metrics import SMALLEST_SIDE
from sdvae.metrics.perceptual import Perceptual, perceptual_if_any
from sdvae.model import AutoencoderKL
from sdvae.pictures import read_curves
from sdvae.roundtrip import check_image_channels
from sdvae.runtime import accelerator_type
from sdvae.studio.report.measure import BATCH_SIZE, Measured, measure
from sdvae.studio.report.page import Subject, render
from sdvae.studio.report.robustness import deltas, drift
from sdvae.training.data import open_sources, reading_of
from sdvae.training.recipe import read_recipe
from sdvae.training.run_folder import RunFolder
from sdvae.weights import load_vae

logger = logging.getLogger(__name__)

PACKAGED = "packaged VAE"
RESOLUTION = 256  # pixels, if neither the user nor a run gives a resolution


@dataclass(frozen=True)
class Photographs:
    """The images that are reconstructed.

    Attributes:
        source: where they come from.
        name: the source's name, for the page.
        resolution: side of the centre crops in pixels.
        reading: how image files are read, except for the number of channels.
    """

    source: ImageSource
    name: str
    resolution: int
    reading: ReadOptions


def write_report(
    vae: str | None,
    *,
    output: Path,
    data: str | None = None,
    count: int = 24,
    resolution: int | None = None,
    subfolder: str | None = None,
    color: Color | None = None,
    lpips: str = "vgg",
    lpips_weights: str | None = None,
    lpips_heads: str = "lpips",
) -> Path:
    """Measure a VAE on the first images of some data, write the page, and print its size.

    Args:
        vae: a source for `load_vae`, or a run folder of the trainer, whose model/ is used; None is the VAE in this
            package.
        output: the HTML file. An existing one is replaced when the new one is complete.
        data: a source for `open_source`; by default the images that the run held out of training, or scikit-image's
            photographs if there is no run.
        count: the largest number of images.
        resolution: side of the centre crops in pixels; by default that of the run's validation, or 256 if there is no
            run.
        subfolder: folder inside the source that holds the VAE.
        color: as in `ReadOptions`; by default that of the run, or "srgb" if there is no run.
        lpips: "vgg", "alex", "squeeze" or "none". If the trunk cannot be downloaded, LPIPS is left out.
        lpips_weights: local file of the trunk, as for `load_perceptual`.
        lpips_heads: the `heads` of `load_perceptual`.

    Returns:
        The written file.

    Raises:
        InputError: for a VAE, images or options that do not fit, before anything is written.
    """
    if count < 1:
        raise InputError(f"got count={count}; need at least 1")
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise InputError(f"got output {output}; need the name of a file that ends in .html; see --output")
    run = _run_folder(vae)
    if run is not None and subfolder is not None:
        raise InputError(f"got subfolder={subfolder} with a run folder, whose model/ is used; leave subfolder out")
    photographs = _photographs(run, data, resolution, color)
    curves = {} if run is None else read_curves(run.metrics)
    model = load_vae(vae if run is None else run.model, subfolder=subfolder, dtype=torch.float32)
    check_image_channels(model, vae)
    perceptual = perceptual_if_any(lpips, lpips_weights, lpips_heads)
    make_folder(output.parent)

    bad_images = BadImages()
    measured = _measured(model, photographs, count, perceptual, bad_images)
    subject = Subject(
        name=PACKAGED if vae is None else _name(vae),
        model=model,
        data=photographs.name,
        resolution=photographs.resolution,
        lpips_name=None if perceptual is None else perceptual.name,
        bad_images=bad_images.items(),
        curves=curves,
        recipe=None if run is None else run.config.read_text(encoding="utf-8"),
    )
    logger.info("repeated round trips, half precision and strips, of the first %d images", len(measured.first))
    first = measured.first.to(model.device)
    page = utf8(render(subject, measured, drift(model, first), deltas(model, first))).encode()
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


def _photographs(run: RunFolder | None, data: str | None, resolution: int | None, color: Color | None) -> Photographs:
    """The images in `data`; by default those that the run held out, or scikit-image's if there is no run."""
    if run is None:
        data = "skimage" if data is None else data
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
        return Photographs(open_source(data), data, resolution, reading)
    _, held_out = open_sources(recipe.data, recipe.seed)
    name = recipe.data.validation_source or f"{recipe.data.source} (held out of training)"
    return Photographs(held_out, name, resolution, reading)


def _measured(
    model: AutoencoderKL,
    photographs: Photographs,
    count: int,
    perceptual: Perceptual | None,
    bad_images: BadImages,
) -> Measured:
    """Move VAE and LPIPS to the accelerator, if there is one, and measure there."""
    device = torch.device(accelerator_type() or "cpu")
    model.to(device)  # type: ignore[arg-type]
    if perceptual is not None:
        perceptual.to(device)
    reading = dataclasses.replace(photographs.reading, channels=model.config.in_channels)
    images = EvaluationImages(photographs.source, photographs.resolution, reading)
    loader = evaluation_loader(images, range(min(count, len(images))), batch_size=BATCH_SIZE, num_workers=0)
    batches = tqdm(loader, "reconstructing", unit="batch", file=sys.stderr, leave=False)
    return measure(model, batches, perceptual, bad_images)


def _name(vae: str) -> str:
    """The name of a VAE at a path: «quickstart» for runs/quickstart/model. An id on the hub is returned unchanged."""
    path = Path(vae).expanduser()
    if not path.exists():
        return vae
    path = path.resolve()
    return path.parent.name if path.name in ("model", "best_model", "vae") else path.name
