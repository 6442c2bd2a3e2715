"""Compare a student of `sdvae distil` with its teacher: quality, size, and times on a CPU.

    python scripts/benchmark_student.py runs/tiny [--best] [--rounds 10] [--side 512] [--grid grid.png]

Measures model/ of a run on all of its validation images, then encodes and decodes one image with teacher and student in
turn, so that both meet the same load of the machine, and prints the median times and the median of each pair's ratio:
with torch's layers alone, and after `speed_up`. Prints two tables in Markdown. With --grid, it draws photographs of
scikit-image's wheel as both decode them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from sdvae import AutoencoderKL, AutoencoderTiny, load_vae, speed_up
from sdvae.data import BadImages, center_crop, open_source, read_image, to_tensor
from sdvae.errors import InputError, exit_code
from sdvae.pictures import student_grid
from sdvae.training.build import build_perceptual, starting_student
from sdvae.training.data import evaluation_batches, open_sources
from sdvae.training.distil import Teacher
from sdvae.training.recipe import read_recipe
from sdvae.training.run_folder import RunFolder
from sdvae.training.validation import validate_student

SHOWN = ("astronaut", "chelsea", "coffee", "rocket")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="run folder of sdvae distil")
    parser.add_argument("--best", action="store_true", help="take best_model/ instead of model/")
    parser.add_argument("--count", type=int, help="number of validation images; default: the recipe's")
    parser.add_argument("--rounds", type=int, default=10, help="pairs of times")
    parser.add_argument("--side", type=int, default=512, help="side in pixels of the image that is timed")
    parser.add_argument("--grid", type=Path, help="file for the picture, which needs scikit-image")
    arguments = parser.parse_args()
    run = RunFolder(arguments.run)
    if not run.config.is_file():
        raise InputError(f"there is no config.yaml in {run.root}; need the folder of a run of sdvae distil")
    recipe = read_recipe(run.config)
    if recipe.distil.teacher is None:
        raise InputError(f"the run in {run.root} trained no student; need a run of sdvae distil")
    if arguments.count is not None:
        recipe = replace(recipe, data=replace(recipe.data, validation_count=arguments.count))
    _, vae, config = starting_student(recipe)
    student = load_vae(run.best_model if arguments.best else run.model, dtype=torch.float32)
    assert isinstance(student, AutoencoderTiny)

    accelerator = Accelerator(cpu=True, mixed_precision="no")
    teacher = Teacher(vae, accelerator)
    _, validation = open_sources(config.data, config.seed)
    batches = evaluation_batches(validation, config, accelerator)
    perceptual = build_perceptual(config, accelerator)
    measured = validate_student(student, teacher, batches, accelerator, perceptual, BadImages(), keep=1)
    print(quality_table(measured.metrics, vae, student, len(measured.per_image), arguments.side))
    print(time_table(vae, student, arguments.side, arguments.rounds))
    if arguments.grid is not None:
        grid(teacher, student).save(arguments.grid)
        print(f"wrote {arguments.grid}")


def quality_table(
    metrics: dict[str, float], vae: AutoencoderKL, student: AutoencoderTiny, images: int, side: int
) -> str:
    """Means over the validation images, parameters, and multiplications for an image of side x side pixels."""
    names = [name for name in metrics if f"teacher_{name}" in metrics]
    rows = [[name, metrics[f"teacher_{name}"], metrics[name], metrics[f"{name}_to_teacher"]] for name in names]
    lines = [f"| {images} images | teacher | student | student to teacher |", "|---|---|---|---|"]
    lines += [f"| {name} | {a:.4g} | {b:.4g} | {c:.4g} |" for name, a, b, c in rows]
    lines.append(f"| psnr with its own encoder | | {metrics['psnr_round_trip']:.4g} | |")
    lines.append(f"| mean squared error of scaled latents | | {metrics['latents']:.3g} | |")
    for part in ("encoder", "decoder"):
        sizes = [parameters(vae, part), parameters(student, part)]
        lines.append(f"| parameters of the {part} | {sizes[0]:,} | {sizes[1]:,} | |")
    inputs = inputs_of(vae, side)
    for part, given in inputs.items():
        products = [multiplications(getattr(model, part), given) for model in (vae, student)]
        lines.append(f"| GMAC to {part} {side}² | {products[0] / 1e9:.2f} | {products[1] / 1e9:.2f} | |")
    return "\n".join([*lines, ""])


def parameters(model: Any, part: str) -> int:
    """Parameters of the encoder or of the decoder, with the 1x1 conv beside it."""
    conv = getattr(model, {"encoder": "quant_conv", "decoder": "post_quant_conv"}[part], None)
    beside = [] if conv is None else list(conv.parameters())
    return sum(p.numel() for p in [*getattr(model, part).parameters(), *beside])


def inputs_of(vae: AutoencoderKL, side: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    small = side // vae.spatial_compression_ratio
    return {
        "encode": torch.rand(1, vae.config.in_channels, side, side, generator=generator) * 2 - 1,
        "decode": torch.randn(1, vae.config.latent_channels, small, small, generator=generator),
    }


@torch.no_grad()
def multiplications(function: Callable[[torch.Tensor], Any], given: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        function(given)
    return counter.get_total_flops() / 2


@torch.no_grad()
def time_table(vae: AutoencoderKL, student: AutoencoderTiny, side: int, rounds: int) -> str:
    lines = [f"| {side}², {torch.get_num_threads()} threads | teacher | student | ratio |", "|---|---|---|---|"]
    for how in ("torch's layers", "after `speed_up`"):
        if how != "torch's layers":
            speed_up(vae)
            speed_up(student)
        for part, given in inputs_of(vae, side).items():
            pairs = []
            for _ in range(rounds + 1):  # the first is for warming up
                pairs.append([seconds(getattr(model, part), given) for model in (vae, student)])
            teacher_ms, student_ms = (1e3 * statistics.median(times) for times in zip(*pairs[1:], strict=True))
            ratio = statistics.median(a / b for a, b in pairs[1:])
            lines.append(f"| {part}, {how} | {teacher_ms:.0f} ms | {student_ms:.0f} ms | {ratio:.1f} |")
    return "\n".join([*lines, ""])


def seconds(function: Callable[[torch.Tensor], Any], given: torch.Tensor) -> float:
    start = time.perf_counter()
    function(given)
    return time.perf_counter() - start


@torch.no_grad()
def grid(teacher: Teacher, student: AutoencoderTiny) -> Image.Image:
    """Photographs that were not trained on, as the teacher and the student decode the teacher's latents."""
    source = open_source("skimage")
    names = [source.name(i) for i in range(len(source))]
    images = torch.stack([to_tensor(center_crop(read_image(source.read(names.index(name))), 256)) for name in SHOWN])
    lesson = teacher.lesson(images)
    assert lesson.picture is not None
    return student_grid(images, lesson.picture, student.decode(lesson.z).sample)


if __name__ == "__main__":
    sys.exit(exit_code("benchmark_student", main))
