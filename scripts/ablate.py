"""Train a recipe, and the same recipe with one change at a time, with several seeds, and tabulate the differences.

    python scripts/ablate.py scripts/ablation.yaml --data.source photos/train --data.validation_source photos/val
        [--output runs/ablation] [--seeds 0 1 2] [--jobs 1] [--only l2 ssim] [any recipe override, for all runs]

The file names a recipe, settings for all runs, and the changes; each change is a set of settings. Each run is one
`sdvae train` with one thread (`OMP_NUM_THREADS` for another number), in a folder of its own, so the same command
continues where it was interrupted, and a second file with more changes can share the runs of the first. A change and
the recipe are compared seed by seed: the table gives the mean difference and its 95 % interval (Student's t), whose
width is the spread between seeds. Besides the figures of the last validation:

- sharpness: energy of the gradients of the reconstructions in parts of that of the images (1 is as sharp);
- equivariance: the encoder's error when images are shrunk to a half (`sdvae.metrics.equivariance`; lower is better);
- CPU s/step: processor time of the whole run, with start and validation, divided by its steps; without the runs that
  were interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from sdvae import load_vae
from sdvae.cli import parse_train_config
from sdvae.errors import InputError, exit_code, one_line
from sdvae.io import replacing
from sdvae.metrics.equivariance import SCALES, Transformed, encoder_errors, transform
from sdvae.metrics.table import estimate_mean
from sdvae.training.config import TrainConfig
from sdvae.training.data import evaluation_batches, open_sources
from sdvae.training.run_folder import RunFolder

COLUMNS = {
    "psnr": ("PSNR (dB)", 2),
    "ssim": ("SSIM", 4),
    "lpips": ("LPIPS", 3),
    "sharpness": ("sharpness", 3),
    "equivariance": ("equivariance", 3),
    "seconds": ("CPU s/step", 3),
}
BASE = "the recipe"
MEASURED = 32  # validation images for sharpness and equivariance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="YAML with recipe, settings and changes")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"), help="folder of all runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", nargs="+", metavar="CHANGE", help="these changes instead of all")
    arguments, overrides = parser.parse_known_args()
    plan = read_plan(arguments.file)
    changes: dict[str, dict[str, Any]] = {BASE: {}} | plan["changes"]
    if unknown := sorted(set(arguments.only or ()) - set(changes)):
        raise InputError(f"got --only {' '.join(unknown)}; need changes of {arguments.file}: {', '.join(changes)}")
    changes = {name: change for name, change in changes.items() if name in (BASE, *(arguments.only or changes))}
    recipe = str(arguments.file.parent / plan["recipe"])
    runs: dict[tuple[str, int], list[str]] = {}
    for seed in arguments.seeds:  # all changes of a seed before the next one, so that a part of the table comes early
        for name, change in changes.items():
            folder = arguments.output / f"{name.replace(' ', '_')}-{seed}"
            own = {**change, "seed": seed, "output_dir": str(folder)}
            runs[name, seed] = ["--config", recipe, *as_options(plan["settings"]), *overrides, *as_options(own)]
            parse_train_config(runs[name, seed])  # so that a mistake is found before hours of training
    with ThreadPoolExecutor(arguments.jobs) as pool:
        futures = {key: pool.submit(trained, options) for key, options in runs.items()}
        figures = {key: future.result() for key, future in futures.items()}
    print(table(figures, list(changes), arguments.seeds))


def read_plan(file: Path) -> dict[str, Any]:
    """The recipe, the settings and the changes in a YAML file."""
    need = "need a YAML file with recipe, settings and changes, such as scripts/ablation.yaml"
    if not file.is_file():
        raise InputError(f"there is no file {file}; {need}")
    try:
        plan = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not YAML: {one_line(error)}; {need}") from error
    kinds = {"recipe": str, "settings": dict, "changes": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(plan, dict) or not isinstance(plan.get(key), kind)]
    if wrong:
        raise InputError(f"got {file}, in which {', '.join(wrong)} is missing or of another kind; {need}")
    return plan


def as_options(settings: Mapping[str, Any]) -> list[str]:
    """Settings by their dotted keys, as options of `sdvae train`."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def trained(options: list[str]) -> dict[str, float]:
    """Train to the end, or continue, and measure; a run that was measured is not begun again."""
    config = parse_train_config(options)
    run = RunFolder(config.output_dir)
    result = Path(run.root) / "ablation.json"
    if not result.is_file():
        log = Path(f"{run.root}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        whole = not Path(run.root).exists()  # the time of one that was interrupted before is not known
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with log.open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "sdvae", "train", *options], stdout=file, stderr=file, env=environment
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise InputError(f"the run in {run.root} ended with exit code {process.returncode}; see {log}")
        measured = measure(config)
        if whole:
            measured["seconds"] = (usage.ru_utime + usage.ru_stime) / config.steps
        with replacing(result) as temporary:
            temporary.write_text(json.dumps(measured, indent=2), encoding="utf-8")
    return json.loads(result.read_text(encoding="utf-8"))


