"""The recipe of a training run: frozen dataclasses, filled from YAML and dotted overrides.

The defaults are LDM's kl-f8 recipe (Rombach et al. 2022); its discriminator is off until it gets a weight.
Only the standard library is imported here, so that a misspelt key is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from sdvae.errors import InputError
from sdvae.metrics import SMALLEST_LPIPS_SIDE, SMALLEST_SIDE
from sdvae.model.config import ModelShape

# What a value must be, whether it is, and the keys of TrainConfig for which that holds. Null is allowed everywhere.
RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    (
        "a number above 0",
        lambda x: x > 0,
        "steps batch_size gradient_accumulation_steps log_every validate_every max_skipped_steps scale_images "
        "grid_images data.validation_count data.resolution data.validation_resolution optimizer.learning_rate "
        "optimizer.grad_clip_norm checkpoint.every_steps checkpoint.keep_last loss.discriminator.layers "
        "loss.discriminator.width loss.discriminator.learning_rate",
    ),
    (
        "0 or more",
        lambda x: x >= 0,
        "data.num_workers data.cache_mib loss.lpips_weight loss.kl_weight loss.kl_warmup_steps loss.free_bits "
        "loss.discriminator.weight loss.discriminator.start_step loss.discriminator.warmup_steps "
        "loss.discriminator.ramp_steps loss.discriminator.r1_weight loss.discriminator.lecam_weight "
        "loss.equivariance.weight optimizer.warmup_steps optimizer.weight_decay",
    ),
    (
        "a number from 0 to 1",
        lambda x: 0 <= x <= 1,
        "data.flip data.color_jitter data.max_bad_fraction data.label_dropout optimizer.ema_decay",
    ),
    ("numbers from 0 to below 1", lambda x: 0 <= x < 1, "optimizer.betas loss.discriminator.betas"),
    ("factors above 0 and up to 1", lambda x: 0 < x <= 1, "loss.equivariance.scales"),
    ("three numbers from 0 to 255", lambda x: 0 <= x <= 255, "data.background"),
)


@dataclass(frozen=True)
class ModelConfig(ModelShape):
    """The autoencoder: its shape, in diffusers' names, and what training does with it at either end."""

    measure_shift: bool = False
    """Write the mean of the latents as shift_factor (SD3 and Flux pipelines need one); else null."""
    initialisation: Literal["pass_through", "torch"] = "pass_through"
    """Initial weights: a coarse copy of the input (sdvae/training/initialise.py), or torch's defaults."""


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
    """Images for validation, given like source; null takes some of `source` out of training."""
    validation_split: str = "validation"
    """Split of validation_source."""
    validation_names: tuple[str, ...] = ()
    """Images of `source` to take for validation, by name; when empty, validation_count of them are chosen by a hash."""
    validation_count: int = 16
    """Number of validation images."""
    resolution: int = 256
    """Side in pixels of the square training crops."""
    validation_resolution: int | None = None
    """Side in pixels of the centre crops that validation and scaling_factor are computed from; null: resolution."""
    pad: bool = False
    """Allow a resolution that is not a multiple of the compression ratio, such as MNIST's 28. The last row and column
    are repeated for the encoder, and the reconstruction is cropped before the loss."""
    label_column: str = "label"
    """Column of class labels, integers, where model.num_classes is above 0. -1 and null mean «no label»."""
    label_dropout: float = 0.0
    """Probability that a training image is given without its label, so that «no label» is trained too."""
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
    """Memory in MiB in which each worker keeps decoded images, for small data sets; 0 is off."""

    @property
    def evaluation_resolution(self) -> int:
        """Side in pixels of the centre crops."""
        return self.validation_resolution or self.resolution


@dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS (Zhang et al. 2018): the trunk, and how its layers are weighted."""

    net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Trunk: VGG16, AlexNet or SqueezeNet 1.1."""
    weights: str | None = None
    """Local file with the trunk's weights in torchvision's names (.pth or .safetensors); null lets torchvision
    download them."""
    heads: Literal["lpips", "uniform"] = "lpips"
    """«lpips»: the published linear heads, which fit torchvision's weights. «uniform»: every feature has the same
    weight, for any other trunk."""
    allow_random: bool = False
    """When no weights can be had, use a randomly initialised trunk (and uniform heads) instead of stopping."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator: a PatchGAN (Isola et al. 2017), which tells reconstructions from images patch by patch."""

    sees: Literal["images", "latents"] = "images"
    """«latents»: instead, an MLP that tells samples of the posterior from samples of the prior, as in the adversarial
    autoencoder (Makhzani et al. 2016). With kl_weight 0 it replaces the KL term."""
    weight: float = 0.0
    """Weight of the adversarial term in the VAE's objective; 0 is no discriminator. LDM: 0.5."""
    adaptive: bool = True
    """Multiply weight by |gradient of the reconstruction loss| / |gradient of the adversarial loss| at the decoder's
    last layer (Esser et al. 2021, eq. 7). Of no effect on a discriminator of latents."""
    start_step: int = 50_000
    """The first step, counted from 0, in which the discriminator learns. LDM's 50001 counts two a batch in some
    versions; here one step is one step of both players."""
    warmup_steps: int = 0
    """Steps in which the discriminator alone learns, before its term is in the VAE's objective."""
    ramp_steps: int = 0
    """Steps over which weight then grows linearly from 0."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """Hinge (Lim & Ye 2017) or binary cross-entropy (Goodfellow et al. 2014)."""
    layers: int = 3
    """Strided layers of the PatchGAN: with 3, patches have 70x70 pixels. Hidden layers of the MLP."""
    width: int = 64
    """Channels of the PatchGAN's first layer; doubled in each layer, up to eight times as many. Units of each hidden
    layer of the MLP."""
    norm: Literal["group", "none"] = "group"
    """Norm of the PatchGAN. Group norm uses one image only, so gradients do not depend on how a batch is divided, as
    they would with LDM's batch norm."""
    r1_weight: float = 0.0
    """Weight γ/2 of R1, the squared gradient at real images (Mescheder et al. 2018); 0 is off."""
    lecam_weight: float = 0.0
    """Weight of LeCam regularisation (Tseng et al. 2021), for little data; 0 is off."""
    learning_rate: float | None = None
    """Peak learning rate; null: the VAE's. The schedule is the VAE's, after optimizer.warmup_steps of its own."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's moment decays."""

    @property
    def generator_start_step(self) -> int:
        """The first step, counted from 0, in which the VAE's objective has the adversarial term."""
        return self.start_step + self.warmup_steps

    @property
    def smallest_side(self) -> int:
        """Pixels along one side below which the PatchGAN has no score: H/2^layers - 2 must be 1."""
        return 3 * 2**self.layers


@dataclass(frozen=True)
class EquivarianceConfig:
    """Latents that transform as their image does: besides D(z) with x, D(t(z)) is compared with t(x).

    Scales: Skorokhodov et al. 2025, «Improving the Diffusability of Autoencoders» (arXiv 2502.14831). With rotations
    too: Kouzelis et al. 2025, «EQ-VAE» (arXiv 2502.09509).
    """

    weight: float = 0.0
    """Weight of the reconstruction term (with LPIPS) of the transformed image; 0 is off."""
    scales: tuple[float, ...] = (0.5, 0.25)
    """Factors to shrink by, one drawn in each step; 1.0 keeps the size."""
    rotations: bool = False
    """Also rotate by a multiple of 90 degrees, drawn in each step."""


