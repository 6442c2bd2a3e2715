"""The recipe of a training run: frozen dataclasses, filled from YAML and dotted overrides.

The defaults are LDM's kl-f8 recipe (Rombach et al. 2022), except that the discriminator's weight is 0, which is off.
Only the standard library is imported here, so that a misspelt key is refused before torch is loaded.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from sdvae.errors import InputError, Ranges, check_ranges
from sdvae.io import changed_fields
from sdvae.metrics import SMALLEST_LPIPS_SIDE, SMALLEST_MS_SSIM_SIDE, SMALLEST_SIDE
from sdvae.model.config import ModelShape

RANGES: Ranges = (
    (
        "a number above 0",
        lambda x: x > 0,
        "steps batch_size gradient_accumulation_steps log_every validate_every max_skipped_steps scale_images "
        "grid_images data.validation_count data.resolution data.validation_resolution data.mixed_resolutions "
        "data.final_resolution optimizer.learning_rate "
        "optimizer.grad_clip_norm data.max_pixels checkpoint.every_steps checkpoint.keep_last "
        "optimizer.ema_half_life "
        "loss.discriminator.layers loss.discriminator.width loss.discriminator.learning_rate "
        "distil.encoder_width distil.decoder_width distil.latent_weight",
    ),
    (
        "0 or more",
        lambda x: x >= 0,
        "data.num_workers data.cache_mib loss.lpips_weight loss.features.weight loss.alignment.weight "
        "loss.kl_weight loss.kl_warmup_steps loss.free_bits "
        "loss.discriminator.weight loss.discriminator.start_step loss.discriminator.warmup_steps "
        "loss.discriminator.ramp_steps loss.discriminator.r1_weight loss.discriminator.lecam_weight "
        "loss.discriminator.consistency_weight "
        "loss.equivariance.weight fine_tune.anchor_weight optimizer.warmup_steps optimizer.weight_decay "
        "distil.encoder_blocks distil.decoder_blocks",
    ),
    (
        "a number from 0 to 1",
        lambda x: 0 <= x <= 1,
        "data.flip data.color_jitter data.max_bad_fraction data.label_dropout optimizer.ema_decay "
        "loss.alignment.cosine_margin loss.alignment.distance_margin "
        "distil.teacher_weight loss.equivariance.probability loss.discriminator.start_fraction "
        "optimizer.final_fraction optimizer.decay_fraction data.native_crop data.final_part",
    ),
    ("numbers from 0 to below 1", lambda x: 0 <= x < 1, "optimizer.betas loss.discriminator.betas"),
    ("factors above 0 and up to 1", lambda x: 0 < x <= 1, "loss.equivariance.scales"),
    ("three numbers from 0 to 255", lambda x: 0 <= x <= 255, "data.background"),
)

RECONSTRUCTION_TERMS = ("l1", "l2", "charbonnier", "ssim", "ms_ssim")  # of which a sum can be made

# What a student does not use (`sdvae distil`). A recipe that sets one of these is refused.
NOT_OF_A_STUDENT_SECTIONS = ("model.", "fine_tune.", "loss.equivariance.", "loss.alignment.")
NOT_OF_A_STUDENT = frozenset(
    {"loss.kl_weight", "loss.kl_warmup_steps", "loss.free_bits", "loss.learn_logvar", "loss.discriminator.sees"}
    | {"scale_images", "compile", "data.label_column", "data.label_dropout"}
)


@dataclass(frozen=True)
class ModelConfig(ModelShape):
    """The autoencoder: its shape, in diffusers' names, its initial weights, and what is measured at the end."""

    measure_shift: bool = False
    """Write the mean of the latents as shift_factor, which SD3 and Flux pipelines need; if false, it is null."""
    measure_channels: bool = False
    """Write latents_mean and latents_std, the mean and standard deviation of each channel, and 1 as scaling_factor.
    SDXL's pipelines and `LatentDataset` then scale each channel to mean 0 and standard deviation 1. Other pipelines do
    not read these keys, so the VAE is for SDXL's alone; those take 4 latent channels."""
    initialisation: Literal["pass_through", "torch"] = "pass_through"
    """Initial weights: a coarse copy of the input (sdvae/training/initialise.py), or torch's defaults."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_norm and self.measure_shift:
            raise InputError(
                "got model.measure_shift=true with model.batch_norm=true, which has a running mean in the place of "
                "shift_factor; need one of the two; leave measure_shift out"
            )
        if self.batch_norm and self.measure_channels:
            raise InputError(
                "got model.measure_channels=true with model.batch_norm=true, which scales each channel by itself; need "
                "one of the two; leave measure_channels out"
            )


@dataclass(frozen=True)
class DataConfig:
    """Where images come from, and how they are cropped and augmented."""

    source: str = ""
    """Must be given: a folder (nested), a data set (owner/name on the hub, saved folder, .parquet, .arrow, webdataset
    .tar), the URL of one (s3://bucket/photos), or «skimage»: the photographs inside scikit-image's wheel. docs/data.md
    says what each layout means."""
    split: str = "train"
    """Split of the source. All of a source without splits is «train»."""
    image_column: str | None = None
    """Image column of a data set, which may hold paths, or the extension of a webdataset's image; null finds it by its
    type."""
    validation_source: str | None = None
    """Images for validation, given as for source; null holds some images of `source` out of training."""
    validation_split: str = "validation"
    """Split of validation_source, all of which is used if it has no splits."""
    validation_names: tuple[str, ...] = ()
    """Names of the images of `source` to use for validation; if empty, validation_count are chosen by a hash."""
    validation_count: int = 16
    """Number of validation images."""
    resolution: int = 256
    """Side in pixels of the square training crops."""
    validation_resolution: int | None = None
    """Side in pixels of the centre crops on which validation runs and scaling_factor is measured; null: resolution."""
    pad: bool = False
    """Allow a resolution that is not a multiple of the compression ratio, such as MNIST's 28. The last row and column
    are repeated for the encoder, and the reconstruction is cropped before the loss."""
    label_column: str = "label"
    """Column of class labels (integers), used if model.num_classes is above 0. -1 and null mean no label."""
    label_dropout: float = 0.0
    """Probability that a training image is used without its label, so that the VAE also works without labels."""
    crop_scale: tuple[float, float] = (0.5, 1.0)
    """Range of a training crop's side as a fraction of the image's short side, from which it is drawn uniformly."""
    native_crop: float = 0.0
    """Probability that a training crop keeps the pixels of the file, instead of being resized as crop_scale says, so
    that the decoder sees texture as cameras give it."""
    mixed_resolutions: tuple[int, ...] = ()
    """Sides of the training crops of which each step draws one, in place of `resolution`. A step's crops all have the
    same size, and batch_size is the same for all; memory is that of the largest."""
    final_resolution: int | None = None
    """Side of the training crops in the last part of the run, `final_part`; null: as before it."""
    final_part: float = 0.1
    """Part of the run that has crops of final_resolution."""
    flip: float = 0.5
    """Probability of a horizontal flip in training."""
    color_jitter: float = 0.0
    """Strength of brightness, contrast, saturation and channel-order changes in training; 0 is off."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour in 0..255 that transparent images are composited on."""
    color: Literal["srgb", "raw"] = "srgb"
    """«srgb» converts colours to sRGB by the profile in the file; «raw» takes the numbers in the file as they are, as
    runs did that were begun before this option."""
    min_side: int | None = None
    """Images whose shorter side has fewer pixels count as bad; null: half of the resolution they are cropped to."""
    max_pixels: int | None = None
    """Images with more pixels count as bad, without being decoded, which bounds the memory; null: 178,956,970."""
    max_bad_fraction: float = 0.01
    """Stop the run when more than this fraction of the images is bad."""
    num_workers: int = 4
    """Loader processes for each training process; 0 loads in the training process."""
    cache_mib: int = 0
    """MiB of decoded images that each worker keeps in memory, for small data sets; 0 is off."""

    @property
    def evaluation_resolution(self) -> int:
        """Side in pixels of the centre crops."""
        return self.validation_resolution or self.resolution

    @property
    def training_resolutions(self) -> tuple[int, ...]:
        """All sides in pixels that training crops have, in ascending order."""
        last = () if self.final_resolution is None else (self.final_resolution,)
        return tuple(sorted({*(self.mixed_resolutions or (self.resolution,)), *last}))


@dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS (Zhang et al. 2018): the trunk, and how its layers are weighted."""

    net: Literal["vgg", "alex", "squeeze"] = "vgg"
    """Trunk: VGG16, AlexNet or SqueezeNet 1.1."""
    weights: str | None = None
    """Local file with the trunk's weights in torchvision's names (.pth or .safetensors); null lets torchvision
    download them."""
    heads: Literal["lpips", "uniform"] = "lpips"
    """«lpips»: the published linear heads, which fit torchvision's weights. «uniform»: equal weights for all features,
    which suit any other trunk."""
    allow_random: bool = False
    """If no weights can be downloaded, use a randomly initialised trunk (and uniform heads) instead of stopping."""


@dataclass(frozen=True)
class FeatureLossConfig:
    """The distance of feature maps of a frozen network, averaged over four depths: LPIPS without its heads.

    ConvNeXt-S with weight 0.1 beside LPIPS with 1 (Kim et al. 2025, «TA-TiTok», arXiv 2501.07730, who compare its
    logits instead of its maps), or a DINO (Zheng et al. 2025, «RAE», arXiv 2510.11690, use one to judge).
    """

    weight: float = 0.0
    """Weight of the term; 0 leaves it out, and the network is not loaded."""
    net: str = "convnext_small"
    """convnext_tiny, convnext_small or convnext_base; or a folder, or an id on the hub, of a vision transformer, such
    as facebook/dinov2-small."""
    weights: str | None = None
    """Local file with the weights of a ConvNeXt in torchvision's names; null lets torchvision download them."""


@dataclass(frozen=True)
class AlignmentConfig:
    """Alignment of the latents with a vision transformer's features (Yao et al. 2025, «VA-VAE», arXiv 2501.01423).

    It makes latents of many channels easier to generate; sdvae/training/alignment.py has the formula.
    """

    weight: float = 0.0
    """Weight of the term; VA-VAE has 0.1 for f16d32 with `adaptive`. 0 is off, and the network is not loaded."""
    net: str = "facebook/dinov2-large"
    """A folder, or an id on the hub, of a vision transformer."""
    adaptive: bool = True
    """Multiply weight by |gradient of the reconstruction loss| / |gradient of the term| at the encoder's last layer,
    for one more backward pass through the decoder."""
    cosine_margin: float = 0.5
    """Projected latents whose cosine with their features is above 1 - cosine_margin cost nothing."""
    distance_margin: float = 0.25
    """Differences up to this, between the cosines of two positions' latents and of their features, cost nothing."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The discriminator: a PatchGAN (Isola et al. 2017), which tells reconstructions from images patch by patch."""

    sees: Literal["images", "latents"] = "images"
    """«images»: the PatchGAN. «latents»: an MLP that tells samples of the posterior from samples of the prior, as in
    the adversarial autoencoder (Makhzani et al. 2016). With kl_weight 0 it replaces the KL term."""
    weight: float = 0.0
    """Weight of the adversarial term in the VAE's objective; 0 means no discriminator. LDM: 0.5."""
    adaptive: bool = True
    """Multiply weight by |gradient of the reconstruction loss| / |gradient of the adversarial loss| at the decoder's
    last layer (Esser et al. 2021, eq. 7). It has no effect with a discriminator of latents."""
    start_step: int = 50_000
    """The first step, counted from 0, in which the discriminator learns. One step trains both VAE and discriminator;
    in LDM, whose value is 50001, some versions of its framework count a batch as two steps."""
    start_fraction: float | None = None
    """Instead of start_step: the part of the run after which the discriminator starts to learn."""
    warmup_steps: int = 0
    """Steps in which the discriminator already learns, and its term is not yet in the VAE's objective."""
    ramp_steps: int = 0
    """Steps over which `weight` then grows linearly from 0."""
    loss: Literal["hinge", "vanilla"] = "hinge"
    """Hinge (Lim & Ye 2017) or binary cross-entropy (Goodfellow et al. 2014)."""
    features: str | None = None
    """Instead of the PatchGAN: light heads on the feature maps of a frozen network (Projected GAN, StyleGAN-T, RAE).
    convnext_tiny, convnext_small or convnext_base; or a folder, or an id on the hub, of a vision transformer, such as
    facebook/dino-vits8 or facebook/dinov2-small."""
    features_weights: str | None = None
    """Local file with the weights of a ConvNeXt in torchvision's names; null lets torchvision download them."""
    layers: int = 3
    """Number of strided layers of the PatchGAN (with 3, patches have 70x70 pixels), or of hidden layers of the MLP."""
    width: int = 64
    """Channels of the PatchGAN's first layer, which are doubled in each layer up to eight times as many; of each head
    on frozen features; or units of each hidden layer of the MLP."""
    norm: Literal["group", "none"] = "group"
    """Norm of the PatchGAN. Group norm uses each image separately, so gradients do not depend on how a batch is
    divided. With LDM's batch norm they would."""
    downsampling: Literal["stride", "blur"] = "stride"
    """Of the PatchGAN: convolutions of stride 2, or convolutions that are blurred with a binomial filter before every
    second value is kept (Zhang 2019, arXiv 1904.11486), which does not alias and costs four times as much."""
    augment: tuple[Literal["color", "translation", "cutout"], ...] = ()
    """Random changes of the real and fake images that it sees, through which gradients pass (DiffAug: Zhao et al.
    2020, arXiv 2006.10738), for small data sets. DiffAug has all three."""
    consistency_weight: float = 0.0
    """Weight of the squared difference between the score of an image and of the same image changed by `augment`, for
    real and fake images (Zhao et al. 2021, arXiv 2002.04724, equation 4; 10 there). 0 is off."""
    source: str | None = None
    """A discriminator.safetensors, which every run with a discriminator writes beside model/, to start from."""
    r1_weight: float = 0.0
    """Weight γ/2 of R1, the squared gradient at real images (Mescheder et al. 2018); 0 is off."""
    lecam_weight: float = 0.0
    """Weight of LeCam regularisation (Tseng et al. 2021), for small data sets; 0 is off."""
    learning_rate: float | None = None
    """Peak learning rate; null: the VAE's. The warm-up has optimizer.warmup_steps steps and begins at start_step; then
    the schedule is the VAE's."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's moment decays."""

    @property
    def generator_start_step(self) -> int:
        """The first step, counted from 0, in which the VAE's objective has the adversarial term."""
        return self.start_step + self.warmup_steps

    @property
    def smallest_side(self) -> int:
        """The smallest side in pixels for which the PatchGAN has a score: its output has side H/2^layers - 2."""
        return 3 * 2**self.layers


@dataclass(frozen=True)
class EquivarianceConfig:
    """Equivariance of the latents: D(t(z)) is compared with t(x) for a transformation t, in one of two ways.

    With `weight` the comparison is a further term beside D(z) with x, as in Skorokhodov et al. 2025, «Improving the
    Diffusability of Autoencoders» (arXiv 2502.14831). With `probability` it takes the place of D(z) with x in some
    steps, as in Kouzelis et al. 2025, «EQ-VAE» (arXiv 2502.09509).
    """

    weight: float = 0.0
    """Weight of the reconstruction term (with LPIPS) of the transformed image, which costs a second decode; 0 is off.
    The discriminator does not see the transformed image."""
    scales: tuple[float, ...] = (0.5, 0.25)
    """Factors by which images and latents are shrunk; each step draws one of them. 1.0 keeps the size."""
    rotations: bool = False
    """Also rotate by a multiple of 90 degrees, which each step draws."""
    probability: float = 0.0
    """Probability that a step transforms: then only t(z) is decoded, and all terms, with the discriminator's, compare
    it with t(x). EQ-VAE: 0.5, with rotations and scales of 8/32, 9/32, … 31/32. 0 is off."""

    @property
    def smallest_scale(self) -> float:
        """The smallest factor by which images are shrunk; 1 if equivariance is off."""
        return min(self.scales) if self.is_on else 1.0

    @property
    def is_on(self) -> bool:
        """Whether some steps have a transformation."""
        return self.weight > 0 or self.replaces

    @property
    def replaces(self) -> bool:
        """Whether the transformed image takes the place of the other, and so is what the discriminator sees."""
        return self.probability > 0


@dataclass(frozen=True)
class LossConfig:
    """The objective: reconstruction + lpips_weight · LPIPS + features.weight · features
    + kl_weight · KL_sum / (C·H·W) [+ GAN]."""

    reconstruction: str = "l1"
    """l1, l2, charbonnier, ssim or ms_ssim, or a weighted sum of them, such as «l1 + 0.4 l2 + 0.2 ssim»: the mean
    absolute error, the mean squared error, or the smooth sqrt(error² + 1e-6), of images in [-1, 1]; 1 - SSIM, or
    1 - MS-SSIM, of images in [0, 1]. «bce», which stands alone: the binary cross-entropy, in nats, with grey values as
    probabilities and the decoder's output as their logits (sdvae/tutorial/likelihood.py); with kl_weight 1 the
    objective is then the negative ELBO, divided by C·H·W."""
    learn_logvar: bool = False
    """Learn a number s, the log-variance of the likelihood: LDM's nll = (reconstruction + LPIPS) / e^s + s."""
    lpips_weight: float = 1.0
    """Weight of LPIPS; 0 leaves it out, and its trunk is not loaded."""
    kl_weight: float = 1e-6
    """Weight of the KL divergence as in LDM: it multiplies the nats summed over an image's latents, and then the
    whole objective is divided by the image's C·H·W."""
    kl_warmup_steps: int = 0
    """Steps over which kl_weight grows linearly from 0."""
    free_bits: float = 0.0
    """Nats that each latent channel of an image may have at no cost, against posterior collapse (Kingma et al. 2016);
    0 is off."""
    perceptual: PerceptualConfig = field(default_factory=PerceptualConfig)
    """LPIPS's trunk."""
    features: FeatureLossConfig = field(default_factory=FeatureLossConfig)
    """A second perceptual term, on a newer network."""
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    """Alignment of the latents with features."""
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    """The adversarial term."""
    equivariance: EquivarianceConfig = field(default_factory=EquivarianceConfig)
    """Regularisation of the latent space."""

    @property
    def reconstruction_terms(self) -> dict[str, float]:
        """The weight of each term of `reconstruction`."""
        return parse_terms(self.reconstruction)


def parse_terms(text: str) -> dict[str, float]:
    """The weight of each term of a sum such as «l1 + 0.4 l2 + 0.2 ssim»; «l1» alone has weight 1.

    Raises:
        InputError: for anything else than weights above 0 and terms of RECONSTRUCTION_TERMS, each at most once, or
            «bce» alone.
    """
    known = ", ".join(RECONSTRUCTION_TERMS)
    terms: dict[str, float] = {}
    for part in text.split("+"):
        *weight, name = part.replace("*", " ").split() or [""]
        try:
            value = float(weight[0]) if weight else 1.0
        except ValueError:
            value = math.nan
        if name == "bce" and text != name:
            raise InputError(f"got loss.reconstruction={text!r}; bce, a likelihood of its own, stands alone")
        if name not in (*RECONSTRUCTION_TERMS, "bce") or len(weight) > 1 or not 0 < value < math.inf or name in terms:
            raise InputError(
                f"got loss.reconstruction={text!r}, of which {part.strip()!r} is no term; need {known} or bce, or a "
                "sum of weighted terms, each once, such as «l1 + 0.4 l2 + 0.2 ssim»"
            )
        terms[name] = value
    return terms


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its schedule."""

    kind: Literal["adamw", "adamw_fused", "adamw_8bit", "muon"] = "adamw"
    """torch's AdamW, torch's with the fused kernel, bitsandbytes' with 8-bit moments (GPU only; pip install
    bitsandbytes), or Muon for the kernels of hidden layers and AdamW for all else, the discriminator included
    (sdvae/training/optimizer.py)."""
    learning_rate: float = 1e-4
    """Peak learning rate. It is not scaled by batch size or number of processes."""
    schedule: Literal["constant", "cosine", "wsd"] = "constant"
    """After the warm-up: constant; falling along a half cosine; or warm-up, stable, decay (Hu et al. 2024, «MiniCPM»,
    arXiv 2404.06395): constant, and falling in the last part of the run as 1 - sqrt (Hägele et al. 2024, arXiv
    2405.18392)."""
    final_fraction: float = 0.0
    """Learning rate after the last step as a fraction of the peak, for cosine and wsd."""
    decay_fraction: float = 0.2
    """Part of the run in which the learning rate falls, for wsd."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.5, 0.9)
    """Adam's moment decays; (0.5, 0.9) is LDM's. Muon's momentum is 0.95."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    grad_clip_norm: float = 1.0
    """Gradients are clipped to this global norm; the norm before clipping is logged."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights. The average is validated and saved. After n updates the
    decay is min(ema_decay, (1 + n) / (10 + n))."""
    ema_half_life: int | None = None
    """Instead of ema_decay: the number of training images after which weights count half as much in the average
    (Karras et al. 2020, StyleGAN2, has 10,000). Unlike ema_decay, it means the same for any batch size and number of
    processes."""


@dataclass(frozen=True)
class FineTuneConfig:
    """Start from an existing VAE instead of new weights. The VAE then has its own shape, and model.* is not used."""

    source: str | None = None
    """Whatever `load_vae` reads: a diffusers folder, a hub id, or a .safetensors or .ckpt file. Null: new weights."""
    subfolder: str | None = None
    """Folder inside source that holds the VAE."""
    config: str | None = None
    """A config.json for a source that is a single file, since a file does not hold the scaling factor."""
    freeze_encoder: bool = False
    """Train only the decoder. Latents, scaling_factor, shift_factor and batch norm do not change, so every diffusion
    model for the old VAE can use the new one."""
    anchor: Literal["mse", "kl"] = "mse"
    """What keeps the latents near those of source while the encoder trains: the mean squared difference of the scaled
    means, or the KL divergence from the posterior of source (sdvae/training/anchor.py)."""
    anchor_weight: float = 0.0
    """Weight of that penalty in the objective; 0 is off."""


@dataclass(frozen=True)
class DistilConfig:
    """Train a student instead of a VAE: a small, fast AutoencoderTiny that computes what a VAE, its teacher, computes.

    Its decoder learns images from the teacher's latents, and its encoder learns the teacher's latents from images. The
    widths and blocks here are its shape (sdvae/model/tiny.py); number of channels and likelihood are the teacher's.
    """

    teacher: str | None = None
    """The VAE to learn from, which does not change: whatever `load_vae` reads. Null: an ordinary run, no student."""
    subfolder: str | None = None
    """Folder inside teacher that holds the VAE."""
    config: str | None = None
    """A config.json for a teacher that is a single file. Its scaling_factor decides which latents the student takes."""
    student: str | None = None
    """A student to start from, whatever `load_vae` reads, such as a TAESD for a VAE that was fine-tuned since. It has
    its own widths and blocks, and those below are not used. Null: new weights."""
    latents_folder: str | None = None
    """The finished data set that `sdvae encode` made of data.source with this teacher, a folder or URL. Its latents
    take the place of the teacher's encoder in training. Crops are cut out of the encoded images and their latents
    alike: data.crop_scale is not used, and only a data set with mirror images has flips. Null: the encoder runs."""
    encoder_width: int = 64
    """Channels of all maps inside the encoder."""
    encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    """Blocks in each level of the encoder, whose first level has the image's resolution. n levels compress by 2^(n-1),
    which must be the teacher's ratio."""
    decoder_width: int = 64
    """Channels of all maps inside the decoder."""
    decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    """Blocks in each level of the decoder, whose first level has the latents' resolution."""
    use_midblock_gn: bool = False
    """Whether the blocks at the latents' resolution see the whole image through a group norm, as the teacher does: the
    network of TAEF2, the published student of FLUX.2. diffusers' own class and A1111 do not compute it, ComfyUI only
    for FLUX.2's latents."""
    latents: Literal["sample", "mode"] = "sample"
    """What the decoder learns from: samples of the teacher's posterior, which diffusion models learn too, or its mode.
    The encoder always learns the mode."""
    teacher_weight: float = 0.5
    """What the decoder's output is compared with: the image (0), the teacher's decoded picture (1), or the weighted sum
    of both errors. The discriminator's real pictures are the images, or with 1 the teacher's."""
    latent_weight: float = 1.0
    """Weight of the encoder's error: the mean squared error of latents whose standard deviation is about 1."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which an interrupted run continues, and the choice of the best model."""

    every_steps: int = 1_000
    """Steps between checkpoints. There is always one after the last step, and when a run is told to stop."""
    keep_last: int = 2
    """Number of checkpoints to keep; an old one is removed only when the new one is complete."""
    best_metric: str = "psnr"
    """The validation metric by which best_model/ is chosen: psnr, ssim, lpips_…, rfid, rfdd or (only with «bce») nelbo.
    All but the first two are better when lower. For a student also psnr_to_teacher and psnr_round_trip."""
    accept_changed_config: bool = False
    """Continue a run with a changed recipe instead of refusing it."""


