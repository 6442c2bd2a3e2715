"""Compare the steps of `sdvae distil` from images and from a data set of latents, on a CPU.

    sdvae encode --source path/to/photographs --output latents --vae VAE --resolution 256 --mirror true
    python scripts/benchmark_distil.py --config configs/tiny.yaml --distil.teacher VAE \
        --data.source path/to/photographs --distil.latents_folder latents

Takes the options of `sdvae distil`, distil.latents_folder among them. The same student does one step from images and
one from latents in turn. Prints the median of a step's seconds, with its loading of images, and the median of each
pair's ratio. Seconds are those of the process on a core, which other programs disturb less than the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from sdvae.cli import parse_train_config
from sdvae.data.dataset import Batch
from sdvae.errors import InputError, exit_code
from sdvae.training.build import build_accelerator, build_perceptual, lay_out, starting_student
from sdvae.training.config import TrainConfig
from sdvae.training.data import open_sources, training_batches, training_images
from sdvae.training.distil import Teacher
from sdvae.training.players import Players
from sdvae.training.step import TrainStep

WARM_UP = 2  # pairs that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=20, help="pairs of steps")
    arguments, options = parser.parse_known_args()
    recipe = parse_train_config(options)
    recipe = replace(recipe, data=replace(recipe.data, num_workers=0))  # so that this process does everything
    if recipe.distil.latents_folder is None:
        raise InputError("got no distil.latents_folder; need the latents of data.source; encode them")
    torch.set_num_threads(1)
    accelerator = build_accelerator(recipe)
    student, vae, config = starting_student(recipe)
    teacher = Teacher(vae, accelerator)
    lay_out(teacher.vae, config, accelerator)
    config = lay_out(student, config, accelerator)
    perceptual = build_perceptual(config, accelerator)
    step = TrainStep(config, Players(student, config, accelerator), perceptual, accelerator, teacher)
    source, _ = open_sources(config.data, config.seed)
    from_images = replace(config, distil=replace(config.distil, latents_folder=None))
    sources = [iter(training_batches(training_images(source, c), c, accelerator)) for c in (from_images, config)]
    seconds = [[timed(step, config, batches) for batches in sources] for _ in range(WARM_UP + arguments.rounds)]
    seconds = seconds[WARM_UP:]
    images, latents = (statistics.median(column) for column in zip(*seconds, strict=True))
    ratio = statistics.median(first / second for first, second in seconds)
    crops, weight = config.data.resolution, config.distil.teacher_weight
    print("| crops | batch | teacher_weight | from images, s | from latents, s | ratio |\n|---|---|---|---|---|---|")
    print(f"| {crops} | {config.batch_size} | {weight:g} | {images:.3f} | {latents:.3f} | {ratio:.2f} |")


def timed(step: TrainStep, config: TrainConfig, batches: Iterator[Batch]) -> float:
    """The seconds of the last step of the schedule, with the loading of its images."""
    start = time.process_time()
    step(config.steps - 1, batches)
    return time.process_time() - start


if __name__ == "__main__":
    sys.exit(exit_code("benchmark_distil", main))
