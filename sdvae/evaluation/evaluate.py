"""`sdvae evaluate`: measure VAEs on the same images, in one process or many.

The images are divided into batches once, and each process takes every num_processes-th batch. So the figures of an
image do not depend on the number of processes.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from sdvae.alpha import as_seen, colours
from sdvae.data import (
    BadImages,
    EvaluationImages,
    ImageSource,
    ReadOptions,
    adm_center_crop,
    center_crop,
    evaluation_loader,
    kinds_of,
    open_source,
)
from sdvae.errors import InputError
from sdvae.evaluation.config import PRESETS, EvaluateConfig
from sdvae.evaluation.diffusability import (
    check_count,
    check_size,
    collect,
    fault_of,
    halfway,
    measure,
    warn_of_few,
)
from sdvae.io import make_folder, replacing, utf8, version
from sdvae.latents.scaling import scaling_of
from sdvae.metrics.image import image_figures
from sdvae.metrics.memory import with_peak_memory
from sdvae.metrics.perceptual import Perceptual, perceptual_if_any
from sdvae.metrics.table import (
    DIFFUSABILITY_COLUMNS,
    columns_with_figures,
    csv_text,
    differences,
    direction,
    jsonable,
    markdown_table,
    means,
)
from sdvae.model import AnyAutoencoder, StockAutoencoder
from sdvae.model.kinds import class_name
from sdvae.noise import sample_seed
from sdvae.pictures import tile_grid
from sdvae.roundtrip import RoundTrip, check_image_channels, decode_images, round_trip, say_if_no_posterior
from sdvae.runtime import DTYPES, accelerator_type
from sdvae.statistics import LatentHealth, merged
from sdvae.weights import load_autoencoder

if TYPE_CHECKING:
    from sdvae.metrics.fid import FrechetDistance, ReconstructionMMD

    Distance = FrechetDistance | ReconstructionMMD

logger = logging.getLogger(__name__)

DISTANCE_NAMES = {"rfid": "rFID", "rfdd": "rFDD", "cmmd": "CMMD"}
PACKAGED = "packaged"  # name of the VAE that is evaluated when none is given


@dataclass
class Measurements:
    """The measurements of one VAE, on the images of this process or, after `gathered`, on all images.

    Attributes:
        health: statistics of the posteriors.
        per_image: for each image its `index` (its place in the data), its `name` and the figures of `image_figures`.
        drawn: (index, reconstruction (C, R, R)) of the images that are drawn.
        seconds: for each batch, the time to encode and to decode, divided by the number of images.
        memory: peak in bytes while a single image was reconstructed; None if the system does not report it.
    """

    health: LatentHealth
    per_image: list[dict[str, Any]] = field(default_factory=list)
    drawn: list[tuple[int, Tensor]] = field(default_factory=list)
    seconds: list[tuple[float, float]] = field(default_factory=list)
    memory: list[int | None] = field(default_factory=list)

    def gathered(self) -> Measurements:
        """The measurements of all processes, in the order of the data. Every process must call it."""
        return Measurements(
            merged(gather_object([self.health])),
            sorted(gather_object(self.per_image), key=lambda image: image["index"]),
            _in_order(gather_object(self.drawn)),
            gather_object(self.seconds),
            gather_object(self.memory),
        )


@dataclass
class Bench:
    """The images and metrics, which are the same for all VAEs. The VAEs are measured one after the other.

    Attributes:
        distances: `rfid`, `rfdd` and `cmmd`, those that are wanted.
        reading: how image files are read.
        originals: (index, image (C, R, R)) of the images that are drawn; known after the first VAE.
        bad: images that could not be read.
    """

    config: EvaluateConfig
    state: PartialState
    source: ImageSource
    perceptual: Perceptual | None
    distances: dict[str, Distance]
    reading: ReadOptions
    originals: list[tuple[int, Tensor]] = field(default_factory=list)
    bad: BadImages = field(default_factory=BadImages)

    def result(self, name: str, vae: AnyAutoencoder, first: bool) -> dict[str, Any]:
        """All results of one VAE, the same on every process.

        Args:
            name: the VAE's name.
            vae: the VAE, which is moved to the device, and back to the CPU at the end.
            first: whether it is the first VAE; the originals are then measured and kept too.

        Raises:
            InputError: when no image can be read, or too few for a figure.
        """
        vae.to(self.state.device)
        measured = self._measure(name, vae, first).gathered()
        if first:
            self.originals = _in_order(gather_object(self.originals))
        self.bad.add(gather_object(self.bad.items()))
        per_image = measured.per_image
        if not per_image:
            raise InputError(
                f"none of the {self.count} images of {self.config.data!r} can be read; see the warnings, and give "
                "others by --data"
            )
        not_finite = sum(not math.isfinite(image["psnr"]) for image in per_image)
        if not_finite:
            logger.warning(
                "%s: %d of %d reconstructions are not finite in %s; see `sdvae fp16`",
                *(name, not_finite, len(per_image), self.config.precision),
            )
        distances = self._distances(len(per_image))
        diffusability = self._diffusability(name, vae, per_image) if self.config.diffusability else {}
        vae.to("cpu")  # type: ignore[arg-type]
        encode_seconds, decode_seconds = zip(*measured.seconds, strict=True)
        return {
            "vae": name,
            "class": class_name(vae),
            "parameters": sum(parameter.numel() for parameter in vae.parameters()),
            "latent_channels": vae.config.latent_channels,
            "compression_ratio": vae.spatial_compression_ratio,
            "images": len(per_image),
            "not_finite": not_finite,
            "means": means(per_image),
            **{key: None if not_finite else distances.get(key) for key in DISTANCE_NAMES},
            **(diffusability | ({"ifid": None} if not_finite else {})),
            "active_channels": measured.health.moments.active_channels,
            "health": measured.health.metrics(),
            "complaints": measured.health.complaints(),
            "encode_ms": 1000 * statistics.median(encode_seconds),
            "decode_ms": 1000 * statistics.median(decode_seconds),
            "memory_mib": max((taken / 2**20 for taken in measured.memory if taken is not None), default=None),
            "per_image": per_image,
            "drawn": measured.drawn,
        }

    @property
    def count(self) -> int:
        """Images to be measured, over all processes."""
        return len(self.source) if self.config.count is None else min(self.config.count, len(self.source))

    def _measure(self, name: str, vae: AnyAutoencoder, first: bool) -> Measurements:
        """The measurements on this process's images. The arguments are those of `result`."""
        measured = Measurements(LatentHealth(vae.config.latent_channels))
        for batch in self._batches(name):
            x = batch["image"].to(self.state.device)
            if not measured.memory:
                self._round_trip(vae, x, batch["index"])  # a warm-up, so that it is not timed
                one = partial(self._round_trip, vae, x[:1], batch["index"][:1])
                measured.memory.append(with_peak_memory(one, self.state.device)[1])
            trip = self._round_trip(vae, x, batch["index"])
            measured.seconds.append((trip.encode_seconds / len(x), trip.decode_seconds / len(x)))
            y = self._as_measured(trip.reconstruction)
            measured.health.update(trip.posterior)
            for i, figures in enumerate(image_figures(x, y, trip.posterior, self.perceptual)):
                measured.per_image.append({"index": batch["index"][i], "name": utf8(batch["name"][i]), **figures})
            for distance in self.distances.values():
                if first:
                    distance.add(colours(as_seen(x)), real=True)
                distance.add(colours(as_seen(y)), real=False)
            for index, original, reconstruction in zip(batch["index"], x.cpu(), y.cpu(), strict=True):
                if index < self.config.images:
                    measured.drawn.append((index, reconstruction.nan_to_num()))
                    if first:
                        self.originals.append((index, original))
        return measured

    def _batches(self, name: str) -> Iterator[dict[str, Any]]:
        """This process's batches in which at least one image could be read, with a progress bar."""
        config, state = self.config, self.state
        crop = adm_center_crop if config.crop == "adm" else center_crop
        images = EvaluationImages(self.source, config.resolution, self.reading, crop=crop)
        size = config.batch_size
        whole = range(0, self.count, size)[state.process_index :: state.num_processes]
        mine = [i for start in whole for i in range(start, min(start + size, self.count))]
        loader = evaluation_loader(images, mine, batch_size=size, num_workers=config.num_workers)
        for batch in tqdm(loader, name, disable=not state.is_main_process, unit="batch", file=sys.stderr):
            self.bad.add(batch["bad"])
            if batch["name"]:
                yield batch

    @torch.inference_mode()
    def _round_trip(self, vae: AnyAutoencoder, x: Tensor, indices: Sequence[int]) -> RoundTrip:
        """Encode and decode. A sample's noise depends on the seed and the image's place in the data, not its batch."""
        seeds = [sample_seed(self.config.seed, 0, index, "evaluation") for index in indices]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return round_trip(vae, x, latents=self.config.latents, generator=generators)

    def _as_measured(self, reconstruction: Tensor) -> Tensor:
        """Clamp to [-1, 1] and, if `quantize` is set, round to 8 bits.

        An image with a value that is not finite becomes NaN, since infinite values would be clamped to black and white.
        """
        finite = reconstruction.isfinite().all(dim=(1, 2, 3), keepdim=True)
        y = reconstruction.clamp(-1, 1).where(finite, math.nan)
        return ((y + 1) * 127.5).round() / 127.5 - 1 if self.config.quantize else y

    def _diffusability(self, name: str, vae: AnyAutoencoder, per_image: list[dict[str, Any]]) -> dict[str, Any]:
        """The figures of `sdvae.evaluation.diffusability`; those of single images are added to `per_image`.

        Every process computes the figures of all images, since they depend on each other; iFID's images are divided.
        """
        batches = self._batches(f"{name}, diffusability")
        images = sorted(gather_object(collect(vae, batches, self.config.seed)), key=lambda image: image.index)
        check_count(len(images))
        fault = fault_of(images)
        if fault is not None:
            logger.warning("%s has no diffusability: %s", name, fault)
            return {}
        ifid = self._ifid(vae, halfway(images))
        measured = measure(
            images, probe_steps=self.config.probe_steps, seed=self.config.seed, device=self.state.device, name=name
        )
        for figures in per_image:
            figures |= measured.per_image[figures["index"]]
        return {**measured.figures, "ifid": ifid, "diffusability": measured.details()}

    def _ifid(self, vae: AnyAutoencoder, latents: Tensor) -> float | None:
        """The FID of decoded latents (scaled for a diffusion model) to the originals; None if `fid` is not set."""
        fid = self.distances.get("rfid")
        if fid is None:
            return None
        scaling, size = scaling_of(vae), (self.config.resolution,) * 2
        mine = latents[self.state.process_index :: self.state.num_processes]
        for z in mine.split(self.config.batch_size):
            z = scaling.denormalize(z.to(self.state.device)).to(vae.dtype)
            with torch.inference_mode():  # but not around `compute`, which makes the tensors of the next sum
                images = decode_images(vae, z, size).float()
            fid.add(self._as_measured(images), real=False)
        return fid.compute()

    def _distances(self, images: int) -> dict[str, float]:
        """The distances of the reconstructions since the last call to the originals."""
        if self.distances and images < 2:
            name = DISTANCE_NAMES[next(iter(self.distances))]
            raise InputError(
                f"got {images} image that can be read; {name} needs at least two, and far more for a reliable value"
            )
        return {key: distance.compute() for key, distance in self.distances.items()}


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Measure each VAE, write results.json, per_image.csv, table.md and a picture, and print the table.

    Args:
        config: the options of `sdvae evaluate`.

    Returns:
        For each VAE `means` (a `MeanEstimate` of each figure), `per_image`, and the figures of the whole set.

    Raises:
        InputError: for VAEs or images that cannot be read; before the first image is encoded, where possible.
    """
    config = config.with_preset()
    state = PartialState(cpu=accelerator_type() is None)
    with state.main_process_first():  # one process downloads; the others find the files in the cache
        source = open_source(config.data, split=config.split, image_column=config.image_column)
        dtype = DTYPES[config.precision]
        vaes = {name or PACKAGED: load_autoencoder(name, dtype=dtype) for name in config.vaes or (None,)}
        perceptual = perceptual_if_any(config.lpips, config.lpips_weights, config.lpips_heads)
        distances = _distances(config, state.device)
    for name, vae in vaes.items():
        check_image_channels(vae, name, alpha=True)
        say_if_no_posterior(vae, name, "it has no KL, and its latents are decoded as they are")
        if config.tiling and isinstance(vae, StockAutoencoder):
            raise InputError(
                f"got tiling with {name}, of class {class_name(vae)}, for which there are no strips; need an "
                "AutoencoderKL or a student; leave tiling out"
            )
        if config.diffusability:
            check_size(vae, name, config.resolution)
    channels = {vae.config.in_channels for vae in vaes.values()}
    if len(channels) > 1:
        raise InputError(f"the VAEs take images of {sorted(channels)} channels; need one kind; evaluate them apart")
    if not all(gather_object([perceptual is not None])):  # if a process could not download LPIPS, none uses it
        perceptual = None
    if perceptual is not None:
        perceptual.to(state.device)
    reading = ReadOptions(
        channels=channels.pop(), min_side=config.min_side, max_pixels=config.max_pixels, color=config.color
    )
    bench = Bench(config, state, source, perceptual, distances, reading)
    if config.diffusability:
        check_count(bench.count)
    make_folder(Path(config.output))  # before the first image, so that a fault of the folder shows at once
    results: list[dict[str, Any]] = []
    for name, vae in vaes.items():
        if config.tiling and not isinstance(vae, StockAutoencoder):
            vae.enable_tiling()
        results.append(bench.result(name, vae, first=not results))
    _warn_of_few(results[0]["images"], config, distances)
    if state.is_main_process:
        write(results, bench)
    return results


def _distances(config: EvaluateConfig, device: torch.device) -> dict[str, Distance]:
    """The distances that are wanted, each with its network."""
    if not (config.fid or config.fdd or config.cmmd):
        return {}
    from sdvae.metrics import fid

    distances: dict[str, Distance] = {
        **fid.frechet_distances(config.fid, config.inception, config.fdd, config.dinov2, device)
    }
    if config.cmmd:
        distances["cmmd"] = fid.ReconstructionMMD(config.clip, device)
    return distances


def _warn_of_few(images: int, config: EvaluateConfig, distances: Mapping[str, Distance]) -> None:
    """Warn if the number of images is not that of the preset's published tables, or too small for a figure."""
    if config.preset != "none" and images != (published := PRESETS[config.preset][0]):
        logger.warning("%s: published rows are of %d images, these are of %d", config.preset, published, images)
    for key, distance in distances.items():
        features = getattr(distance, "features", 0)  # CMMD has no covariance that needs as many images
        if images <= features:
            logger.warning(
                "%s of %d images is biased upwards; need more than its %d features",
                *(DISTANCE_NAMES[key], images, features),
            )
    if config.diffusability:
        warn_of_few(images)


