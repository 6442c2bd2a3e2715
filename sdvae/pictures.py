"""Pictures: grids of images, training curves, and plots of the latents' statistics."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sdvae.alpha import drawn
from sdvae.data import to_image
from sdvae.errors import InputError
from sdvae.model.config import LOGVAR_RANGE
from sdvae.statistics import BINS, DEAD_KL, LatentHealth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

AMPLIFICATION = 4  # factor by which the difference between original and reconstruction is amplified
GAP = 4  # pixels between tiles
CAPTION_HEIGHT = 28  # minimum height in pixels of the text above the tiles
LABEL_WIDTH = 120  # maximum width in pixels of the text left of a row


def reconstruction_grid(images: Tensor, reconstructions: Tensor) -> Image.Image:
    """A row for each image: original | reconstruction | amplified absolute difference.

    Args:
        images: (N, C, H, W) in [-1, 1], C 1, 3 or 4; values outside are clamped. Images with alpha are drawn over a
            board of squares.
        reconstructions: the same shape.
    """
    images, reconstructions = drawn(images), drawn(reconstructions)
    rows = list(zip(images, reconstructions, amplified_difference(images, reconstructions), strict=True))
    return tile_grid(rows, ["original", "reconstruction", f"{AMPLIFICATION} x |difference|"])


def student_grid(images: Tensor, teacher: Tensor, student: Tensor) -> Image.Image:
    """A row for each image: original | teacher | student | amplified absolute difference of the last two.

    Args:
        images: (N, C, H, W) in [-1, 1], C 1 or 3; values outside are clamped.
        teacher: what a VAE makes of them, the same shape.
        student: what its student makes of them, the same shape.
    """
    rows = list(zip(images, teacher, student, amplified_difference(teacher, student), strict=True))
    return tile_grid(rows, ["original", "teacher", "student", f"{AMPLIFICATION} x |teacher - student|"])


def amplified_difference(images: Tensor, reconstructions: Tensor) -> Tensor:
    """AMPLIFICATION times the absolute difference, as an image: -1, black, is no difference.

    Args:
        images: any shape, in [-1, 1]; values outside are clamped.
        reconstructions: the same shape.
    """
    return (AMPLIFICATION * (images.clamp(-1, 1) - reconstructions.clamp(-1, 1)).abs() - 1).clamp(max=1)


def tile_grid(
    tiles: Sequence[Sequence[Tensor | None]],
    columns: Sequence[str],
    *,
    rows: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    note: str = "",
) -> Image.Image:
    """Images of one size in rows and columns, with text around them.

    Every pixel of an image becomes one pixel of the picture, so that artefacts are shown exactly. A grid of
    matplotlib's subplots would resample them.

    Args:
        tiles: for each row a list of (C, H, W) float in [-1, 1], C 1, 3 or 4; None leaves a place empty.
        columns: text above each column; may be empty strings.
        rows: text left of each row.
        captions: text below each tile, in the shape of `tiles`.
        note: text below the grid.
    """
    height, width = next(tile.shape[-2:] for row in tiles for tile in row if tile is not None)
    size = min(16, max(8, width // 10))
    font = ImageFont.load_default(size=size)
    line = round(1.25 * size)

    def wrapped(texts: Sequence[str], room: float) -> tuple[list[str], int]:
        """The texts with line breaks, and the height in pixels of the one with the most lines."""
        broken = [_wrap(text, font, room) for text in texts]
        return broken, line * max((text.count("\n") + 1 for text in broken if text), default=0)

    left = 0
    labels: list[str] = []
    if rows:
        labels, _ = wrapped(rows, LABEL_WIDTH)
        left = 2 * GAP + math.ceil(max(font.getlength(part) for label in labels for part in label.split("\n")))
    headings, above = wrapped(columns, width + GAP)
    above = max(CAPTION_HEIGHT, above + 2 * GAP) if any(columns) else 0
    below = [wrapped(row, width + GAP) for row in captions] or [([], 0)] * len(tiles)
    inside = len(columns) * (width + GAP) - GAP
    remark, last = wrapped([note], left + inside - 2 * GAP)

    bottom = above + sum(height + GAP + room for _, room in below) - GAP
    grid = Image.new("RGB", (left + inside, bottom + (last + 3 * GAP if last else 0)), "white")
    draw = ImageDraw.Draw(grid)

    def write(text: str, x: float, y: float, align: Literal["left", "center"], anchor: str) -> None:
        draw.multiline_text((x, y), text, fill="black", font=font, anchor=anchor, align=align, spacing=line - size)

    for column, heading in enumerate(headings):
        write(heading, left + column * (width + GAP) + width / 2, above / 2, "center", "mm")
    top = above
    for i, (row, (texts, room)) in enumerate(zip(tiles, below, strict=True)):
        if labels:
            write(labels[i], GAP, top + height / 2, "left", "lm")
        for column, tile in enumerate(row):
            x = left + column * (width + GAP)
            if tile is not None:
                grid.paste(to_image(drawn(tile[None])[0]), (x, top))
            if texts:
                write(texts[column], x + width / 2, top + height + room / 2, "center", "mm")
        top += height + GAP + room
    if last:
        write(remark[0], GAP, bottom + 2 * GAP + last / 2, "left", "lm")
    return grid


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, room: float) -> str:
    """Break lines at spaces so that none is wider than `room` pixels. A word that is wider is broken too."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= room:
            lines[-1] = longer
            continue
        lines += [""] if lines[-1] else []
        for letter in word:
            if font.getlength(lines[-1] + letter) > room:
                lines.append("")
            lines[-1] += letter
    return "\n".join(lines)


