"""The settings of `sdvae explore`. This does not import torch, so that the command line lists options at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
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
    color: Literal["srgb", "raw"] = "srgb"
    """`srgb` converts colours to sRGB by the profile in the file; `raw` takes the numbers in the file as they are."""
    steps: int = 7
    """For `interpolate` and `traverse`: number of columns."""
    sigmas: tuple[float, ...] = (5.0, 15.0, 25.0, 50.0)
    """For `denoise`: standard deviations of the noise to remove, in grey levels of 0 to 255."""
    seed: int = 0
    """Seed of the samples, the defects and the noise."""
