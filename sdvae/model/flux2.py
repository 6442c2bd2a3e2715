"""AutoencoderKLFlux2: the VAE of FLUX.2, a batch norm over patches of whose latents scales them for diffusion models.

The networks are those of `AutoencoderKL`, and so is the forward pass, which has no use for the batch norm. Pipelines
take each 2 x 2 positions of the latents as the channels of one (`sdvae.model.patches`), and subtract the running mean
and divide by the root of the running variance (`sdvae.latents.scaling`). So a diffusion model has 4 times the channels
at half the resolution: 128 at 1/16 of the image's size for FLUX.2, whose latents have 32 channels at 1/8.

Configuration keys and state-dict names are those of diffusers' AutoencoderKLFlux2, of which the class here is a
subclass.
"""

from __future__ import annotations

import math

from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2 as StockAutoencoderKLFlux2
from diffusers.models.modeling_utils import ModelMixin  # pipelines look for this name in this module when they load
from torch import Tensor, nn

from sdvae.model.config import DOWN_BLOCK_TYPES, UP_BLOCK_TYPES
from sdvae.model.convolutional import ConvolutionalVAE


class AutoencoderKLFlux2(ConvolutionalVAE, StockAutoencoderKLFlux2):  # type: ignore[misc]  # other signatures
    """The VAE of FLUX.2, which can replace `diffusers.AutoencoderKLFlux2` everywhere.

    `encode` and `decode` take and give latents before the batch norm, (B, latent_channels, H/f, W/f), as in diffusers.
    The arguments have diffusers' names and defaults and are kept in config.json. Those that `AutoencoderKL` has too are
    described there.

    Args:
        in_channels: channels of the images that go in.
        out_channels: channels of the images that come out.
        down_block_types: one name for each level of the encoder.
        up_block_types: the same for the decoder.
        block_out_channels: width of each level of the encoder.
        decoder_block_out_channels: width of each level of the decoder, from the image to the latents, as above; None
            for the encoder's.
        layers_per_block: ResNet blocks in each level of the encoder.
        act_fn: activation inside the ResNet blocks.
        latent_channels: channels of the latents before patches are made of them.
        norm_num_groups: groups of every GroupNorm.
        sample_size: side in pixels that diffusers' tiling takes as the default.
        use_quant_conv: a 1x1 conv after the encoder.
        use_post_quant_conv: a 1x1 conv before the decoder.
        mid_block_add_attention: self-attention in the middle blocks.
        batch_norm_eps: what is added to the running variance, inside the root.
        batch_norm_momentum: kept for diffusers; the running statistics are measured, not averaged (docs/training.md).
        patch_size: height and width, in positions, of the patches that are normalised. diffusers' pipelines know only
            2 x 2.
        padding_mode: how 3x3 convs extend a map at its edges, as in `AutoencoderKL`.

    Raises:
        InputError: when the arguments do not fit together.
    """

    bn: nn.BatchNorm2d
    _stock = StockAutoencoderKLFlux2

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = (DOWN_BLOCK_TYPES[0],) * 4,
        up_block_types: tuple[str, ...] = (UP_BLOCK_TYPES[0],) * 4,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        decoder_block_out_channels: tuple[int, ...] | None = None,
        layers_per_block: int = 2,
        act_fn: str = "silu",
        latent_channels: int = 32,
        norm_num_groups: int = 32,
        sample_size: int = 1024,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        batch_norm_eps: float = 1e-4,
        batch_norm_momentum: float = 0.1,
        patch_size: tuple[int, int] = (2, 2),
        padding_mode: str = "zeros",
    ):
        ModelMixin.__init__(self)  # instead of diffusers' class's, which builds its own networks
        self._build()
        channels = math.prod(patch_size) * latent_channels
        self.bn = nn.BatchNorm2d(channels, eps=batch_norm_eps, momentum=batch_norm_momentum, affine=False)

    def set_statistics(self, mean: Tensor, variance: Tensor) -> None:
        """Set the running statistics of the batch norm, (C·p·q,) each, to those of the channels of patches."""
        for buffer, values in ((self.bn.running_mean, mean), (self.bn.running_var, variance)):
            assert buffer is not None
            buffer.copy_(values)
