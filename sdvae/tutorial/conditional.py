"""ConditionalAutoencoderKL: the VAE given a class label, q(z|x, y) and p(x|z, y).

The label is embedded, and each ResNet block of encoder and decoder adds its own linear map of the embedding between its
two convolutions: where LDM's blocks take the embedding of the diffusion time («temb»; ldm/modules/diffusionmodules/
model.py). One more row of the table stands for «no label», so one model is also the unconditional VAE, if it was
trained with some labels left out (data.label_dropout; Ho & Salimans 2022, section 3.2).

`sdvae.AutoencoderKL` knows nothing of this: its code, config and state dict are what they are without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as StockAutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.model.autoencoder import AutoencoderForwardOutput, AutoencoderKL, Decoder, Encoder
from sdvae.model.blocks import DownBlock, ResnetBlock, checkpointed
from sdvae.model.posterior import DiagonalGaussian


class ConditionalResnetBlock(ResnetBlock):
    """x + conv(act(norm(conv(act(norm(x))) + W act(e)))), with e the embedding of each image's label."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int, act_fn: str, embedding_channels: int):
        super().__init__(in_channels, out_channels, num_groups, act_fn)
        self.label_proj = nn.Linear(embedding_channels, out_channels)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:  # type: ignore[override]  # the label comes beside
        """(B, C_in, H, W), (B, E) -> (B, C_out, H, W)."""
        h = self.conv1(self.nonlinearity(self.norm1(x)))
        h = h + self.label_proj(self.nonlinearity(e))[:, :, None, None]
        h = self.conv2(self.nonlinearity(self.norm2(h)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class ConditionalAutoencoderKL(AutoencoderKL):
    """An AutoencoderKL whose `encode`, `decode` and `forward` take `labels` too.

    Args:
        num_classes: labels are 0 .. num_classes - 1.
        Else as for `AutoencoderKL`, and kept in config.json with it.

    `save_pretrained` and `from_pretrained` work as for any model of diffusers; no pipeline calls it with labels.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 10,
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
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        width = block_out_channels[-1]
        self.label_embedding = nn.Embedding(num_classes + 1, width)  # the last row: no label
        for resnets in _all_resnets(self):
            for i, plain in enumerate(resnets):
                conv: nn.Conv2d = plain.conv1  # type: ignore[assignment]
                shape = (conv.in_channels, conv.out_channels, norm_num_groups, act_fn, width)
                resnets[i] = ConditionalResnetBlock(*shape)

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True, labels: Tensor | None = None
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        """As `AutoencoderKL.encode`, given the labels.

        Args: labels: (B,) integers, below zero for no label; None is no label for all.
        """
        self._check_images(x)
        e = self._embedded(labels, x)
        encoder: Encoder = self.encoder
        h = encoder.conv_in(x)
        for level in encoder.down_blocks:
            h = checkpointed(encoder, partial(_level, level, e), h)
        h = checkpointed(encoder, partial(_middle, encoder.mid_block, e), h)
        h = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(h)))
        posterior = DiagonalGaussian(h if self.quant_conv is None else self.quant_conv(h))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """As `AutoencoderKL.decode`, given the labels, (B,) as in `encode`."""
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            need = f"(batch, {self.config.latent_channels}, height, width)"
            raise InputError(f"got latents of shape {tuple(z.shape)}; need {need}, unscaled")
        e = self._embedded(labels, z)
        decoder: Decoder = self.decoder
        h = decoder.conv_in(z if self.post_quant_conv is None else self.post_quant_conv(z))
        h = checkpointed(decoder, partial(_middle, decoder.mid_block, e), h)
        for level in decoder.up_blocks:
            h = checkpointed(decoder, partial(_level, level, e), h)
        image = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        labels: Tensor | None = None,
    ) -> AutoencoderForwardOutput | tuple[Tensor]:
        """As `AutoencoderKL.forward`, with the same labels for encoder and decoder."""
        posterior = self.encode(sample, labels=labels).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        reconstruction = self.decode(z, labels=labels).sample
        if not return_dict:
            return (reconstruction,)
        return AutoencoderForwardOutput(sample=reconstruction, posterior=posterior)

    def enable_tiling(self, use_tiling: bool = True, *, memory_bytes: int | None = None) -> None:
        """Raises: InputError; strips pass no labels."""
        raise InputError("a conditional VAE has no tiling; need whole images; take smaller ones or batches")

    def enable_slicing(self) -> None:
        """Raises: InputError; slices pass no labels."""
        raise InputError("a conditional VAE has no slicing; need whole batches; take smaller ones")

    def to_diffusers(self) -> StockAutoencoderKL:
        """Raises: InputError; diffusers has no such class."""
        raise InputError("diffusers has no conditional VAE; need an AutoencoderKL; train one with model.num_classes=0")

    def _embedded(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """(B,) labels -> (B, E), on the device of `like`, whose first dimension is B."""
        count, null = like.shape[0], self.config.num_classes
        if labels is None:
            labels = like.new_full((count,), null, dtype=torch.long)
        elif labels.shape != (count,) or labels.is_floating_point() or bool((labels >= null).any()):
            raise InputError(
                f"got labels of shape {tuple(labels.shape)}, {labels.dtype}, up to {labels.max().item()}; need {count} "
                f"integers up to {null - 1}, or below 0 for no label"
            )
        labels = labels.to(like.device)
        return self.label_embedding(labels.where(labels >= 0, null))


def _all_resnets(vae: AutoencoderKL) -> Iterator[nn.ModuleList]:
    for part in (vae.encoder.down_blocks, [vae.encoder.mid_block, vae.decoder.mid_block], vae.decoder.up_blocks):
        for block in part:
            yield block.resnets  # type: ignore[misc]


def _level(level: Any, e: Tensor, x: Tensor) -> Tensor:
    """`forward` of a DownBlock or an UpBlock, with labels."""
    for i, resnet in enumerate(level.resnets):
        x = resnet(x, e)
        if level.attentions is not None:
            x = level.attentions[i](x)
    resamplers = level.downsamplers if isinstance(level, DownBlock) else level.upsamplers
    return x if resamplers is None else resamplers[0](x)


def _middle(block: Any, e: Tensor, x: Tensor) -> Tensor:
    """`forward` of a MidBlock, with labels."""
    x = block.resnets[0](x, e)
    for attention in block.attentions:
        x = attention(x)
    return block.resnets[1](x, e)
