"""The options of `sdvae evaluate`, and the conventions of published tables."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from sdvae.errors import InputError

SMALLEST_SIDE = 16  # pixels

# What a published row was measured on: (images, settings). PSNR and SSIM are of 8-bit images, rFID by torch-fidelity's
# Inception. «PSIM» in Stability's tables is on another scale than LPIPS (1.01 for kl-f8), and compares with no column.
PRESETS: dict[str, tuple[int, dict[str, Any]]] = {
    # COCO 2017 val, 256x256, 5,000 images: the tables of sd-vae-ft-ema and sd-vae-ft-mse (their model cards, 2022)
    "coco_val_5k_256": (5_000, {"resolution": 256, "crop": "resize", "quantize": True, "fid": True}),
    # ImageNet val, 256x256, 50,000 images, cropped as by ADM (Dhariwal & Nichol 2021): LlamaGen, DC-AE, SiT, …
    "imagenet_val_50k_256": (50_000, {"resolution": 256, "crop": "adm", "quantize": True, "fid": True}),
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Several VAEs, the same images, the same preprocessing."""

    vaes: tuple[str, ...] = ()
    """Whatever `sdvae export` takes as SOURCE, each; none: the VAE of this package."""
    data: str = "skimage"
    """Images; whatever data.source takes in training."""
    split: str = "train"
    """Split of a data set."""
    image_column: str | None = None
    """Column of a data set that holds the images; null finds it."""
    preset: Literal["none", "coco_val_5k_256", "imagenet_val_50k_256"] = "none"
    """A convention of the literature: sets resolution, crop, quantize and fid, and says so when the number of images is
    another than that of the published rows."""
    count: int | None = None
    """The first so many images; null takes all."""
    resolution: int = 256
    """Side in pixels of the square that the VAE sees."""
    crop: Literal["resize", "adm"] = "resize"
    """«resize»: the largest centred square, resized with antialias. «adm»: halved by a box filter while twice too
    large, then bicubic, then cropped (ADM's center_crop_arr, which ImageNet rows use)."""
    min_side: int | None = None
    """Images with a shorter side are skipped; null: half the resolution."""
    latents: Literal["mode", "sample"] = "mode"
    """Decode the posterior's mode, or a sample, drawn for each image by its place and the seed."""
    seed: int = 0
    """Of the samples."""
    quantize: bool = True
    """Round reconstructions to 8 bits before they are measured, as a picture that is saved would be."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the VAE computes in."""
    tiling: bool = False
    """Encode and decode in strips (`enable_tiling`): large images in bounded memory."""
    batch_size: int = 8
    """Images at once, on each process."""
    num_workers: int = 2
    """Processes that read images, for each process."""
    lpips: Literal["vgg", "alex", "squeeze", "none"] = "vgg"
    """LPIPS's trunk; where it can be neither read nor downloaded, LPIPS is left out, with a word. Published tables of
    VAEs mostly have vgg or alex: they do not compare."""
    lpips_weights: str | None = None
    """Local file of the trunk in torchvision's names; null lets torchvision download it."""
    lpips_heads: Literal["lpips", "uniform"] = "lpips"
    """«uniform» counts all features the same: for a trunk that the published heads were not fitted to."""
    fid: bool = False
    """Compute rFID, the Fréchet distance between Inception features of originals and reconstructions."""
    inception: str | None = None
    """Local file of torch-fidelity's Inception weights (pt_inception-2015-12-05-6726825d.pth); null lets it download
    them."""
    images: int = 4
    """Of the first images, originals and all reconstructions are drawn side by side; 0 draws nothing."""
    output: str = "evaluation"
    """Folder for results.json, per_image.csv, table.md and reconstructions.png; those of an earlier run are
    replaced."""

    def __post_init__(self) -> None:
        for key in ("count", "resolution", "min_side", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise InputError(f"got {key}={value}; need at least 1")
        for key in ("images", "num_workers"):
            if getattr(self, key) < 0:
                raise InputError(f"got {key}={getattr(self, key)}; need 0 or more")
        if self.resolution < SMALLEST_SIDE:
            raise InputError(f"got resolution={self.resolution}; need at least {SMALLEST_SIDE}: SSIM's window has 11")
        doubled = sorted({vae for vae in self.vaes if self.vaes.count(vae) > 1})
        if doubled:
            raise InputError(f"got {doubled[0]} more than once; need each VAE once")

    def with_preset(self) -> EvaluateConfig:
        """The settings of the preset in place of one's own."""
        return self if self.preset == "none" else dataclasses.replace(self, **PRESETS[self.preset][1])
