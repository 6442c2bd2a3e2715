"""From a VAE, or a run folder, to the file."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from sdvae.cli.parsing import parse_train_config
from sdvae.data import BadImages, EvaluationImages, ImageSource, evaluation_loader, open_source
from sdvae.errors import InputError
from sdvae.io import make_folder, replacing, utf8
from sdvae.metrics.perceptual import perceptual_if_any
from sdvae.model import AutoencoderKL
from sdvae.pictures import read_curves
from sdvae.reconstruct import SMALLEST_SIDE
from sdvae.roundtrip import check_image_channels
from sdvae.runtime import accelerator_type
from sdvae.studio.report.measure import BATCH_SIZE, measure
from sdvae.studio.report.page import Subject, render
from sdvae.studio.report.robustness import deltas, drift
from sdvae.training.data import open_sources
from sdvae.training.run_folder import RunFolder
from sdvae.weights import load_vae

logger = logging.getLogger(__name__)

PACKAGED = "packaged VAE"
RESOLUTION = 256  # pixels, where neither the user nor a run says another


@dataclass(frozen=True)
class Photographs:
    """What is reconstructed."""

    source: ImageSource
    name: str
    resolution: int
    min_side: int | None


def write_report(
    vae: str | None,
    *,
    output: Path,
    data: str | None = None,
    count: int = 24,
    resolution: int | None = None,
    subfolder: str | None = None,
    lpips: str = "vgg",
    lpips_weights: str | None = None,
    lpips_heads: str = "lpips",
) -> Path:
    """Measure a VAE on the first images of some data, write the page, and print its size.

    Args:
        vae: whatever `load_vae` reads, or a run folder of the trainer, whose model/ is taken; None takes the
            VAE of this package.
        output: the HTML file. It stays what it was until the new one is whole.
        data: whatever `open_source` reads; by default scikit-image's photographs, and for a run those that it
            held out.
        resolution: side of the centre crops in pixels; by default 256, and for a run that of its validation.
        lpips: "vgg", "alex", "squeeze" or "none". Where its trunk cannot be downloaded, LPIPS is left out.
        lpips_weights, lpips_heads: as for `load_perceptual`.

    Raises: InputError for a VAE, images or options that do not fit, before anything is written.
    """
    if count < 1:
        raise InputError(f"got count={count}; need at least 1")
    if output.suffix.lower() not in (".html", ".htm") or output.is_dir():
        raise InputError(f"got output {output}; need the name of a file that ends in .html; see --output")
    run = _run_folder(vae)
    if run is not None and subfolder is not None:
        raise InputError(f"got subfolder={subfolder} with a run folder; its model/ is taken; leave it out")
    photographs = _photographs(run, data, resolution)
    curves = {} if run is None else read_curves(run.metrics)
    model = load_vae(vae if run is None else run.model, subfolder=subfolder, dtype=torch.float32)
    check_image_channels(model, vae)
    _check_resolution(photographs.resolution, model)
    perceptual = perceptual_if_any(lpips, lpips_weights, lpips_heads)
    make_folder(output.parent)

    device = torch.device(accelerator_type() or "cpu")
    model.to(device)  # type: ignore[arg-type]
    if perceptual is not None:
        perceptual.to(device)
    images = EvaluationImages(
        photographs.source, photographs.resolution, model.config.in_channels, min_side=photographs.min_side
    )
    indices = range(min(count, len(images)))
    loader = evaluation_loader(images, indices, batch_size=BATCH_SIZE, num_workers=0)
    bad_images = BadImages()
    batches = tqdm(loader, "reconstructing", unit="batch", file=sys.stderr, leave=False)
    measured = measure(model, batches, perceptual, device, bad_images)
    logger.info("round trips, half precision and strips, on the first %d images", len(measured.first))
    first = measured.first.to(device)
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
    page = utf8(render(subject, measured, drift(model, first), deltas(model, first))).encode()
    with replacing(output) as temporary:
        temporary.write_bytes(page)
    print(f"wrote {output}: {measured.images} images, {len(page) / 1e6:.1f} MB")
    return output


def _run_folder(vae: str | None) -> RunFolder | None:
    """Raises: InputError for a run that has not saved a VAE yet."""
    if vae is None:
        return None
    run = RunFolder(vae)
    if not (run.config.is_file() and run.metrics.is_file()):
        return None
    if not run.model.is_dir():
        raise InputError(f"{run.root} has no model/ yet; need a run that has validated once; wait for its validation")
    return run


def _photographs(run: RunFolder | None, data: str | None, resolution: int | None) -> Photographs:
    """Those that were asked for, or those that the run held out, or scikit-image's."""
    if run is None:
        data = "skimage" if data is None else data
        return Photographs(open_source(data), data, RESOLUTION if resolution is None else resolution, None)
    config = parse_train_config(["--config", str(run.config)])
    resolution = config.data.evaluation_resolution if resolution is None else resolution
    if data is not None:
        return Photographs(open_source(data), data, resolution, None)
    _, held_out = open_sources(config.data, config.seed)
    name = config.data.validation_source or f"{config.data.source} (held out of training)"
    return Photographs(held_out, name, resolution, config.data.min_side)


def _check_resolution(resolution: int, vae: AutoencoderKL) -> None:
    factor = vae.spatial_compression_ratio
    if resolution < SMALLEST_SIDE or resolution % factor:
        raise InputError(
            f"got resolution={resolution}; need a multiple of {factor}, at least {SMALLEST_SIDE}: SSIM's window has 11"
        )


def _name(vae: str) -> str:
    """The last part of a path that says something: «quickstart» of runs/quickstart/model; a hub id as it is."""
    path = Path(vae).expanduser()
    if not path.exists():
        return vae
    path = path.resolve()
    return path.parent.name if path.name in ("model", "best_model", "vae") else path.name
