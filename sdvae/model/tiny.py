"""AutoencoderTiny: a small, fast student of a VAE, also known as TAESD (Ollin Boer Bohan, 2023).

    images --encoder--> scaled latents --decoder--> images

A student computes what a VAE, its teacher, computes, with a fraction of the operations: no attention, one width, and
little but 3x3 convolutions and ReLUs. `sdvae distil` trains one. It is enough for previews while a diffusion model
samples, and for a light encoder. Three things differ from AutoencoderKL:

- There is no posterior. The encoder predicts the mean of the teacher's.
- Its latents are those of diffusion models, (z - shift_factor) · scaling_factor of the teacher, of mean 0 and standard
  deviation 1. So its own `scaling_factor` is 1, and pipelines, which divide by that, hand it their latents as they are.
- The networks compute with images in [0, 1]; `encode` takes and `decode` returns [-1, 1], like every VAE here.

Configuration keys and state-dict names are those of diffusers' AutoencoderTiny, so both classes read the same weights
and config.json. The class here is a subclass of diffusers', because diffusers' pipelines require an instance of that.
It inherits saving, loading, slicing and `forward`. The networks are here, and so is tiling, which gives the values of
the whole image; diffusers' own tiles blend into each other, and take only 4 latent channels and fp32.

With `use_midblock_gn`, blocks at the latents' resolution have a branch with a group norm, through which each position
learns of the whole image, as it does in the teacher. That is the network of TAEF2, the student of FLUX.2's VAE
(madebyollin/taesd, 2025), which diffusers' class cannot compute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.activations import get_activation
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as StockAutoencoderTiny
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.model.blocks import checkpointed, conv3x3
from sdvae.model.state import without_default

LATENT_BOUND = 3.0  # the decoder bends latents beyond 3 standard deviations smoothly towards 3; TAESD's Clamp
NORM_GROUPS = 4  # of the group norm in a block, which is as many times wider than the block; TAEF2's
STRIP_ROWS = 64  # rows of latents in a strip of `enable_tiling`: 512 pixels at f8


class TinyBlock(nn.Module):
    """relu(y + conv(act(conv(act(conv(y)))))): (B, C, H, W) -> (B, C, H, W).

    y is x, or with a norm x + conv1x1(relu(group_norm(conv1x1(x)))), which depends on all positions of x.
    """

    def __init__(self, channels: int, act_fn: str, with_norm: bool = False):
        super().__init__()
        act = get_activation(act_fn)
        self.conv = nn.Sequential(
            *(conv3x3(channels, channels), act), *(conv3x3(channels, channels), act), conv3x3(channels, channels)
        )
        self.pool = None  # TAEF2's name for it
        if with_norm:
            wide = NORM_GROUPS * channels
            self.pool = nn.Sequential(
                *(nn.Conv2d(channels, wide, 1, bias=False), nn.GroupNorm(NORM_GROUPS, wide), nn.ReLU()),
                nn.Conv2d(wide, channels, 1, bias=False),
            )
        self.fuse = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return self.fuse(self.conv(x) + x)


class _Tiny(nn.Module):
    """Layers in a row, under the names `layers.0`, `layers.1`, … of TAESD's files.

    Attributes:
        layers: all layers.
        boundary: the number of layers in the encoder before the blocks at the latents' resolution, in the decoder up
            to their end.
    """

    def __init__(self, layers: Sequence[nn.Module], boundary: int):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.boundary = boundary
        self.gradient_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.before(x))

    def before(self, x: Tensor) -> Tensor:
        """The layers before the boundary."""
        return self._run(self.layers[: self.boundary], x)

    def after(self, h: Tensor) -> Tensor:
        """The layers after the boundary."""
        return self._run(self.layers[self.boundary :], h)

    def _run(self, layers: nn.Sequential, h: Tensor) -> Tensor:
        for layer in layers:
            h = checkpointed(self, layer, h, None)
        return h


class TinyEncoder(_Tiny):
    """(B, in_channels, H, W) in [-1, 1] -> (B, latent_channels, H/f, W/f), scaled latents; f = 2^(levels - 1)."""

    def __init__(
        self, in_channels: int, latent_channels: int, blocks: Sequence[int], width: int, act_fn: str, with_norms: bool
    ):
        layers: list[nn.Module] = []
        for level, count in enumerate(blocks):
            halve = nn.Conv2d(width, width, kernel_size=3, stride=2, padding=1, bias=False)
            layers.append(halve if level > 0 else conv3x3(in_channels, width))
            is_last = level == len(blocks) - 1
            layers += [TinyBlock(width, act_fn, with_norms and is_last) for _ in range(count)]
        super().__init__([*layers, conv3x3(width, latent_channels)], boundary=len(layers) - blocks[-1])

    def before(self, x: Tensor) -> Tensor:
        return super().before(x.add(1).div(2))


class TinyDecoder(_Tiny):
    """(B, latent_channels, h, w), scaled latents -> (B, out_channels, f·h, f·w), nominally in [-1, 1]."""

    def __init__(
        self,
        latent_channels: int,
        out_channels: int,
        blocks: Sequence[int],
        width: int,
        act_fn: str,
        with_norms: bool,
        upsample_fn: str,
        upsampling_scaling_factor: int,
    ):
        layers: list[nn.Module] = [conv3x3(latent_channels, width), get_activation(act_fn)]
        boundary = len(layers) + blocks[0]
        for level, count in enumerate(blocks):
            if level > 0:
                layers.append(nn.Upsample(scale_factor=upsampling_scaling_factor, mode=upsample_fn))
                layers.append(nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False))
            layers += [TinyBlock(width, act_fn, with_norms and level == 0) for _ in range(count)]
        super().__init__([*layers, conv3x3(width, out_channels)], boundary)

    @property
    def conv_out(self) -> nn.Conv2d:
        """The last convolution, under the name that it has in AutoencoderKL's decoder."""
        return self.get_submodule(f"layers.{len(self.layers) - 1}")  # type: ignore[return-value]

    def before(self, x: Tensor) -> Tensor:
        return super().before(torch.tanh(x / LATENT_BOUND) * LATENT_BOUND)

    def after(self, h: Tensor) -> Tensor:
        return super().after(h).mul(2).sub(1)


