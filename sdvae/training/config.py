"""The recipe of a training run: frozen dataclasses, filled from YAML and dotted overrides.

The defaults are LDM's kl-f8 recipe (Rombach et al. 2022); its discriminator is off until it gets a weight.
Only the standard library is imported here, so that a misspelt key is refused before torch is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sdvae.errors import InputError
from sdvae.metrics import SMALLEST_SIDE

ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")  # what diffusers' get_activation knows


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
    num_classes: int = 0
    """Condition encoder and decoder on a class label, 0 .. num_classes - 1, of each image
    (sdvae/tutorial/conditional.py). 0 is the plain AutoencoderKL."""

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
        if self.num_classes < 0:
            raise InputError(f"got model.num_classes={self.num_classes}; need 0 for none, or how many there are")
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
    pad: bool = False
    """Allow a resolution that is no multiple of the compression ratio, as MNIST's 28 is none of 8: the encoder sees
    the image with its last row and column repeated, and the reconstruction is cropped before the loss."""
    label_column: str = "label"
    """Column of class labels, integers; read where model.num_classes asks for them. -1 and null are no label."""
    label_dropout: float = 0.0
    """Probability that a training image comes without its label, so that the null label learns too."""
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
class DiscriminatorConfig:
    """The second player: a PatchGAN (Isola et al. 2017) that tells reconstructions from images, patch by patch."""

    sees: Literal["images", "latents"] = "images"
    """«latents»: instead, an MLP that tells posterior samples from draws of the prior, the adversarial autoencoder's
    (Makhzani et al. 2016); with kl_weight 0 it stands in the KL term's place."""
    weight: float = 0.0
    """Weight of the generator's term; 0 is no discriminator. LDM: 0.5."""
    adaptive: bool = True
    """Where it sees images, multiply weight by |grad of the reconstruction loss| / |grad of the GAN loss| at the
    decoder's last layer (Esser et al. 2021, eq. 7)."""
    start_step: int = 50_000
    """The first step, counted from 0, in which the discriminator learns. LDM's 50001 counts two a batch in some
    versions; here one step is one step of both players."""
    warmup_steps: int = 0
    """Steps that it learns alone before the decoder hears of it."""
    ramp_steps: int = 0
    """Steps over which the generator's weight then grows linearly from 0."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """Hinge (Lim & Ye 2017) or binary cross-entropy (Goodfellow et al. 2014)."""
    layers: int = 3
    """Strided layers: 3 see patches of 70x70 pixels. Hidden layers of the MLP."""
    width: int = 64
    """Channels of the first layer; doubled in each up to eight times as many. Of all hidden layers of the MLP."""
    norm: Literal["group", "none"] = "group"
    """The PatchGAN's. Group norm looks at one image only, so that gradients do not depend on how a batch is divided;
    LDM's batch norm would."""
    r1_weight: float = 0.0
    """Weight gamma/2 of R1, the squared gradient at real images (Mescheder et al. 2018); 0 is off."""
    lecam_weight: float = 0.0
    """Weight of LeCam regularisation (Tseng et al. 2021), for little data; 0 is off."""
    learning_rate: float | None = None
    """Peak learning rate; null: the VAE's. It follows the VAE's schedule, after optimizer.warmup_steps of its own."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's moment decays."""

    @property
    def generator_start_step(self) -> int:
        """The first step, counted from 0, in which the decoder hears of the discriminator."""
        return self.start_step + self.warmup_steps


