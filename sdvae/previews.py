"""Pictures of latents while a diffusion model samples, and the linear map that draws the cheapest of them.

    pipe(…, callback_on_step_end=Previews(student, show))

Three decoders serve, from the best to the fastest: the VAE itself, a student of it (`sdvae distil`, TAESD), and an
affine map from the latents at a position to one pixel, which user interfaces know as «latent RGB factors».
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sdvae.alpha import as_seen, colours
from sdvae.data import EvaluationImages, ReadOptions, evaluation_loader, open_source, to_image
from sdvae.data.reading import Color
from sdvae.errors import InputError
from sdvae.io import printable, read_json, replacing, with_section
from sdvae.kernels.speed import speed_up
from sdvae.latents.scaling import identity_scaling, scaling_of
from sdvae.model import Autoencoder
from sdvae.model.patches import unpatched
from sdvae.roundtrip import compute_device, decode_images, encode_images, pad_to_multiple
from sdvae.runtime import accelerator_type
from sdvae.statistics import LatentRGB, RGBFactors
from sdvae.weights.save import RGB_FACTORS, factors_beside

BATCH_SIZE = 4  # images
PREVIEWS = "Previews"  # heading of the section in a model card
PREVIEWS_TEXT = """The linear map from latents to RGB that comes nearest to images shrunk by {compression_ratio}
(«latent RGB factors»), also in `{name}`. It takes latents as a diffusion model gets them,
{scaling}, and gives values from -1 to 1:

| | {colours} |
|---|{rules}
{table}

