"""Pictures: reconstruction grids and training curves."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from sdvae.evaluation.health import BINS, DEAD_KL, LatentHealth
from sdvae.model.posterior import LOGVAR_RANGE

AMPLIFICATION = 4  # of the difference column
GAP = 4  # pixels between tiles
CAPTION_HEIGHT = 28  # pixels


def reconstruction_grid(images: Tensor, reconstructions: Tensor) -> Image.Image:
    """One row an image: original | reconstruction | amplified absolute difference.

    Args: images, reconstructions: (N, C, H, W) in [-1, 1], values outside are clamped; C = 1 is drawn grey,
        of more than three channels the first three are drawn.
    """
    x, y = (_as_drawn(batch) for batch in (images, reconstructions))
    difference = (AMPLIFICATION * (x - y).abs()).clamp(0, 1)
    columns = [_to_uint8(column) for column in (x, y, difference)]  # each (N, H, W, 3)
    captions = ["original", "reconstruction", f"{AMPLIFICATION} x |difference|"]

    count, height, width, _ = columns[0].shape
    size = (3 * width + 2 * GAP, CAPTION_HEIGHT + count * (height + GAP) - GAP)
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=min(16, max(8, width // 12)))
    for column, (tiles, caption) in enumerate(zip(columns, captions, strict=True)):
        left = column * (width + GAP)
        draw.text((left + width / 2, CAPTION_HEIGHT / 2), caption, fill="black", font=font, anchor="mm")
        for row in range(count):
            grid.paste(Image.fromarray(tiles[row]), (left, CAPTION_HEIGHT + row * (height + GAP)))
    return grid


def _as_drawn(images: Tensor) -> Tensor:
    images = (images.detach().float().cpu().clamp(-1, 1) + 1) / 2
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]


def _to_uint8(images: Tensor) -> np.ndarray:
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def training_curves(metrics_file: Path, png: Path) -> None:
    """Draw metrics.jsonl: everything about training, and every validation metric but those of single channels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    series: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)):
                steps, values = series.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)

    log_scale = {"train/loss", "train/reconstruction", "train/grad_norm", "train/kl"}
    drawn = [name for name in series if name.startswith(("train/", "validation/")) and "/channel_kl" not in name]
    columns = 4
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for i, name in enumerate(drawn):
        axes = figure.add_subplot(rows, columns, i + 1)
        steps, values = series[name]
        axes.plot(steps, values, linewidth=1.4, marker="o" if len(steps) < 12 else None, markersize=3)
        if name in log_scale and min(values) > 0:
            axes.set_yscale("log")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(png, dpi=110)


def latent_figure(health: LatentHealth) -> Image.Image:
    """Histogram of the log-variance | KL of each channel | mean ± std of each channel; complaints above."""
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
    edges = np.linspace(*LOGVAR_RANGE, BINS + 1)
    counts = health.logvar_histogram.numpy()
    left.set(yscale="log", ylim=(0.5, 2 * max(1, counts.max())))  # from below one element, so that one is seen
    left.bar(edges[:-1], counts, width=1.0, align="edge", color=["firebrick"] + ["C0"] * (BINS - 1))  # red: the clamp
    left.set(xlim=(edges[0] - 1, edges[-1] + 1), xlabel="log-variance of the posterior, nats", ylabel="elements")
    middle.bar(channels, health.channel_kl.numpy())
    middle.axhline(DEAD_KL, color="firebrick", linewidth=1.0, linestyle="--")  # below it a channel carries nothing
    middle.set(xlabel="channel", ylabel="KL, nats an element")
    right.errorbar(channels, health.channel_mean.numpy(), yerr=health.channel_std.numpy(), fmt="o", capsize=4)
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