class AutoencoderTiny(StockAutoencoderTiny):
    """A student of a VAE, which can replace `diffusers.AutoencoderTiny` everywhere.

    The arguments have diffusers' names and defaults and are kept in config.json.

    Args:
        in_channels: channels of the images that go in, 3 for RGB, 1 for grey.
        out_channels: channels of the images that come out.
        encoder_block_out_channels: width of each level of the encoder, the same for all. The compression ratio is
            2^(levels - 1).
        decoder_block_out_channels: the same for the decoder.
        act_fn: activation inside the blocks; a ReLU ends each.
        upsample_fn: how the decoder enlarges its maps, a mode of `nn.Upsample`.
        latent_channels: channels of the latents, the teacher's.
        upsampling_scaling_factor: factor by which each level of the decoder except the last enlarges.
        num_encoder_blocks: blocks in each level of the encoder, whose first level has the image's resolution.
        num_decoder_blocks: the same for the decoder, whose first level has the latents' resolution.
        latent_magnitude: `scale_latents` maps latents from this range, -3 to 3, to [0, 1], for storage in bytes.
        latent_shift: what it maps 0 to.
        force_upcast: not used, and false in config.json whatever is given.
        scaling_factor: what pipelines multiply the output of `encode` by: 1, since that is scaled.
        shift_factor: what pipelines subtract from it before that: 0.
        use_midblock_gn: whether the blocks at the latents' resolution, in both halves, have a branch with a group norm
            (`TinyBlock`). diffusers' class does not know it: config.json has the key only where it is true.

    Raises:
        InputError: when the arguments do not fit together.
    """

    config: Any  # diffusers' FrozenDict, with attribute access
    encoder: TinyEncoder  # type: ignore[assignment]
    decoder: TinyDecoder  # type: ignore[assignment]
    _no_split_modules = ["TinyBlock"]  # type: ignore[assignment]
    _internal_dict: Any  # the same, which diffusers sets
    likelihood = "gaussian"  # what the decoder outputs: images; see `AutoencoderKL.likelihood`

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
        act_fn: str = "relu",
        upsample_fn: str = "nearest",
        latent_channels: int = 4,
        upsampling_scaling_factor: int = 2,
        num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
        num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
        latent_magnitude: int = 3,
        latent_shift: float = 0.5,
        force_upcast: bool = False,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        use_midblock_gn: bool = False,
    ):
        ModelMixin.__init__(self)  # instead of diffusers' class's, which builds its own networks
        widths = {
            part: _only_width(part, channels, blocks)
            for part, channels, blocks in (
                ("encoder", encoder_block_out_channels, num_encoder_blocks),
                ("decoder", decoder_block_out_channels, num_decoder_blocks),
            )
        }
        if use_midblock_gn and 0 in (num_encoder_blocks[-1], num_decoder_blocks[0]):
            raise InputError(
                f"got use_midblock_gn with num_encoder_blocks={list(num_encoder_blocks)} and num_decoder_blocks="
                f"{list(num_decoder_blocks)}; need blocks at the latents' resolution (the encoder's last level, the "
                "decoder's first)"
            )
        self.encoder = TinyEncoder(
            *(in_channels, latent_channels, num_encoder_blocks, widths["encoder"], act_fn), use_midblock_gn
        )
        self.decoder = TinyDecoder(
            *(latent_channels, out_channels, num_decoder_blocks, widths["decoder"], act_fn, use_midblock_gn),
            *(upsample_fn, upsampling_scaling_factor),
        )
        self.latent_magnitude = latent_magnitude  # this and the next five are what diffusers' methods read
        self.latent_shift = latent_shift
        self.scaling_factor = scaling_factor
        self.use_slicing = False
        self.use_tiling = False
        self.spatial_scale_factor = self.spatial_compression_ratio
        # pipelines find the compression ratio by the length of block_out_channels
        self.register_to_config(block_out_channels=decoder_block_out_channels, force_upcast=False)

    def register_to_config(self, **kwargs: Any) -> None:
        """diffusers' `register_to_config`, without the default of `use_midblock_gn`, which diffusers does not know."""
        super().register_to_config(**kwargs)
        self._internal_dict = without_default(self.config, "use_midblock_gn", False)

    @property
    def spatial_compression_ratio(self) -> int:
        """f, the number of image pixels along one side of a latent element: 8 for Stable Diffusion."""
        return 2 ** (len(self.config.num_encoder_blocks) - 1)

    def _tiled_encode(self, x: Tensor) -> Tensor:
        """`encode` after `enable_tiling`: as the whole image would be, in strips of rows up to the boundary."""
        f = self.spatial_compression_ratio
        reach = f * encoder_reach(self.config.num_encoder_blocks)
        return self.encoder.after(_in_strips(self.encoder.before, x, f * STRIP_ROWS, reach, f, 1))

    def _tiled_decode(self, x: Tensor) -> Tensor:
        """`decode` after `enable_tiling`: as the whole image would be, in strips of rows from the boundary on."""
        enlarges, blocks = self.config.upsampling_scaling_factor, self.config.num_decoder_blocks
        reach, up = decoder_reach(blocks, enlarges), enlarges ** (len(blocks) - 1)
        return _in_strips(self.decoder.after, self.decoder.before(x), STRIP_ROWS, reach, 1, up)


