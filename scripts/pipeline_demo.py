"""Put a saved VAE into a diffusers pipeline and decode a photograph through it.

    python scripts/pipeline_demo.py runs/quickstart/model pipeline.png

Stable Diffusion's image-to-image pipeline encodes the photograph with the VAE, multiplies the latents by
`scaling_factor`, adds a little noise, denoises, divides by `scaling_factor` and decodes. The UNet here is tiny and
always predicts zero noise, so the result shows only what the VAE and its scaling factor do to the photograph.
"""

from __future__ import annotations

import argparse
import sys

import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from jsonargparse.typing import PositiveInt
from PIL import Image

from sdvae import load_vae
from sdvae.data import center_crop, open_source, read_image
from sdvae.errors import exit_code

TEXT_WIDTH = 8


def silent_unet(latent_channels: int) -> UNet2DConditionModel:
    """A UNet of the right shape that always predicts zero noise."""
    unet = UNet2DConditionModel(
        sample_size=64,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        cross_attention_dim=TEXT_WIDTH,
    )
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("vae", help="folder or file of the VAE")
    parser.add_argument("output", help="PNG to write: the photograph beside the result of the pipeline")
    parser.add_argument("--image", help="photograph; by default scikit-image's astronaut")
    parser.add_argument("--size", type=PositiveInt, default=256, help="side of the square crop in pixels")
    arguments = parser.parse_args()

    if arguments.image:
        photograph = read_image(arguments.image)
    else:
        source = open_source("skimage")
        names = [source.name(i) for i in range(len(source))]
        photograph = read_image(source.read(names.index("astronaut")))
    photograph = center_crop(photograph, arguments.size)

    vae = load_vae(arguments.vae)
    pipe = StableDiffusionImg2ImgPipeline(
        vae=vae,
        unet=silent_unet(vae.config.latent_channels),
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    picture = pipe(
        image=photograph,
        prompt_embeds=torch.zeros(1, 1, TEXT_WIDTH),
        guidance_scale=1.0,
        strength=0.01,  # one denoising step out of a hundred, from barely noised latents
        num_inference_steps=100,
        generator=torch.Generator().manual_seed(0),
    ).images[0]

    side_by_side = Image.new("RGB", (2 * arguments.size + 4, arguments.size), "white")
    side_by_side.paste(photograph, (0, 0))
    side_by_side.paste(picture, (arguments.size + 4, 0))
    side_by_side.save(arguments.output)
    print(f"{type(pipe).__name__} encoded and decoded through {arguments.vae}: {arguments.output}")


if __name__ == "__main__":
    sys.exit(exit_code("pipeline_demo", main))
