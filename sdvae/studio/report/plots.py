"""The report's plots, as SVG that can be read on a phone.

They contain no text from outside: matplotlib would take dollar signs in a file's name for a formula.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image
from torch import Tensor

from sdvae.diffusion.probe import NoiseLevel
from sdvae.metrics.spectrum import Spectra
from sdvae.statistics import HISTOGRAM_BINS, HISTOGRAM_RANGE
from sdvae.studio.report.measure import Measured
from sdvae.studio.report.robustness import Drift

INK, MUTED, BLUE, RED = "#1b1f24", "#8b949e", "#2563b0", "#c2410c"
STYLE: Any = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "lines.linewidth": 1.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "sdvae",  # makes ids in the file reproducible
}
WIDE = (4.8, 3.0)  # inches
SMALL = (2.5, 1.9)
LATENT_LIMIT = 3.0  # scaled latents beyond ±3 get the outermost colours
NAMED_CELLS = 8  # channels; a larger correlation matrix has no numbers in its cells


def svg(draw: Callable[[Axes], None], size: tuple[float, float] = WIDE) -> bytes:
    """An SVG file with one plot.

    Args:
        draw: the function that draws the plot on the axes.
        size: width and height in inches.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="compressed")
        draw(figure.add_subplot())
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def latent_picture(z: Tensor) -> Image.Image:
    """Scaled latents of one channel, (h, w), as a picture of w x h pixels: blue below zero and red above."""
    colours = matplotlib.colormaps["RdBu_r"]((z.numpy() / LATENT_LIMIT + 1) / 2, bytes=True)  # (h, w, 4)
    return Image.fromarray(np.ascontiguousarray(colours[..., :3]))


def histogram(axes: Axes, counts: Tensor, total: int) -> None:
    """Density of the scaled latents of one channel, with that of N(0, 1) for comparison.

    Args:
        axes: the axes to draw on.
        counts: (HISTOGRAM_BINS,).
        total: number of latents, including those outside HISTOGRAM_RANGE.
    """
    edges = np.linspace(*HISTOGRAM_RANGE, HISTOGRAM_BINS + 1)
    width = edges[1] - edges[0]
    axes.stairs(counts.numpy() / (total * width), edges, fill=True, color=BLUE, alpha=0.55)
    axes.plot(edges, np.exp(-np.square(edges) / 2) / np.sqrt(2 * np.pi), color=INK, linewidth=1.2)
    axes.set(xlim=HISTOGRAM_RANGE, ylim=(0, None), yticks=[])
    axes.spines["left"].set_visible(False)


def correlation(axes: Axes, matrix: Tensor) -> None:
    """The matrix of correlations between channels, (C, C) in [-1, 1]."""
    values = matrix.numpy()
    axes.grid(False)
    image = axes.imshow(values, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.figure.colorbar(image, ax=axes, shrink=0.85)
    axes.set(xlabel="channel", ylabel="channel")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if len(values) <= NAMED_CELLS:
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if abs(value) > 0.6 else INK
            axes.text(
                column, row, f"{value:.2f}".replace("-", "−"), ha="center", va="center", color=colour, fontsize=8.5
            )


def position_map(axes: Axes, values: Tensor) -> None:
    """A value for each position, (h, w), with a colour scale."""
    axes.grid(False)
    image = axes.imshow(values.numpy(), cmap="viridis")
    axes.figure.colorbar(image, ax=axes, shrink=0.85)
    axes.set(xlabel="column", ylabel="row")


def drift_curves(axes: Axes, drift: Drift) -> None:
    """PSNR after each round trip: the mean, and thin lines for single images."""
    trips = np.arange(1, len(drift.to_original) + 1)
    for values, colour, label in (
        (drift.to_previous, BLUE, "to the trip before"),
        (drift.to_original, RED, "to the original"),
    ):
        axes.plot(trips, values.numpy(), color=colour, alpha=0.25, linewidth=0.9)
        axes.plot(trips, values.mean(dim=1).numpy(), color=colour, marker="o", markersize=3.5, label=label)
    axes.set(xlabel="round trips", ylabel="PSNR, dB", xticks=trips)
    axes.legend()


def power(axes: Axes, measured: Measured, factor: int) -> None:
    """The spectra of originals and reconstructions, log-log.

    Args:
        axes: the axes to draw on.
        measured: the measurements with the spectra.
        factor: the compression ratio; a dashed line marks the highest frequency that the grid of latents can hold.
    """
    axes.loglog(_frequencies(measured), measured.originals.numpy(), color=INK, label="originals")
    axes.loglog(_frequencies(measured), measured.reconstructions.numpy(), color=RED, label="reconstructions")
    axes.axvline(1 / (2 * factor), color=MUTED, linewidth=1, linestyle="--")
    axes.set(xlabel="cycles a pixel", ylabel="power")
    _plain_ticks(axes.xaxis)
    axes.legend(loc="lower left")


def power_ratio(axes: Axes, measured: Measured, factor: int) -> None:
    """The reconstructions' power divided by the originals'. The arguments are those of `power`."""
    axes.loglog(_frequencies(measured), (measured.reconstructions / measured.originals).numpy(), color=RED)
    axes.axhline(1, color=INK, linewidth=1)
    axes.axvline(1 / (2 * factor), color=MUTED, linewidth=1, linestyle="--")
    axes.set(xlabel="cycles a pixel", ylabel="reconstructions / originals")
    _plain_ticks(axes.xaxis)
    _plain_ticks(axes.yaxis)


def latent_spectra(axes: Axes, latents: Spectra, images: Spectra) -> None:
    """The share of the energy above each frequency, of latents and of images."""
    for spectra, colour, label in ((images, INK, "images"), (latents, RED, "latents")):
        axes.plot(spectra.frequency.numpy(), spectra.share_above.numpy(), color=colour, label=label)
    axes.set(xlabel="frequency, parts of the highest", ylabel="share of the energy above", xlim=(0, 1), ylim=(0, 1))
    axes.legend()


def noise_levels(axes: Axes, levels: Sequence[NoiseLevel]) -> None:
    """The probe's error divided by that of the linear denoiser, at each noise level."""
    ratios = [level.error / level.linear_error for level in levels]
    axes.plot([level.log_snr for level in levels], ratios, color=RED, marker="o", markersize=3.5)
    axes.axhline(1, color=INK, linewidth=1)
    axes.set(xlabel="log of signal to noise: much noise is on the left", ylabel="probe ÷ linear")


def _frequencies(measured: Measured) -> np.ndarray:
    """Of the spectra's rings, in cycles a pixel."""
    side = measured.first.shape[-1]
    return np.arange(1, side // 2 + 1) / side


def _plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis of a decade or two with 1, 2, 5, 10, … instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