By least squares over {images} images at {resolution}x{resolution} pixels: {fit}.
"""
PATCH = 2  # Flux's pipelines pack 2 x 2 latents into one token

Decoder = Autoencoder | RGBFactors


class Previews:
    """A callback for diffusers' pipelines that shows what is in the latents after a step.

    It takes the latents as the pipeline holds them, so early pictures have the noise that is left in them. Pipelines of
    images work: latents (B, C, h, w), and packed ones (B, h·w / 4, 4·C), as of Flux. Latents of videos are refused.

    Args:
        decoder: the VAE or a student, on any device; or the map of `fit_preview`, whose pictures have one pixel
            for each position of the latents.
        show: called after a step with its number, from 0, and the pictures of the batch.
        every: show only every so many steps, from the first on.
        size: height and width of the images in pixels, which packed latents do not tell; by default a square.
    """

    def __init__(
        self,
        decoder: Decoder,
        show: Callable[[int, list[Image.Image]], None],
        *,
        every: int = 1,
        size: tuple[int, int] | None = None,
    ):
        if every < 1:
            raise InputError(f"got every={every}; need at least 1")
        self.decoder = decoder
        self.show = show
        self.every = every
        self.size = size

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """What `callback_on_step_end` asks for. Nothing is changed.

        Raises:
            InputError: for latents that cannot be shown, or a pipeline that does not hand them over.
        """
        if step % self.every == 0:
            if "latents" not in tensors:
                raise InputError("the callback got no latents; give 'latents' in callback_on_step_end_tensor_inputs")
            self.show(step, self.draw(tensors["latents"]))
        return {}

    @torch.no_grad()
    def draw(self, latents: Tensor) -> list[Image.Image]:
        """The pictures of latents as a pipeline holds them: scaled, of any shape that `Previews` takes."""
        z = unpacked(latents, self.size) if latents.ndim == 3 else latents
        if z.ndim != 4:
            raise InputError(f"got latents of shape {tuple(latents.shape)}; need those of images, (B, C, h, w)")
        return [to_image(image) for image in decode_scaled(self.decoder, z)]


def decode_scaled(decoder: Decoder, z: Tensor) -> Tensor:
    """The images of scaled latents.

    Args:
        decoder: a VAE, a student, or a linear map.
        z: (B, C, h, w), as a diffusion model gives them, on the decoder's device. Those of FLUX.2's kind may also be
            its patches, (B, 4·C, h/2, w/2), for a VAE.

    Returns:
        (B, 3, H, W) in fp32, nominally in [-1, 1]; for a linear map H = h and W = w.

    Raises:
        InputError: when the decoder takes another number of channels.
    """
    scaling = identity_scaling() if isinstance(decoder, RGBFactors) else scaling_of(decoder)
    channels = len(decoder.factors) if isinstance(decoder, RGBFactors) else decoder.config.latent_channels
    if z.shape[1] == channels * math.prod(scaling.patch_size):
        z = unpatched(z, scaling.patch_size)
    if z.shape[1] != channels:
        raise InputError(f"got latents of {z.shape[1]} channels for a decoder of {channels}; need one of the same VAE")
    if isinstance(decoder, RGBFactors):
        return decoder.decode(z.float())
    unscaled = scaling.unscaled(z.float())
    ratio = decoder.spatial_compression_ratio
    size = (ratio * z.shape[2], ratio * z.shape[3])
    return decode_images(decoder, unscaled.to(compute_device(decoder), decoder.dtype), size).float()


def unpacked(latents: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Latents of which each token holds 2 x 2 positions, as in Flux's pipelines.

    Args:
        latents: (B, h/2 · w/2, 4·C).
        size: height and width of the images in pixels, whose ratio is that of h and w; None for a square.

    Returns:
        (B, C, h, w).

    Raises:
        InputError: when the tokens do not fill a rectangle of this shape.
    """
    batch, tokens, values = latents.shape
    height, width = size or (1, 1)
    rows = math.isqrt(tokens * height // width)
    if values % PATCH**2 or not rows or tokens % rows or rows * width != tokens // rows * height:
        raise InputError(
            f"got packed latents of shape {tuple(latents.shape)}, which are no image of {height}:{width}; need its "
            "height and width: size="
        )
    grid = latents.reshape(batch, rows, tokens // rows, values // PATCH**2, PATCH, PATCH)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, values // PATCH**2, PATCH * rows, -1)


@dataclass(frozen=True)
class Preview:
    """A linear map, and what it belongs to.

    Attributes:
        map: from latents scaled as a diffusion model gets them.
        scaling: that scaling, in words.
        about: the factors of the scaling, the compression ratio, and the number and size of the images that it was
            fitted to.
    """

    map: RGBFactors
    scaling: str
    about: dict[str, Any]

    @property
    def fit(self) -> str:
        """Text such as «22.2 dB, R² 0.926, 0.858, 0.822»."""
        return f"{self.map.psnr:.1f} dB, R² {', '.join(f'{value:.3f}' for value in self.map.r2.tolist())}"

    def __str__(self) -> str:
        return f"{self.fit}, fitted to {self.about['images']} images"

    def markdown(self) -> str:
        """The content of a model card's section `PREVIEWS`, with the numbers as UIs take them."""
        rows = [*self.map.factors.tolist(), self.map.bias.tolist()]
        names = [*(f"channel {channel}" for channel in range(len(rows) - 1)), "bias"]
        table = "\n".join(
            f"| {name} | {' | '.join(f'{v:.4f}' for v in row)} |" for name, row in zip(names, rows, strict=True)
        )
        colours = ("R", "G", "B") if len(rows[0]) == 3 else ("grey",)
        return PREVIEWS_TEXT.format(
            name=RGB_FACTORS,
            colours=" | ".join(colours),
            rules="---|" * len(colours),
            table=table,
            fit=self.fit,
            scaling=f"`{self.scaling}`",
            **self.about,
        )

    def write_beside(self, vae: Path) -> Path:
        """Write it into a VAE's folder, or beside its file; and into the folder's model card, if it has one.

        The keys are those of ComfyUI's latent formats, which take the values as they are.

        Returns:
            The written file.
        """
        path = factors_beside(vae)
        content = {
            "latent_rgb_factors": self.map.factors.tolist(),
            "latent_rgb_factors_bias": self.map.bias.tolist(),
            "input": f"latents as a diffusion model gets them: {self.scaling}",
            "output": "RGB in [-1, 1], one pixel for each position of the latents",
            "r2": self.map.r2.tolist(),
            "psnr": self.map.psnr,
            **self.about,
        }
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        card = vae / "README.md"
        if card.is_file():
            text = with_section(card.read_text(encoding="utf-8"), PREVIEWS, self.markdown())
            with replacing(card) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return path


@torch.no_grad()
def fit_preview(vae: Autoencoder, data: str, count: int = 64, resolution: int = 256, color: Color = "srgb") -> Preview:
    """The linear map that comes nearest to images at the latents' resolution, by least squares in float64.

    Args:
        vae: the VAE, which is not changed; a copy encodes in fp32, on the accelerator if there is one.
        data: a source for `open_source`.
        count: number of images, at most, the first ones.
        resolution: side of their centre crops in pixels.
        color: as in `ReadOptions`.

    Raises:
        InputError: when no image can be read, or for a count or resolution below 1.
    """
    if count < 1 or resolution < 1:
        raise InputError(f"got count={count}, resolution={resolution}; need at least one image of at least one pixel")
    source = open_source(data)
    config: Any = vae.config
    images = EvaluationImages(source, resolution, ReadOptions(channels=config.in_channels, min_side=1, color=color))
    device = torch.device(accelerator_type() or "cpu")
    encoder = copy.deepcopy(vae)
    nn.Module.to(encoder, device, torch.float32)  # diffusers' own method warns about the dtype
    if device.type == "cpu":
        speed_up(encoder)
    sums, seen = LatentRGB(config.latent_channels, min(3, config.in_channels)), 0
    for batch in evaluation_loader(images, range(min(count, len(source))), batch_size=BATCH_SIZE, num_workers=0):
        if batch["name"]:
            x = pad_to_multiple(batch["image"], vae.spatial_compression_ratio)
            sums.update(encode_images(encoder, x.to(device)).mean, colours(as_seen(x)))
            seen += len(x)
    if not seen:
        raise InputError(f"none of the images in {data!r} can be read; choose others with --data")
    return preview_of(vae, sums, seen, resolution)


def preview_of(vae: Autoencoder, sums: LatentRGB, images: int, resolution: int) -> Preview:
    """The linear map of a VAE's latents, as its configuration or its batch norm scales them.

    A map serves all positions, so with patches the shift and the scale of a channel are their means over the positions
    of a patch. In natural images these differ little.

    Args:
        vae: the VAE; only its configuration is used.
        sums: of its unscaled latents.
        images: the number of images that were counted.
        resolution: their side in pixels.

    Raises:
        InputError: when no image was counted, or all have one colour, or the VAE has no scaling_factor.
    """
    config: Any = vae.config
    scaling, fitted = scaling_of(vae), sums.fit()
    positions = math.prod(scaling.patch_size)
    shift, scale = (part.double().reshape(-1, positions).mean(dim=1) for part in (scaling.shift, scaling.scale))
    # z = s / scale + shift, so factors · z + bias = (factors / scale) · s + (bias + factors · shift)
    factors, bias = fitted.factors / scale[:, None], fitted.bias + (fitted.factors * shift[:, None]).sum(0)
    keys = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
    about = {key: config[key] for key in keys if config.get(key) is not None}
    about |= {"compression_ratio": vae.spatial_compression_ratio, "images": images, "resolution": resolution}
    undone = "" if scaling.patch_size == (1, 1) else ", and then the patches are undone"
    return Preview(replace(fitted, factors=factors, bias=bias), scaling.formula + undone, about)


def read_preview(path: str | Path) -> RGBFactors:
    """The map in a file of `sdvae export --data`.

    Raises:
        InputError: when the file cannot be read or is another one.
    """
    content = read_json(Path(path))
    try:
        factors, bias, r2 = (
            torch.tensor(content[key], dtype=torch.float64)
            for key in ("latent_rgb_factors", "latent_rgb_factors_bias", "r2")
        )
        return RGBFactors(factors, bias, r2, float(content["psnr"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{printable(str(path))} holds no latent RGB factors; need a file of sdvae export") from error
