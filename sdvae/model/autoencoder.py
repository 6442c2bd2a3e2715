"""AutoencoderKL: the convolutional VAE of Stable Diffusion.

    images --encoder--> h --quant_conv--> (mean, logvar) --sample--> z --post_quant_conv--> h --decoder--> images

Rombach et al. 2022, «High-Resolution Image Synthesis with Latent Diffusion Models», section 3.1 and
appendix G. Configuration keys and state-dict names are diffusers' AutoencoderKL's, so weights and
config.json serve both classes; persistence, `.config`, `.dtype` and the offload hooks come from its mixins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as StockAutoencoderKL
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.model.blocks import DownBlock, MidBlock, UpBlock, activated, checkpointed, conv3x3, group_norm
from sdvae.model.posterior import DiagonalGaussian
from sdvae.model.tiling import Streamed, has_hooks, plan

# diffusers' block names -> does the level have self-attention? (LDM's f16 and f32 models have.)
DOWN_BLOCK_TYPES = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
LIKELIHOODS = ("gaussian", "bernoulli")
UP_BLOCK_TYPES = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}


@dataclass
class AutoencoderForwardOutput(DecoderOutput):
    """diffusers' DecoderOutput with the posterior beside it, for the KL term of the loss.

    sample: (B, out_channels, H, W), the reconstruction. posterior: over latents (B, C, H/f, W/f).
    """

    posterior: DiagonalGaussian | None = None


class Encoder(nn.Module):
    """(B, in_channels, H, W) -> (B, 2·latent_channels, H/f, W/f) with f = 2^(levels - 1)."""

    def __init__(
        self,
        in_channels: int,
        latent_channels: int,
        block_out_channels: tuple[int, ...],
        level_attention: list[bool],
        layers_per_block: int,
        norm_num_groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
    ):
        super().__init__()
        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = conv3x3(in_channels, first)
        self.down_blocks = nn.ModuleList()
        width = first
        for level, out_width in enumerate(block_out_channels):
            block = DownBlock(
                in_channels=width,
                out_channels=out_width,
                num_layers=layers_per_block,
                num_groups=norm_num_groups,
                act_fn=act_fn,
                add_attention=level_attention[level],
                add_downsample=level < len(block_out_channels) - 1,
            )
            self.down_blocks.append(block)
            width = out_width
        self.mid_block = MidBlock(last, norm_num_groups, act_fn, mid_block_add_attention)
        self.conv_norm_out = group_norm(norm_num_groups, last)
        self.conv_act = nn.SiLU()
        self.conv_out = conv3x3(last, 2 * latent_channels)
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for block in self.down_blocks:
            h = checkpointed(self, block, h)
        h = checkpointed(self, self.mid_block, h)
        return self.conv_out(activated(self.conv_act, self.conv_norm_out(h), self.conv_norm_out))


class Decoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, out_channels, f·h, f·w): the encoder's mirror, one layer deeper a level."""

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        block_out_channels: tuple[int, ...],
        level_attention: list[bool],
        layers_per_block: int,
        norm_num_groups: int,
        act_fn: str,
        mid_block_add_attention: bool,
    ):
        super().__init__()
        first, last = block_out_channels[0], block_out_channels[-1]
        self.conv_in = conv3x3(latent_channels, last)
        self.mid_block = MidBlock(last, norm_num_groups, act_fn, mid_block_add_attention)
        self.up_blocks = nn.ModuleList()
        width = last
        for level, out_width in enumerate(reversed(block_out_channels)):
            block = UpBlock(
                in_channels=width,
                out_channels=out_width,
                num_layers=layers_per_block + 1,
                num_groups=norm_num_groups,
                act_fn=act_fn,
                add_attention=level_attention[level],
                add_upsample=level < len(block_out_channels) - 1,
            )
            self.up_blocks.append(block)
            width = out_width
        self.conv_norm_out = group_norm(norm_num_groups, first)
        self.conv_act = nn.SiLU()
        self.conv_out = conv3x3(first, out_channels)
        self.gradient_checkpointing = False

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = checkpointed(self, self.mid_block, h)
        for block in self.up_blocks:
            h = checkpointed(self, block, h)
        return self.conv_out(activated(self.conv_act, self.conv_norm_out(h), self.conv_norm_out))


