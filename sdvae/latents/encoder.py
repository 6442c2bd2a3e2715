"""The encoder of a VAE on a device, from pixels to posterior moments. What overflows is computed again in fp32."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.model import AnyAutoencoder, DiagonalGaussian, StockAutoencoder
from sdvae.model.kinds import class_name, has_posterior
from sdvae.model.state import sha256_of_weights
from sdvae.roundtrip import encode_images
from sdvae.runtime import DTYPES, accelerator_type, resolve_precision
from sdvae.weights import load_autoencoder

logger = logging.getLogger(__name__)


@dataclass
class PendingMoments:
    """A batch whose computation was started; the device may still be computing it.

    Attributes:
        pixels: (B, H, W, C) uint8, the input.
    """

    pixels: Tensor
    _moments: Tensor  # (V, B, 2·latent_channels, h, w); V = 2 views if the mirror image is encoded too, else 1
    _ready: torch.cuda.Event | None

    def moments(self) -> Tensor:
        """Wait for the device.

        Returns:
            (V, B, 2·latent_channels, h, w) in fp32 on the CPU.
        """
        if self._ready is not None:
            self._ready.synchronize()
        return self._moments.float()


class MomentEncoder:
    """The encoder of a VAE, in the precision and memory format in which it runs. Threads may share it.

    Args:
        vae: a VAE on the CPU, which is not changed. Its encoder is copied, its decoder is not.
        device: the device to compute on.
        precision: «fp32», «bf16» or «fp16».
        mirror: also encode the left-right mirror image.
    """

    def __init__(self, vae: AnyAutoencoder, device: torch.device, precision: str, mirror: bool):
        encoder = without_decoder(vae)
        self._vae = _copied(encoder, DTYPES[precision], device)
        self._device = device
        self._mirror = mirror
        # Each computation uses all cores and much memory. On a CPU a second one at the same time keeps the cores busy
        # while the first is in a part that uses one core: through Ray this gave 10 % more images/s on two cores.
        self._turns = threading.Semaphore(1 if device.type == "cuda" else 2)
        self._copying = threading.Lock()
        # For retries in fp32: a model in fp32, or, until one is needed, a model that shares its weights with `vae`.
        self._in_fp32 = self._vae if precision == "fp32" else None
        self._original = None if precision == "fp32" else encoder

    @torch.inference_mode()
    def launch(self, pixels: Sequence[np.ndarray]) -> PendingMoments:
        """Start encoding (H, W, C) uint8 images of one size. On a GPU this returns before they are computed."""
        batch = torch.from_numpy(np.stack(pixels))
        with self._turns:
            if self._device.type != "cuda":
                return PendingMoments(batch, self._encode(self._vae, batch).cpu(), None)
            moments = self._encode(self._vae, batch.pin_memory())
            on_cpu = torch.empty(moments.shape, dtype=moments.dtype, pin_memory=True)
            on_cpu.copy_(moments, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
            return PendingMoments(batch, on_cpu, ready)

    @torch.inference_mode()
    def again(self, pixels: Tensor) -> Tensor:
        """Encode images in fp32 whose moments were not finite before.

        Args:
            pixels: (B, H, W, C) uint8.

        Returns:
            (V, B, 2·latent_channels, h, w) on the CPU.
        """
        with self._copying:
            if self._in_fp32 is None:
                assert self._original is not None
                self._in_fp32, self._original = _copied(self._original, torch.float32, self._device), None
        with self._turns:
            return self._encode(self._in_fp32, pixels).cpu()

    def _encode(self, vae: AnyAutoencoder, pixels: Tensor) -> Tensor:
        # Copying uint8 takes a quarter of the bytes of fp32, so values are scaled on the device, as in `to_tensor`.
        x = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)
        x = x.contiguous() if next(vae.encoder.parameters()).is_contiguous() else x
        views = [x, x.flip(3)] if self._mirror else [x]
        return torch.stack([encode_images(vae, view.to(vae.dtype)).parameters for view in views])


class LatentEncoder:
    """Batches of images to posteriors, as a callable for a pipeline of your own: Ray Data, Spark, or a loop.

        dataset.map_batches(LatentEncoder, fn_constructor_kwargs={"vae": "runs/quickstart/model"}, batch_size=32, …)

    The VAE is opened at the first call, and is left out when the object is pickled.

    Args:
        vae: a folder, file or hub id, as `load_autoencoder` takes; by default the small VAE in this package.
        subfolder: the folder inside `vae` that holds the VAE.
        vae_config: a config.json whose keys replace those of the VAE.
        dtype: «fp16» or «fp32», the dtype of the result.
        precision: «auto», «fp32», «bf16» or «fp16», that of the computation. auto: bf16 if the hardware computes in
            it, else fp32.
        device: such as «cpu» or «cuda»; by default the accelerator if there is one.
    """

    def __init__(
        self,
        vae: str | None = None,
        *,
        subfolder: str | None = None,
        vae_config: str | None = None,
        dtype: str = "fp16",
        precision: str = "auto",
        device: str | None = None,
    ):
        if dtype not in ("fp16", "fp32"):
            raise InputError(f"got dtype={dtype}; need fp16 or fp32, since NumPy has no other")
        if precision not in ("auto", *DTYPES):
            raise InputError(f"got precision={precision}; need one of auto, {', '.join(DTYPES)}")
        self._vae = {"source": vae, "subfolder": subfolder, "config": vae_config}
        self._dtype, self._precision, self._device = dtype, precision, device
        self._opened: tuple[AnyAutoencoder, MomentEncoder] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Encode a batch.

        Args:
            batch: `image`: (B, H, W, 3) uint8, sRGB, with H and W multiples of the VAE's compression ratio. One
                channel instead of three if the VAE has one. Other columns may be there.

        Returns:
            `mean` and `logvar`: (B, C, h, w), unscaled; and the other columns as they were. A student, whose encoder
            predicts no variance, gives `mean` alone. Images whose result is not
            finite in `dtype` are computed again in fp32; what is not finite even then is a warning, and is left so.

        Raises:
            InputError: when the images have another dtype or shape.
        """
        if self._opened is None:
            loaded = load_autoencoder(**self._vae, dtype="file")
            device = choose_device(self._device)
            self._opened = loaded, MomentEncoder(loaded, device, choose_precision(self._precision, device), False)
        vae, encoder = self._opened
        images = np.asarray(batch["image"])
        channels, ratio = vae.config.in_channels, vae.spatial_compression_ratio
        if (
            images.dtype != np.uint8
            or images.ndim != 4
            or images.shape[3] != channels
            or any(side % ratio for side in images.shape[1:3])
        ):
            raise InputError(
                f"got images of shape {images.shape}, {images.dtype}; need (B, H, W, {channels}), uint8, with H and W "
                f"multiples of {ratio}; crop or pad them to one size"
            )
        others = {name: values for name, values in batch.items() if name != "image"}
        encoded = self._encoded(encoder, images)
        return {**others, **(encoded if has_posterior(vae) else {"mean": encoded["mean"]})}

    def _encoded(self, encoder: MomentEncoder, images: np.ndarray) -> dict[str, np.ndarray]:
        pending = encoder.launch(list(images))
        values = _in_dtype(pending.moments()[0], DTYPES[self._dtype])  # (2, B, C, h, w)
        bad = ~values.isfinite().flatten(2).all(2).all(0)
        if bad.any():
            values[:, bad] = _in_dtype(encoder.again(pending.pixels[bad])[0], DTYPES[self._dtype])
            left = int((~values.isfinite().flatten(2).all(2).all(0)).sum())
            if left:
                logger.warning("the latents of %d of %d images are not finite as %s", left, len(bad), self._dtype)
        return {"mean": values[0].numpy(), "logvar": values[1].numpy()}


