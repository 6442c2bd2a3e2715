"""The convolutional VAE of Stable Diffusion, whatever scales its latents: its networks, and all that is done with them.

    images --encoder--> h --quant_conv--> (mean, logvar) --sample--> z --post_quant_conv--> h --decoder--> images

Rombach et al. 2022, «High-Resolution Image Synthesis with Latent Diffusion Models», section 3.1 and appendix G.
`AutoencoderKL` and `AutoencoderKLFlux2` are of this kind. Each is a subclass of diffusers' class of that name as well,
from which it inherits `.config`, `.dtype`, saving and loading, attention processors, adapters and the offload hooks.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from sdvae.errors import InputError, first_few, one_line
from sdvae.model.blocks import Decoder, Encoder, only, set_padding
from sdvae.model.config import (
    DOWN_BLOCK_TYPES,
    LIKELIHOODS,
    PADDING_MODES,
    UP_BLOCK_TYPES,
    decoder_widths,
    level_attention,
)
from sdvae.model.patches import PatchSize
from sdvae.model.posterior import DiagonalGaussian
from sdvae.model.state import declared_padding, initialise, is_network, rebuilt, without_default
from sdvae.model.tiling import Streamed, can_stream, plan
from sdvae.runtime import DTYPES, dtype_named

logger = logging.getLogger(__name__)


def _with_dtype(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments with `dtype` and `torch_dtype` as torch.dtype, since diffusers reads every word as fp32.

    Raises:
        InputError: for the name of no such dtype.
    """
    for key in ("dtype", "torch_dtype"):
        word = kwargs.get(key)
        if isinstance(word, str):
            kwargs = {**kwargs, key: dtype_named(word)}
            if kwargs[key] is None:
                raise InputError(f"got {key}={word!r}; need one of {', '.join(DTYPES)}, or a torch.dtype")
    return kwargs


def check_floating(images: Tensor) -> None:
    """Refuse images of integers.

    Raises:
        InputError: with the way to scale them.
    """
    if not images.is_floating_point():
        raise InputError(f"got images of {images.dtype}; need floats in [-1, 1]; scale 0 to 255 by x / 127.5 - 1")


@dataclass
class AutoencoderForwardOutput(DecoderOutput):
    """diffusers' DecoderOutput together with the posterior, which the KL term of the loss needs.

    Attributes:
        sample: (B, out_channels, H, W), the reconstruction.
        posterior: over latents (B, C, H/f, W/f).
    """

    posterior: DiagonalGaussian | None = None


