"""`sdvae evaluate`: VAEs side by side on the same images, on one process or many.

The images are cut into batches once, and each process takes every num_processes-th batch whole: so the figures of an
image do not depend on the number of processes.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import sdvae
from sdvae.data import (
    BadImages,
    EvaluationImages,
    ImageSource,
    adm_center_crop,
    center_crop,
    evaluation_loader,
    open_source,
)
from sdvae.errors import InputError
from sdvae.evaluation.config import PRESETS, EvaluateConfig
from sdvae.io import make_folder, replacing, utf8
from sdvae.metrics.fid import FEATURES, ReconstructionFID
from sdvae.metrics.image import image_figures
from sdvae.metrics.memory import with_peak_memory
from sdvae.metrics.perceptual import Perceptual, perceptual_if_any
from sdvae.metrics.table import csv_text, differences, jsonable, markdown_table, means
from sdvae.model import AutoencoderKL, DiagonalGaussian
from sdvae.noise import sample_seed
from sdvae.pictures import tile_grid
from sdvae.roundtrip import check_image_channels, crop_to, pad_to_multiple
from sdvae.runtime import DTYPES, accelerator_type
from sdvae.statistics import LatentHealth
from sdvae.weights import load_vae

logger = logging.getLogger(__name__)

PACKAGED = "packaged"  # the VAE's name where none was given


@dataclass
class Evaluation:
    """The bench that all VAEs go over, one after the other."""

    config: EvaluateConfig
    state: PartialState
    source: ImageSource
    perceptual: Perceptual | None
    fid: ReconstructionFID | None
    channels: int
    originals: list[tuple[int, Tensor]] = field(default_factory=list)  # for the picture: place and (C, R, R)
    bad: BadImages = field(default_factory=BadImages)

    def measure(self, name: str, vae: AutoencoderKL, first: bool) -> dict[str, Any]:
        """All figures of one VAE, the same on every process.

        Args: first: the originals are looked at, too.

        Raises: InputError when no image can be read.
        """
        device = self.state.device
        vae.to(device)
        health = LatentHealth(vae.config.latent_channels)
        rows: list[dict[str, Any]] = []
        drawn: list[tuple[int, Tensor]] = []
        seconds: list[tuple[float, float]] = []  # to encode and to decode an image
        memory: list[int | None] = []  # of one image
        for batch in self._batches(name):
            x = batch["image"].to(device)
            if not memory:
                self._reconstruct(vae, x, batch["index"])  # warms up
                one = partial(self._reconstruct, vae, x[:1], batch["index"][:1])
                memory.append(with_peak_memory(one, device)[1])
            y, posterior, times = self._reconstruct(vae, x, batch["index"])
            seconds.append((times[0] / len(x), times[1] / len(x)))
            health.update(posterior)
            for i, figures in enumerate(image_figures(x, y, posterior, self.perceptual)):
                rows.append({"index": batch["index"][i], "name": utf8(batch["name"][i]), **figures})
            if self.fid is not None:
                if first:
                    self.fid.add(x, real=True)
                self.fid.add(y, real=False)
            for place, original, reconstruction in zip(batch["index"], x.cpu(), y.cpu(), strict=True):
                if place < self.config.images:
                    drawn.append((place, reconstruction.nan_to_num()))
                    if first:
                        self.originals.append((place, original))
        vae.to("cpu")  # type: ignore[arg-type]
        rows = sorted(gather_object(rows), key=lambda row: row["index"])
        if first:
            self.originals = _in_order(gather_object(self.originals))
        self.bad.add(gather_object(self.bad.items()))
        if not rows:
            raise InputError(f"none of the {self.count} images of {self.config.data!r} can be read; see the warnings")
        health.sums = torch.stack(gather_object([health.sums])).sum(dim=0)
        seconds, memory = gather_object(seconds), gather_object(memory)
        if self.fid is not None and len(rows) < 2:
            raise InputError(
                f"got {len(rows)} image that can be read; rFID needs two, and more than {FEATURES} to mean something"
            )
        rfid = None if self.fid is None else self.fid.compute()
        infinite = sum(not math.isfinite(row["psnr"]) for row in rows)
        if infinite:
            logger.warning(
                "%s: %d of %d reconstructions are not finite in %s; see `sdvae fp16`",
                *(name, infinite, len(rows), self.config.precision),
            )
        return {
            "vae": name,
            "parameters": sum(parameter.numel() for parameter in vae.parameters()),
            "latent_channels": vae.config.latent_channels,
            "compression_ratio": vae.spatial_compression_ratio,
            "images": len(rows),
            "not_finite": infinite,
            "means": means(rows),
            "rfid": None if infinite else rfid,
            "active_channels": health.moments.active_channels,
            "health": health.metrics(),
            "complaints": health.complaints(),
            "encode_ms": 1000 * statistics.median(encode for encode, _ in seconds),
            "decode_ms": 1000 * statistics.median(decode for _, decode in seconds),
            "memory_mib": max((taken / 2**20 for taken in memory if taken is not None), default=None),
            "per_image": rows,
            "drawn": _in_order(gather_object(drawn)),
        }

    @property
    def count(self) -> int:
        return len(self.source) if self.config.count is None else min(self.config.count, len(self.source))

    def _batches(self, name: str) -> Iterator[dict[str, Any]]:
        """This process's batches that hold an image, with a progress bar on the main process."""
        config, state = self.config, self.state
        crop = adm_center_crop if config.crop == "adm" else center_crop
        images = EvaluationImages(self.source, config.resolution, self.channels, min_side=config.min_side, crop=crop)
        size = config.batch_size
        whole = range(0, self.count, size)[state.process_index :: state.num_processes]
        mine = [i for start in whole for i in range(start, min(start + size, self.count))]
        loader = evaluation_loader(images, mine, batch_size=size, num_workers=config.num_workers)
        for batch in tqdm(loader, name, disable=not state.is_main_process, unit="batch", file=sys.stderr):
            self.bad.add(batch["bad"])
            if batch["name"]:
                yield batch

    @torch.inference_mode()
    def _reconstruct(
        self, vae: AutoencoderKL, x: Tensor, places: Sequence[int]
    ) -> tuple[Tensor, DiagonalGaussian, tuple[float, float]]:
        """(B, C, R, R) fp32 in [-1, 1], the posterior, and the seconds that it took to encode and to decode."""
        start = self._now()
        padded = pad_to_multiple(x.to(vae.dtype), vae.spatial_compression_ratio)
        posterior = DiagonalGaussian(vae.encode(padded).latent_dist.parameters.float())
        z = posterior.mode()
        if self.config.latents == "sample":
            shape = z.shape[1:]
            noise = [torch.randn(shape, generator=self._generator(place)) for place in places]
            z = posterior.mean + posterior.std * torch.stack(noise).to(z)
        middle = self._now()
        y = crop_to(vae.decode(z.to(vae.dtype)).sample, x.shape[2], x.shape[3]).float()
        end = self._now()
        finite = y.isfinite().all(dim=(1, 2, 3), keepdim=True)
        y = y.clamp(-1, 1).where(finite, math.nan)  # infinite values must not pass for black and white
        if self.config.quantize:
            y = ((y + 1) * 127.5).round() / 127.5 - 1
        return y, posterior, (middle - start, end - middle)

    def _generator(self, place: int) -> torch.Generator:
        return torch.Generator().manual_seed(sample_seed(self.config.seed, 0, place, "evaluation"))

    def _now(self) -> float:
        if self.state.device.type == "cuda":
            torch.cuda.synchronize(self.state.device)
        return time.perf_counter()


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Measure each VAE, write results.json, per_image.csv, table.md and a picture, and print the table.

    Returns: for each VAE its figures: `means` (of `Mean`, one a figure), `per_image`, and those of the whole set.

    Raises: InputError for VAEs or images that cannot be read, before the first image is encoded where that is known.
    """
    config = config.with_preset()
    state = PartialState(cpu=accelerator_type() is None)
    with state.main_process_first():  # one process downloads what is to be downloaded
        source = open_source(config.data, split=config.split, image_column=config.image_column)
        dtype = DTYPES[config.precision]
        vaes = {name or PACKAGED: load_vae(name, dtype=dtype) for name in config.vaes or (None,)}
        perceptual = perceptual_if_any(config.lpips, config.lpips_weights, config.lpips_heads)
        fid = ReconstructionFID(config.inception, state.device) if config.fid else None
    for name, vae in vaes.items():
        check_image_channels(vae, name)
    channels = {vae.config.in_channels for vae in vaes.values()}
    if len(channels) > 1:
        raise InputError(f"the VAEs take images of {sorted(channels)} channels; need one kind; evaluate them apart")
    if not all(gather_object([perceptual is not None])):  # one process's download may fail: all have it, or none
        perceptual = None
    if perceptual is not None:
        perceptual.to(state.device)
    bench = Evaluation(config, state, source, perceptual, fid, channels.pop())
    make_folder(Path(config.output))  # or fail now, and not after the last image
    results: list[dict[str, Any]] = []
    for name, vae in vaes.items():
        if config.tiling:
            vae.enable_tiling()
        results.append(bench.measure(name, vae, first=not results))
    measured = results[0]["images"]
    if config.preset != "none" and measured != (published := PRESETS[config.preset][0]):
        logger.warning("%s: rows are published of %d images, here are %d", config.preset, published, measured)
    if fid is not None and measured <= FEATURES:
        logger.warning("rFID of %d images is biased upwards; need more than %d, its features", measured, FEATURES)
    if state.is_main_process:
        write(results, bench)
    return results


def write(results: list[dict[str, Any]], bench: Evaluation) -> None:
    """The four files, each whole or not at all."""
    config = bench.config
    lpips_name = None if bench.perceptual is None else bench.perceptual.name
    table = markdown_table(results, lpips_name) + f"\n{_conditions(results[0], config)}\n"
    folder = Path(config.output)
    drawn = [result.pop("drawn") for result in results]
    about = {
        "config": asdict(config),
        "versions": {"sdvae": sdvae.__version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "device": str(bench.state.device),
        "processes": bench.state.num_processes,
        "threads": torch.get_num_threads(),
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


def _conditions(result: dict[str, Any], config: EvaluateConfig) -> str:
    """What the table was measured on, in a line."""
    how = f"{config.resolution} x {config.resolution} pixels, crop «{config.crop}», the posterior's {config.latents}"
    rounded = ", rounded to 8 bits" if config.quantize else ""
    return f"Means over {result['images']} images ± 95 % confidence; {how}, {config.precision}{rounded}."


def _in_order(pictures: list[tuple[int, Tensor]]) -> list[tuple[int, Tensor]]:
    return sorted(pictures, key=lambda entry: entry[0])


def _picture(
    results: Sequence[dict[str, Any]], originals: list[tuple[int, Tensor]], drawn: list[list[tuple[int, Tensor]]]
) -> Image.Image:
    """A row an image: the original, and each VAE's reconstruction with its PSNR."""
    tiles = [[image, *(entries[i][1] for entries in drawn)] for i, (_, image) in enumerate(originals)]
    psnr = [{row["index"]: f"{row['psnr']:.2f} dB" for row in result["per_image"]} for result in results]
    captions = [["", *(of_vae[place] for of_vae in psnr)] for place, _ in originals]
    return tile_grid(tiles, ["original", *(result["vae"] for result in results)], captions=captions)


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
