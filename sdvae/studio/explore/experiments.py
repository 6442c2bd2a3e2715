"""The experiments of `sdvae explore`. Each takes a `Study` and returns a picture, figures and a few lines of text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from torch import Tensor

from sdvae.metrics.image import psnr
from sdvae.noise import sample_seed
from sdvae.pictures import tile_grid
from sdvae.roundtrip import crop_to
from sdvae.studio.explore.anomaly import (
    DEFECTS,
    add_defect,
    anomaly_scores,
    auroc,
    auroc_of_counts,
    count_errors,
    error_map,
)
from sdvae.studio.explore.denoise import BLURS, add_noise, blur
from sdvae.studio.explore.moves import analogy, angle_between, lerp, mean_analogy, slerp, traverse
from sdvae.studio.explore.prior import gaussian_kl, neighbour_correlation, sample_moments
from sdvae.studio.explore.study import MOST_SHOWN, Finding, Study, caption, contrast, rounded

REACH = 3.0  # standard deviations to each side, in a traversal
SHOWN_STD = 2.5  # standard deviations from the mean at which a principal component has its full colour
SAMPLES = 5  # number of samples from each distribution
NEEDED = {"interpolate": 2, "arithmetic": 3}  # photographs to draw; the other experiments need 1
SHOWN_ANOMALIES = 6
WHITE_QUANTILE = 0.998  # of the errors; larger errors get the same colour


def explore_interpolation(study: Study) -> Finding:
    """Go from one reconstruction to another: a cross-fade of pixels, latents on a line, latents on an arc."""
    names, images = study.shown(2, needed=NEEDED["interpolate"])
    a, b = study.encode(images).mode()
    t = torch.linspace(0, 1, study.settings.steps)
    latents = {"linear": lerp(a, b, t), "spherical": slerp(a, b, t)}
    drawn = {kind: study.decode(z) for kind, z in latents.items()}
    fade = lerp(drawn["linear"][0], drawn["linear"][-1], t)

    paths = {
        kind: {
            "latent_norm": rounded(z.flatten(1).norm(dim=1)),
            "psnr_to_cross_fade": rounded(psnr(fade, drawn[kind]), 2),
            "contrast": rounded(contrast(drawn[kind]), 2),
        }
        for kind, z in latents.items()
    }
    degrees = round(math.degrees(angle_between(a, b)), 1)
    figures = {
        "images": names,
        "t": rounded(t),
        "angle_degrees": degrees,
        "cross_fade": {"contrast": rounded(contrast(fade), 2)},
        **paths,
    }
    middle = len(t) // 2
    halfway = {kind: (path["psnr_to_cross_fade"][middle], path["contrast"][middle]) for kind, path in paths.items()}
    lines = [
        f"angle between the latents {degrees:g} degrees",
        f"at t = {t[middle]:.2f} the cross-fade has contrast {contrast(fade)[middle]:.1f} (std of 0..255); "
        + "; ".join(f"{kind} {c:.1f}, {db:.1f} dB from the cross-fade" for kind, (db, c) in halfway.items()),
    ]
    picture = tile_grid(
        [list(fade), list(drawn["linear"]), list(drawn["spherical"])],
        [f"t = {float(step):.2f}" for step in t],
        rows=["pixels, cross-fade", "latents, linear", "latents, spherical"],
        note=f"{caption(names[0])} to {caption(names[1])}; the latents are {degrees:g} degrees apart. Below a tile its "
        "contrast, the standard deviation of its values (0 to 255).",
        captions=[[f"{c:.0f}" for c in contrast(row)] for row in (fade, drawn["linear"], drawn["spherical"])],
    )
    return Finding(picture, figures, lines)


def explore_arithmetic(study: Study) -> Finding:
    """Compute a - b + c in latents, in pixels, and only in the channels' means."""
    names, images = study.shown(3, needed=NEEDED["arithmetic"])
    a, b, c = study.encode(images).mode()
    (*decoded, of_latents, of_means) = study.decode(torch.stack([a, b, c, analogy(a, b, c), mean_analogy(a, b, c)]))
    of_pixels = analogy(*decoded).clamp(-1, 1)
    distance = float(psnr(of_pixels[None], of_latents[None]))
    x, y, z = map(caption, names)
    picture = tile_grid(
        [[*decoded, of_latents, of_pixels, of_means]],
        [f"a: {x}", f"b: {y}", f"c: {z}", "a - b + c in latents", "a - b + c in pixels", "c + mean(a) - mean(b)"],
        note=f"Latents against pixels: {distance:.1f} dB. The last tile moves only the mean of each latent channel.",
    )
    figures = {"images": names, "psnr_latents_to_pixels": round(distance, 2)}
    return Finding(picture, figures, [f"a - b + c in latents is {distance:.1f} dB from the same sum of pixels"])