class ConvolutionalVAE(ModelMixin):
    """The networks that a config describes, their forward pass, saving and loading.

    A subclass takes the keys of its config as arguments, and calls `_build`. Its `_stock` is diffusers' class.
    """

    config: Any  # diffusers' FrozenDict, with attribute access
    _internal_dict: Any  # the same, which diffusers sets
    encoder: Encoder
    decoder: Decoder
    _supports_gradient_checkpointing = True
    _no_split_modules = ["ResnetBlock", "SelfAttention"]  # type: ignore[assignment]
    _group_offload_block_modules = ["quant_conv", "post_quant_conv", "encoder", "decoder"]

    _stock: type[Any]

    def _build(self) -> None:
        """Make the networks that the config describes.

        Raises:
            InputError: when its keys do not fit together.
        """
        config = self.config
        widths, up_widths = tuple(config.block_out_channels), decoder_widths(config)
        if len(up_widths) != len(widths):
            raise InputError(
                f"got decoder_block_out_channels for {len(up_widths)} levels and block_out_channels for {len(widths)}; "
                "need one width for each level in both"
            )
        for width in (*widths, *up_widths):
            if width % config.norm_num_groups:
                raise InputError(
                    f"block_out_channels has {width}, which norm_num_groups={config.norm_num_groups} does not divide; "
                    f"choose widths that are multiples of {config.norm_num_groups} or fewer groups"
                )
        names = ("layers_per_block", "norm_num_groups", "act_fn", "mid_block_add_attention")
        shared = {name: config[name] for name in names}
        down, up = (
            level_attention(key, config[key], known, len(widths))
            for key, known in (("down_block_types", DOWN_BLOCK_TYPES), ("up_block_types", UP_BLOCK_TYPES))
        )
        channels = config.latent_channels
        self.encoder = Encoder(config.in_channels, channels, widths, down, **shared)
        self.decoder = Decoder(channels, config.out_channels, up_widths, up, **shared)
        self.quant_conv = nn.Conv2d(2 * channels, 2 * channels, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(channels, channels, 1) if config.use_post_quant_conv else None
        self.set_padding_mode(config.get("padding_mode", "zeros"))
        self.use_slicing = False
        self.use_tiling = False
        self._memory_bytes: int | None = None
        self.original_attn_processors: dict[str, Any] | None = None  # while the projections are fused
        # what diffusers' tiled_encode and tiled_decode read; `enable_tiling` does not
        size = config.sample_size
        self.tile_sample_min_size = size
        side = size if isinstance(size, int) else size[0]  # pairs are in some old config.json
        self.tile_latent_min_size = side // 2 ** (len(widths) - 1)
        self.tile_overlap_factor = 0.25

    def enable_tiling(self, use_tiling: bool = True, *, memory_bytes: int | None = None) -> None:
        """Encode and decode images of any size in bounded memory. diffusers' pipelines call this method.

        Unlike with diffusers' tiles, the result equals that of the whole image (see `sdvae.model.tiling`). Tiling is
        used when gradients are off and every layer is as this class made it. With gradients, or if a layer was replaced
        or has hooks, as with adapters and layer-by-layer offloading, a warning says that the whole image is computed at
        once.

        Args:
            use_tiling: false turns it off, as `disable_tiling` does.
            memory_bytes: what the device may use in addition to weights, input and output. Maps that do not fit are
                kept in the host's memory. By default 70 % of an accelerator's free memory.
        """
        self.use_tiling = use_tiling
        self._memory_bytes = memory_bytes

    def fuse_qkv_projections(self) -> None:
        """Compute queries, keys and values of attention in one product. State-dict names do not change."""
        if self.original_attn_processors is None:
            super().fuse_qkv_projections()  # type: ignore[misc]  # of diffusers' class

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`. Without fused projections this has no effect."""
        super().unfuse_qkv_projections()  # type: ignore[misc]  # of diffusers' class
        for module in self.modules():
            if isinstance(module, Attention):
                module.fuse_projections(fuse=False)
        self.original_attn_processors = None

    @property
    def spatial_compression_ratio(self) -> int:
        """f, the number of image pixels along one side of a latent element: 8 for Stable Diffusion."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    @property
    def patch_size(self) -> PatchSize:
        """Height and width of the patches of latents that are scaled together: 1 x 1 unless there is a batch norm."""
        height, width = self.config.get("patch_size") or (1, 1)
        return height, width

    @property
    def likelihood(self) -> str:
        """What the decoder outputs: images («gaussian»), or the logits of their values («bernoulli»).

        config.json holds it under `_likelihood`, a key that diffusers' class keeps and does not use. `sdvae.roundtrip`
        turns both kinds of output into images.
        """
        return self.config.get("_likelihood", "gaussian")

    def set_likelihood(self, likelihood: str) -> None:
        """Set `likelihood` to «gaussian» or «bernoulli». `save_pretrained` writes it to config.json.

        Raises:
            InputError: for another word.
        """
        if likelihood not in LIKELIHOODS:
            raise InputError(f"got likelihood {likelihood!r}; need one of {', '.join(LIKELIHOODS)}")
        if likelihood != self.likelihood:
            self.register_to_config(_likelihood=likelihood)

    @property
    def padding_mode(self) -> str:
        """How 3x3 convs extend a map at its edges: "zeros", "reflect" or "replicate"."""
        return declared_padding(self)

    def set_padding_mode(self, padding_mode: str) -> None:
        """Set `padding_mode`, in the layers and in the configuration.

        Raises:
            InputError: for another word.
        """
        if padding_mode not in PADDING_MODES:
            raise InputError(f"got padding_mode {padding_mode!r}; need one of {', '.join(PADDING_MODES)}")
        set_padding(self, padding_mode)
        if padding_mode != self.padding_mode:
            by_default = [key for key in self.config.get("_use_default_values", []) if key != "padding_mode"]
            self.register_to_config(padding_mode=padding_mode, _use_default_values=by_default)

    def register_to_config(self, **kwargs: Any) -> None:
        """diffusers' `register_to_config`. The default of `padding_mode` is left out, as diffusers does not know it."""
        super().register_to_config(**kwargs)  # type: ignore[misc]  # of diffusers' class
        self._internal_dict = without_default(self.config, "padding_mode", "zeros")

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[DiagonalGaussian]:
        """Images to the posterior over their latents.

        Args:
            x: (B, in_channels, H, W) float in [-1, 1]; H and W multiples of `spatial_compression_ratio`
                (`sdvae.pad_to_multiple` makes them so).
            return_dict: false gives a 1-tuple of the posterior.

        Returns:
            `.latent_dist`, over unscaled latents (B, latent_channels, H/f, W/f).

        Raises:
            InputError: for a tensor of another shape or of integers.
        """
        posterior = self._posterior(x)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Unscaled latents to images.

        Args:
            z: (B, latent_channels, h, w) float: a sample or the mode of a posterior.
            return_dict: false gives a 1-tuple of the images.
            generator: not used, since decoding is deterministic; diffusers' pipelines pass it.

        Returns:
            `.sample`, (B, out_channels, f·h, f·w), nominally in [-1, 1] and not clamped.

        Raises:
            InputError: for a tensor of another shape or of integers.
        """
        image = self._reconstruction(z)
        return DecoderOutput(sample=image) if return_dict else (image,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        **given: Any,
    ) -> AutoencoderForwardOutput | tuple[Tensor]:
        """Encode, take the posterior's mode or a sample, decode.

        Args:
            sample: (B, in_channels, H, W) float in [-1, 1].
            sample_posterior: draw z from the posterior instead of taking its mode.
            return_dict: false gives a 1-tuple of the reconstruction.
            generator: the source of that draw; one for the batch, or a list with one for each image.
            given: what `encode` and `decode` of a subclass take in addition.

        Returns:
            `.sample`, the reconstruction (B, out_channels, H, W), and `.posterior`.
        """
        posterior = self.encode(sample, **given).latent_dist
        z = posterior.sample(generator) if sample_posterior else posterior.mode()
        reconstruction = self.decode(z, **given).sample
        if not return_dict:
            return (reconstruction,)
        return AutoencoderForwardOutput(sample=reconstruction, posterior=posterior)

    def _posterior(self, x: Tensor, temb: Tensor | None = None) -> DiagonalGaussian:
        """(B, in_channels, H, W), (B, E) -> the posterior over (B, latent_channels, H/f, W/f)."""
        self._check_images(x)
        return DiagonalGaussian(self._sliced(self._encode, x, temb))

    def _reconstruction(self, z: Tensor, temb: Tensor | None = None) -> Tensor:
        """(B, latent_channels, h, w), (B, E) -> (B, out_channels, f·h, f·w)."""
        self._check_latents(z)
        return self._sliced(lambda z, *temb: self._decode(z, True, *temb).sample, z, temb)

    # The names of the next two are diffusers', because users call them, and put others in their place.

    def _encode(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """Images to the posterior's parameters, for a batch that is checked and not to be sliced."""
        if self._streams(x, self.encoder, self.quant_conv):
            return self._streamed(x.shape, x).encode(self, x, temb)
        h = self.encoder(x, *only(temb))
        return h if self.quant_conv is None else self.quant_conv(h)

    def _decode(self, z: Tensor, return_dict: bool = True, temb: Tensor | None = None) -> Any:
        """`decode`, for a batch that is checked and not to be sliced."""
        if self._streams(z, self.decoder, self.post_quant_conv):
            # One such value reaches the whole image. Only a CPU takes long for it; on a GPU the check would wait.
            if z.device.type == "cpu" and not z.isfinite().all():
                raise InputError("got latents with NaN or infinite values; need finite ones; find what overflowed")
            f = self.spatial_compression_ratio
            shape = torch.Size((z.shape[0], self.config.out_channels, f * z.shape[2], f * z.shape[3]))
            image = self._streamed(shape, z).decode(self, z, temb)
        else:
            image = self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z), *only(temb))
        return DecoderOutput(sample=image) if return_dict else (image,)

    def _streams(self, x: Tensor, *parts: nn.Module | None) -> bool:
        """Whether to compute in strips. If tiling is on and cannot be used, a warning gives the reason."""
        if not self.use_tiling or x.shape[0] == 0:
            return False
        if torch.is_grad_enabled():
            reason = "gradients are on; turn them off with torch.no_grad()"
        elif not all(can_stream(part, self.config.norm_num_groups) for part in parts):
            reason = "a layer was replaced, adapted or hooked"
        else:
            return True
        if not torch.compiler.is_compiling():
            warnings.warn(f"tiling is not used, and the whole image is computed at once: {reason}", stacklevel=2)
        return False

    def _streamed(self, shape: torch.Size, x: Tensor) -> Streamed:
        """The strip-wise computation for images of a shape, on the device and in the dtype of `x`."""
        budget = plan(self, tuple(shape), x.device, x.dtype, self._memory_bytes)
        return Streamed(budget, self.config.norm_num_groups)

    def _sliced(self, function: Callable[..., Tensor], x: Tensor, temb: Tensor | None) -> Tensor:
        """`function` of the whole batch; or of one image at a time, if slicing is on and gradients are off."""
        if self.use_slicing and x.shape[0] > 1 and not torch.is_grad_enabled():
            tembs = [None] * x.shape[0] if temb is None else temb.split(1)
            return torch.cat([function(x, *only(temb)) for x, temb in zip(x.split(1), tembs, strict=True)])
        return function(x, *only(temb))

    def to_diffusers(self) -> Any:
        """The same VAE as an instance of diffusers' own class, with a copy of the weights.

        Config, device, dtype and mode are the same. If it is put into a pipeline before `pipe.save_pretrained`, the
        saved folder can be loaded where sdvae is not installed: the pipeline's model_index.json names the package of
        each class. The layers of the copy have this VAE's `padding_mode`. If it is not zeros, a warning says that
        diffusers does not read it from a folder.

        Raises:
            InputError: as `save_pretrained` does.
        """
        stock = rebuilt(self, self._stock)
        if self.padding_mode != "zeros":
            logger.warning(
                "the layers of this copy pad by %s, but diffusers does not read that from a folder, and pads by "
                "zeros: after loading set their padding_mode again (docs/inference.md, «Padding»)",
                self.padding_mode,
            )
        stock.load_state_dict({name: weight.clone() for name, weight in stock.state_dict().items()}, assign=True)
        return stock

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """diffusers' `save_pretrained`, with the same arguments, which also saves a VAE that was changed for use.

        The folder holds the `plain_weights` (see `sdvae.model.state`), which this class and diffusers' both load.

        Raises:
            InputError: when there are none, for example because of an adapter that is not merged. Nothing is written.
        """
        ModelMixin.save_pretrained(rebuilt(self, type(self)), save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """diffusers' `from_pretrained`, with the same arguments, except that it refuses weights that do not fit.

        diffusers only warns, and leaves missing weights at random values. It also takes the dtype as a word, such as
        "fp16" or "float16". With `ignore_mismatched_sizes=True`, weights of another shape are left out, and those of
        the model are newly initialised and named in one warning. For single files and stricter checks see
        `sdvae.load_vae`.

        Raises:
            InputError: with the missing, unexpected and wrongly shaped keys, or for an unknown dtype.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        if kwargs.get("ignore_mismatched_sizes"):
            kwargs["low_cpu_mem_usage"] = False  # otherwise diffusers leaves the weights in question without data
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, **_with_dtype(kwargs)
        )
        model, info = loaded
        origin = f"the weights in {pretrained_model_name_or_path}"
        extra = [key for key in sorted(info["unexpected_keys"]) if not is_network(key)]
        faults = {
            "missing": sorted(info["missing_keys"]),
            "unexpected": sorted(set(info["unexpected_keys"]) - set(extra)),
            "mismatched": sorted(str(key) for key, *_ in info["mismatched_keys"]),
        }
        if kwargs.get("ignore_mismatched_sizes") and (new := faults.pop("mismatched")):
            initialise(model, new)
            logger.warning("%s have other shapes: newly initialised %s", origin, ", ".join(new))
        if any(faults.values()):
            found = [f"{len(keys)} {kind} ({first_few(keys)})" for kind, keys in faults.items() if keys]
            raise InputError(f"{origin} do not fit its config.json: keys {'; '.join(found)}; get a whole copy of it")
        if extra:
            logger.warning("%s have %d more that no VAE has: left out %s", origin, len(extra), first_few(extra))
        model.set_likelihood(model.likelihood)  # refuses a word that this version does not know
        return (model, info) if wants_info else model

    @classmethod
    def from_single_file(cls, *args: Any, **kwargs: Any) -> Any:
        """diffusers' `from_single_file`, with the same arguments; the dtype may be a word, as in `from_pretrained`.

        `low_cpu_mem_usage` is always true, since without it diffusers leaves missing weights at random values without
        a word. `sdvae.load_vae` reads more forms of files, and needs no configuration from the hub.

        Raises:
            InputError: when the file lacks weights, or for an unknown dtype.
        """
        try:
            return super().from_single_file(*args, **_with_dtype(kwargs) | {"low_cpu_mem_usage": True})  # type: ignore[misc]  # of diffusers' class
        except NotImplementedError as error:  # a weight that the file lacks is on the meta device, and has no data
            raise InputError(
                f"{args[0] if args else 'the file'} lacks weights of its configuration ({one_line(error)[:40]}…); "
                "need all of them; load the file with sdvae.load_vae, which names them"
            ) from error

    def _check_images(self, x: Tensor) -> None:
        factor = self.spatial_compression_ratio
        if x.ndim != 4 or x.shape[1] != self.config.in_channels:
            raise InputError(
                f"got images of shape {tuple(x.shape)}; need (batch, {self.config.in_channels}, height, width) "
                "in [-1, 1]"
            )
        check_floating(x)
        for name, size in (("height", x.shape[2]), ("width", x.shape[3])):
            if size == 0 or size % factor:
                down, up = size - size % factor, size + -size % factor or factor
                crop = f"crop to {down} or " if down else ""
                raise InputError(
                    f"{name} {size} is not a positive multiple of {factor}; {crop}pad to {up} (sdvae.pad_to_multiple)"
                )
        self._check_reflects(x, factor)

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim != 4 or z.shape[1] != self.config.latent_channels:
            raise InputError(
                f"got latents of shape {tuple(z.shape)}; need (batch, {self.config.latent_channels}, height, width), "
                "unscaled"
            )
        if not z.is_floating_point():
            raise InputError(f"got latents of {z.dtype}; need unscaled floats; convert them: z.float()")
        if 0 in z.shape[2:]:
            raise InputError(f"got latents of shape {tuple(z.shape)}, with a side of zero; need at least 1")
        self._check_reflects(z, 1)

    def _check_reflects(self, x: Tensor, factor: int) -> None:
        """Refuse maps that have no second row or column to reflect at the lowest resolution."""
        if self.padding_mode == "reflect" and min(x.shape[2:]) < 2 * factor:
            height, width = x.shape[2:]
            raise InputError(
                f"got {height} x {width} for a VAE that pads by reflection; need at least {2 * factor} on each side"
            )
