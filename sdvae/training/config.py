"""The recipe of a training run: frozen dataclasses, filled from YAML and dotted overrides.

The defaults are LDM's kl-f8 recipe (Rombach et al. 2022) as far as it goes without a discriminator.
Only the standard library is imported here, so that a misspelt key is refused before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sdvae.errors import InputError

ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")  # what diffusers' get_activation knows
MIN_RESOLUTION = 16  # pixels: SSIM's windows have 11, LPIPS's smallest trunk pools three times


@dataclass(frozen=True)
class ModelConfig:
    """The shape of the autoencoder, in diffusers' names."""

    in_channels: int = 3
    """Channels of the images: 3 for RGB, 1 for grey. The reconstruction has as many."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each level; n levels compress by 2^(n-1) along each side."""
    layers_per_block: int = 2
    """ResNet blocks a level in the encoder; the decoder has one more."""
    latent_channels: int = 4
    """Channels of the latents."""
    norm_num_groups: int = 32
    """Groups of every GroupNorm; must divide every width."""
    act_fn: str = "silu"
    """Activation in the ResNet blocks."""
    use_quant_conv: bool = True
    """1x1 convolutions around the latents, as in SD and SDXL; SD3 and Flux have none."""
    mid_block_add_attention: bool = True
    """Self-attention in the middle blocks."""
    force_upcast: bool = True
    """Tell SDXL pipelines to run this VAE in fp32 even under fp16. Needs the quant convs."""
    measure_shift: bool = False
    """Write the mean of the latents as shift_factor (SD3 and Flux pipelines need one); else null."""
    initialisation: Literal["pass_through", "torch"] = "pass_through"
    """Initial weights: a coarse copy of the input (sdvae/training/initialise.py), or torch's defaults."""
    sample_size: int = 512
    """Side in pixels that pipelines take as the default and that diffusers' own tiling uses."""

    @property
    def compression_ratio(self) -> int:
        """Pixels along one side of a latent element."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self) -> None:
        if not self.block_out_channels:
            raise InputError("got model.block_out_channels=[]; need a width for each level")
        sizes = (self.layers_per_block, self.latent_channels, self.norm_num_groups, *self.block_out_channels)
        if min(sizes) < 1:
            raise InputError("got a model with a width, layer, latent channel or group count below 1; need 1 or more")
        if self.in_channels not in (1, 3):
            raise InputError(f"got model.in_channels={self.in_channels}; need 3 for RGB or 1 for grey images")
        if self.act_fn not in ACTIVATIONS:
            raise InputError(f"got model.act_fn={self.act_fn!r}; need one of {', '.join(ACTIVATIONS)}")
        if self.force_upcast and not self.use_quant_conv:
            raise InputError(
                "got model.force_upcast=true with model.use_quant_conv=false, which SDXL pipelines cannot run; "
                "set model.force_upcast=false"
            )


@dataclass(frozen=True)
class DataConfig:
    """Where images come from and how they become a batch."""

    source: str = ""
    """Must be given: a folder (nested), a data set (hub id, saved folder, .parquet, .arrow, webdataset .tar), or
    «skimage»: the photographs inside scikit-image's wheel."""
    split: str = "train"
    """Split of a data set."""
    image_column: str | None = None
    """Image column of a data set; null finds it by its type."""
    validation_source: str | None = None
    """Like source, for validation; null holds images of `source` out of training."""
    validation_split: str = "validation"
    """Split of validation_source."""
    validation_names: tuple[str, ...] = ()
    """Images of `source` to hold out, by name; when empty, validation_count of them are chosen by a hash."""
    validation_count: int = 16
    """How many images validate, from either place."""
    resolution: int = 256
    """Side in pixels of the square training crops."""
    validation_resolution: int | None = None
    """Side in pixels of the centre crops that validate, and that scaling_factor is measured on; null: resolution."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """A training crop's side as a fraction of the image's short side, drawn uniformly."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast, saturation and channel-order changes in training; 0 is off."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour in 0..255 that transparent images are composited on."""
    min_side: int | None = None
    """Images with a shorter side, in pixels, count as bad; null: half of the resolution they are cropped to."""
    max_bad_fraction: float = 0.01
    """Stop when more than this fraction of the images cannot be read."""
    num_workers: int = 4
    """Loader processes for each training process; 0 loads in the training process."""
    cache_mib: int = 0
    """Memory in MiB for each worker to keep decoded images in; for small data sets. 0 is off."""

    @property
    def evaluation_resolution(self) -> int:
        """Side in pixels of the centre crops."""
        return self.validation_resolution or self.resolution


@dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS (Zhang et al. 2018): the trunk and how its layers are weighed."""

    net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Trunk: VGG16, AlexNet or SqueezeNet 1.1."""
    weights: str | None = None
    """Local file with the trunk's weights in torchvision's names (.pth or .safetensors); null lets torchvision
    download them."""
    heads: Literal["lpips", "uniform"] = "lpips"
    """«lpips»: the published linear heads, right for torchvision's weights. «uniform»: every feature counts the
    same, for any other trunk."""
    allow_random: bool = False
    """Without weights, go on with a randomly initialised trunk (and uniform heads) instead of stopping."""


@dataclass(frozen=True)
class LossConfig:
    """The objective: reconstruction + lpips_weight · LPIPS + kl_weight · KL_sum / (C·H·W)."""

    reconstruction: Literal["l1", "l2"] = "l1"
    """Mean absolute or mean squared error in [-1, 1]."""
    lpips_weight: float = 1.0
    """Weight of LPIPS; 0 leaves it out of the objective, and the trunk unloaded."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence, in LDM's meaning: it multiplies nats summed over an image's latents, and
    the whole objective is divided by the image's C·H·W."""
    kl_warmup_steps: int = 0
    """Steps over which kl_weight grows linearly from 0."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """LPIPS's trunk."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: float = 1e-4
    """Peak learning rate, used as it stands: nothing scales it by batch or processes."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to 0 along a half cosine."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's moment decays; (0.5, 0.9) is LDM's."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip_norm: float = 1.0
    """Largest global gradient norm; the norm before clipping is logged."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is what is validated and saved;
    it warms up as min(ema_decay, (1 + n) / (10 + n))."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    output_dir: str = "runs/sdvae"
    """Run folder: config.yaml, metrics.jsonl, images/, tracker logs, model/."""
    overwrite: bool = False
    """Remove an earlier run from output_dir first; otherwise a run folder is refused."""
    seed: int = 0
    """Seed of the initial weights, the order of samples, augmentation and posterior noise."""
    steps: int = 100_000
    """Optimizer steps."""
    batch_size: int = 12
    """Images for each process and each forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward and backward passes for each optimizer step."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Autocast dtype over fp32 weights. «auto»: bf16 where the hardware computes in it, else fp32."""
    channels_last: bool = True
    """Keep activations in channels-last memory format."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the encoder and the decoder."""
    log_every: int = 50
    """Steps between lines of metrics."""
    validate_every: int = 2_000
    """Steps between validations; the last step always validates."""
    scale_images: int = 512
    """Training images over which scaling_factor = 1/std of the latents is measured at the end."""
    grid_images: int = 8
    """Validation images drawn in the reconstruction grid."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """accelerate's trackers: tensorboard, wandb, trackio, mlflow, …"""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the autoencoder."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Objective."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""

    def __post_init__(self) -> None:
        positive = {
            "steps": self.steps,
            "batch_size": self.batch_size,
            "gradient_accumulation_steps": self.gradient_accumulation_steps,
            "log_every": self.log_every,
            "validate_every": self.validate_every,
            "scale_images": self.scale_images,
            "grid_images": self.grid_images,
            "data.validation_count": self.data.validation_count,
            "optimizer.learning_rate": self.optimizer.learning_rate,
            "optimizer.grad_clip_norm": self.optimizer.grad_clip_norm,
        }
        for key, value in positive.items():
            if not value > 0:
                raise InputError(f"got {key}={value}; need a number above 0")
        factor = self.model.compression_ratio
        for key in ("resolution", "validation_resolution"):
            side = getattr(self.data, key)
            if side is not None and (side <= 0 or side % factor):
                raise InputError(
                    f"got data.{key}={side}; need a positive multiple of {factor}, the compression ratio of "
                    f"{len(self.model.block_out_channels)} levels"
                )
            if side is not None and side < MIN_RESOLUTION:
                raise InputError(f"got data.{key}={side}; need at least {MIN_RESOLUTION}, or SSIM has no window")
        not_negative = {
            "loss.lpips_weight": self.loss.lpips_weight,
            "loss.kl_weight": self.loss.kl_weight,
            "loss.kl_warmup_steps": self.loss.kl_warmup_steps,
            "optimizer.warmup_steps": self.optimizer.warmup_steps,
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "data.num_workers": self.data.num_workers,
            "data.cache_mib": self.data.cache_mib,
        }
        for key, value in not_negative.items():
            if not value >= 0:
                raise InputError(f"got {key}={value}; need 0 or more")
        fractions = {
            "data.flip": self.data.flip,
            "data.color_jitter": self.data.color_jitter,
            "data.max_bad_fraction": self.data.max_bad_fraction,
            "optimizer.ema_decay": self.optimizer.ema_decay,
        }
        for key, value in fractions.items():
            if not 0 <= value <= 1:
                raise InputError(f"got {key}={value}; need a number from 0 to 1")
        if not all(0 <= beta < 1 for beta in self.optimizer.betas):
            raise InputError(f"got optimizer.betas={list(self.optimizer.betas)}; need numbers from 0 to below 1")
        if self.optimizer.warmup_steps > self.steps:
            raise InputError(
                f"got optimizer.warmup_steps={self.optimizer.warmup_steps} in steps={self.steps}; need fewer than steps"
            )
        if not all(0 <= value <= 255 for value in self.data.background):
            raise InputError(f"got data.background={list(self.data.background)}; need three numbers from 0 to 255")
        low, high = self.data.crop_scale
        if not 0 < low <= high <= 1:
            raise InputError(f"got data.crop_scale=[{low}, {high}]; need 0 < low <= high <= 1")
