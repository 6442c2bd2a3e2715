"""The settings of `sdvae explore`, and the options of `sdvae demo` and `sdvae report`.

Torch is not imported here, so that the command line lists options at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sdvae.evaluation.config import PROBE_STEPS, check_probe_steps


@dataclass(frozen=True, kw_only=True)
class ColorOption:
    """The option of every command that reads image files."""

    color: Literal["srgb", "raw"] = "srgb"
    """`srgb` converts colours to sRGB by the profile in the file; `raw` takes the numbers in the file as they are."""


@dataclass(frozen=True)
class Settings(ColorOption):
    """The images that are measured and drawn, and the settings of single experiments."""

    data: str = "skimage"
    """Images to measure: whatever `data.source` takes in training."""
    images: tuple[str, ...] = ()
    """Images to draw: files, or names of images in `data`. By default the first ones of `data`."""
    anomalies: str | None = None
    """For `anomaly`: images that are not normal, whatever `data.source` takes. By default the normal images with
    synthetic defects."""
    count: int = 16
    """Largest number of images to measure."""
    resolution: int = 256
    """Side in pixels of the square that is cropped from the centre of each image."""
    steps: int = 7
    """For `interpolate` and `traverse`: number of columns."""
    sigmas: tuple[float, ...] = (5.0, 15.0, 25.0, 50.0)
    """For `denoise`: standard deviations of the noise to remove, in grey levels of 0 to 255."""
    seed: int = 0
    """Seed of the samples, the defects and the noise."""


@dataclass(frozen=True)
class DemoOptions(ColorOption):
    """Options of `sdvae demo`."""

    vae: str | None = None
    """The VAE: whatever `sdvae export` takes as its source. By default the one inside this package."""
    compare: str | None = None
    """A second VAE, shown beside the first."""
    student: str | None = None
    """A student of the first VAE (`sdvae distil`), given as the VAE is. Its picture is shown while a setting changes,
    until the VAE's own is there. The VAE inside this package comes with one."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 lets other machines use the page."""
    port: int = 7860
    """Port to listen on."""
    max_side: int = 1024
    """Photographs with a longer side than this are shrunk to it, in pixels."""
    max_megabytes: float = 20.0
    """Largest size of an uploaded file, in megabytes."""


@dataclass(frozen=True)
class ReportOptions:
    """Options of `sdvae report`."""

    vae: str | None = None
    """The VAE: whatever `sdvae export` takes as its source, a run folder of `sdvae train`, or a folder or hub id of
    another autoencoder of diffusers, such as AutoencoderDC or AutoencoderKLWan. By default the one inside this
    package."""
    subfolder: str | None = None
    """Folder inside `vae` that holds the VAE."""
    data: str | None = None
    """Images to measure: whatever `data.source` takes in training. By default those that the run held out, or else the
    photographs of scikit-image."""
    count: int = 24
    """Measure this many images, the first ones."""
    resolution: int | None = None
    """Side in pixels of the square that is cropped from the centre of each image. By default that of the run's
    validation, or else 256."""
    color: Literal["srgb", "raw"] | None = None
    """`srgb` converts colours to sRGB by the profile in the file; `raw` takes the numbers in the file as they are. By
    default as the run did, or else srgb."""
    output: Path = Path("report.html")
    """The file to write."""
    lpips: Literal["vgg", "alex", "squeeze", "none"] = "vgg"
    """Network of LPIPS. If its weights can be neither read nor downloaded, LPIPS is left out."""
    lpips_weights: str | None = None
    """Local file of that network's weights, with torchvision's names."""
    lpips_heads: Literal["lpips", "uniform"] = "lpips"
    """`uniform` gives all features the same weight."""
    diffusability: bool = False
    """Add a section on how well a diffusion model can learn the latents, as in `sdvae evaluate`; takes minutes more."""
    probe_steps: int = PROBE_STEPS
    """With `diffusability`: training steps of the probe, a small diffusion model; 0 leaves it out."""

    def __post_init__(self) -> None:
        check_probe_steps(self)
