"""AutoencoderKL: the convolutional VAE of Stable Diffusion, whose latents are scaled by factors in its configuration.

Configuration keys and state-dict names are those of diffusers' AutoencoderKL, so both classes read the same weights and
config.json. The class here is a subclass of diffusers', because diffusers' pipelines require an instance of that. The
networks and the forward pass are in `sdvae.model.convolutional` and `sdvae.model.blocks`.
"""

from __future__ import annotations

from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as StockAutoencoderKL
from diffusers.models.modeling_utils import ModelMixin  # pipelines look for this name in this module when they load

from sdvae.model.convolutional import ConvolutionalVAE


class AutoencoderKL(ConvolutionalVAE, StockAutoencoderKL):  # type: ignore[misc]  # other signatures
    """The VAE of Stable Diffusion, which can replace `diffusers.AutoencoderKL` everywhere.

    The arguments have diffusers' names and defaults and are kept in config.json.

    Args:
        in_channels: channels of the images that go in, 3 for RGB, 1 for grey.
        out_channels: channels of the images that come out.
        down_block_types: one name for each level of the encoder; "Attn…" adds self-attention to the level.
        up_block_types: the same for the decoder, whose first level has the lowest resolution.
        block_out_channels: width of each level. The compression ratio is 2^(levels - 1).
        layers_per_block: ResNet blocks in each level of the encoder; the decoder has one more.
        act_fn: activation inside the ResNet blocks.
        latent_channels: channels of the latents.
        norm_num_groups: groups of every GroupNorm; divides every width.
        sample_size: side in pixels, or height and width, that diffusers' tiling and pipelines take as the default.
        scaling_factor: 1/std of the latents; pipelines use (z - shift_factor) · scaling_factor.
            0.18215 is SD-1's (LDM, appendix G).
        shift_factor: mean of the latents, or None; SD3 and Flux pipelines need a number.
        latents_mean: the mean of each channel; SDXL pipelines read it.
        latents_std: the standard deviation of each channel; SDXL pipelines read it.
        force_upcast: whether SDXL pipelines run the VAE in fp32 even when they run in fp16.
        use_quant_conv: a 1x1 conv after the encoder (SD: yes; SD3, Flux: no).
        use_post_quant_conv: a 1x1 conv before the decoder (SD: yes; SD3, Flux: no).
        mid_block_add_attention: self-attention in the middle blocks.
        padding_mode: how 3x3 convs extend a map at its edges: "zeros", "reflect" or "replicate". diffusers' class pads
            with zeros, and does not have this argument. So config.json only has the key if it is another word, and
            diffusers then warns that it ignores the key.

    Raises:
        InputError: when the arguments do not fit together.
    """

    _stock = StockAutoencoderKL

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
        sample_size: int | tuple[int, int] = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        padding_mode: str = "zeros",
    ):
        ModelMixin.__init__(self)  # instead of diffusers' class's, which builds its own networks
        self._build()