def _in_dtype(moments: Tensor, dtype: torch.dtype) -> Tensor:
    """Mean and log-variance, (2, B, C, h, w), from moments (B, 2C, h, w)."""
    posterior = DiagonalGaussian(moments)
    return torch.stack([posterior.mean, posterior.logvar]).to(dtype)


def without_decoder(vae: Any) -> Any:
    """A second model that shares the parameters of `vae` and has no decoder."""
    if isinstance(vae, StockAutoencoder):
        return StockAutoencoder(without_decoder(vae.network))
    encoder = copy.copy(vae)
    encoder._modules = {**vae._modules, "decoder": nn.Identity()}
    return encoder


def _copied(vae: AnyAutoencoder, dtype: torch.dtype, device: torch.device) -> AnyAutoencoder:
    """A copy in evaluation mode; of this package's own classes with the layout and the kernels that encode fastest."""
    copied = copy.deepcopy(vae).eval()
    nn.Module.to(copied, device, dtype)  # diffusers' own `to` warns about half precision
    if isinstance(copied, StockAutoencoder):
        return copied
    if device.type == "cpu":
        from sdvae.kernels.speed import speed_up

        speed_up(copied)
    else:
        nn.Module.to(copied, memory_format=torch.channels_last)
    return copied


def encoder_sha256(vae: AnyAutoencoder) -> str:
    """A hash of name, dtype, shape and bytes of every weight that latents depend on, so not of the decoder's."""
    weights = (vae.network if isinstance(vae, StockAutoencoder) else vae).state_dict().items()
    return sha256_of_weights({name: weight for name, weight in weights if name.startswith(("encoder.", "quant_conv."))})


def encoder_identity(vae: AnyAutoencoder) -> dict[str, Any]:
    """What determines the latents of an image, except for rounding: the weights, and what they do not determine."""
    beside_weights = ("norm_num_groups", "act_fn", "padding_mode")
    network = {key: vae.config[key] for key in beside_weights if key in vae.config}
    if isinstance(vae, StockAutoencoder):  # this package's own classes can be told by their weights
        network["class"] = class_name(vae)
    return {"encoder_sha256": encoder_sha256(vae), **network}


def choose_device(name: str | None) -> torch.device:
    """The device of that name; by default the accelerator of this process's local rank, or the CPU if there is none.

    Raises:
        InputError: for a device that does not exist.
    """
    if name is None:
        kind = accelerator_type()
        if kind is None:
            return torch.device("cpu")
        return torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) % torch.accelerator.device_count())
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"got device {name!r}, which is not there ({str(error).splitlines()[0]}); try cpu") from error
    return device


def choose_precision(requested: str, device: torch.device) -> str:
    """The precision of the encoder: «auto» is bf16 if the device computes in it, else fp32.

    Raises:
        InputError: for fp16 on a CPU.
    """
    if requested == "fp32":
        return "fp32"
    resolved = resolve_precision(requested, device.type)
    return "fp32" if resolved == "no" else resolved