def explore_traversal(study: Study) -> Finding:
    """Move one channel after the other, and measure how that changes the mean colour of the picture."""
    (name,), images = study.shown(1)
    z = study.encode(images).mode()[0]
    std = study.statistics.moments.channel_std
    reach = torch.linspace(-REACH, REACH, study.settings.steps)
    moved = traverse(z, std, reach)  # (C, K, C, h, w)
    drawn = torch.stack([study.decode(row) for row in moved])  # (C, K, 3, R, R)
    still = study.decode(z[None])[0]

    colour = 127.5 * (drawn.mean(dim=(3, 4)) - still.mean(dim=(1, 2)))  # (C, K, 3), levels of 0..255
    slope = torch.einsum("k,ckd->cd", reach, colour) / reach.square().sum()  # least squares through the origin
    figures = {
        "image": name,
        "measured_on": len(study.statistics.names),
        "channel_std": rounded(std),
        "k": rounded(reach),
        "mean_colour_change": [[rounded(value, 2) for value in row] for row in colour],
        "mean_colour_change_per_std": [rounded(value, 2) for value in slope],
    }
    colours = "RGB" if slope.shape[1] == 3 else [str(i) for i in range(slope.shape[1])]
    lines = [
        f"channel {c}: std {float(std[c]):.3g}; one more std changes the mean colour by "
        + ", ".join(f"{letter} {float(value):+.1f}" for letter, value in zip(colours, slope[c], strict=True))
        for c in range(len(std))
    ]
    picture = tile_grid(
        [list(row) for row in drawn],
        [f"{float(k):+.3g} std" if k else "as it is" for k in reach],
        rows=[f"channel {c}, std {float(std[c]):.3g}" for c in range(len(std))],
        note=f"{caption(name)}; every position of the channel moved alike. The std is that of the latents of "
        f"{len(study.statistics.names)} photographs.",
    )
    return Finding(picture, figures, lines)


def explore_components(study: Study) -> Finding:
    """Draw the first three principal components as colours, and decode latents from the first few components."""
    names, images = study.shown(MOST_SHOWN)
    components = study.statistics.covariance.principal_components()
    z = study.encode(images).mode()
    channels = z.shape[1]

    colours = -torch.ones(len(z), 3, *z.shape[2:])  # black where there are fewer than three
    scale = SHOWN_STD * components.variance.sqrt().clamp(min=1e-12)
    scaled = components.coefficients(z) / scale.to(z)[:, None, None]
    colours[:, : min(3, channels)] = scaled[:, :3]
    larger = F.interpolate(colours, scale_factor=float(study.vae.spatial_compression_ratio), mode="nearest")
    colours = crop_to(larger, *images.shape[2:])

    counts = sorted({count for count in (1, 2, 3) if count < channels} | {channels})
    decoded = {count: study.decode(components.keep(z, count)) for count in counts}
    reached = {count: float(psnr(images, y).mean()) for count, y in decoded.items()}
    explained = components.explained
    figures = {
        "images": names,
        "measured_on": len(study.statistics.names),
        "explained": rounded(explained),
        "axes": [rounded(axis) for axis in components.axes],
        "mean": rounded(components.mean),
        "psnr_with_components": {count: round(value, 2) for count, value in reached.items()},
    }
    lines = [
        "explained variance: " + ", ".join(f"{100 * share:.1f} %" for share in explained.tolist()),
        "decoded from the first components: " + ", ".join(f"{k}: {db:.2f} dB" for k, db in reached.items()),
    ]
    words = {1: "1", channels: f"all {channels}"}
    each = torch.stack([psnr(images, y) for y in decoded.values()], dim=1)  # (N, counts)
    shares = ", ".join(f"{100 * share:.0f} %" for share in explained.tolist())
    picture = tile_grid(
        list(zip(images, colours, *decoded.values(), strict=True)),
        [
            "photograph",
            "components 1, 2, 3 as RGB",
            *(f"decoded: {words.get(k, f'1 to {k}')}" for k in counts),
        ],
        rows=[caption(name) for name in names],
        captions=[["", "", *(f"{value:.1f} dB" for value in row)] for row in each.tolist()],
        note=f"Explained variance: {shares}, over the latents of {len(study.statistics.names)} photographs. "
        f"Full colour is {SHOWN_STD:g} std.",
    )
    return Finding(picture, figures, lines)