@dataclass(frozen=True)
class LossConfig:
    """The objective: reconstruction + lpips_weight · LPIPS + kl_weight · KL_sum / (C·H·W) [+ GAN]."""

    reconstruction: Literal["l1", "l2", "charbonnier", "bce"] = "l1"
    """Mean absolute error, mean squared error, or the smooth sqrt(error² + 1e-6), in [-1, 1]; or «bce»: the binary
    cross-entropy of grey values taken as probabilities, in nats, for which the decoder's output is their logits
    (sdvae/tutorial/likelihood.py). With kl_weight 1 the objective is then the negative ELBO, divided by C·H·W."""
    learn_logvar: bool = False
    """Learn s, the log-variance of the likelihood, one number: LDM's nll = (reconstruction + LPIPS) / e^s + s."""
    lpips_weight: float = 1.0
    """Weight of LPIPS; 0 leaves it out of the objective, and the trunk unloaded."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence, in LDM's meaning: it multiplies nats summed over an image's latents, and
    the whole objective is divided by the image's C·H·W."""
    kl_warmup_steps: int = 0
    """Steps over which kl_weight grows linearly from 0."""
    free_bits: float = 0.0
    """Nats that each latent channel of an image may have without a cost, against posterior collapse
    (Kingma et al. 2016); 0 is off."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """LPIPS's trunk."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The adversarial term."""
    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)
    """Regularisation of the latent space."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule."""

    kind: Literal["adamw", "adamw_fused", "adamw_8bit"] = "adamw"
    """torch's AdamW; its fused kernel; or bitsandbytes' with 8-bit moments (GPU; pip install bitsandbytes)."""
    learning_rate: float = 1e-4
    """Peak learning rate. It is not scaled by batch size or number of processes."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or falling to 0 along a half cosine."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's moment decays; (0.5, 0.9) is LDM's."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip_norm: float = 1.0
    """Gradients are clipped to this global norm; the norm before clipping is logged."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is what is validated and saved;
    it warms up as min(ema_decay, (1 + n) / (10 + n))."""


@dataclass(frozen=True)
class FineTuneConfig:
    """Start from an existing VAE instead of from new weights. Its own shape counts then; model.* is not read."""

    source: str | None = None
    """Whatever `load_vae` reads: a diffusers folder, a hub id, a .safetensors or .ckpt file. Null: train anew."""
    subfolder: str | None = None
    """Folder inside source that holds the VAE."""
    config: str | None = None
    """config.json for a source that is a single file, whose scaling factor cannot be read from its shapes."""
    freeze_encoder: bool = False
    """Train the decoder only. Latents, scaling_factor and shift_factor stay as they are, so that every diffusion
    model for this VAE can still use it."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What an interrupted run is continued from, and which model counts as the best."""

    every_steps: int = 1_000
    """Steps between checkpoints. There is always one after the last step, and when a run is told to stop."""
    keep_last: int = 2
    """Number of checkpoints to keep; an old one is removed only when the new one is complete."""
    best_metric: str = "psnr"
    """The validation metric by which best_model/ is chosen: psnr, ssim, lpips_… or, with «bce», nelbo; the last two
    are better when lower."""
    accept_changed_config: bool = False
    """Continue a run with a changed recipe instead of refusing it."""


