"""Photographs -> latents -> a diffusion model -> new pictures, offline, on one CPU core.

    python scripts/latent_diffusion.py [--output runs/latent_diffusion] [--vae SOURCE] [--student SOURCE] [--steps N]

Cuts 400 crops per class out of the photographs in scikit-image's wheel, encodes them as `sdvae encode` does, trains a
small class-conditional UNet on `LatentDataset`, and samples it through a diffusers pipeline that decodes with the VAE.
`samples.png` has a row per class: crops after the VAE beside new pictures. `previews.png` shows what the model expects
a picture to become, step by step, drawn by a student of the VAE or else by latent RGB factors. `pipeline/` can be
loaded by `DiTPipeline.from_pretrained` without this package. Takes about 20 minutes of one core.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTPipeline
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from jsonargparse.typing import PositiveInt
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from sdvae import AutoencoderKL, InputError, load_vae
from sdvae.data import open_source, read_image, to_image, to_tensor
from sdvae.diffusion.denoiser import Batch, new_denoiser, new_scheduler, train
from sdvae.errors import exit_code
from sdvae.io import replacing
from sdvae.latents.config import EncodeConfig
from sdvae.latents.dataset import LatentDataset
from sdvae.latents.encode import encode
from sdvae.pictures import tile_grid
from sdvae.previews import Decoder, Previews, fit_preview
from sdvae.weights import load_kl

SIDE = 128  # pixels of a crop after resizing
# Class: photograph, side of its crops, and margins without crops, in pixels. `encode` numbers folders in this order.
CLASSES: dict[str, tuple[str, int, int | tuple[int, ...]]] = {
    "brick": ("brick", 128, 0),
    "coins": ("coins", 128, 0),
    "galaxies": ("hubble_deep_field", 128, 0),
    "gravel": ("gravel", 128, 0),
    "retina": ("retina", 256, (206, 206, 205, 205)),  # the corners are black
    "tissue": ("ihc", 192, 0),
}
GUIDANCE = 1.5  # v = v(no class) + GUIDANCE (v(class) - v(no class))
LOG_EVERY = 100  # steps
SHOWN_CROPS, SHOWN_SAMPLES = 3, 5  # per row of the grid
SHOWN_STEPS = 6  # in previews.png
PREVIEW_CROPS = 256  # to which the RGB factors are fitted
GAP, CAPTION = 4, 24  # pixels


def cut_crops(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` random crops of each class as folder/CLASS/0000.png, …"""
    generator = np.random.default_rng(seed)
    source = open_source("skimage")
    names = [source.name(i) for i in range(len(source))]
    with replacing(folder) as temporary:
        for label, (name, side, margin) in CLASSES.items():
            photograph = ImageOps.crop(read_image(source.read(names.index(name))), margin)
            (temporary / label).mkdir(parents=True)
            for i in range(count):
                left = int(generator.integers(photograph.width - side + 1))
                top = int(generator.integers(photograph.height - side + 1))
                crop = photograph.crop((left, top, left + side, top + side))
                crop.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(temporary / label / f"{i:04}.png")


def batches(dataset: LatentDataset, batch_size: int) -> Iterator[Batch]:
    """Batches without end; each epoch has its own order, mirror images and samples of the posteriors."""
    for epoch in itertools.count():
        for batch in dataset.loader(batch_size, epoch=epoch):
            yield batch["latents"], batch["label"]


@torch.inference_mode()
def decoded_crops(dataset: LatentDataset, vae: AutoencoderKL, count: int) -> list[list[Image.Image]]:
    """`count` crops of each class, decoded from the data set of latents."""
    rows: list[list[Image.Image]] = [[] for _ in CLASSES]
    for i in np.random.default_rng(0).permutation(len(dataset)):
        row = dataset[int(i)]
        if len(rows[row["label"]]) < count:
            z = dataset.scaling.denormalize(row["latents"])[None]
            rows[row["label"]].append(to_image(vae.decode(z).sample[0]))
    return rows


def draw(pipe: DiTPipeline, count: int, *, sampling_steps: int, seed: int) -> list[list[Image.Image]]:
    """`count` new pictures of each class."""
    labels = [label for label in range(len(CLASSES)) for _ in range(count)]
    generator = torch.Generator().manual_seed(seed)
    images = pipe(labels, guidance_scale=GUIDANCE, num_inference_steps=sampling_steps, generator=generator).images
    return [images[label * count : (label + 1) * count] for label in range(len(CLASSES))]


