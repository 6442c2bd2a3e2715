"""The pictures and figures of the demo's page: a photograph's reconstruction from its latents, which may be edited.

photograph --encode--> latents --edit--> decode --> pictures and figures
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from sdvae.data import ImageError, ReadOptions, read_image, to_image, to_tensor
from sdvae.data.crops import RESAMPLING, cover
from sdvae.data.reading import Color
from sdvae.errors import InputError
from sdvae.io import printable
from sdvae.latents.scaling import scaling_of
from sdvae.metrics import SMALLEST_SIDE
from sdvae.metrics.image import image_metrics
from sdvae.model import Autoencoder, AutoencoderKLFlux2, DiagonalGaussian
from sdvae.model.tiling import map_bytes
from sdvae.pictures import amplified_difference, tile_grid
from sdvae.previews import decode_scaled
from sdvae.roundtrip import check_image_channels, crop_to, decode_images, encode_images
from sdvae.runtime import accelerator_type
from sdvae.studio.explore.moves import lerp, slerp
from sdvae.weights import load_vae
from sdvae.weights.load import PACKAGED_STUDENT

SHEET_WIDTH = 768  # approximate width in pixels of the picture of all channels
# Size of the largest layer's maps up to which an image is computed as a whole, which takes three times as much memory.
# Larger images are computed in strips.
WHOLE_BYTES = 2**29
CONTRAST = (0.01, 0.99)  # quantiles of a channel that are drawn black and white, so that outliers do not matter


@dataclass(frozen=True)
class Model:
    """A VAE, the name under which it is shown, and perhaps a student of it."""

    name: str
    vae: Autoencoder
    student: Autoencoder | None = None

    @classmethod
    def load(cls, source: str | None, student: str | None = None) -> Model:
        """Load a VAE in fp32, on the accelerator if there is one.

        Args:
            source: a source for `load_vae`; None is the VAE of this package.
            student: the same for a student of it; by default, if `source` is None, that of this package.

        Raises:
            InputError: when it cannot be read, its images are neither grey nor RGB, or the student is not of its shape.
        """
        vae = _loaded(source)
        student = str(PACKAGED_STUDENT) if source is None and student is None else student
        small = None if student is None else _loaded(student)
        if small is not None and _shape(small) != _shape(vae):
            raise InputError(
                f"got student {student} with image channels, latent channels and compression ratio {_shape(small)}; "
                f"need the VAE's, {_shape(vae)}; give a student of this VAE"
            )
        return cls("packaged VAE" if source is None else source, vae, small)

    @property
    def std(self) -> float:
        """Standard deviation of the latents of photographs: 1/scaling_factor of its configuration (LDM, appendix G)."""
        return scaling_of(self.vae).std

    @property
    def summary(self) -> str:
        """Text such as «f8, 4 channels, 3.11 M parameters, cpu»."""
        millions = sum(p.numel() for p in self.vae.parameters()) / 1e6
        channels = self.vae.config.latent_channels
        ratio = self.vae.spatial_compression_ratio
        return f"f{ratio}, {channels} channels, {millions:.2f} M parameters, {self.vae.device.type}"

    def encode(self, x: Tensor) -> DiagonalGaussian:
        """(1, C, H, W) of any size -> the posterior over the latents of the padded image, on the CPU."""
        self._tile_if_large(x.shape[2], x.shape[3])
        return encode_images(self.vae, x.to(self.vae.device)).to("cpu")

    def decode(self, z: Tensor, height: int, width: int) -> Tensor:
        """(1, c, ⌈H/f⌉, ⌈W/f⌉) -> (1, C, H, W) in about [-1, 1], on the CPU."""
        self._tile_if_large(height, width)
        return decode_images(self.vae, z.to(self.vae.device), (height, width)).cpu()

    def preview(self, z: Tensor, height: int, width: int) -> Tensor:
        """`decode`, by the student."""
        assert self.student is not None
        scaled = scaling_of(self.vae).scaled(z).to(self.student.device)
        return crop_to(decode_scaled(self.student, scaled), height, width).cpu()

    def _tile_if_large(self, height: int, width: int) -> None:
        """Use strips if the whole image would take gigabytes. They give the same result, and are slower."""
        ratio = self.vae.spatial_compression_ratio
        height, width = height + -height % ratio, width + -width % ratio  # as padded
        self.vae.use_tiling = map_bytes(self.vae, 1, height, width, torch.float32) > WHOLE_BYTES


def _loaded(source: str | None) -> Autoencoder:
    vae = load_vae(source, dtype=torch.float32)
    check_image_channels(vae, source)
    device = torch.device(accelerator_type() or "cpu")
    if device.type == "cpu":
        from sdvae.kernels.speed import speed_up

        speed_up(vae)
    return nn.Module.to(vae, device)  # the type hints of diffusers' own method allow dtypes only


def _shape(vae: Autoencoder) -> tuple[int, int, int]:
    return vae.config.in_channels, vae.config.latent_channels, vae.spatial_compression_ratio


@dataclass(frozen=True)
class Encoded:
    """A photograph and its posterior under one VAE.

    Attributes:
        x: (1, C, H, W) in [-1, 1], on the CPU.
        posterior: over (1, c, ⌈H/f⌉, ⌈W/f⌉), on the CPU.
        second: the same shape, the posterior's mode for the second photograph, which is cropped to the size of the
            first; None without a second one.
        seconds: the time of encoding the first photograph.
    """

    x: Tensor
    posterior: DiagonalGaussian
    second: Tensor | None
    seconds: float


@dataclass(frozen=True)
class Edits:
    """Changes to the latents before they are decoded, in this order."""

    blend: float = 0.0
    """From 0, the first photograph, to 1, the second one. Without a second one it has no effect."""
    spherical: bool = False
    """Blend along an arc instead of a straight line."""
    noise: float = 0.0
    """Standard deviation of added noise, divided by that of the latents of photographs."""
    seed: int = 0
    """Seed of the noise."""
    zeroed: tuple[int, ...] = ()
    """Channels that are set to 0. Numbers beyond the VAE's channels are ignored."""