@dataclass(frozen=True)
class TrainConfig:
    """A whole run."""

    output_dir: str = "runs/sdvae"
    """Run folder: config.yaml, metrics.jsonl, images/, checkpoints/, tracker logs, model/, best_model/. The same
    command again continues the run in it."""
    overwrite: bool = False
    """Remove an earlier run from output_dir and start anew instead of continuing it."""
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
    """Keep activations in channels-last memory format. On a CPU with fast_convolutions, these choose the format."""
    fast_convolutions: bool = True
    """On a CPU: 3x3 convolutions by Winograd's algorithm, for wide models in fp32, and upsampling with four taps
    instead of nine, the same function to rounding (sdvae/cpu/kernels.py)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the encoder and the decoder's blocks."""
    log_every: int = 50
    """Steps between lines of metrics."""
    validate_every: int = 2_000
    """Steps between validations; there is always one after the last step."""
    validate_raw: bool = False
    """Also validate the weights themselves, besides their moving average, as validation_raw/…"""
    max_skipped_steps: int = 20
    """Steps without a finite loss and gradient are skipped; after so many in a row the run stops."""
    scale_images: int = 512
    """Training images over which scaling_factor = 1/std of the latents is measured at the end."""
    grid_images: int = 8
    """Validation images drawn in the reconstruction grid."""
    trackers: tuple[str, ...] = ()
    """accelerate's trackers, where they are installed: tensorboard (`pip install sdvae[tensorboard]`), wandb, trackio,
    mlflow, … metrics.jsonl and curves.png are always written."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the autoencoder."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Objective."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    """Starting weights."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_likelihood()
        self._check_labels()
        self._check_resolutions()
        if self.fine_tune.freeze_encoder and self.fine_tune.source is None:
            raise InputError("got fine_tune.freeze_encoder=true without fine_tune.source; need a VAE to start from")
        if self.optimizer.warmup_steps > self.steps:
            raise InputError(
                f"got optimizer.warmup_steps={self.optimizer.warmup_steps} in steps={self.steps}; need fewer than steps"
            )
        low, high = self.data.crop_scale
        if not 0 < low <= high <= 1:
            raise InputError(f"got data.crop_scale=[{low}, {high}]; need 0 < low <= high <= 1")

    def _check_ranges(self) -> None:
        for need, in_range, keys in RANGES:
            for key in keys.split():
                value = attrgetter(key)(self)
                several = isinstance(value, tuple | list)
                if value is not None and not all(in_range(x) for x in (value if several else [value])):
                    raise InputError(f"got {key}={list(value) if several else value}; need {need}")
        if not self.loss.equivariance.scales:
            raise InputError("got loss.equivariance.scales=[]; need one factor or more")

    def _check_resolutions(self) -> None:
        # the compression ratio of a VAE to be fine-tuned is known only when it is loaded
        factor = self.model.compression_ratio if self.fine_tune.source is None and not self.data.pad else 1
        for key in ("resolution", "validation_resolution"):
            side = getattr(self.data, key)
            if side is not None and side % factor:
                raise InputError(
                    f"got data.{key}={side}; need a positive multiple of {factor}, the compression ratio of "
                    f"{len(self.model.block_out_channels)} levels"
                )
            if side is not None and side < SMALLEST_SIDE:
                raise InputError(f"got data.{key}={side}; need at least {SMALLEST_SIDE}, or SSIM has no window")
        side, gan, equivariance = self.data.resolution, self.loss.discriminator, self.loss.equivariance
        if gan.weight > 0 and gan.sees == "images" and side < gan.smallest_side:
            raise InputError(
                f"got data.resolution={side} with loss.discriminator.layers={gan.layers}; need crops of "
                f"{gan.smallest_side} pixels or more for one patch; take fewer layers"
            )
        if (
            equivariance.weight > 0
            and self.loss.lpips_weight > 0
            and side * min(equivariance.scales) < SMALLEST_LPIPS_SIDE
        ):
            raise InputError(
                f"got loss.equivariance.scales={list(equivariance.scales)} on crops of {side}; need images of "
                f"{SMALLEST_LPIPS_SIDE} pixels or more for LPIPS; take larger factors or crops"
            )

    def _check_likelihood(self) -> None:
        loss = self.loss
        if loss.reconstruction == "bce":
            discriminator = loss.discriminator
            if (discriminator.weight > 0 and discriminator.sees == "images") or loss.learn_logvar:
                raise InputError(
                    "got loss.reconstruction=bce with loss.discriminator or loss.learn_logvar; a Bernoulli likelihood "
                    "has no variance, and a discriminator would see logits; take l1 or l2, or "
                    "loss.discriminator.sees=latents"
                )
            if self.fine_tune.source is None and self.model.in_channels != 1:
                raise InputError(
                    f"got loss.reconstruction=bce with {self.model.in_channels} channels; need grey images: set "
                    "model.in_channels=1"
                )
        if self.data.pad and loss.equivariance.weight > 0:
            raise InputError(
                "got data.pad=true with loss.equivariance; need a resolution without padding, or the transformed "
                "image would not lie where the latents' does"
            )

    def _check_labels(self) -> None:
        if self.model.num_classes == 0:
            return
        if self.fine_tune.source is not None:
            raise InputError("got model.num_classes with fine_tune.source, which has no labels; need one of the two")
        if self.compile:
            raise InputError("got compile=true with model.num_classes; a conditional VAE is not compiled; leave it out")
