"""ConditionalAutoencoderKL: a VAE conditioned on a class label, q(z|x, y) and p(x|z, y).

The label is embedded, and each ResNet block of encoder and decoder adds its own linear map of the embedding between its
two convolutions. In that place LDM's blocks take the embedding of the diffusion time (`temb`;
ldm/modules/diffusionmodules/model.py). One more row of the table stands for no label, so a model that was trained with
some labels left out is also an unconditional VAE (data.label_dropout; Ho & Salimans 2022, section 3.2).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as StockAutoencoderKL
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.model.blocks import ResnetBlock
from sdvae.model.posterior import DiagonalGaussian


def _with_arguments_of(base: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace `**shape` in the signature of an __init__ by the arguments of `base`, where diffusers reads the keys."""

    def spelt_out(init: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(init).parameters.values() if p.kind is not p.VAR_KEYWORD]
        inherited = list(inspect.signature(base).parameters.values())[1:]  # without self
        init.__signature__ = inspect.Signature([*own, *inherited])  # type: ignore[attr-defined]
        return init

    return spelt_out


class ConditionalAutoencoderKL(AutoencoderKL):
    """An AutoencoderKL whose `encode`, `decode` and `forward` take `labels` too.

    `save_pretrained` and `from_pretrained` work as for any model of diffusers. diffusers' pipelines give no labels.

    Args:
        num_classes: labels are 0 .. num_classes - 1.
        shape: the arguments of `AutoencoderKL`; all are kept in config.json.
    """

    @register_to_config
    @_with_arguments_of(AutoencoderKL.__init__)
    def __init__(self, num_classes: int = 10, **shape: Any):
        super().__init__(**shape)
        width = self.config.block_out_channels[-1]
        self.label_embedding = nn.Embedding(num_classes + 1, width)  # the last row: no label
        coders = (*self.encoder.down_blocks, self.encoder.mid_block, self.decoder.mid_block, *self.decoder.up_blocks)
        for resnets in (block.resnets for block in coders):
            for i, plain in enumerate(resnets):
                channels = plain.conv1.in_channels, plain.conv1.out_channels
                resnets[i] = ResnetBlock(*channels, self.config.norm_num_groups, self.config.act_fn, width)
        self.set_padding_mode(self.padding_mode)  # in the new blocks too

    @apply_forward_hook
    def encode(
        self, x: Tensor, return_dict: bool = True, labels: Tensor | None = None
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        """`AutoencoderKL.encode`, conditioned on labels.

        Args:
            x: (B, in_channels, H, W) float in [-1, 1].
            return_dict: false gives a 1-tuple of the posterior.
            labels: (B,) integers, below zero for no label; None means no label for any image.

        Raises:
            InputError: for images or labels that do not fit.
        """
        posterior = self._posterior(x, self._embedded(labels, x))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self,
        z: Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        labels: Tensor | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """`AutoencoderKL.decode`, conditioned on labels, (B,) as in `encode`."""
        image = self._reconstruction(z, self._embedded(labels, z))
        return DecoderOutput(sample=image) if return_dict else (image,)

    def to_diffusers(self) -> StockAutoencoderKL:
        """Not possible, since diffusers has no such class.

        Raises:
            InputError: always.
        """
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
        labels = labels.to(like.device, non_blocking=True)
        return self.label_embedding(labels.where(labels >= 0, null))
