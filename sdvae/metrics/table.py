"""From the figures of single images to means, confidence intervals, paired differences and tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from scipy.stats import t as student

from sdvae.io import printable

ImageFigures = Sequence[Mapping[str, Any]]  # for each image its `index`, its `name` and numbers such as `psnr`


class Column(NamedTuple):
    """A figure in a table.

    Attributes:
        key: its name in the results.
        title: its heading, with its unit.
        form: how a number is written.
        better: +1 if a larger number is better, -1 if a smaller one is, 0 if neither.
        about: what it is, for the lines below the table.
    """

    key: str
    title: str
    form: str
    better: int
    about: str = ""


COLUMNS = (
    Column("psnr", "PSNR, dB", ".2f", 1),
    Column("psnr_alpha", "PSNR of alpha, dB", ".2f", 1),
    Column("ssim", "SSIM", ".3f", 1),
    Column("lpips", "LPIPS", ".4f", -1),
    Column("rfid", "rFID", ".2f", -1),
    Column("rfdd", "rFDD", ".2f", -1),
    Column("cmmd", "CMMD", ".3f", -1),
    Column("kl_nats", "KL, nats", ".0f", 0),
    Column("bits_per_pixel", "bits a pixel", ".2f", 0),
    Column("active_channels", "active channels", "", 0),
    Column("bias", "colour bias R G B (alpha)", "", 0),
    Column("encode_ms", "encode, ms", ".0f", 0),
    Column("decode_ms", "decode, ms", ".0f", 0),
    Column("memory_mib", "memory of an image, MiB", ".0f", 0),
)

# docs/diffusability.md says of each where it comes from and what it is known to predict.
DIFFUSABILITY_COLUMNS = (
    Column(
        "probe_ratio",
        "probe ÷ linear",
        ".4f",
        -1,
        "error of a small diffusion model, trained for a short time, on latents that it has not seen, divided by that "
        "of the best linear denoiser",
    ),
    Column("probe_error", "probe error", ".4f", -1, "the same error, in parts of the latents' variance"),
    Column("ifid", "iFID", ".2f", -1, "FID of the decoded halfway points between latents and their nearest neighbours"),
    Column(
        "spectrum_slope",
        "slope",
        ".2f",
        0,
        "exponent of the power law nearest to the latents' spectrum: 0 for white noise, about -2 for photographs",
    ),
    Column(
        "high_share",
        "finest octave",
        ".3f",
        0,
        "share of the latents' energy above half the highest frequency: 0.74 for white noise",
    ),
    Column(
        "encoder_scale_error",
        "encoder, scale",
        ".3f",
        -1,
        "squared error of the shrunk latents as latents of the shrunk image, in parts of their variance",
    ),
    Column("encoder_turn_error", "encoder, turn", ".3f", -1, "the same for a quarter turn and a mirror image"),
    Column(
        "decoder_scale_loss",
        "decoder, scale, dB",
        ".2f",
        -1,
        "PSNR that is lost when the shrunk latents are decoded, and not the latents of the shrunk image",
    ),
    Column("decoder_turn_loss", "decoder, turn, dB", ".2f", -1, "the same for a quarter turn and a mirror image"),
    Column("intrinsic_dimension", "intrinsic dimension", ".1f", 0, "of the set of latents, by TwoNN"),
    Column(
        "negentropy",
        "negentropy, nats",
        ".3f",
        0,
        "entropy that a latent lacks to that of a Gaussian of its variance, in the mean over channels",
    ),
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
    """The mean of each figure, over the images that have it."""
    return {key: estimate_mean([image[key] for image in per_image if key in image]) for key in _figure_names(per_image)}


def differences(per_image: ImageFigures, baseline: ImageFigures) -> dict[str, MeanEstimate]:
    """The mean of each figure minus the baseline's on the same image, over the images for which both have it.

    The mean of paired differences varies less than the difference of two means, because how hard an image is affects
    both figures of a pair.
    """
    other = {image["index"]: image for image in baseline}
    pairs = [(image, other[image["index"]]) for image in per_image]
    known = {key: [a[key] - b[key] for a, b in pairs if key in a and key in b] for key in _figure_names(per_image)}
    return {key: estimate_mean(values) for key, values in known.items() if values}


def jsonable(value: Any) -> Any:
    """A value that JSON can hold: a `MeanEstimate` becomes a dict of its fields; NaN and infinity become None."""
    if isinstance(value, MeanEstimate):
        return jsonable(asdict(value))
    if isinstance(value, Mapping):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_table(
    results: Sequence[Mapping[str, Any]], lpips_name: str | None, columns: Sequence[Column] = COLUMNS
) -> str:
    """One line for each VAE: means with their 95 % interval, and the best number of each column in bold.

    Args:
        results: for each VAE its name, `vae`, its `means`, and the figures of the whole set, such as `rfid`.
        lpips_name: name of the perceptual distance; None if it was not measured.
        columns: the figures.

    Returns:
        Markdown. A column that would be empty is left out.
    """
    shown = columns_with_figures(results, lpips_name, columns)
    titles = [lpips_name if column.key == "lpips" and lpips_name else column.title for column in shown]
    lines = [f"| {' | '.join(['VAE', *titles])} |", "|" + "---|" * (len(shown) + 1)]
    best = {column.key: _best(results, column.key, column.better, lpips_name) for column in shown}
    for result in results:
        cells = [printable(result["vae"]).replace("|", "\\|")]
        for column in shown:
            number = figure_of(result, column.key, lpips_name)
            cell = "" if number is None else written(number, column.form)
            cells.append(f"**{cell}**" if cell and result is best[column.key] else cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def columns_with_figures(
    results: Sequence[Mapping[str, Any]], lpips_name: str | None, columns: Sequence[Column]
) -> list[Column]:
    """The columns in which at least one VAE has a figure. The arguments are those of `markdown_table`."""
    return [
        column for column in columns if any(figure_of(result, column.key, lpips_name) is not None for result in results)
    ]


def csv_text(results: Sequence[Mapping[str, Any]]) -> str:
    """CSV with a line for each image and VAE; a figure that a VAE lacks is left empty."""
    keys = list(dict.fromkeys(key for result in results for image in result["per_image"] for key in image))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["vae", *keys], lineterminator="\n")
    writer.writeheader()
    for result in results:
        vae = printable(result["vae"])
        writer.writerows({"vae": vae, **row, "name": printable(row["name"])} for row in result["per_image"])
    return stream.getvalue()


def direction(column: Column) -> str:
    """Which numbers are better, in words."""
    return {1: "higher is better", -1: "lower is better", 0: "neither high nor low is better"}[column.better]


def _figure_names(per_image: ImageFigures) -> list[str]:
    return list(dict.fromkeys(key for image in per_image for key in image if key not in ("index", "name")))


def figure_of(result: Mapping[str, Any], key: str, lpips_name: str | None = None) -> Any:
    """A figure of a result: the mean over images, or else the figure of the whole set; None if there is neither."""
    if key == "bias":
        channels = [result["means"][name] for name in result["means"] if name.startswith("bias_")]
        return " ".join(f"{channel.mean:+.2f}" for channel in channels) or None
    key = lpips_name or key if key == "lpips" else key
    return result["means"].get(key, result.get(key))


def written(number: Any, form: str) -> str:
    """A number, or a mean with half the width of its confidence interval."""
    if isinstance(number, MeanEstimate):
        half = (number.high - number.low) / 2
        return f"{number.mean:{form}}" + (f" ± {half:{form}}" if math.isfinite(half) else "")
    return format(number, form)


def _best(results: Sequence[Mapping[str, Any]], key: str, better: int, lpips_name: str | None) -> Any:
    numbers = [(figure_of(result, key, lpips_name), result) for result in results]
    if not better or len(results) < 2:
        return None
    known = [(n.mean if isinstance(n, MeanEstimate) else n, result) for n, result in numbers if n is not None]
    known = [(n, result) for n, result in known if math.isfinite(n)]
    return max(known, key=lambda pair: better * pair[0], default=(None, None))[1]