def encoder_reach(blocks: Sequence[int]) -> int:
    """How many rows of latents above and below one the encoder, up to the boundary, reads pixels for it."""
    # each conv reads one row more at its own resolution: 3 in a block, 1 before the blocks
    pixels = sum(2 ** max(0, level - 1) + 3 * count * 2**level for level, count in enumerate((*blocks[:-1], 0)))
    return -(-pixels // 2 ** (len(blocks) - 1))


def decoder_reach(blocks: Sequence[int], enlarges: int) -> int:
    """How many rows of latents above and below a row of pixels the decoder, from the boundary on, reads for it."""
    # as for the encoder; nearest-neighbour enlarging adds a row, and smooth modes read one more; 1 at the end
    return 1 + sum(-(-(3 * count + 1) // enlarges**level) + 2 for level, count in enumerate(blocks) if level > 0)


def _in_strips(function: Callable[[Tensor], Tensor], x: Tensor, rows: int, halo: int, down: int, up: int) -> Tensor:
    """function(x), computed from `rows` rows at a time and as many more above and below as its result depends on.

    Args:
        function: (B, C, H, W) -> (B, C', up·H/down, up·W/down), made of convolutions.
        x: its input.
        rows: rows of x in each strip; a multiple of `down`.
        halo: rows that are computed along above and below, and thrown away; a multiple of `down`.
        down: rows of x for `up` rows of the output.
        up: see `down`.
    """
    strips = []
    for top in range(0, x.shape[2], rows):
        first = max(0, top - halo)
        strip = function(x[:, :, first : top + rows + halo])
        start = (top - first) // down * up
        strips.append(strip[:, :, start : start + rows // down * up])
    return torch.cat(strips, dim=2)


def _only_width(part: str, widths: Sequence[int], blocks: Sequence[int]) -> int:
    """The one width of all levels.

    Raises:
        InputError: for other numbers of levels, or several widths, which diffusers' class accepts and cannot compute.
    """
    if not widths or len(widths) != len(blocks) or len(set(widths)) > 1:
        raise InputError(
            f"got {part}_block_out_channels={list(widths)} with num_{part}_blocks={list(blocks)}; need both as long as "
            "the number of levels, and one width for all levels"
        )
    return widths[0]