def explore_prior(study: Study) -> Finding:
    """Decode samples: from the prior, and from distributions that resemble the latents of photographs."""
    statistics, seed = study.statistics, study.settings.seed
    moments, spectrum = statistics.moments, statistics.spectrum
    names, images = study.shown(SAMPLES)
    size = (len(images), *spectrum.size)

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    z = {
        "photographs": study.encode(images).sample(generator()),
        "prior": torch.randn(len(images), len(moments.channel_std), *spectrum.size, generator=generator()),
        "moments": sample_moments(moments, size, generator()),
        "spectrum": spectrum.sample(len(images), generator()),
    }
    drawn = {kind: study.decode(latents) for kind, latents in z.items()}
    correlation = {kind: neighbour_correlation(latents) for kind, latents in z.items()}
    contrasts = {kind: float(contrast(y).mean()) for kind, y in drawn.items()}
    kl = gaussian_kl(moments)
    figures = {
        "images": names,
        "measured_on": len(statistics.names),
        "channel_mean": rounded(moments.channel_mean),
        "channel_std": rounded(moments.channel_std),
        "kl_nats_per_element": round(statistics.kl, 3),
        "kl_of_channel_gaussians_to_prior": rounded(kl, 3),
        "neighbour_correlation": {kind: round(value, 4) for kind, value in correlation.items()},
        "contrast": {kind: round(value, 2) for kind, value in contrasts.items()},
    }
    lines = [
        f"latents: mean {_numbers(moments.channel_mean)}, std {_numbers(moments.channel_std)}; the prior's are 0 and 1",
        f"KL of one posterior to the prior: {statistics.kl:.2f} nats an element; of all posteriors together, as a "
        f"Gaussian for each channel: {float(kl.mean()):.2f}",
        *(f"{kind}: neighbours correlate by {correlation[kind]:.2f}, contrast {contrasts[kind]:.1f}" for kind in z),
    ]
    words = {
        "photographs": "photographs, from their posteriors",
        "prior": "the prior, N(0, I)",
        "moments": "mean and std of each channel",
        "spectrum": "mean and spectrum of all channels",
    }
    picture = tile_grid(
        [list(y) for y in drawn.values()],
        [f"{i + 1}" for i in range(len(images))],
        rows=[words[kind] for kind in z],
        note=f"Measured on the latents of {len(statistics.names)} photographs: mean {_numbers(moments.channel_mean)}, "
        f"std {_numbers(moments.channel_std)}.",
    )
    return Finding(picture, figures, lines)


