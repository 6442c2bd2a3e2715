"""LPIPS, the learned perceptual distance, as a metric and as a loss.

Zhang et al. 2018, «The Unreasonable Effectiveness of Deep Features as a Perceptual Metric»: the distance is
a weighted sum of squared differences between unit-normalised features of an ImageNet trunk. The network and
its linear heads come from the `lpips` package. This module loads the trunk's weights and keeps the network frozen, in
evaluation mode and in fp32.
"""

from __future__ import annotations

import logging
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lpips
import torch
import torchvision
from torch import Tensor, nn

from sdvae.errors import InputError
from sdvae.weights.read import read_weights

logger = logging.getLogger(__name__)

TORCHVISION_WEIGHTS = {
    "vgg": torchvision.models.VGG16_Weights.IMAGENET1K_V1,
    "alex": torchvision.models.AlexNet_Weights.IMAGENET1K_V1,
    "squeeze": torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1,
}
DOWNLOAD_TIMEOUT_SECONDS = 20.0
RANDOM_TRUNK_SEED = 0  # a random trunk is the same in every run and on every process


class Perceptual(nn.Module):
    """LPIPS of two batches of images. Its weights are frozen and it stays in evaluation mode.

    Build it with `load_perceptual`.

    Attributes:
        name: the name in tables and logs: «lpips_vgg»; «lpips_vgg_random» for a random trunk, whose values cannot be
            compared with published ones; «lpips_vgg_uniform» for uniform heads.
    """

    def __init__(self, network: lpips.LPIPS, name: str):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name = name

    def train(self, mode: bool = True) -> Perceptual:
        """Stay in evaluation mode: in training mode the heads' dropout would make the distance random."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """The distance between each pair of images, computed in fp32 even under autocast.

        Grey images are repeated to three channels. If images have neither 1 nor 3 channels, each channel counts as a
        grey image, and the distances of the channels are averaged.

        Args:
            reconstruction: (B, C, H, W) in [-1, 1].
            images: the same shape.

        Returns:
            (B,) in fp32.
        """
        channels = images.shape[1]
        with torch.autocast(images.device.type, enabled=False):
            a, b = (_as_rgb(x.float()) for x in (reconstruction, images))
            distances = self.network(a, b).flatten()  # (B,), or (B·C,) if each channel is an image
        return distances if channels in (1, 3) else distances.view(-1, channels).mean(dim=1)


def _as_rgb(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    if channels == 3:
        return x
    return x.reshape(batch * channels, 1, height, width).expand(-1, 3, -1, -1)


def load_perceptual(
    net: str = "vgg", weights: str | Path | None = None, heads: str = "lpips", allow_random: bool = False
) -> Perceptual:
    """LPIPS with its trunk's weights from a local file, from torchvision's download, or (if allowed) random.

    Args:
        net: "vgg", "alex" or "squeeze".
        weights: file with the trunk in torchvision's names; None downloads it, or uses torch hub's cache.
        heads: "lpips" for the published linear heads, "uniform" to weight all features equally.
        allow_random: whether a failed download leads to a warning and a random trunk with uniform heads.

    Returns:
        The network, frozen, on the CPU.

    Raises:
        InputError: for an unknown `net`, a file that does not fit, or when the download fails and a random trunk is
            not allowed.
    """
    if net not in TORCHVISION_WEIGHTS:
        raise InputError(f"got perceptual net {net!r}; need one of {', '.join(TORCHVISION_WEIGHTS)}")
    trunk: dict[str, Tensor] | None
    if weights is not None:
        trunk, origin = read_weights(Path(weights), _trunk_keys), str(weights)
    else:
        trunk, origin = _download_trunk(net, allow_random), "torchvision"
    if trunk is None:
        heads = "uniform"  # the published heads are fitted to trained features

    network = _build(net, heads)
    if trunk is not None:
        _load_trunk(network.net, trunk, net, origin)
    name = f"lpips_{net}" + ("_random" if trunk is None else "_uniform" if heads == "uniform" else "")
    return Perceptual(network, name)


def perceptual_if_any(net: str, weights: str | None, heads: str) -> Perceptual | None:
    """LPIPS, or None if it is not wanted or its weights cannot be downloaded.

    Args:
        net: "none", or a `net` of `load_perceptual`.
        weights: see `load_perceptual`.
        heads: see `load_perceptual`.

    Returns:
        None for "none", and, with a warning, when `weights` is None and the download fails.

    Raises:
        InputError: as `load_perceptual` does, when `weights` names a file.
    """
    if net == "none":
        return None
    try:
        return load_perceptual(net, weights, heads)
    except InputError as error:
        if weights is not None:
            raise
        logger.warning("LPIPS is left out: %s; --lpips_weights FILE takes a local file", str(error).split(";")[0])
        return None


def _trunk_keys(keys: list[str]) -> dict[str, str]:
    """The names of the convolutional part of a whole classifier, unchanged."""
    return {key: key for key in keys if key.startswith("features.")}


def _build(net: str, heads: str) -> lpips.LPIPS:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # lpips 0.1.4 uses torchvision's deprecated argument `pretrained`
        warnings.filterwarnings(
            "ignore", message=".*'pretrained' is deprecated.*|.*weight enum.*", category=UserWarning
        )
        torch.manual_seed(RANDOM_TRUNK_SEED)
        return lpips.LPIPS(net=net, lpips=heads == "lpips", pnet_rand=True, verbose=False)


def _download_trunk(net: str, allow_random: bool) -> dict[str, Tensor] | None:
    """The trunk's state dict; None when the download fails and a random trunk is allowed."""
    try:
        return download_weights(TORCHVISION_WEIGHTS[net])
    except OSError as error:
        reason = f"no ImageNet weights for LPIPS's {net} trunk: the download failed ({error})"
        if not allow_random:
            raise InputError(
                f"{reason}; give a local file with loss.perceptual.weights=FILE, "
                "or set loss.lpips_weight=0 or loss.perceptual.allow_random=true"
            ) from error
        logger.warning("%s; using a RANDOM trunk: its values cannot be compared with published LPIPS", reason)
        return None


