"""The page of the report: a single HTML file that needs no network, no other file and no framework."""

from __future__ import annotations

import base64
import datetime
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import jinja2
import torch
from PIL import Image

from sdvae.alpha import drawn
from sdvae.data import to_image
from sdvae.evaluation.diffusability import Diffusability
from sdvae.io import version
from sdvae.metrics.image import PEAK_PSNR
from sdvae.metrics.table import DIFFUSABILITY_COLUMNS, direction, figure_of, means, written
from sdvae.model import AnyAutoencoder
from sdvae.model.kinds import class_name
from sdvae.pictures import AMPLIFICATION, draw_curve, draw_log_variances
from sdvae.statistics import HISTOGRAM_RANGE
from sdvae.studio.report import plots
from sdvae.studio.report.gallery import webp
from sdvae.studio.report.measure import Measured
from sdvae.studio.report.plots import SMALL, WIDE, svg
from sdvae.studio.report.robustness import SHOWN_TRIPS, STRIPS_NAME, Delta, Drift, computes_natively

STRIPS = 2  # images whose round trips are shown
FACTOR_TOLERANCE = 0.1  # if the scaling factor differs from 1/std by more than this share, the page says so


@dataclass(frozen=True)
class Subject:
    """The subject of the report.

    Attributes:
        name: the VAE's name.
        model: the VAE.
        data: name of the images' source.
        resolution: side of the images in pixels.
        lpips_name: name of the perceptual distance; None if it was not measured.
        bad_images: (name, reason) of images that could not be read.
        curves: the result of `read_curves`; empty if there is no run.
        recipe: text of the run's config.yaml, or None.
    """

    name: str
    model: AnyAutoencoder
    data: str
    resolution: int
    lpips_name: str | None
    bad_images: Sequence[tuple[str, str]]
    curves: dict[str, tuple[list[int], list[float]]]
    recipe: str | None