def watch(pipe: DiTPipeline, decoder: Decoder, *, sampling_steps: int, seed: int) -> dict[int, list[Image.Image]]:
    """The picture of each class that the model expects in the end, while it draws.

    Pipelines that take a callback get `callback_on_step_end=Previews(…)`. DiTPipeline takes none, so the scheduler
    hands on what it predicts as the clean latents.

    Args:
        pipe: the pipeline.
        decoder: a student of its VAE, the VAE itself, or latent RGB factors.
        sampling_steps: of which SHOWN_STEPS are shown, or all if there are fewer.
        seed: the seed of the noise.

    Returns:
        Step, from 0 -> a picture of each class.
    """
    shown: dict[int, list[Image.Image]] = {}
    every = max(1, (sampling_steps - 1) // (SHOWN_STEPS - 1))
    # under guidance the pipeline's batch has each picture twice
    previews = Previews(decoder, lambda step, pictures: shown.update({step: pictures[: len(CLASSES)]}), every=every)

    class Watched(DDIMScheduler):
        def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> DDIMSchedulerOutput:
            output = super().step(model_output, timestep, sample)
            number = self.timesteps.tolist().index(int(timestep))
            previews(pipe, number, timestep, {"latents": output.pred_original_sample})
            return output

    scheduler = pipe.scheduler
    pipe.scheduler = Watched.from_config(scheduler.config)
    try:
        draw(pipe, 1, sampling_steps=sampling_steps, seed=seed)
    finally:
        pipe.scheduler = scheduler
    return shown


def strips(shown: dict[int, list[Image.Image]]) -> Image.Image:
    """One row per class, one column per step that `watch` shows."""
    rows = [
        [to_tensor(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST)) for picture in of_class]
        for of_class in zip(*shown.values(), strict=True)
    ]
    return tile_grid(rows, [f"step {step + 1}" for step in shown])


def grid(crops: list[list[Image.Image]], samples: list[list[Image.Image]]) -> Image.Image:
    """One row per class: crops decoded by the VAE on the left, new pictures on the right."""
    tops = [CAPTION + row * (SIDE + GAP) for row in range(len(crops))]
    lefts = [column * (SIDE + GAP) for column in range(len(crops[0]) + len(samples[0]))]
    lefts[len(crops[0]) :] = [left + 2 * GAP for left in lefts[len(crops[0]) :]]
    picture = Image.new("RGB", (lefts[-1] + SIDE, tops[-1] + SIDE), "white")
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    captions = {lefts[0]: "crops, decoded by the VAE", lefts[len(crops[0])]: "drawn by the diffusion model"}
    for left, caption in captions.items():
        canvas.text((left, CAPTION / 2), caption, fill="black", font=font, anchor="lm")
    for top, of_class in zip(tops, zip(crops, samples, strict=True), strict=True):
        for left, tile in zip(lefts, itertools.chain(*of_class), strict=True):
            picture.paste(tile, (left, top))
    return picture


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/latent_diffusion"))
    parser.add_argument("--vae", help="VAE, as load_vae takes it; default: the one inside this package")
    parser.add_argument("--student", help="student of the VAE for the previews; default: latent RGB factors")
    parser.add_argument("--crops", type=PositiveInt, default=400, help="number of crops of each class")
    parser.add_argument("--steps", type=PositiveInt, default=1500)
    parser.add_argument("--batch_size", type=PositiveInt, default=32)
    parser.add_argument(
        "--widths", type=PositiveInt, nargs="+", default=[48, 96, 128], help="channels of the UNet's levels"
    )
    parser.add_argument("--sampling_steps", type=PositiveInt, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    vae = load_kl(arguments.vae)
    if vae.patch_size != (1, 1) or vae.config.shift_factor or vae.config.latents_mean:
        raise InputError(
            "got a VAE with a shift or a batch norm; need one without: DiTPipeline only divides by scaling_factor"
        )

    crops, latents = arguments.output / "crops", arguments.output / "latents"
    cut_crops(crops, arguments.crops)
    encode(EncodeConfig(source=str(crops), output=str(latents), vae=arguments.vae, resolution=SIDE, mirror=True))
    dataset = LatentDataset(latents, seed=arguments.seed)
    print(f"{len(dataset)} latents of {tuple(dataset[0]['latents'].shape)}")

    torch.manual_seed(arguments.seed)
    channels, side = vae.config.latent_channels, SIDE // vae.spatial_compression_ratio
    model, scheduler = new_denoiser(channels, side, arguments.widths, classes=True), new_scheduler()
    print(f"a denoiser of {model.num_parameters() / 1e6:.2f} M parameters")
    losses: list[float] = []
    start, steps = time.perf_counter(), arguments.steps
    for loss in train(model, scheduler, batches(dataset, arguments.batch_size), steps=steps):
        losses.append(loss)
        if len(losses) % LOG_EVERY == 0 or len(losses) == steps:
            mean, seconds = np.mean(losses[-LOG_EVERY:]), time.perf_counter() - start
            print(f"step {len(losses)}/{steps}  loss {mean:.4f}  {seconds:.0f} s", flush=True)

    # DiTPipeline is diffusers' class-conditional pipeline. A UNet2DModel has all that it uses of its `transformer`.
    pipe = DiTPipeline(transformer=model, vae=vae.float(), scheduler=scheduler)
    samples = draw(pipe, SHOWN_SAMPLES, sampling_steps=arguments.sampling_steps, seed=arguments.seed)
    grid(decoded_crops(dataset, vae, SHOWN_CROPS), samples).save(arguments.output / "samples.png")
    student = arguments.student and load_vae(arguments.student)
    decoder = student or fit_preview(vae, str(crops), PREVIEW_CROPS, SIDE).map
    shown = watch(pipe, decoder, sampling_steps=arguments.sampling_steps, seed=arguments.seed)
    strips(shown).save(arguments.output / "previews.png")
    pipe.vae = vae.to_diffusers()  # the saved folder then loads without sdvae
    pipe.save_pretrained(arguments.output / "pipeline")
    print(f"{', '.join(str(arguments.output / name) for name in ('samples.png', 'previews.png', 'pipeline'))}")


if __name__ == "__main__":
    sys.exit(exit_code("latent_diffusion", main))