@dataclass(frozen=True)
class View:
    """The pictures and figures of one VAE on the page, without the picture of its latents.

    Attributes:
        original: the photograph as the VAE gets it.
        reconstruction: decoded from the edited latents.
        difference: the amplified absolute difference of the two.
        figures: name of a figure -> its value as text.
    """

    original: Image.Image
    reconstruction: Image.Image
    difference: Image.Image
    figures: dict[str, str]


def open_photograph(path: str | Path, max_side: int, color: Color = "srgb") -> tuple[Image.Image, str]:
    """An RGB image whose longer side has at most `max_side` pixels, and a sentence about it.

    Raises:
        InputError: a line that starts with the file's name, when the file is not an image, is damaged, has too many
            pixels to be decoded safely, or a side that is too short.
    """
    name = printable(Path(path).name)
    try:
        image = read_image(path, ReadOptions(min_side=SMALLEST_SIDE, color=color))
    except ImageError as error:
        raise InputError(f"{name}: {error}; need a photograph (JPEG, PNG, WebP, TIFF, …)") from error
    width, height = image.size
    scale = min(1.0, max_side / max(width, height))
    size = (round(width * scale), round(height * scale))
    if min(size) < SMALLEST_SIDE:
        raise InputError(
            f"{name}: {width} x {height} pixels, {size[0]} x {size[1]} after shrinking to {max_side}; "
            f"the shorter side needs {SMALLEST_SIDE}; crop it"
        )
    if scale == 1.0:
        return image, f"{name}: {width} x {height} pixels"
    shrunk = image.resize(size, RESAMPLING)
    return shrunk, f"{name}: {width} x {height} pixels, shrunk to {size[0]} x {size[1]}"


@torch.inference_mode()
def encode(model: Model, image: Image.Image, second: Image.Image | None = None) -> Encoded:
    """Encode one photograph or two.

    Args:
        model: the VAE.
        image: an RGB image; a VAE for grey images gets its luma.
        second: a second RGB image, to blend with; None for no blending.
    """
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
    """Decode the edited latents. The figures compare the result with the first photograph, even after edits."""
    z = edit(encoded.posterior.mode(), encoded.second, edits, model.std)
    start = time.perf_counter()
    x = encoded.x
    height, width = x.shape[-2:]
    y = model.decode(z, height, width)
    seconds = time.perf_counter() - start
    (merits,) = image_metrics(x, y, encoded.posterior, None)
    figures = {"PSNR": f"{merits['psnr']:.2f} dB", "SSIM": f"{merits['ssim']:.4f}"}
    if not encoded.posterior.deterministic:
        nats = float(encoded.posterior.kl())
        figures["KL"] = f"{nats:,.0f} nats = {nats / math.log(2) / (height * width):.3f} bits per pixel"
    return View(
        original=to_image(x[0]),
        reconstruction=to_image(y[0]),
        difference=to_image(amplified_difference(x, y)[0]),
        figures={
            **figures,
            "latents": " x ".join(str(side) for side in z.shape[1:]),
            "encode": f"{1000 * encoded.seconds:.0f} ms",
            "decode": f"{1000 * seconds:.0f} ms",
        },
    )


