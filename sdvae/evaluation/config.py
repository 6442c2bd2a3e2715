"""The options of `sdvae evaluate`, and the conventions of published tables."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from sdvae.errors import InputError

SMALLEST_SIDE = 16  # pixels
SMALLEST_FOR_LPIPS = 32  # pixels: four halvings and wide first kernels in AlexNet and SqueezeNet

# What a published row was measured on: (images, crop). PSNR and rFID compare; «PSIM» in Stability's tables is on
# another scale than LPIPS (1.01 for kl-f8), and SSIM has as many definitions as papers (windows, ranges, borders).
PRESETS: dict[str, tuple[int, Literal["resize", "adm"]]] = {
    # COCO 2017 val, 256x256, 5,000 images: the tables of sd-vae-ft-ema and sd-vae-ft-mse (their model cards, 2022)
    "coco_val_5k_256": (5_000, "resize"),
    # ImageNet val, 256x256, 50,000 images, cropped as by ADM (Dhariwal & Nichol 2021): LlamaGen, DC-AE, SiT, …
    "imagenet_val_50k_256": (50_000, "adm"),
}


@dataclass(frozen=True)
class EvaluateConfig:
    """Several VAEs, the same images, the same preprocessing."""

    vaes: tuple[str, ...] = ()
    """Whatever `sdvae export` takes as SOURCE, each; none: the VAE of this package. Also what stands before the first
    option."""
    data: str = "skimage"
    """Images; whatever data.source takes in training."""
    split: str = "train"
    """Split of a data set."""
    image_column: str | None = None
    """Column of a data set that holds the images; null finds it."""
    preset: Literal["none", "coco_val_5k_256", "imagenet_val_50k_256"] = "none"
    """A convention of the literature, which sets resolution, crop, min_side and quantize, whatever they are given as;
    says so when the number of images is another than that of the published rows. They have rFID: give fid as well."""
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
    """Local file of torch-fidelity's Inception weights (weights-inception-2015-12-05-6726825d.pth); null lets it
    download them."""
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
        if self.seed < 0:
            raise InputError(f"got seed={self.seed}; need 0 or more")
        if self.lpips in ("alex", "squeeze") and self.resolution < SMALLEST_FOR_LPIPS:
            raise InputError(
                f"got resolution={self.resolution} with lpips={self.lpips}; its trunk needs {SMALLEST_FOR_LPIPS}; "
                "take lpips=vgg or none"
            )
        if self.inception is not None and not self.fid:
            raise InputError(f"got inception={self.inception} without fid; need fid=true to use it, or leave it out")
        doubled = sorted({vae for vae in self.vaes if self.vaes.count(vae) > 1})
        if doubled:
            raise InputError(f"got {doubled[0]} more than once; need each VAE once")

    def with_preset(self) -> EvaluateConfig:
        """The settings of the preset in place of one's own."""
        if self.preset == "none":
            return self
        crop = PRESETS[self.preset][1]
        return dataclasses.replace(self, crop=crop, resolution=256, min_side=1, quantize=True)  # no image is left out
