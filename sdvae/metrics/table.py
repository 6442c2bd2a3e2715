"""Figures of single images to means, intervals, differences and tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.stats import t as student

Rows = Sequence[Mapping[str, Any]]  # one an image, with `index` and `name`

# (key, heading, how it is written, better when: +1 greater, -1 smaller, 0 neither)
COLUMNS: tuple[tuple[str, str, str, int], ...] = (
    ("psnr", "PSNR, dB", ".2f", 1),
    ("ssim", "SSIM", ".3f", 1),
    ("lpips", "LPIPS", ".4f", -1),
    ("rfid", "rFID", ".2f", -1),
    ("kl_nats", "KL, nats", ".0f", 0),
    ("bits_per_pixel", "bits a pixel", ".2f", 0),
    ("active_channels", "active channels", "", 0),
    ("bias", "colour bias R G B", "", 0),
    ("encode_ms", "encode, ms", ".0f", 0),
    ("decode_ms", "decode, ms", ".0f", 0),
    ("memory_mib", "memory of an image, MiB", ".0f", 0),
)


@dataclass(frozen=True)
class Mean:
    """Of one figure over the images.

    Attributes:
        mean: over the images.
        std: between images, with n - 1.
        low, high: 95 % confidence interval of the mean, mean ± t·std/√n with Student's t of n - 1 degrees of freedom.
    """

    mean: float
    std: float
    low: float
    high: float


def mean_of(values: Sequence[float]) -> Mean:
    """Of one image or more. Of a single one std, low and high are NaN."""
    x = torch.tensor(values, dtype=torch.float64)
    mean, std = float(x.mean()), float(x.std()) if len(values) > 1 else math.nan
    half = float(student.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return Mean(mean, std, mean - half, mean + half)


def means(rows: Rows) -> dict[str, Mean]:
    """Of every figure that the rows hold."""
    return {key: mean_of([row[key] for row in rows]) for key in rows[0] if key not in ("index", "name")}


def differences(rows: Rows, baseline: Rows) -> dict[str, Mean]:
    """Of each figure minus the baseline's on the same image: paired, so that easy and hard images cancel."""
    other = {row["index"]: row for row in baseline}
    pairs = [(row, other[row["index"]]) for row in rows]
    keys = [key for key in rows[0] if key not in ("index", "name")]
    return {key: mean_of([a[key] - b[key] for a, b in pairs]) for key in keys}


def jsonable(value: Any) -> Any:
    """What JSON can hold: a `Mean` becomes its fields, and NaN, which JSON has not, null."""
    if isinstance(value, Mean):
        return jsonable(asdict(value))
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_table(results: Sequence[Mapping[str, Any]], lpips_name: str | None) -> str:
    """One line a VAE; figures of images with their 95 % interval, the best of each column in bold.

    Args:
        results: each with `vae`, `means` (of `Mean`) and the figures that are one for the whole set.
        lpips_name: of the perceptual distance's column, or None.
    """
    keys = [
        column for column in COLUMNS if any(_number(result, column[0], lpips_name) is not None for result in results)
    ]
    titles = [lpips_name if key == "lpips" and lpips_name else title for key, title, _, _ in keys]
    lines = [f"| {' | '.join(['VAE', *titles])} |", "|" + "---|" * (len(keys) + 1)]
    best = {key: _best(results, key, better, lpips_name) for key, _, _, better in keys}
    for result in results:
        cells = [result["vae"].replace("|", "\\|")]
        for key, _, form, _ in keys:
            number = _number(result, key, lpips_name)
            cell = "" if number is None else _written(number, form)
            cells.append(f"**{cell}**" if cell and result is best[key] else cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def csv_text(results: Sequence[Mapping[str, Any]]) -> str:
    """A line for each image and VAE."""
    keys = list(results[0]["per_image"][0])
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["vae", *keys], lineterminator="\n")
    writer.writeheader()
    for result in results:
        writer.writerows({"vae": result["vae"], **row} for row in result["per_image"])
    return stream.getvalue()


def _number(result: Mapping[str, Any], key: str, lpips_name: str | None) -> Any:
    if key == "bias":
        channels = [result["means"][name] for name in result["means"] if name.startswith("bias_")]
        return " ".join(f"{channel.mean:+.2f}" for channel in channels) or None
    key = lpips_name or key if key == "lpips" else key
    return result["means"].get(key, result.get(key))


def _written(number: Any, form: str) -> str:
    if isinstance(number, Mean):
        half = (number.high - number.low) / 2
        return f"{number.mean:{form}}" + (f" ± {half:{form}}" if math.isfinite(half) else "")
    return format(number, form)


def _best(results: Sequence[Mapping[str, Any]], key: str, better: int, lpips_name: str | None) -> Any:
    numbers = [(_number(result, key, lpips_name), result) for result in results]
    if not better or len(results) < 2:
        return None
    known = [(n.mean if isinstance(n, Mean) else n, result) for n, result in numbers if n is not None]
    known = [(n, result) for n, result in known if math.isfinite(n)]
    return max(known, key=lambda pair: better * pair[0], default=(None, None))[1]