@torch.inference_mode()
def show_preview(model: Model, encoded: Encoded, edits: Edits) -> tuple[Image.Image, Image.Image]:
    """The photograph, and what the model's student decodes the edited latents to."""
    z = edit(encoded.posterior.mode(), encoded.second, edits, model.std)
    height, width = encoded.x.shape[-2:]
    return to_image(encoded.x[0]), to_image(model.preview(z, height, width)[0])


@torch.inference_mode()
def show_latents(model: Model, encoded: Encoded, edits: Edits, channel: int | None = None) -> Image.Image:
    """A picture of the latents that `show` decodes.

    Args:
        model: the VAE.
        encoded: the photograph.
        edits: the edits of its latents.
        channel: the channel to draw; None, or a number beyond the VAE's channels, draws all.
    """
    z = edit(encoded.posterior.mode(), encoded.second, edits, model.std)
    return draw_channels(z[0], None if channel is None or channel >= z.shape[1] else channel)


def edit(z: Tensor, second: Tensor | None, edits: Edits, std: float) -> Tensor:
    """The edited latents. The noise pattern depends on the seed and the shape only; `edits.noise` scales it.

    Args:
        z: (1, c, h, w), unscaled.
        second: the latents of the second photograph, the same shape, or None.
        edits: the changes to make.
        std: standard deviation of the latents of photographs, the unit of `edits.noise`.

    Returns:
        A new tensor of the same shape.

    Raises:
        InputError: for a spherical blend of zeros or of opposite latents, between which there is no single arc.
    """
    if second is not None:
        blend = slerp if edits.spherical else lerp
        z = blend(z, second, torch.tensor([edits.blend]))[0]
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(edits.seed))
    z = z + edits.noise * std * noise
    z[:, [channel for channel in edits.zeroed if channel < z.shape[1]]] = 0.0
    return z


def draw_channels(z: Tensor, channel: int | None) -> Image.Image:
    """A picture of one channel, or of all in a grid.

    A channel's grey levels go from its 1st to its 99th percentile, which are written below it.

    Args:
        z: (c, h, w).
        channel: its number; None draws all.
    """
    shown = range(len(z)) if channel is None else [channel]
    columns = math.ceil(math.sqrt(len(shown)))
    zoom = max(1, round(SHEET_WIDTH / columns / z.shape[2]))  # an integer, so that latent elements are squares
    tiles, captions = [], []
    for c in shown:
        low, high = torch.quantile(z[c].flatten().double(), torch.tensor(CONTRAST).double()).tolist()
        grey = (z[c] - low) / (high - low) if high > low else torch.full_like(z[c], 0.5)
        tiles.append(2 * grey.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)[None] - 1)
        captions.append(f"{c}: {low:.3g} … {high:.3g}")
    rows = [slice(first, first + columns) for first in range(0, len(shown), columns)]
    return tile_grid([tiles[row] for row in rows], [""] * columns, captions=[captions[row] for row in rows])


def save_latents(model: Model, encoded: Encoded, path: Path) -> None:
    """Write a safetensors file with `mean` and `logvar`, (1, c, h, w) float32 each: as the encoder gives them.

    There is no `logvar` if the encoder predicts no variance.

    Its metadata hold the VAE's name, its scaling_factor (and shift_factor, if it has one; or the scaling by its batch
    norm), and the image's width and height in pixels, to which the decoded image has to be cropped.
    """
    config = model.vae.config
    metadata = {"vae": model.name}
    metadata |= {key: repr(config[key]) for key in ("scaling_factor", "shift_factor") if config.get(key) is not None}
    if isinstance(model.vae, AutoencoderKLFlux2):
        metadata["scaling"] = json.dumps(scaling_of(model.vae).to_json())
    height, width = encoded.x.shape[-2:]
    metadata |= {"image_width": str(width), "image_height": str(height)}
    tensors = {"mean": encoded.posterior.mean.contiguous()}
    if not encoded.posterior.deterministic:
        tensors["logvar"] = encoded.posterior.logvar.contiguous()
    save_file(tensors, path, metadata=metadata)


def _pixels(model: Model, image: Image.Image) -> Tensor:
    return to_tensor(image if model.vae.config.in_channels == 3 else image.convert("L"))[None]