@dataclass(frozen=True)
class ValidationConfig:
    """Distances between the validation images and their reconstructions, besides PSNR, SSIM and LPIPS.

    They need thousands of images for values that compare with published ones; with fewer they are biased upwards, and
    only compare runs on the same images. Both need torch-fidelity: pip install "sdvae[fid]".
    """

    fid: bool = False
    """rFID, the Fréchet distance of Inception's features."""
    inception: str | None = None
    """Local file of torch-fidelity's Inception weights (weights-inception-2015-12-05-6726825d.pth); null downloads
    it."""
    fdd: bool = False
    """rFDD, the Fréchet distance of DINOv2's features."""
    dinov2: str | None = None
    """Local file of DINOv2's weights, such as dinov2_vitl14_pretrain.pth; null downloads that one."""

    def __post_init__(self) -> None:
        for file, switch in (("inception", "fid"), ("dinov2", "fdd")):
            if getattr(self, file) is not None and not getattr(self, switch):
                raise InputError(
                    f"got validation.{file} without validation.{switch}, which alone uses it; set "
                    f"validation.{switch}=true, or leave it out"
                )


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
    """Images in each forward pass of each process."""
    gradient_accumulation_steps: int = 1
    """Number of forward and backward passes in each optimizer step."""
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """The dtype of autocast; weights are in fp32. «auto»: bf16 if the hardware computes in it, else fp32."""
    channels_last: bool = True
    """Keep activations in the channels-last memory format. On a CPU, fast_convolutions overrides this."""
    fast_convolutions: bool = True
    """On a CPU, use faster kernels, which compute the same function up to rounding: Winograd's algorithm for 3x3
    convolutions of wide models in fp32, and upsampling with four taps instead of nine (sdvae/kernels/)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: bool = False
    """torch.compile the encoder and the decoder's blocks."""
    log_every: int = 50
    """Steps between lines of metrics."""
    validate_every: int = 2_000
    """Steps between validations; there is always one after the last step."""
    validate_raw: bool = False
    """Besides their moving average, also validate the weights themselves, and log this as validation_raw/…"""
    max_skipped_steps: int = 20
    """A step whose loss or gradient is not finite is skipped. After this many skipped steps in a row the run stops."""
    scale_images: int = 512
    """Number of training images on which scaling_factor = 1/std of the latents, or the statistics of model.batch_norm,
    are measured at each validation."""
    grid_images: int = 8
    """Number of validation images in the reconstruction grid."""
    trackers: tuple[str, ...] = ()
    """Trackers of accelerate, which must be installed: tensorboard (`pip install sdvae[tensorboard]`), wandb, trackio,
    mlflow, … The run also writes metrics.jsonl and curves.png, with or without trackers."""
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
    distil: DistilConfig = field(default_factory=DistilConfig)
    """A student of a VAE."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Further figures of validation."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""

    @property
    def discriminator_side(self) -> float:
        """The smallest side in pixels of the images that the discriminator sees."""
        equivariance = self.loss.equivariance
        return self.data.training_resolutions[0] * (equivariance.smallest_scale if equivariance.replaces else 1)

    def images_per_step(self, processes: int) -> int:
        """The number of images in a step of all processes together."""
        return self.batch_size * self.gradient_accumulation_steps * processes

    def __post_init__(self) -> None:
        check_ranges(self, RANGES)
        if not self.loss.equivariance.scales:
            raise InputError("got loss.equivariance.scales=[]; need one factor or more")
        self._resolve_start_of_discriminator()
        self._check_scaling()
        self._check_student()
        self._check_likelihood()
        self._check_labels()
        self._check_resolutions()
        if self.fine_tune.freeze_encoder and self.fine_tune.source is None:
            raise InputError("got fine_tune.freeze_encoder=true without fine_tune.source; need a VAE to start from")
        if self.loss.alignment.weight > 0 and self.fine_tune.freeze_encoder:
            raise InputError(
                f"got loss.alignment.weight={self.loss.alignment.weight:g} with fine_tune.freeze_encoder, whose "
                "latents do not change; leave one of the two out"
            )
        if self.fine_tune.anchor_weight > 0 and (self.fine_tune.source is None or self.fine_tune.freeze_encoder):
            raise InputError(
                f"got fine_tune.anchor_weight={self.fine_tune.anchor_weight:g} "
                + (
                    "with freeze_encoder, which moves no latents"
                    if self.fine_tune.source
                    else "without fine_tune.source"
                )
                + "; need a VAE whose encoder trains on; leave it out"
            )
        if self.optimizer.warmup_steps > self.steps:
            raise InputError(
                f"got optimizer.warmup_steps={self.optimizer.warmup_steps} in steps={self.steps}; need fewer than steps"
            )
        low, high = self.data.crop_scale
        if not 0 < low <= high <= 1:
            raise InputError(f"got data.crop_scale=[{low}, {high}]; need 0 < low <= high <= 1")

    def _resolve_start_of_discriminator(self) -> None:
        """Set loss.discriminator.start_step, which all else reads, if start_fraction is given in its place."""
        given = self.loss.discriminator
        if given.start_fraction is None:
            return
        start = round(given.start_fraction * self.steps)
        if given.start_step not in (DiscriminatorConfig.start_step, start):  # `start` is in a recipe that a run wrote
            raise InputError(
                f"got loss.discriminator.start_step={given.start_step} and start_fraction={given.start_fraction}; need "
                "one of the two"
            )
        loss = replace(self.loss, discriminator=replace(given, start_step=start))
        object.__setattr__(self, "loss", loss)

    def _check_scaling(self) -> None:
        if not self.model.measure_channels:
            return
        if self.model.measure_shift:
            raise InputError(
                "got model.measure_channels and model.measure_shift; need one of them: measure_channels for SDXL's "
                "pipelines, measure_shift for those of SD3 and Flux"
            )
        if self.fine_tune.freeze_encoder:
            raise InputError(
                "got model.measure_channels with fine_tune.freeze_encoder, which keeps the scaling; leave it out, or "
                "measure it afterwards: sdvae export --latents FOLDER --by_channel true"
            )

    def _check_resolutions(self) -> None:
        # the compression ratio of a VAE or student that is trained further is known only when it has been loaded
        levels = len(self.model.block_out_channels if self.distil.teacher is None else self.distil.encoder_blocks)
        known = self.fine_tune.source is None and self.distil.student is None
        factor = 2 ** (levels - 1) if known and not self.data.pad else 1
        data = self.data
        given = [("resolution", data.resolution), ("validation_resolution", data.validation_resolution)]
        given += [("mixed_resolutions", side) for side in data.mixed_resolutions]
        given += [("final_resolution", data.final_resolution)]
        for key, side in given:
            if side is not None and side % factor:
                raise InputError(
                    f"got data.{key}={side}; need a positive multiple of {factor}, the compression ratio of "
                    f"{levels} levels"
                )
            if side is not None and side < SMALLEST_SIDE:
                raise InputError(f"got data.{key}={side}; need at least {SMALLEST_SIDE}, or SSIM has no window")
        side, gan, equivariance = data.training_resolutions[0], self.loss.discriminator, self.loss.equivariance
        if gan.weight > 0 and gan.sees == "latents" and len(data.training_resolutions) > 1:
            raise InputError(
                f"got crops of {list(data.training_resolutions)} pixels with loss.discriminator.sees=latents, an MLP "
                "on latents of one size; need one resolution"
            )
        if gan.consistency_weight > 0 and not gan.augment:
            raise InputError(
                "got loss.discriminator.consistency_weight without augment; need something to be consistent under; set "
                "loss.discriminator.augment, such as [color, translation, cutout]"
            )
        if gan.sees == "latents" and (gan.augment or gan.downsampling != "stride" or gan.features):
            raise InputError(
                "got loss.discriminator.augment, downsampling or features with sees=latents; they are of images; leave "
                "them out"
            )
        of_patches = ("layers", "norm", "downsampling")
        if gan.features is not None and any(
            getattr(gan, key) != getattr(DiscriminatorConfig, key) for key in of_patches
        ):
            raise InputError(
                "got loss.discriminator.features with layers, norm or downsampling, which are of the PatchGAN; leave "
                "them out"
            )
        if gan.features is None and gan.features_weights is not None:
            raise InputError("got loss.discriminator.features_weights without features; need the network's name")
        seen = self.discriminator_side
        if gan.weight > 0 and gan.sees == "images" and gan.features is None and seen < gan.smallest_side:
            raise InputError(
                f"got {'' if seen == side else 'loss.equivariance.scales with '}training crops of {side} pixels and "
                f"loss.discriminator.layers={gan.layers}, so that the discriminator sees images of {seen:g} pixels; "
                f"need {gan.smallest_side} or more for one patch; take fewer layers"
            )
        smallest = side * equivariance.smallest_scale
        if smallest < side and self.loss.lpips_weight > 0 and smallest < SMALLEST_LPIPS_SIDE:
            raise InputError(
                f"got loss.equivariance.scales={list(equivariance.scales)} on crops of {side}; need images of "
                f"{SMALLEST_LPIPS_SIDE} pixels or more for LPIPS; take larger factors or crops"
            )

        terms = self.loss.reconstruction_terms
        for name, least in (("ssim", SMALLEST_SIDE), ("ms_ssim", SMALLEST_MS_SSIM_SIDE)):
            if name in terms and smallest < least:
                raise InputError(
                    f"got {name} in loss.reconstruction, and images of {smallest:g} pixels to compare; need {least} or "
                    "more for its windows; take larger crops (data.resolution), or leave it out"
                )

    def _check_student(self) -> None:
        settings = self.distil
        if settings.teacher is None and (changed := changed_fields(asdict(DistilConfig()), asdict(settings))):
            raise InputError(
                f"got distil.{changed[0].partition(':')[0]} without a teacher; need a VAE to learn from; give "
                "distil.teacher, or use sdvae distil"
            )
        if settings.latents_folder is not None and self.data.color_jitter > 0:
            raise InputError(
                f"got data.color_jitter={self.data.color_jitter} with distil.latents_folder, whose latents are those "
                "of unchanged images; need 0; leave one of the two out"
            )
        if len(settings.encoder_blocks) != len(settings.decoder_blocks) or not settings.encoder_blocks:
            raise InputError(
                f"got distil.encoder_blocks={list(settings.encoder_blocks)} and "
                f"distil.decoder_blocks={list(settings.decoder_blocks)}; need the same number of levels in both"
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
        if loss.equivariance.weight > 0 and loss.equivariance.replaces:
            raise InputError(
                "got loss.equivariance.weight and loss.equivariance.probability; need one of the two: a further term, "
                "or a probability that the transformed image takes the place of the other"
            )
        if self.data.pad and loss.equivariance.is_on:
            raise InputError(
                "got data.pad=true with loss.equivariance, whose transformed images and latents would not match; "
                "need a resolution without padding; set data.pad=false"
            )

    def _check_labels(self) -> None:
        if self.model.num_classes == 0:
            return
        if self.fine_tune.source is not None:
            raise InputError("got model.num_classes with fine_tune.source, which has no labels; need one of the two")
        if self.compile:
            raise InputError("got compile=true with model.num_classes; a conditional VAE is not compiled; leave it out")


def check_used(config: TrainConfig) -> None:
    """Refuse settings that a student does not use. (A VAE has no use for the section distil, which is checked above.)

    Args:
        config: the recipe, as the user wrote it.

    Raises:
        InputError: with the settings, if the recipe is for a student.
    """
    if config.distil.teacher is None:
        return
    changed = [line.partition(":")[0] for line in changed_fields(asdict(TrainConfig()), asdict(config))]
    unused = [key for key in changed if key in NOT_OF_A_STUDENT or key.startswith(NOT_OF_A_STUDENT_SECTIONS)]
    if config.loss.reconstruction == "bce":
        unused.append("loss.reconstruction=bce")
    if unused:
        raise InputError(
            f"got {', '.join(unused)} with distil.teacher; need a recipe of what a student uses; leave out these"
        )