class AutoencoderKL(ModelMixin, AutoencoderMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own clash
    """The VAE of Stable Diffusion, a drop-in for `diffusers.AutoencoderKL`.

    Args (diffusers' names and defaults; kept in config.json):
        in_channels, out_channels: channels of the images, 3 for RGB, 1 for grey.
        down_block_types, up_block_types: one name a level; "Attn…" adds self-attention to the level.
        block_out_channels: width of each level. The compression ratio is 2^(levels - 1).
        layers_per_block: ResNet blocks a level in the encoder; the decoder has one more.
        act_fn: activation inside the ResNet blocks.
        latent_channels: channels of the latents.
        norm_num_groups: groups of every GroupNorm; divides every width.
        sample_size: side in pixels that diffusers' tiling and pipelines take as the default.
        scaling_factor: 1/std of the latents; pipelines use (z - shift_factor) · scaling_factor.
            0.18215 is SD-1's (LDM, appendix G).
        shift_factor: mean of the latents, or None; SD3 and Flux pipelines need a number.
        latents_mean, latents_std: the same for each channel; SDXL pipelines read them.
        force_upcast: SDXL pipelines run the VAE in fp32 even when they run in fp16.
        use_quant_conv, use_post_quant_conv: 1x1 convs around the latents (SD: yes; SD3, Flux: no).
        mid_block_add_attention: self-attention in the middle blocks.

    Raises: InputError when the arguments do not fit together.
    """

    config: Any  # diffusers' FrozenDict, with attribute access
    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock", "SelfAttention"]  # type: ignore[assignment]
    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "encoder", "decoder"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ):
        super().__init__()
        levels = len(block_out_channels)
        down_attention = _level_attention("down_block_types", down_block_types, DOWN_BLOCK_TYPES, levels)
        up_attention = _level_attention("up_block_types", up_block_types, UP_BLOCK_TYPES, levels)
        for width in block_out_channels:
            if width % norm_num_groups:
                raise InputError(
                    f"block_out_channels has {width}, which norm_num_groups={norm_num_groups} does not divide; "
                    f"choose widths that are multiples of {norm_num_groups} or fewer groups"
                )
        shared: dict[str, Any] = {
            "block_out_channels": tuple(block_out_channels),
            "layers_per_block": layers_per_block,
            "norm_num_groups": norm_num_groups,
            "act_fn": act_fn,
            "mid_block_add_attention": mid_block_add_attention,
        }
        self.encoder = Encoder(in_channels, latent_channels, level_attention=down_attention, **shared)
        self.decoder = Decoder(latent_channels, out_channels, level_attention=up_attention, **shared)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv else None
        self.use_slicing = False
        self.use_tiling = False
        self._memory_bytes: int | None = None

    def enable_tiling(self, use_tiling: bool = True, *, memory_bytes: int | None = None) -> None:
        """Encode and decode images of any size in bounded memory; the switch that diffusers' pipelines know.

        Unlike diffusers' tiles, the result is that of the whole image (see `sdvae.model.tiling`). It acts where
        gradients are off and no layer has hooks, which would see strips: offloading layer by layer, say.

        Args:
            use_tiling: false turns it off, as `disable_tiling` does.
            memory_bytes: that the device may take above weights, input and output. What does not fit waits in the
                host's memory. By default as much of an accelerator as is free.
        """
        self.use_tiling = use_tiling
        self._memory_bytes = memory_bytes

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels of the image along one side of a latent element: 8 for Stable Diffusion."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def likelihood(self) -> str:
        """What the decoder gives: «gaussian», images, or «bernoulli», the logits of their values.

        It is the key `_likelihood` of config.json, which diffusers' class keeps and does not read. `sdvae.roundtrip`
        turns both into images.
        """
        return self.config.get("_likelihood", "gaussian")

    def set_likelihood(self, likelihood: str) -> None:
        """Say what the decoder gives; «gaussian» or «bernoulli». `save_pretrained` writes it into config.json.

        Raises:
            InputError: for another word.
        """
        if likelihood not in LIKELIHOODS:
            raise InputError(f"got likelihood {likelihood!r}; need one of {', '.join(LIKELIHOODS)}")
        if likelihood != self.likelihood:
            self.register_to_config(_likelihood=likelihood)

    def _moments(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, 2·latent_channels, H/f, W/f)
        if self._streams:
            return self._streamed(x.shape, x).encode(self, x)
        h = self.encoder(x)
        return h if self.quant_conv is None else self.quant_conv(h)

    def _image(self, z: Tensor) -> Tensor:  # (B, latent_channels, h, w) -> (B, C, f·h, f·w)
        if self._streams:
            if not z.isfinite().all():  # one such value would reach the whole image, after a long time
                raise InputError("got latents with NaN or infinite values; need finite ones; look what overflowed")
            f = self.spatial_compression_ratio
            shape = torch.Size((z.shape[0], self.config.out_channels, f * z.shape[2], f * z.shape[3]))
            return self._streamed(shape, z).decode(self, z)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    @property
    def _streams(self) -> bool:
        return self.use_tiling and not torch.is_grad_enabled() and not has_hooks(self)

    def _streamed(self, shape: torch.Size, x: Tensor) -> Streamed:
        """The streaming pass for images of a shape, computed on the device and in the dtype of `x`."""
        budget = plan(self, tuple(shape), x.device, x.dtype, self._memory_bytes)
        return Streamed(budget, self.config.norm_num_groups)

    def _sliced(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function` over the whole batch, or image by image, when slicing is on and gradients are off: less memory."""
        if self.use_slicing and x.shape[0] > 1 and not torch.is_grad_enabled():
            return torch.cat([function(image) for image in x.split(1)])
        return function(x)

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        """Images to the posterior over their latents.

        Args:
            x: (B, in_channels, H, W) float in [-1, 1]; H and W multiples of `spatial_compression_ratio`
                (`sdvae.pad_to_multiple` makes them so).

        Returns: `.latent_dist`, over unscaled latents (B, latent_channels, H/f, W/f); a 1-tuple of it
            when `return_dict` is false.
        Raises: InputError for a tensor of another shape.
        """
        self._check_images(x)
        posterior = DiagonalGaussian(self._sliced(self._moments, x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Unscaled latents to images.

        Args:
            z: (B, latent_channels, h, w) float: a sample or the mode of a posterior.
            generator: taken for diffusers' sake and unused; decoding is deterministic.

        Returns: `.sample`, (B, out_channels, f·h, f·w), nominally in [-1, 1] and not clamped; a 1-tuple
            of it when `return_dict` is false.
        Raises: InputError for a tensor of another shape.
        """
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise InputError(
                f"got latents of shape {tuple(z.shape)}; need (batch, {self.config.latent_channels}, height, width), "
                "unscaled"
            )
        if z.numel() == 0:
            raise InputError(f"got latents of shape {tuple(z.shape)}, with a side of zero; need at least 1")
        image = self._sliced(self._image, z)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> AutoencoderForwardOutput | tuple[Tensor]:
        """Encode, take the posterior's mode or a sample, decode.

        Training calls this and nothing else, so that DDP and autocast, which wrap `forward`, see every
        operation that has a gradient.

        Args:
            sample: (B, in_channels, H, W) float in [-1, 1].
            sample_posterior: draw z from the posterior instead of taking its mode.
            generator: for that draw; one for the batch, or a list with one for each image.

        Returns: `.sample`, the reconstruction (B, out_channels, H, W), and `.posterior`; a 1-tuple of the
            reconstruction when `return_dict` is false.
        """
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        reconstruction = self.decode(z).sample
        if not return_dict:
            return (reconstruction,)
        return AutoencoderForwardOutput(sample=reconstruction, posterior=posterior)

    def to_diffusers(self) -> StockAutoencoderKL:
        """The same VAE as diffusers' own class: same config, a copy of the weights, device, dtype and mode.

        Put this into a pipeline before `pipe.save_pretrained`, and the saved folder loads where sdvae is
        not installed (model_index.json names the class's module).
        """
        config = {key: value for key, value in self.config.items() if not key.startswith("_")}
        stock = StockAutoencoderKL(**config)
        weights = {name: weight.detach().clone() for name, weight in self.state_dict().items()}
        stock.load_state_dict(weights, assign=True)
        return stock.train(self.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """diffusers' `from_pretrained`, except that weights which do not fit the model are refused.

        diffusers only warns and leaves the missing weights at random values. Takes its arguments; for
        single files and stricter checks see `sdvae.load_vae`.

        Raises: InputError naming the missing, unexpected and wrongly shaped keys.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, output_loading_info=True, **kwargs)
        model, info = loaded
        faults = [
            f"{len(info[kind])} {kind.split('_')[0]} ({', '.join(map(str, sorted(info[kind])[:3]))}…)"
            for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[kind]
        ]
        if faults:
            raise InputError(
                f"the weights in {pretrained_model_name_or_path} do not fit its config.json: keys {'; '.join(faults)}; "
                "get a whole copy of the folder"
            )
        return (model, info) if wants_info else model

    def _check_images(self, x: Tensor) -> None:
        factor = self.spatial_compression_ratio
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise InputError(
                f"got images of shape {tuple(x.shape)}; need (batch, {self.config.in_channels}, height, width) "
                "in [-1, 1]"
            )
        for name, size in (("height", x.shape[2]), ("width", x.shape[3])):
            if size == 0 or size % factor:
                down, up = size - size % factor, size + -size % factor or factor
                crop = f"crop to {down} or " if down else ""
                raise InputError(
                    f"{name} {size} is not a positive multiple of {factor}; {crop}pad to {up} (sdvae.pad_to_multiple)"
                )


def _level_attention(key: str, names: tuple[str, ...], known: dict[str, bool], levels: int) -> list[bool]:
    if len(names) != levels:
        raise InputError(f"{key} names {len(names)} blocks, block_out_channels has {levels}; give one name a level")
    for name in names:
        if name not in known:
            raise InputError(f"{key} has {name!r}; need one of {', '.join(known)}")
    return [known[name] for name in names]
