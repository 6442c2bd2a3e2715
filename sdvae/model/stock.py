"""diffusers' other image autoencoders, behind the interface of those in this package.

    images --network.encode--> posterior, or a single point --> latents --network.decode--> images

The network is diffusers' own class and code. `StockAutoencoder` gives it what the rest of the package uses of an
autoencoder (`sdvae.model.kinds`). Four things differ from class to class, and `USES` holds them:

- Video autoencoders take an image as a video of one frame: (B, C, 1, H, W).
- Some encoders predict a point instead of a posterior.
- Each has its own compression ratio.
- Each is scaled as its pipelines do it. In `config` the scaling has AutoencoderKL's keys, whatever the class's own are:
  `scaling_factor`, and `latents_mean` and `latents_std` where pipelines read those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models import autoencoders
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.model.posterior import DiagonalGaussian


@dataclass(frozen=True)
class Use:
    """How a class of diffusers is used for images.

    Attributes:
        levels: the key of its config that has an entry for each level of the encoder, each of which but one halves the
            sides; or the key that is the compression ratio itself. `ratio_of` reads either.
        scaling: the scaling of its latents, under AutoencoderKL's keys, from its config.
        is_video: whether it takes (B, C, frames, H, W).
        has_posterior: whether its encoder predicts a variance.
    """

    levels: str
    scaling: Callable[[Mapping[str, Any]], dict[str, Any]]
    is_video: bool = False
    has_posterior: bool = True


def _by_factor(config: Mapping[str, Any]) -> dict[str, Any]:
    """z · scaling_factor."""
    return {"scaling_factor": config["scaling_factor"], "latents_mean": None, "latents_std": None}


def _by_channel(config: Mapping[str, Any]) -> dict[str, Any]:
    """(z - latents_mean) / latents_std."""
    return {"scaling_factor": 1.0, "latents_mean": config["latents_mean"], "latents_std": config["latents_std"]}


def _of_vq(config: Mapping[str, Any]) -> dict[str, Any]:
    """z · scaling_factor for LDM's VQ models; none for Kandinsky's MoVQ, whose pipelines decode latents as they are."""
    return {**_by_factor(config), **({"scaling_factor": 1.0} if is_movq(config) else {})}


def is_movq(config: Mapping[str, Any]) -> bool:
    """Whether a VQModel is Kandinsky's, whose latents are decoded without looking them up in the codebook."""
    return config["norm_type"] == "spatial"


# The pipelines of diffusers 0.42 that scale these latents are, in this order, pipeline_sana.py,
# pipeline_stable_diffusion_inpaint.py, pipeline_latent_diffusion.py and pipeline_kandinsky2_2.py,
# pipeline_hunyuanimage.py, pipeline_wan.py, pipeline_qwenimage.py, pipeline_hunyuan_video.py, pipeline_cogvideox.py.
USES = {
    "AutoencoderDC": Use("encoder_block_out_channels", _by_factor, has_posterior=False),
    "AsymmetricAutoencoderKL": Use("down_block_out_channels", _by_factor),
    "VQModel": Use("block_out_channels", _of_vq, has_posterior=False),
    "AutoencoderKLHunyuanImage": Use("spatial_compression_ratio", _by_factor),
    "AutoencoderKLWan": Use("scale_factor_spatial", _by_channel, is_video=True),
    "AutoencoderKLQwenImage": Use("dim_mult", _by_channel, is_video=True),
    "AutoencoderKLHunyuanVideo": Use("spatial_compression_ratio", _by_factor, is_video=True),
    "AutoencoderKLCogVideoX": Use("block_out_channels", _by_factor, is_video=True),
}
STOCK_KINDS: dict[str, type[nn.Module]] = {name: getattr(autoencoders, name) for name in USES}