@torch.no_grad()
def measure(config: TrainConfig) -> dict[str, float]:
    """The figures of the last validation, and those that need the VAE again."""
    run = RunFolder(config.output_dir)
    lines = [json.loads(line) for line in Path(run.metrics).read_text(encoding="utf-8").splitlines()]
    last = next(line for line in reversed(lines) if "validation/psnr" in line)
    figures = {name.removeprefix("validation/"): value for name, value in last.items() if isinstance(value, float)}
    measured = {"psnr": figures["psnr"], "ssim": figures["ssim"]}
    if distances := [value for name, value in figures.items() if name.startswith("lpips")]:
        measured["lpips"] = distances[0]
    vae = load_vae(run.model, dtype=torch.float32).eval()
    data = replace(config.data, validation_count=min(MEASURED, config.data.validation_count))
    _, source = open_sources(data, config.seed)
    images_energy = energy = 0.0
    rows: list[dict[str, Transformed]] = []
    for batch in evaluation_batches(source, config, Accelerator(cpu=True)):
        images = batch["image"]
        posterior = vae.encode(images).latent_dist
        images_energy += gradient_energy(images)
        energy += gradient_energy(vae.decode(posterior.mode()).sample.clamp(-1, 1))
        rows += transform(vae, images, posterior.mean)
    (half,) = (name for name, transformation in SCALES.items() if transformation.scale == 0.5)
    errors = encoder_errors([row[half] for row in rows])
    return measured | {"sharpness": energy / images_energy, "equivariance": float(errors.mean())}


def gradient_energy(images: Tensor) -> float:
    """The sum of squared differences between neighbouring pixels."""
    return float(images.diff(dim=2).square().sum() + images.diff(dim=3).square().sum())


def table(figures: Mapping[tuple[str, int], Mapping[str, float]], changes: list[str], seeds: list[int]) -> str:
    """The means of the recipe, and the differences of each change from it, in Markdown."""
    lines = ["| | " + " | ".join(title for title, _ in COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for change in changes:
        cells = []
        for column, (_, digits) in COLUMNS.items():
            values = [figures[change, seed].get(column, math.nan) for seed in seeds]  # without LPIPS in the loss
            if change != BASE:
                values = [value - figures[BASE, seed][column] for value, seed in zip(values, seeds, strict=True)]
            cells.append(cell(values, digits, signed=change != BASE))
        lines.append(f"| {change} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(values: list[float], digits: int, signed: bool) -> str:
    """The mean, a difference with its sign, and half the width of its interval if there are two values or more."""
    values = [value for value in values if not math.isnan(value)]
    if not values:
        return ""
    estimate = estimate_mean(values)
    text = f"{estimate.mean:{'+' if signed else ''}.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {estimate.high - estimate.mean:.{digits}f}"


if __name__ == "__main__":
    sys.exit(exit_code("ablate", main))