def training_curves(metrics_file: Path, png: Path) -> None:
    """Draw the metrics of training and validation, except those of single channels.

    Args:
        metrics_file: the trainer's metrics.jsonl.
        png: the file of the picture.
    """
    from matplotlib.figure import Figure

    curves = read_curves(metrics_file)
    columns = 4
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    for i, (name, (steps, values)) in enumerate(curves.items()):
        axes = figure.add_subplot(rows, columns, i + 1)
        draw_curve(axes, name, steps, values)
        axes.set_title(name, fontsize=10)
    figure.savefig(png, dpi=110)


def read_curves(metrics_file: Path) -> dict[str, tuple[list[int], list[float]]]:
    """The curves that `training_curves` draws. An incomplete last line is ignored, since a run may be writing it.

    Args:
        metrics_file: the trainer's metrics.jsonl.

    Returns:
        {name: (steps, values)}.

    Raises:
        InputError: when the file holds something else.
    """
    lines = metrics_file.read_text(encoding="utf-8").splitlines(keepends=True)
    series: dict[str, tuple[list[int], list[float]]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{metrics_file}: line {number} is not a line of metrics; need a file that the trainer wrote"
            ) from error
        for name, value in record.items():
            wanted = name.startswith(("train/", "validation/")) and "/channel_kl" not in name
            if wanted and isinstance(value, (int, float)):
                steps, values = series.setdefault(name, ([], []))
                steps.append(step)
                values.append(value)
    return series


def draw_curve(axes: Axes, name: str, steps: Sequence[int], values: Sequence[float]) -> None:
    """Draw one curve over the steps, on a logarithmic scale for losses, which span decades.

    Args:
        axes: the axes of matplotlib to draw on.
        name: the metric's name, such as «train/loss».
        steps: the step of each value.
        values: the same number of values.
    """
    log_scale = {"train/loss", "train/reconstruction", "train/grad_norm", "train/kl"}
    axes.plot(steps, values, linewidth=1.4, marker="o" if len(steps) < 12 else None, markersize=3)
    if name in log_scale and min(values) > 0:
        axes.set_yscale("log")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def latent_plot(health: LatentHealth) -> Image.Image:
    """Histogram of the log-variance | KL of each channel | mean ± std of each channel, below the list of complaints."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    complaints = health.complaints()
    channels = np.arange(len(health.channel_kl))
    figure = Figure(figsize=(12, 3.2 + 0.2 * max(1, len(complaints))), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    title = "\n".join(complaints) or "no complaint"
    figure.suptitle(title, fontsize=9, color="firebrick" if complaints else "black", x=0.01, ha="left", wrap=True)

    left, middle, right = figure.subplots(1, 3)
    draw_log_variances(left, health, "C0", "firebrick")
    middle.bar(channels, health.channel_kl.numpy())
    middle.axhline(
        DEAD_KL, color="firebrick", linewidth=1.0, linestyle="--"
    )  # a channel below it carries no information
    middle.set(xlabel="channel", ylabel="KL, nats per element")
    mean, std = health.moments.channel_mean, health.moments.channel_std
    right.errorbar(channels, mean.numpy(), yerr=std.numpy(), fmt="o", capsize=4)
    right.set(xlabel="channel", ylabel="latents, mean ± std")
    for axes in (middle, right):
        axes.set_xlim(-0.6, len(channels) - 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (left, middle, right):
        axes.set_axisbelow(True)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def draw_log_variances(axes: Axes, health: LatentHealth, colour: str, clamped: str) -> None:
    """Draw a histogram of the posterior's log-variance.

    Args:
        axes: the axes of matplotlib to draw on.
        health: the statistics with the histogram.
        colour: the colour of all bars but the lowest.
        clamped: the colour of the lowest bar, which is at the clamp.
    """
    edges = np.linspace(*LOGVAR_RANGE, BINS + 1)
    counts = health.logvar_histogram.numpy()
    axes.set(yscale="log", ylim=(0.5, 2 * max(1, counts.max())))  # 0.5: a bar of one element is visible
    axes.bar(edges[:-1], counts, width=1.0, align="edge", color=[clamped] + [colour] * (BINS - 1))
    axes.set(xlim=(edges[0] - 1, edges[-1] + 1), xlabel="log-variance of the posterior, nats", ylabel="elements")
