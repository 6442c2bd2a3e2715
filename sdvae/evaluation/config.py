"""The options of `sdvae evaluate`, and the conventions of published tables."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from sdvae.errors import InputError, Ranges, check_ranges
from sdvae.metrics import SMALLEST_LPIPS_SIDE, SMALLEST_SIDE

# (number of images, crop) of published tables. Their PSNR and rFID can be compared with those of `sdvae evaluate`. SSIM
# cannot, since papers define it differently (windows, ranges, borders), and «PSIM» in Stability's tables has another
# scale than LPIPS (1.01 for kl-f8).
PRESETS: dict[str, tuple[int, Literal["resize", "adm"]]] = {
    # COCO 2017 val, 256x256, 5,000 images: the tables of sd-vae-ft-ema and sd-vae-ft-mse (their model cards, 2022)
    "coco_val_5k_256": (5_000, "resize"),
    # ImageNet val, 256x256, 50,000 images, cropped as by ADM (Dhariwal & Nichol 2021): LlamaGen, DC-AE, SiT, …
    "imagenet_val_50k_256": (50_000, "adm"),
}

PROBE_STEPS = 500  # training steps of the probe of diffusability

RANGES: Ranges = (
    ("at least 1", lambda x: x >= 1, "count min_side max_pixels batch_size"),
    (f"at least {SMALLEST_SIDE} for SSIM", lambda x: x >= SMALLEST_SIDE, "resolution"),
    ("0 or more", lambda x: x >= 0, "images num_workers seed"),
)


def check_used(options: Any, option: str, unset: Any, switch: str) -> None:
    """Refuse an option that is set and would not be used.

    Args:
        options: a dataclass of options.
        option: its name.
        unset: its default.
        switch: name of the option that has to be true for it.
    """
    value = getattr(options, option)
    if value != unset and not getattr(options, switch):
        raise InputError(
            f"got {option}={value} without {switch}; need {switch}=true to use it; set that, or leave it out"
        )


def check_probe_steps(options: Any) -> None:
    """Refuse a number of steps below 0, or one without `diffusability`."""
    check_ranges(options, (("0 or more", lambda x: x >= 0, "probe_steps"),))
    check_used(options, "probe_steps", PROBE_STEPS, "diffusability")


@dataclass(frozen=True)
class EvaluateConfig:
    """The options of `sdvae evaluate`: which VAEs are measured, on which images, and how."""

    vaes: tuple[str, ...] = ()
    """The VAEs, each given as the source of `sdvae export`, or a folder or hub id of another autoencoder of diffusers,
    such as AutoencoderDC or AutoencoderKLWan; by default the VAE in this package. They may also be given without a
    name, before the first option."""
    data: str = "skimage"
    """The images; whatever data.source takes in training."""
    split: str = "train"
    """Split of the images. All of a source without splits is «train»."""
    image_column: str | None = None
    """Column of a data set that holds the images; null finds it by its type."""
    preset: Literal["none", "coco_val_5k_256", "imagenet_val_50k_256"] = "none"
    """A convention of published tables. It sets resolution, crop, min_side and quantize, even if they are given too,
    and warns if the number of images is not that of the tables. The tables have rFID, for which fid must be set too."""
    count: int | None = None
    """Measure the first `count` images; null takes all."""
    resolution: int = 256
    """Side of the square crops in pixels."""
    crop: Literal["resize", "adm"] = "resize"
    """«resize»: the largest centred square, resized with antialiasing. «adm»: the image, halved by a box filter while
    it is at least twice too large, resized (bicubic) and cropped (ADM's center_crop_arr, as in tables on ImageNet)."""
    min_side: int | None = None
    """Skip images with a shorter side, in pixels; null: half the resolution."""
    max_pixels: int | None = None
    """Skip images with more pixels, without decoding them; null: 178,956,970."""
    color: Literal["srgb", "raw"] = "srgb"
    """«srgb» converts colours to sRGB by the profile in the file; «raw» takes the numbers in the file as they are."""
    latents: Literal["mode", "sample"] = "mode"
    """Decode the posterior's mode, or a sample, whose noise depends on the seed and the image's place in the data."""
    seed: int = 0
    """Seed of the samples."""
    quantize: bool = True
    """Round reconstructions to 8 bits before they are measured, as if they had been saved as pictures."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Data type of the VAE's weights and computation."""
    tiling: bool = False
    """Encode and decode in strips (`enable_tiling`), which bounds the memory for large images. There are none for other
    autoencoders of diffusers."""
    batch_size: int = 8
    """Images in a batch, on each process."""
    num_workers: int = 2
    """Worker processes that read images, for each process."""
    lpips: Literal["vgg", "alex", "squeeze", "none"] = "vgg"
    """The trunk of LPIPS. If it can be neither read nor downloaded, LPIPS is left out with a warning. Published tables
    of VAEs mostly use vgg or alex; values of different trunks cannot be compared."""
    lpips_weights: str | None = None
    """Local file of the trunk in torchvision's names; null lets torchvision download it."""
    lpips_heads: Literal["lpips", "uniform"] = "lpips"
    """«uniform» weights all features equally, for a trunk to which the published heads were not fitted."""
    fid: bool = False
    """Compute rFID, the Fréchet distance between Inception features of originals and reconstructions. Needs
    torch-fidelity: pip install "sdvae[fid]"."""
    inception: str | None = None
    """Local file of torch-fidelity's Inception weights (weights-inception-2015-12-05-6726825d.pth); null downloads
    it."""
    fdd: bool = False
    """Compute rFDD, the same distance between features of DINOv2. Needs torch-fidelity too."""
    dinov2: str | None = None
    """Local file of DINOv2's weights, such as dinov2_vitl14_pretrain.pth, that of published tables; null downloads
    it."""
    cmmd: bool = False
    """Compute CMMD, the maximum mean discrepancy between CLIP's embeddings of originals and reconstructions, times
    1000. Needs torch-fidelity too."""
    clip: str | None = None
    """Local file of CLIP, OpenAI's TorchScript archive (ViT-L-14-336px.pt); null downloads it."""
    diffusability: bool = False
    """Also measure how well a diffusion model can learn the latents (docs/diffusability.md): their spectrum,
    equivariance, intrinsic dimension and entropy, a probe, and with `fid` iFID. Takes minutes on a CPU and holds the
    latents of all images in memory."""
    probe_steps: int = PROBE_STEPS
    """With `diffusability`: training steps of the probe, a small diffusion model; 0 leaves it out. Figures compare only
    at the same number of steps and images."""
    images: int = 4
    """Draw the first `images` originals beside all reconstructions; 0 draws nothing."""
    output: str = "evaluation"
    """Folder for results.json, per_image.csv, table.md and reconstructions.png; files of an earlier run are
    replaced."""

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        if self.lpips in ("alex", "squeeze") and self.resolution < SMALLEST_LPIPS_SIDE:
            raise InputError(
                f"got resolution={self.resolution} with lpips={self.lpips}, whose trunk needs {SMALLEST_LPIPS_SIDE}; "
                "use lpips=vgg or none"
            )
        for option, switch in (("inception", "fid"), ("dinov2", "fdd"), ("clip", "cmmd")):
            check_used(self, option, None, switch)
        check_probe_steps(self)
        doubled = sorted({vae for vae in self.vaes if self.vaes.count(vae) > 1})
        if doubled:
            raise InputError(f"got {doubled[0]} more than once; need each VAE once")

    def with_preset(self) -> EvaluateConfig:
        """The same options, with those that the preset sets."""
        if self.preset == "none":
            return self
        crop = PRESETS[self.preset][1]
        return dataclasses.replace(self, crop=crop, resolution=256, min_side=1, quantize=True)  # 1: skip none