@dataclass
class Scored:
    """Scores of normal images and of abnormal ones.

    Attributes:
        normal: `anomaly_scores` of each normal image.
        abnormal: `anomaly_scores` of each abnormal image.
        tiles: for each abnormal image that is drawn: its name, the score `local`, and its pictures. The last picture is
            the error map (R, R).
    """

    normal: list[dict[str, float]] = field(default_factory=list)
    abnormal: list[dict[str, float]] = field(default_factory=list)
    tiles: list[tuple[str, float, list[Tensor]]] = field(default_factory=list)

    def columns(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Kind of score -> (scores of the normal images, scores of the abnormal images)."""
        return {kind: (_column(self.normal, kind), _column(self.abnormal, kind)) for kind in self.normal[0]}


@dataclass
class Defects:
    """Measurements of images with an added defect, besides their scores.

    Attributes:
        inside: kind of defect -> errors of the pixels inside the defect, counted by `count_errors`.
        outside: errors of all other pixels of those images, counted in the same way.
        damaged: places of the normal images to which a defect could be given.
        unchanged: kind of defect -> number of images that the defect would not change. These images are left out.
    """

    inside: dict[str, Tensor] = field(default_factory=lambda: {kind: count_errors(torch.empty(0)) for kind in DEFECTS})
    outside: Tensor = field(default_factory=lambda: count_errors(torch.empty(0)))
    damaged: list[int] = field(default_factory=list)
    unchanged: Counter[str] = field(default_factory=Counter)

    def summary(self, columns: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[dict[str, object], list[str], str]:
        """Figures, lines and a note for the picture.

        Args:
            columns: the tensors of `Scored.columns`.
        """
        raised = {kind: float((b > a[self.damaged]).float().mean()) for kind, (a, b) in columns.items()}
        pixels = {kind: auroc_of_counts(self.outside, counts) for kind, counts in self.inside.items() if counts.any()}
        figures = {
            "raised_by_defect": {kind: round(value, 4) for kind, value in raised.items()},
            "pixel_auroc": {kind: round(value, 4) for kind, value in pixels.items()},
            "images_unchanged_by_defect": dict(self.unchanged),
        }
        lines = [
            "share of images whose score is higher with a defect than without: " + _named(raised, ".0%"),
            "AUROC of the error over pixels, inside a defect against outside: " + _named(pixels, ".3f"),
        ]
        if self.unchanged:
            lines.append("images left out because the defect changed nothing: " + _named(self.unchanged, "d"))
        return figures, lines, " Over pixels, inside a defect against outside: " + _named(pixels, ".2f") + "."


def explore_anomalies(study: Study) -> Finding:
    """Compare the scores of normal images with those of a second set, or of the same images with defects."""
    source = study.settings.anomalies
    scored, defects = _score_with_defects(study) if source is None else (_score_second_set(study, source), None)
    columns = scored.columns()
    area = {kind: auroc(*pair) for kind, pair in columns.items()}
    figures: dict[str, object] = {
        "normal": len(scored.normal),
        "anomalous": len(scored.abnormal),
        "anomalies": source or "synthetic",
        "auroc": {kind: round(value, 4) for kind, value in area.items()},
    }
    lines = [f"{len(scored.normal)} normal, {len(scored.abnormal)} with anomalies; AUROC " + _named(area, ".3f")]
    note = "AUROC over images: " + _named(area, ".2f") + "."
    headings = ["image", "reconstruction", "squared error"]
    if defects is not None:
        more_figures, more_lines, more_note = defects.summary(columns)
        figures, lines, note = figures | more_figures, lines + more_lines, note + more_note
        headings = ["photograph", "with a defect", "reconstruction", "squared error"]
    shown_errors = torch.cat([images[-1].flatten() for *_, images in scored.tiles])
    # NumPy's quantile, since torch's takes 16 million values at most
    white = float(np.quantile(shown_errors.numpy(), WHITE_QUANTILE)) or 1.0
    picture = tile_grid(
        [[*images, _heat(errors / white)] for *_, (*images, errors) in scored.tiles],
        headings,
        rows=[name for name, *_ in scored.tiles],
        note=note,
    )
    return Finding(picture, figures, lines)


def _score_with_defects(study: Study) -> tuple[Scored, Defects]:
    """Score each measured image, and the same image with a defect; the kinds of defects take turns."""
    scored, defects = Scored(), Defects()
    for index, (name, image) in enumerate(study.measured()):
        scored.normal.append(_score(study, image)[0])
        kind = DEFECTS[index % len(DEFECTS)]
        generator = torch.Generator().manual_seed(sample_seed(study.settings.seed, 0, index, "defect"))
        damaged, where = add_defect(image, kind, generator)
        if not where.any():
            defects.unchanged[kind] += 1
            continue
        defects.damaged.append(index)
        scores, reconstruction, errors = _score(study, damaged)
        scored.abnormal.append(scores)
        defects.inside[kind] += count_errors(errors[where])
        defects.outside += count_errors(errors[~where])
        if len(scored.tiles) < SHOWN_ANOMALIES:
            tiles = [image, damaged, reconstruction, errors]
            scored.tiles.append((f"{caption(name)}, {kind}", scores["local"], tiles))
    return scored, defects


def _score_second_set(study: Study, source: str) -> Scored:
    """Score the measured images and those of `source`. The images of `source` with the largest errors are drawn."""
    scored = Scored([_score(study, image)[0] for _, image in study.measured()])
    for name, image in study.measured(source):
        scores, reconstruction, errors = _score(study, image)
        scored.abnormal.append(scores)
        scored.tiles.append((caption(name), scores["local"], [image, reconstruction, errors]))
        scored.tiles = sorted(scored.tiles, key=lambda tile: -tile[1])[:SHOWN_ANOMALIES]
    return scored


def explore_denoising(study: Study) -> Finding:
    """Compare noisy images, their reconstructions and their best blur with the clean images."""
    sigmas, seed = study.settings.sigmas, study.settings.seed
    rows: dict[float, list[Tensor]] = {
        sigma: [] for sigma in sigmas
    }  # PSNR for each image: noisy, reconstructed, each blur
    ceiling, count = 0.0, 0
    for index, (_, image) in enumerate(study.measured()):
        x = image[None]
        ceiling, count = ceiling + float(psnr(x, study.decode(study.encode(x).mode()))), count + 1
        for sigma in sigmas:
            noisy = add_noise(x, sigma, _noise_of(seed, index))
            candidates = [noisy, study.decode(study.encode(noisy).mode()), *(blur(noisy, width) for width in BLURS)]
            rows[sigma].append(torch.cat([psnr(x, y) for y in candidates]))
    means = {sigma: torch.stack(values).double().mean(dim=0) for sigma, values in rows.items()}
    best = {sigma: BLURS[int(values[2:].argmax())] for sigma, values in means.items()}
    table = [
        {
            "sigma": sigma,
            "noisy": round(float(values[0]), 2),
            "vae": round(float(values[1]), 2),
            "blur": round(float(values[2:].max()), 2),
            "blur_pixels": round(best[sigma], 3),
        }
        for sigma, values in means.items()
    ]
    (name,), images = study.shown(1)
    tiles, captions = [], []
    for sigma in sigmas:
        noisy = add_noise(images, sigma, _noise_of(seed, 0))
        row = [noisy, study.decode(study.encode(noisy).mode()), blur(noisy, best[sigma])]
        tiles.append([images[0], *(y[0] for y in row)])
        captions.append(["", *(f"{float(psnr(images, y)):.1f} dB" for y in row)])
    lines = [
        f"sigma {row['sigma']:g}: noisy {row['noisy']:.2f} dB, VAE {row['vae']:.2f} dB, "
        f"blur of {row['blur_pixels']:.2f} pixels {row['blur']:.2f} dB"
        for row in table
    ]
    lines.append(f"without noise the VAE gives {ceiling / count:.2f} dB; {count} images")
    picture = tile_grid(
        tiles,
        ["photograph", "noisy", "encoded, decoded", "blurred"],
        rows=[f"sigma {sigma:g} of 255; blur of {best[sigma]:.2f} pixels" for sigma in sigmas],
        captions=captions,
        note=f"{caption(name)}. Each blur is the one that is best over {count} photographs, chosen with the clean ones "
        f"at hand. Without noise this VAE gives {ceiling / count:.1f} dB over them.",
    )
    figures = {"image": name, "measured_on": count, "clean": round(ceiling / count, 2), "table": table}
    return Finding(picture, figures, lines)


EXPERIMENTS: dict[str, Callable[[Study], Finding]] = {
    "interpolate": explore_interpolation,
    "traverse": explore_traversal,
    "pca": explore_components,
    "prior": explore_prior,
    "arithmetic": explore_arithmetic,
    "anomaly": explore_anomalies,
    "denoise": explore_denoising,
}


def _score(study: Study, image: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """(C, R, R) -> its scores, its reconstruction (C, R, R) and its error map (R, R)."""
    posterior = study.encode(image[None])
    reconstruction = study.decode(posterior.mode())
    scores = anomaly_scores(image[None], reconstruction, posterior)
    errors = error_map(image[None], reconstruction)[0]
    return {kind: float(score) for kind, score in scores.items()}, reconstruction[0], errors


def _column(rows: list[dict[str, float]], kind: str) -> Tensor:
    return torch.tensor([row[kind] for row in rows], dtype=torch.float64)


def _heat(values: Tensor) -> Tensor:
    """A picture of (H, W) values from 0, dark, to 1, bright: (3, H, W) in [-1, 1]."""
    colours = colormaps["inferno"](values.clamp(0, 1).numpy())[..., :3]
    return torch.from_numpy(2 * colours - 1).permute(2, 0, 1).float()


def _noise_of(seed: int, index: int) -> torch.Generator:
    """The generator of one image's noise, which does not depend on the other images."""
    return torch.Generator().manual_seed(sample_seed(seed, 0, index, "noise"))


def _numbers(values: Tensor) -> str:
    return ", ".join(f"{value:.2f}" for value in values.tolist())


def _named(values: Mapping[str, float], style: str) -> str:
    return ", ".join(f"{kind} {value:{style}}" for kind, value in values.items())
