"""The shape of a VAE: the keys of a recipe's model section, and their conversion to and from diffusers' config.json.

Only the standard library is imported here, so that a misspelt key in a recipe is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from sdvae.errors import InputError

ACTIVATIONS = ("silu", "swish", "mish", "gelu", "relu")  # those that diffusers' get_activation knows
# `_class_name` in the config.json of this package's autoencoders
CLASS_NAMES = ("AutoencoderKL", "ConditionalAutoencoderKL", "AutoencoderKLFlux2", "AutoencoderTiny")
LOGVAR_RANGE = (-30.0, 20.0)  # of a posterior; LDM, ldm/modules/distributions/distributions.py
LIKELIHOODS = ("gaussian", "bernoulli")
# How 3x3 convs extend a map at its edges, in torch's names. All published VAEs of 2022 to 2024 pad with zeros.
PADDING_MODES = ("zeros", "reflect", "replicate")
# diffusers' names for levels without and with self-attention, which some levels of LDM's f16 and f32 models have
DOWN_BLOCK_TYPES = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")
UP_BLOCK_TYPES = ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


@dataclass(frozen=True)
class ModelShape:
    """The shape of the autoencoder, in diffusers' names. A new key is added here and in `AutoencoderKL.__init__`."""

    in_channels: int = 3
    """Channels of the images and of their reconstructions: 3 for RGB, 1 for grey, 4 for RGB with alpha."""
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    """Width of each level; n levels compress by 2^(n-1) along each side."""
    decoder_block_out_channels: tuple[int, ...] = ()
    """Width of each level of the decoder, from the image to the latents, if it is not that of the encoder. Needs
    batch_norm."""
    layers_per_block: int = 2
    """ResNet blocks in each level of the encoder; the decoder has one more."""
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
    padding_mode: Literal["zeros", "reflect", "replicate"] = "zeros"
    """How 3x3 convolutions extend an image or map at its edges; those of downsamplers always use zeros. diffusers and
    other programs know zeros alone: with another value, what they decode is wrong at the edges."""
    sample_size: int = 512
    """Side in pixels that pipelines take as the default and that diffusers' own tiling uses."""
    batch_norm: bool = False
    """Make an AutoencoderKLFlux2: a batch norm over 2x2 patches of the latents takes the place of scaling_factor and
    shift_factor, and pipelines of FLUX.2 can use the VAE. Its statistics are measured like those factors."""
    num_classes: int = 0
    """Condition encoder and decoder on a class label, 0 .. num_classes - 1, of each image
    (sdvae/tutorial/conditional.py). 0 is the plain AutoencoderKL."""

    @property
    def compression_ratio(self) -> int:
        """Image pixels along one side of a latent element."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self) -> None:
        if not self.block_out_channels:
            raise InputError("got model.block_out_channels=[]; need a width for each level")
        own = self.decoder_block_out_channels
        if own and (len(own) != len(self.block_out_channels) or not self.batch_norm):
            raise InputError(
                f"got model.decoder_block_out_channels={list(own)}; need a width for each of the "
                f"{len(self.block_out_channels)} levels, and model.batch_norm=true: diffusers' AutoencoderKL has none"
            )
        if self.batch_norm and self.num_classes:
            raise InputError("got model.batch_norm with model.num_classes; need one of the two; leave the other out")
        sizes = (self.layers_per_block, self.latent_channels, self.norm_num_groups, *self.block_out_channels, *own)
        if min(sizes) < 1:
            raise InputError("got a model with a width, layer, latent channel or group count below 1; need 1 or more")
        if self.in_channels not in (1, 3, 4):
            raise InputError(f"got model.in_channels={self.in_channels}; need 3 for RGB, 1 for grey or 4 for RGBA")
        if self.act_fn not in ACTIVATIONS:
            raise InputError(f"got model.act_fn={self.act_fn!r}; need one of {', '.join(ACTIVATIONS)}")
        if self.padding_mode not in PADDING_MODES:
            raise InputError(f"got model.padding_mode={self.padding_mode!r}; need one of {', '.join(PADDING_MODES)}")
        if self.num_classes < 0:
            raise InputError(f"got model.num_classes={self.num_classes}; need 0 for none, or how many there are")
        if self.force_upcast and not self.use_quant_conv and not self.batch_norm:
            raise InputError(
                "got model.force_upcast=true with model.use_quant_conv=false, which SDXL pipelines cannot run; "
                "set model.force_upcast=false"
            )

    def to_diffusers(self) -> dict[str, Any]:
        """The arguments of `AutoencoderKL`, of `ConditionalAutoencoderKL` if there are classes, or of
        `AutoencoderKLFlux2` if there is a batch norm."""
        same = {field.name: getattr(self, field.name) for field in fields(ModelShape)}
        del same["batch_norm"]
        if not self.num_classes:
            del same["num_classes"]
        if self.batch_norm:
            del same["force_upcast"]
        if not self.decoder_block_out_channels:
            del same["decoder_block_out_channels"]
        levels = [False] * len(self.block_out_channels)
        return {
            **same,
            **block_types(levels, levels),
            "out_channels": self.in_channels,
            "use_post_quant_conv": self.use_quant_conv,
        }


def shape_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `ModelShape` that describe an existing VAE.

    Args:
        config: the VAE's config, with diffusers' keys.
    """
    shape = {field.name: config[field.name] for field in fields(ModelShape) if field.name in config}
    return {
        **shape,
        "block_out_channels": tuple(config["block_out_channels"]),
        "decoder_block_out_channels": tuple(config.get("decoder_block_out_channels") or ()),
        "batch_norm": "batch_norm_eps" in config,
        # without quant convs SDXL pipelines cannot upcast, whatever the config says
        "force_upcast": config.get("force_upcast", False) and config["use_quant_conv"],
    }


def decoder_widths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """The width of each level of a VAE's decoder, from the image to the latents: the encoder's, unless it has its own.

    Args:
        config: the VAE's config, with diffusers' keys.
    """
    return tuple(config.get("decoder_block_out_channels") or config["block_out_channels"])


def block_types(down: Sequence[bool], up: Sequence[bool]) -> dict[str, tuple[str, ...]]:
    """diffusers' names of the blocks.

    Args:
        down: whether each level of the encoder has self-attention.
        up: whether each level of the decoder has it.
    """
    return {
        "down_block_types": tuple(DOWN_BLOCK_TYPES[attention] for attention in down),
        "up_block_types": tuple(UP_BLOCK_TYPES[attention] for attention in up),
    }


def level_attention(key: str, names: Sequence[str], known: tuple[str, str], levels: int) -> list[bool]:
    """Whether each level has self-attention, from the names of its blocks: the inverse of `block_types`.

    Args:
        key: the name of the config's key, for the message.
        names: the names of the blocks, one for each level.
        known: DOWN_BLOCK_TYPES or UP_BLOCK_TYPES.
        levels: how many names there must be.

    Raises:
        InputError: for another number of names, or an unknown one.
    """
    if len(names) != levels:
        raise InputError(
            f"{key} names {len(names)} blocks and block_out_channels has {levels} levels; give one name for each level"
        )
    for name in names:
        if name not in known:
            raise InputError(f"{key} has {name!r}; need one of {', '.join(known)}")
    return [known.index(name) == 1 for name in names]
