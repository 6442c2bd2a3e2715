"""From the figures of single images to means, confidence intervals, paired differences and tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.stats import t as student

from sdvae.io import printable

ImageFigures = Sequence[Mapping[str, Any]]  # for each image its `index`, its `name` and numbers such as `psnr`

# (key, heading, format, which is better: +1 a larger number, -1 a smaller one, 0 neither)
COLUMNS: tuple[tuple[str, str, str, int], ...] = (
    ("psnr", "PSNR, dB", ".2f", 1),
    ("psnr_alpha", "PSNR of alpha, dB", ".2f", 1),
    ("ssim", "SSIM", ".3f", 1),
    ("lpips", "LPIPS", ".4f", -1),
    ("rfid", "rFID", ".2f", -1),
    ("kl_nats", "KL, nats", ".0f", 0),
    ("bits_per_pixel", "bits a pixel", ".2f", 0),
    ("active_channels", "active channels", "", 0),
    ("bias", "colour bias R G B (alpha)", "", 0),
    ("encode_ms", "encode, ms", ".0f", 0),
    ("decode_ms", "decode, ms", ".0f", 0),
    ("memory_mib", "memory of an image, MiB", ".0f", 0),
)


@dataclass(frozen=True)
class MeanEstimate:
    """The mean of one figure over the images, with its confidence interval.

    Attributes:
        mean: over the images.
        std: standard deviation between images, with the divisor n - 1.
        low: lower end of the mean's 95 % confidence interval, mean - t·std/√n, with Student's t of n - 1 degrees of
            freedom.
        high: upper end, mean + t·std/√n.
    """

    mean: float
    std: float
    low: float
    high: float


def estimate_mean(values: Sequence[float]) -> MeanEstimate:
    """The mean of at least one number. For a single number, `std`, `low` and `high` are NaN."""
    x = torch.tensor(values, dtype=torch.float64)
    mean, std = float(x.mean()), float(x.std()) if len(values) > 1 else math.nan
    half = float(student.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return MeanEstimate(mean, std, mean - half, mean + half)


def means(per_image: ImageFigures) -> dict[str, MeanEstimate]:
    """The mean of each figure."""
    return {key: estimate_mean([image[key] for image in per_image]) for key in _figure_names(per_image)}


def differences(per_image: ImageFigures, baseline: ImageFigures) -> dict[str, MeanEstimate]:
    """The mean of each figure that both have minus the baseline's on the same image.

    The mean of paired differences varies less than the difference of two means, because how hard an image is affects
    both figures of a pair.
    """
    other = {image["index"]: image for image in baseline}
    pairs = [(image, other[image["index"]]) for image in per_image]
    shared = [key for key in _figure_names(per_image) if key in baseline[0]]
    return {key: estimate_mean([a[key] - b[key] for a, b in pairs]) for key in shared}


def jsonable(value: Any) -> Any:
    """A value that JSON can hold: a `MeanEstimate` becomes a dict of its fields; NaN and infinity become None."""
    if isinstance(value, MeanEstimate):
        return jsonable(asdict(value))
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_table(results: Sequence[Mapping[str, Any]], lpips_name: str | None) -> str:
    """One line for each VAE: means with their 95 % interval, and the best number of each column in bold.

    Args:
        results: for each VAE its name, `vae`, its `means`, and the figures of the whole set, such as `rfid`.
        lpips_name: name of the perceptual distance; None if it was not measured.

    Returns:
        Markdown. A column that would be empty is left out.
    """
    keys = [
        column for column in COLUMNS if any(_number(result, column[0], lpips_name) is not None for result in results)
    ]
    titles = [lpips_name if key == "lpips" and lpips_name else title for key, title, _, _ in keys]
    lines = [f"| {' | '.join(['VAE', *titles])} |", "|" + "---|" * (len(keys) + 1)]
    best = {key: _best(results, key, better, lpips_name) for key, _, _, better in keys}
    for result in results:
        cells = [printable(result["vae"]).replace("|", "\\|")]
        for key, _, form, _ in keys:
            number = _number(result, key, lpips_name)
            cell = "" if number is None else _written(number, form)
            cells.append(f"**{cell}**" if cell and result is best[key] else cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def csv_text(results: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a line for each image and VAE; a figure that a VAE lacks is left empty."""
    keys = list(dict.fromkeys(key for result in results for key in result["per_image"][0]))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["vae", *keys], lineterminator="\n")
    writer.writeheader()
    for result in results:
        vae = printable(result["vae"])
        writer.writerows({"vae": vae, **row, "name": printable(row["name"])} for row in result["per_image"])
    return stream.getvalue()


def _figure_names(per_image: ImageFigures) -> list[str]:
    return [key for key in per_image[0] if key not in ("index", "name")]


def _number(result: Mapping[str, Any], key: str, lpips_name: str | None) -> Any:
    if key == "bias":
        channels = [result["means"][name] for name in result["means"] if name.startswith("bias_")]
        return " ".join(f"{channel.mean:+.2f}" for channel in channels) or None
    key = lpips_name or key if key == "lpips" else key
    return result["means"].get(key, result.get(key))


def _written(number: Any, form: str) -> str:
    if isinstance(number, MeanEstimate):
        half = (number.high - number.low) / 2
        return f"{number.mean:{form}}" + (f" ± {half:{form}}" if math.isfinite(half) else "")
    return format(number, form)


def _best(results: Sequence[Mapping[str, Any]], key: str, better: int, lpips_name: str | None) -> Any:
    numbers = [(_number(result, key, lpips_name), result) for result in results]
    if not better or len(results) < 2:
        return None
    known = [(n.mean if isinstance(n, MeanEstimate) else n, result) for n, result in numbers if n is not None]
    known = [(n, result) for n, result in known if math.isfinite(n)]
    return max(known, key=lambda pair: better * pair[0], default=(None, None))[1]
