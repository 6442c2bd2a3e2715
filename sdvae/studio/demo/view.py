"""One photograph through a VAE, with its latents edited on the way: tensors to pictures and figures.

photograph --encode--> latents --edited--> decode --> what is shown
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn

from sdvae.cpu.kernels import speed_up
from sdvae.data.images import RESAMPLING, ImageError, cover, read_image, to_image, to_tensor
from sdvae.errors import InputError
from sdvae.metrics.image import image_metrics
from sdvae.model import AutoencoderKL, DiagonalGaussian
from sdvae.model.tiling import map_bytes
from sdvae.pictures import AMPLIFICATION
from sdvae.reconstruct import SMALLEST_SIDE
from sdvae.roundtrip import check_image_channels, crop_to, pad_to_multiple
from sdvae.runtime import accelerator_type
from sdvae.studio.explore.moves import lerp, slerp
from sdvae.weights import load_vae

SHEET_WIDTH = 768  # pixels, about, of the picture of all channels
WHOLE_BYTES = 2**29  # of a layer's maps, above which an image is computed in strips; all at once takes thrice that
CONTRAST = (0.01, 0.99)  # quantiles of a channel that are drawn black and white: single outliers would leave it flat


@dataclass(frozen=True)
class Model:
    """A VAE with the name under which it is shown."""

    name: str
    vae: AutoencoderKL

    @classmethod
    def load(cls, source: str | None) -> Model:
        """In fp32, on the accelerator if there is one.

        Args: source: whatever `load_vae` reads; None takes the VAE of this package.

        Raises: InputError when it cannot be read, or its images are neither grey nor RGB.
        """
        vae = load_vae(source, dtype=torch.float32)
        check_image_channels(vae, source)
        device = torch.device(accelerator_type() or "cpu")
        if device.type == "cpu":
            speed_up(vae)
        nn.Module.to(vae, device)  # diffusers' own is typed for dtypes alone
        return cls("packaged VAE" if source is None else source, vae)

    @property
    def std(self) -> float:
        """Of the latents of photographs, as its configuration has it: scaling_factor is 1/std (LDM, appendix G)."""
        return 1.0 / self.vae.config.scaling_factor

    @property
    def summary(self) -> str:
        """«f8, 4 channels, 3.11 M parameters, cpu»."""
        millions = sum(p.numel() for p in self.vae.parameters()) / 1e6
        channels = self.vae.config.latent_channels
        ratio = self.vae.spatial_compression_ratio
        return f"f{ratio}, {channels} channels, {millions:.2f} M parameters, {self.vae.device.type}"

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """(1, C, H, W) of any size -> the posterior over the latents of the padded image, on the CPU."""
        padded = pad_to_multiple(x, self.vae.spatial_compression_ratio)
        self._tile_if_large(padded.shape[2], padded.shape[3])
        return DiagonalGaussian(self.vae.encode(padded.to(self.vae.device)).latent_dist.parameters.cpu())

    def decode(self, z: Tensor) -> Tensor:
        """(1, c, h, w) -> (1, C, f·h, f·w), on the CPU."""
        ratio = self.vae.spatial_compression_ratio
        self._tile_if_large(ratio * z.shape[2], ratio * z.shape[3])
        return self.vae.decode(z.to(self.vae.device)).sample.cpu()

    def _tile_if_large(self, height: int, width: int) -> None:
        """In strips, to the same result, where the whole image at once would take gigabytes; small ones are slower."""
        self.vae.enable_tiling(map_bytes(self.vae, 1, height, width, torch.float32) > WHOLE_BYTES)


@dataclass(frozen=True)
class Encoded:
    """A photograph and its posterior under one VAE.

    Attributes:
        x: (1, C, H, W) in [-1, 1], as given to the VAE, before padding; on the CPU.
        posterior: of the padded image, on the CPU.
        second: (1, c, h, w), the mode of the second photograph, which is cut to the first one's size; or None.
        seconds: that encoding the first one took.
    """

    x: Tensor
    posterior: DiagonalGaussian
    second: Tensor | None
    seconds: float


@dataclass(frozen=True)
class Edits:
    """What is done to the latents before they are decoded, in this order."""

    blend: float = 0.0
    """From 0, the photograph, to 1, the second one; without a second one it does nothing."""
    spherical: bool = False
    """Blend along the arc instead of along the straight line."""
    noise: float = 0.0
    """Standard deviation of added noise, in units of that of the latents of photographs."""
    seed: int = 0
    """Of the noise."""
    zeroed: tuple[int, ...] = ()
    """Channels that become 0; those that the VAE lacks are passed over."""


@dataclass(frozen=True)
class View:
    """What the page shows of one VAE, beside its latents."""

    original: Image.Image
    reconstruction: Image.Image
    difference: Image.Image
    figures: dict[str, str]


def open_photograph(path: str | Path, max_side: int) -> tuple[Image.Image, str]:
    """An RGB image whose longer side has `max_side` pixels at most, and a sentence about what was read.

    Raises: InputError, one line that starts with the file's name, when it is no image, is damaged, has more pixels
        than are ever decoded, or a side that is too short.
    """
    path = Path(path)
    try:
        image = read_image(path, min_side=SMALLEST_SIDE)
    except ImageError as error:
        raise InputError(f"{path.name}: {error}; need a photograph (JPEG, PNG, WebP, TIFF, …)") from error
    width, height = image.size
    scale = min(1.0, max_side / max(width, height))
    size = (round(width * scale), round(height * scale))
    if min(size) < SMALLEST_SIDE:
        raise InputError(
            f"{path.name}: {width} x {height} pixels, {size[0]} x {size[1]} after shrinking to {max_side}; "
            f"the shorter side needs {SMALLEST_SIDE}; crop it"
        )
    if scale == 1.0:
        return image, f"{path.name}: {width} x {height} pixels"
    shrunk = image.resize(size, RESAMPLING)
    return shrunk, f"{path.name}: {width} x {height} pixels, shrunk to {size[0]} x {size[1]}"


@torch.inference_mode()
def encode(model: Model, image: Image.Image, second: Image.Image | None = None) -> Encoded:
    """Args: image, second: RGB; a grey VAE gets their luma."""
    x = _pixels(model, image)
    start = time.perf_counter()
    posterior = model.encode(x)
    seconds = time.perf_counter() - start
    if second is None:
        return Encoded(x, posterior, None, seconds)
    other = model.encode(_pixels(model, cover(second, image.width, image.height)))
    return Encoded(x, posterior, other.mode(), seconds)


@torch.inference_mode()
def show(model: Model, encoded: Encoded, edits: Edits) -> View:
    """Decode the edited latents. Figures of the reconstruction are against the photograph, whatever was edited."""
    z = edit(encoded.posterior.mode(), encoded.second, edits, model.std)
    start = time.perf_counter()
    y = model.decode(z)
    seconds = time.perf_counter() - start
    height, width = encoded.x.shape[-2:]
    x, y = encoded.x, crop_to(y, height, width)
    (merits,) = image_metrics(x, y, encoded.posterior, None)
    nats = float(encoded.posterior.kl())
    difference = (2 * AMPLIFICATION * ((x - y.clamp(-1, 1)) / 2).abs() - 1).clamp(-1, 1)  # 0 is black
    return View(
        original=to_image(x[0]),
        reconstruction=to_image(y[0]),
        difference=to_image(difference[0]),
        figures={
            "PSNR": f"{merits['psnr']:.2f} dB",
            "SSIM": f"{merits['ssim']:.4f}",
            "KL": f"{nats:,.0f} nats = {nats / math.log(2) / (height * width):.3f} bits per pixel",
            "latents": " x ".join(str(side) for side in z.shape[1:]),
            "encode": f"{1000 * encoded.seconds:.0f} ms",
            "decode": f"{1000 * seconds:.0f} ms",
        },
    )


@torch.inference_mode()
def show_latents(model: Model, encoded: Encoded, edits: Edits, channel: int | None = None) -> Image.Image:
    """The latents that `show` decodes. Args: channel: the one to draw; None, or one that the VAE lacks, draws all."""
    z = edit(encoded.posterior.mode(), encoded.second, edits, model.std)
    return draw_channels(z[0], None if channel is None or channel >= z.shape[1] else channel)


def edit(z: Tensor, second: Tensor | None, edits: Edits, std: float) -> Tensor:
    """Latents as they are decoded.

    Args:
        z: (1, c, h, w), unscaled.
        second: the same, of the second photograph.
        std: of the latents of photographs, the unit of `edits.noise`.

    Returns: a new tensor; the noise depends on the seed and the shape alone, and grows in place with its strength.
    Raises: InputError where there is no arc between the two: from zero, or to the opposite.
    """
    if second is not None:
        blend = slerp if edits.spherical else lerp
        z = blend(z, second, torch.tensor([edits.blend]))[0]
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(edits.seed))
    z = z + edits.noise * std * noise
    z[:, [channel for channel in edits.zeroed if channel < z.shape[1]]] = 0.0
    return z


def draw_channels(z: Tensor, channel: int | None) -> Image.Image:
    """(c, h, w) -> one channel, or all in a grid; each grey from its 1st to its 99th percentile, which are given."""
    shown = range(len(z)) if channel is None else [channel]
    columns = math.ceil(math.sqrt(len(shown)))
    zoom = max(1, round(SHEET_WIDTH / columns / z.shape[2]))  # whole pixels, so that elements are squares
    width, height = zoom * z.shape[2], zoom * z.shape[1]
    size = min(16, max(10, width // 14))
    font = ImageFont.load_default(size)
    gap, caption = 8, round(1.6 * size)
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + caption + gap) - gap), "white")
    draw = ImageDraw.Draw(sheet)
    for place, c in enumerate(shown):
        left, top = place % columns * (width + gap), place // columns * (height + caption + gap)
        low, high = torch.quantile(z[c].flatten().double(), torch.tensor(CONTRAST).double()).tolist()
        grey = (z[c] - low) / (high - low) if high > low else torch.full_like(z[c], 0.5)
        tile = Image.fromarray((grey.clamp(0, 1) * 255).round().numpy().astype(np.uint8))
        sheet.paste(tile.resize((width, height), Image.Resampling.NEAREST), (left, top + caption))
        text = f"{c}: {low:.3g} … {high:.3g}"
        draw.text((left + width / 2, top + caption / 2), text, fill="black", font=font, anchor="mm")
    return sheet


def save_latents(model: Model, encoded: Encoded, path: Path) -> None:
    """Write `mean` and `logvar`, (1, c, h, w) float32 each, as encoded: unscaled and not edited.

    The metadata have the VAE's name, its scaling_factor (and shift_factor, where it has one), and the image's
    width and height in pixels, to which what is decoded is cropped.
    """
    config = model.vae.config
    metadata = {"vae": model.name, "scaling_factor": repr(config.scaling_factor)}
    if config.shift_factor is not None:
        metadata["shift_factor"] = repr(config.shift_factor)
    height, width = encoded.x.shape[-2:]
    metadata |= {"image_width": str(width), "image_height": str(height)}
    tensors = {"mean": encoded.posterior.mean.contiguous(), "logvar": encoded.posterior.logvar.contiguous()}
    save_file(tensors, path, metadata=metadata)


def _pixels(model: Model, image: Image.Image) -> Tensor:
    return to_tensor(image if model.vae.config.in_channels == 3 else image.convert("L"))[None]