class StockAutoencoder(nn.Module):
    """An autoencoder of one of the classes in `USES`.

    Args:
        network: the instance of diffusers' class.

    Attributes:
        config: the network's, with these keys of AutoencoderKL in addition: `in_channels`, `out_channels` and
            `latent_channels` (of images in, images out and latents), `scaling_factor`, `shift_factor` (None),
            `latents_mean` and `latents_std`.
        spatial_compression_ratio: f, the number of image pixels along one side of a latent element.
        likelihood: what the decoder outputs: images.

    Raises:
        InputError: for another class, or when its config tells no compression ratio or no scaling.
    """

    config: Any  # diffusers' FrozenDict, with attribute access
    network: Any
    likelihood = "gaussian"

    def __init__(self, network: Any):
        super().__init__()
        self.class_name = type(network).__name__
        if self.class_name not in USES:
            raise InputError(f"got an {self.class_name}; need one of {', '.join(USES)}")
        self.use = USES[self.class_name]
        self.network = network
        config: dict[str, Any] = dict(network.config)
        self.spatial_compression_ratio = ratio_of(config, self.use)
        channels: int = config["in_channels" if "in_channels" in config else "input_channels"]
        patch = config.get("patch_size") or 1  # Wan 2.2's channels are those of patches of pixels
        latents = config["latent_channels" if "latent_channels" in config else "z_dim"]
        if self.class_name == "VQModel":
            latents = config["vq_embed_dim"] or latents
        scaling = self.use.scaling(config)
        if not scaling["scaling_factor"]:
            raise InputError(
                f"the config of this {self.class_name} has scaling_factor {scaling['scaling_factor']}; need the number "
                "by which its pipelines multiply latents; give it as config= (sdvae encode: --vae_config FILE.json)"
            )
        self.config = FrozenDict(
            {
                **config,
                "in_channels": channels // patch**2,
                "out_channels": config.get("out_channels", channels) // patch**2,
                "latent_channels": latents,
                "shift_factor": None,
                **scaling,
            }
        )

    @property
    def encoder(self) -> nn.Module:
        """The network's encoder."""
        return self.network.encoder

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def encode(self, x: Tensor) -> AutoencoderKLOutput:
        """Images to the posterior over their latents.

        Args:
            x: (B, in_channels, H, W) float in [-1, 1]; H and W multiples of `spatial_compression_ratio`.

        Returns:
            `.latent_dist`, over unscaled latents (B, latent_channels, H/f, W/f). It is a single point
            (`deterministic`) if the encoder predicts no variance.

        Raises:
            InputError: when the network gives latents of another shape, so that its config is wrong.
        """
        encoded = self.network.encode(x[:, :, None] if self.use.is_video else x, return_dict=False)[0]
        found = encoded.parameters if self.use.has_posterior else encoded
        found = self._image(found)
        posterior = DiagonalGaussian(found) if self.use.has_posterior else DiagonalGaussian.point(found)
        f = self.spatial_compression_ratio
        want = (self.config.latent_channels, math.ceil(x.shape[2] / f), math.ceil(x.shape[3] / f))
        if posterior.mean.shape[1:] != want:
            raise InputError(
                f"this {self.class_name} gives latents of shape {tuple(posterior.mean.shape[1:])}, and by its config "
                f"they have {want}; need the config of these weights; correct config.json"
            )
        return AutoencoderKLOutput(latent_dist=posterior)

    def decode(self, z: Tensor) -> DecoderOutput:
        """Unscaled latents to images.

        A VQ model looks latents up in its codebook first, except MoVQ, as in its pipelines.

        Args:
            z: (B, latent_channels, h, w) float.

        Returns:
            `.sample`, (B, out_channels, f·h, f·w), nominally in [-1, 1].
        """
        given = {"force_not_quantize": True} if self.class_name == "VQModel" and is_movq(self.config) else {}
        decoded = self.network.decode(z[:, :, None] if self.use.is_video else z, return_dict=False, **given)[0]
        return DecoderOutput(sample=self._image(decoded))

    def _image(self, x: Tensor) -> Tensor:
        """The only frame of a video (B, C, 1, h, w), or an image as it is: (B, C, h, w)."""
        if not self.use.is_video:
            return x
        if x.shape[2] != 1:
            raise InputError(f"this {self.class_name} makes {x.shape[2]} frames of one; it cannot be used for images")
        return x.squeeze(2)


def ratio_of(config: Mapping[str, Any], use: Use) -> int:
    """The compression ratio of the sides.

    Args:
        config: of a network.
        use: of its class.
    """
    value = config[use.levels]
    return value if isinstance(value, int) else 2 ** (len(value) - 1)