def write(results: list[dict[str, Any]], bench: Bench) -> None:
    """Write the four files, each whole or not at all, and print the table.

    Args:
        results: the results of `Bench.result`; `drawn` is removed from each.
        bench: the bench on which they were measured.
    """
    config = bench.config
    lpips_name = None if bench.perceptual is None else bench.perceptual.name
    table = markdown_table(results, lpips_name) + f"\n{_conditions(results[0], bench)}\n"
    if config.diffusability:
        table += f"\n{_diffusability_table(results)}"
    folder = Path(config.output)
    drawn = [result.pop("drawn") for result in results]
    about = {
        "config": asdict(config),
        "versions": {"sdvae": version(), "torch": torch.__version__, "diffusers": diffusers.__version__},
        "device": str(bench.state.device),
        "processes": bench.state.num_processes,
        "threads": torch.get_num_threads(),
        "images": bench.count,  # of which `skipped` could not be used
        "skipped": {utf8(name): reason for name, reason in bench.bad.items()},
        "vaes": [{key: value for key, value in result.items() if key != "per_image"} for result in results],
        "differences": {
            result["vae"]: differences(result["per_image"], results[0]["per_image"]) for result in results[1:]
        },
    }
    _write_text(folder / "results.json", json.dumps(jsonable(about), indent=1, ensure_ascii=False) + "\n")
    _write_text(folder / "per_image.csv", csv_text(results))
    _write_text(folder / "table.md", table)
    (folder / "reconstructions.png").unlink(missing_ok=True)
    if bench.originals:
        with replacing(folder / "reconstructions.png") as temporary:
            _picture(results, bench.originals, drawn).save(temporary, format="PNG")
    print(f"{table}wrote {folder}")