def render(
    subject: Subject,
    measured: Measured,
    drift: Drift,
    deltas: Sequence[Delta],
    diffusability: Diffusability | None = None,
) -> str:
    """The page's HTML. The template escapes all names, which may come from anywhere."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sdvae.studio.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_uri"] = _uri
    environment.filters["signed"] = lambda number: f"{number:+.2f}".replace("-", "−")
    return environment.get_template("template.html.j2").render(
        subject=subject,
        measured=measured,
        versions=_versions(subject.model),
        amplification=AMPLIFICATION,
        **_head(subject, measured),
        **_reconstructions(measured),
        **_latents(subject.model, measured),
        **_drift(measured, drift),
        deltas=deltas,
        strips_are_measured=any(delta.name == STRIPS_NAME for delta in deltas),
        native=computes_natively(subject.model.device),
        peak_psnr=PEAK_PSNR,
        spectra=_spectra(subject, measured),
        diffusability=None if diffusability is None else _diffusability(diffusability),
        curves={
            name: _plot(partial(draw_curve, name=name, steps=steps, values=values), SMALL)
            for name, (steps, values) in subject.curves.items()
        },
    )


def _versions(model: AnyAutoencoder) -> str:
    device = model.device
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() or device.type
    return (
        f"sdvae {version()}, torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"Python {platform.python_version()}, on {device.type} ({kind})"
    )


def _head(subject: Subject, measured: Measured) -> dict[str, Any]:
    config, moments = subject.model.config, measured.health.moments
    channels = config.in_channels
    names = ("grey",) if channels == 1 else ("red", "green", "blue", "alpha")[:channels]
    by_channel = config.get("latents_mean") is not None and config.get("latents_std") is not None
    scaled_std = measured.maps.scaled_moments.std  # 1 if the VAE's scaling is right for these images
    return {
        "date": datetime.datetime.now().astimezone(),
        "parameters": sum(parameter.numel() for parameter in subject.model.parameters()),
        "latent_shape": tuple(measured.first_latents.shape[1:]),
        "bias": {name: measured.mean(f"bias_{channel}") for channel, name in enumerate(names)},
        "class_name": class_name(subject.model),
        "by_channel": by_channel,
        "scaled_std": scaled_std,
        "measured_factor": 1 / moments.std if moments.std > 0 else None,
        "factor_is_off": not scaled_std > 0 or abs(1 / scaled_std - 1) > FACTOR_TOLERANCE,
    }


def _reconstructions(measured: Measured) -> dict[str, Any]:
    """The worst and the best images, and the pictures on the page."""
    gallery = measured.gallery
    worst, best = gallery.extremes()
    return {
        "ranked_by": "PSNR" if gallery.ranked_by == "psnr" else gallery.ranked_by,
        "worst": worst,
        "best": best,
        "shown": gallery.shown(),
    }


def _latents(model: AnyAutoencoder, measured: Measured) -> dict[str, Any]:
    health, maps = measured.health, measured.maps
    moments = health.moments
    elements = int(moments.sums[0, 0])
    kl, mean, std = (values.tolist() for values in (health.channel_kl, moments.channel_mean, moments.channel_std))
    scaled = maps.scaled_moments
    scaled_mean, scaled_std = scaled.channel_mean.tolist(), scaled.channel_std.tolist()
    channels = [
        {
            "kl": kl[c] if health.has_variance else None,
            "mean": mean[c],
            "std": std[c],
            "scaled_mean": scaled_mean[c],
            "scaled_std": scaled_std[c],
            "outside": int(maps.outside[c]) / elements,
            "histogram": _plot(partial(plots.histogram, counts=maps.histogram[c], total=elements), SMALL),
        }
        for c in range(model.config.latent_channels)
    ]
    return {
        "complaints": health.complaints(),
        "latent_rows": [
            {
                "image": _image_uri(to_image(image)),
                "channels": [_image_uri(plots.latent_picture(channel)) for channel in z],
            }
            for image, z in zip(drawn(measured.first), measured.first_latents, strict=True)
        ],
        "latent_limit": plots.LATENT_LIMIT,
        "histogram_limit": HISTOGRAM_RANGE[1],
        "channels": channels,
        "correlation": _plot(partial(plots.correlation, matrix=maps.correlation(moments))),
        "covariance": maps.covariance(moments).tolist(),
        "kl_map": _plot(partial(plots.position_map, values=maps.kl())) if health.has_variance else None,
        "std_map": _plot(partial(plots.position_map, values=maps.std(moments))),
        "log_variances": _plot(partial(draw_log_variances, health=health, colour=plots.BLUE, clamped=plots.RED))
        if health.has_variance
        else None,
    }


def _drift(measured: Measured, drift: Drift) -> dict[str, Any]:
    to_original, to_previous = (values.mean(dim=1).tolist() for values in (drift.to_original, drift.to_previous))
    originals, shown = drawn(measured.first), {n: drawn(images) for n, images in drift.shown.items()}
    return {
        "drift_plot": _plot(partial(plots.drift_curves, drift=drift)),
        "trips": list(zip(range(1, len(to_original) + 1), to_original, to_previous, strict=True)),
        "drift_images": len(measured.first),
        "strips": [
            [("original", _image_uri(to_image(originals[i])), None)]
            + [(f"×{n}", _image_uri(to_image(shown[n][i])), float(drift.to_original[n - 1, i])) for n in SHOWN_TRIPS]
            for i in range(min(STRIPS, len(measured.first)))
        ],
    }


def _spectra(subject: Subject, measured: Measured) -> dict[str, Any]:
    factor = subject.model.spatial_compression_ratio
    return {
        "power": _plot(partial(plots.power, measured=measured, factor=factor)),
        "ratio": _plot(partial(plots.power_ratio, measured=measured, factor=factor)),
        "edge": 1 / (2 * factor),
        "factor": factor,
    }


def _diffusability(found: Diffusability) -> dict[str, Any]:
    """The figures as (name, number, what it is, which is better), and the plots."""
    result = {**found.figures, "means": means(list(found.per_image.values()))}
    rows = [
        (column.title, written(number, column.form), column.about, direction(column))
        for column in DIFFUSABILITY_COLUMNS
        if (number := figure_of(result, column.key)) is not None
    ]
    probe = found.probe
    return {
        "rows": rows,
        "images": len(found.per_image),
        "image_slope": found.figures["image_slope"],
        "image_high_share": found.figures["image_high_share"],
        "held_out": 0 if probe is None else len(probe.held_out),
        "spectra": _plot(partial(plots.latent_spectra, latents=found.spectrum, images=found.image_spectrum)),
        "levels": None if probe is None else _plot(partial(plots.noise_levels, levels=probe.levels)),
    }


def _plot(draw: Any, size: tuple[float, float] = WIDE) -> str:
    return _uri(svg(draw, size), "svg+xml")


def _image_uri(image: Image.Image) -> str:
    return _uri(webp(image), "webp")


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