def download_weights(published: Any) -> dict[str, Tensor]:
    """The state dict of a network of torchvision, from its download or from torch hub's cache.

    Args:
        published: an entry of torchvision's enumeration of the network's weights.

    Raises:
        OSError: when there is no network, or when what came has the wrong hash.
    """
    try:
        with download_timeout():
            return published.get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
    except RuntimeError as error:
        if "hash" not in str(error):
            raise
        raise OSError(str(error)) from error


@contextmanager
def download_timeout() -> Iterator[None]:
    """Give up on a silent network after DOWNLOAD_TIMEOUT_SECONDS.

    torch hub, which downloads the weights, has no timeout and no argument for one. So this sets the default of all new
    sockets of the process, in all threads, until the block ends.
    """
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(timeout)


def _load_trunk(trunk: nn.Module, tensors: dict[str, Tensor], net: str, origin: str) -> None:
    """Load torchvision's weights `features.3.…` into lpips's layer `sliceK.3.…`, which is the same layer.

    Raises:
        InputError: for missing tensors, or tensors of the wrong shape.
    """
    expected = trunk.state_dict()
    found = {key: tensors.get("features." + key.split(".", 1)[1]) for key in expected}
    missing = [key for key, tensor in found.items() if tensor is None]
    wrong = [key for key, tensor in found.items() if tensor is not None and tensor.shape != expected[key].shape]
    if missing or wrong:
        example = (missing + wrong)[0].split(".", 1)[1]
        raise InputError(
            f"{origin} is not the trunk {net}: {len(missing)} of {len(expected)} tensors missing, {len(wrong)} of the "
            f"wrong shape (features.{example}); need torchvision's {type(TORCHVISION_WEIGHTS[net]).__name__[:-8]} names"
        )
    trunk.load_state_dict(found)