def _conditions(result: dict[str, Any], bench: Bench) -> str:
    """A line that says how the figures in the table were measured, and on how many of the images."""
    config, bad = bench.config, [reason for _, reason in bench.bad.items()]
    images = f"{result['images']} of {bench.count} images ({kinds_of(bad)})" if bad else f"{bench.count} images"
    how = f"{config.resolution} x {config.resolution} pixels, crop «{config.crop}», the posterior's {config.latents}"
    rounded = ", rounded to 8 bits" if config.quantize else ""
    return f"Means over {images} ± 95 % confidence; {how}, {config.precision}{rounded}."


def _diffusability_table(results: list[dict[str, Any]]) -> str:
    """The second table, and a line about each of its columns."""
    columns = columns_with_figures(results, None, DIFFUSABILITY_COLUMNS)
    if not columns:
        return ""
    lines = [f"- {column.title}: {column.about}; {direction(column)}." for column in columns]
    measured = next(result for result in results if "image_slope" in result)
    slope, share = measured["image_slope"], measured["image_high_share"]
    lines.append(f"\nThe images have a slope of {slope:.2f} and {share:.3f} of their energy in the finest octave.")
    return markdown_table(results, None, columns) + "\n" + "\n".join(lines) + "\n"


def _in_order(images: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    return sorted(images, key=lambda image: image[0])


def _picture(
    results: Sequence[dict[str, Any]], originals: list[tuple[int, Tensor]], drawn: list[list[tuple[int, Tensor]]]
) -> Image.Image:
    """A row for each image: the original, and each VAE's reconstruction with its PSNR."""
    tiles = [[image, *(of_vae[i][1] for of_vae in drawn)] for i, (_, image) in enumerate(originals)]
    psnr = [{image["index"]: f"{image['psnr']:.2f} dB" for image in result["per_image"]} for result in results]
    captions = [["", *(of_vae[index] for of_vae in psnr)] for index, _ in originals]
    return tile_grid(tiles, ["original", *(result["vae"] for result in results)], captions=captions)


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # paths may hold any bytes