@dataclass(frozen=True)
class EquivarianceConfig:
    """Latents that transform as their image does: D(t(z)) is compared with t(x) beside D(z) with x.

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
    """Nats that each latent channel of an image may carry for nothing: against posterior collapse
    (Kingma et al. 2016). 0 is off."""
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
class FineTuneConfig:
    """Start from a VAE instead of from new weights. Its own shape counts then, and model.* is not read."""

    source: str | None = None
    """Whatever `load_vae` reads: a diffusers folder, a hub id, a .safetensors or .ckpt file. Null: train anew."""
    subfolder: str | None = None
    """Folder inside source that holds the VAE."""
    config: str | None = None
    """config.json for a source that is a single file, whose scaling factor cannot be read from its shapes."""
    freeze_encoder: bool = False
    """Train the decoder only. Latents, scaling_factor and shift_factor stay what they are, so that every diffusion
    model that uses the VAE goes on working."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What an interrupted run is continued from, and which model counts as the best."""

    every_steps: int = 1_000
    """Steps between checkpoints; the last step always has one, and so has a run that is told to stop."""
    keep_last: int = 2
    """How many checkpoints stay; an old one goes only after the new one is whole."""
    best_metric: str = "psnr"
    """The validation metric by which best_model/ is chosen: psnr, ssim, lpips_… or, with «bce», nelbo; the last two
    are better when lower."""
    accept_changed_config: bool = False
    """Continue with another recipe than the run was started with, instead of refusing it."""


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
    """Keep activations in channels-last memory format; where fast_convolutions act, these choose the format."""
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
    """Steps between validations; the last step always validates."""
    validate_raw: bool = False
    """Validate the raw weights too, beside their moving average, as validation_raw/…"""
    max_skipped_steps: int = 20
    """Steps in a row without a finite loss and gradient that are skipped; then the run stops."""
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
    fine_tune: FineTuneConfig = field(default_factory=FineTuneConfig)
    """Starting weights."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""

    def __post_init__(self) -> None:
        discriminator, equivariance = self.loss.discriminator, self.loss.equivariance
        positive: dict[str, float] = {
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
            "max_skipped_steps": self.max_skipped_steps,
            "checkpoint.every_steps": self.checkpoint.every_steps,
            "checkpoint.keep_last": self.checkpoint.keep_last,
            "loss.discriminator.layers": discriminator.layers,
            "loss.discriminator.width": discriminator.width,
        }
        if discriminator.learning_rate is not None:
            positive["loss.discriminator.learning_rate"] = discriminator.learning_rate
        for key, value in positive.items():
            if not value > 0:
                raise InputError(f"got {key}={value}; need a number above 0")
        # of a VAE to be fine-tuned the factor is known only once it is loaded
        factor = self.model.compression_ratio if self.fine_tune.source is None else 1
        factor = 1 if self.data.pad else factor
        for key in ("resolution", "validation_resolution"):
            side = getattr(self.data, key)
            if side is not None and (side <= 0 or side % factor):
                raise InputError(
                    f"got data.{key}={side}; need a positive multiple of {factor}, the compression ratio of "
                    f"{len(self.model.block_out_channels)} levels"
                )
            if side is not None and side < SMALLEST_SIDE:
                raise InputError(f"got data.{key}={side}; need at least {SMALLEST_SIDE}, or SSIM has no window")
        not_negative = {
            "loss.lpips_weight": self.loss.lpips_weight,
            "loss.kl_weight": self.loss.kl_weight,
            "loss.kl_warmup_steps": self.loss.kl_warmup_steps,
            "loss.free_bits": self.loss.free_bits,
            "optimizer.warmup_steps": self.optimizer.warmup_steps,
            "optimizer.weight_decay": self.optimizer.weight_decay,
            "data.num_workers": self.data.num_workers,
            "data.cache_mib": self.data.cache_mib,
            "loss.discriminator.weight": discriminator.weight,
            "loss.discriminator.start_step": discriminator.start_step,
            "loss.discriminator.warmup_steps": discriminator.warmup_steps,
            "loss.discriminator.ramp_steps": discriminator.ramp_steps,
            "loss.discriminator.r1_weight": discriminator.r1_weight,
            "loss.discriminator.lecam_weight": discriminator.lecam_weight,
            "loss.equivariance.weight": equivariance.weight,
        }
        for key, value in not_negative.items():
            if not value >= 0:
                raise InputError(f"got {key}={value}; need 0 or more")
        fractions = {
            "data.flip": self.data.flip,
            "data.color_jitter": self.data.color_jitter,
            "data.max_bad_fraction": self.data.max_bad_fraction,
            "data.label_dropout": self.data.label_dropout,
            "optimizer.ema_decay": self.optimizer.ema_decay,
        }
        for key, value in fractions.items():
            if not 0 <= value <= 1:
                raise InputError(f"got {key}={value}; need a number from 0 to 1")
        for key, betas in (
            ("optimizer.betas", self.optimizer.betas),
            ("loss.discriminator.betas", discriminator.betas),
        ):
            if not all(0 <= beta < 1 for beta in betas):
                raise InputError(f"got {key}={list(betas)}; need numbers from 0 to below 1")
        if not equivariance.scales or not all(0 < scale <= 1 for scale in equivariance.scales):
            raise InputError(
                f"got loss.equivariance.scales={list(equivariance.scales)}; need factors above 0 and up to 1"
            )
        self._check_likelihood()
        self._check_labels()
        if self.fine_tune.freeze_encoder and self.fine_tune.source is None:
            raise InputError("got fine_tune.freeze_encoder=true without fine_tune.source; need a VAE to start from")
        if self.optimizer.warmup_steps > self.steps:
            raise InputError(
                f"got optimizer.warmup_steps={self.optimizer.warmup_steps} in steps={self.steps}; need fewer than steps"
            )
        if not all(0 <= value <= 255 for value in self.data.background):
            raise InputError(f"got data.background={list(self.data.background)}; need three numbers from 0 to 255")
        low, high = self.data.crop_scale
        if not 0 < low <= high <= 1:
            raise InputError(f"got data.crop_scale=[{low}, {high}]; need 0 < low <= high <= 1")

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
            if self.model.in_channels != 1:
                raise InputError(
                    f"got loss.reconstruction=bce with {self.model.in_channels} channels; need grey images"
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
