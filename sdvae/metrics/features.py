"""Feature maps of a frozen network that was trained on other images: what a discriminator or a loss looks at.

ConvNeXt (Liu et al. 2022, arXiv 2201.03545) is torchvision's. Any vision transformer of the transformers library will
do too, such as DINO, DINOv2 and DINOv3: it is read from a folder, or from the Hugging Face hub.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from sdvae.alpha import colours
from sdvae.errors import InputError, one_line, require
from sdvae.io import HUB_ID
from sdvae.metrics.perceptual import download_weights
from sdvae.weights.read import misfits, read_weights

models = torchvision.models
CONVNEXTS: dict[str, tuple[Callable[..., nn.Module], Any]] = {
    "convnext_tiny": (models.convnext_tiny, models.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
    "convnext_small": (models.convnext_small, models.ConvNeXt_Small_Weights.IMAGENET1K_V1),
    "convnext_base": (models.convnext_base, models.ConvNeXt_Base_Weights.IMAGENET1K_V1),
}
STAGES = (1, 3, 5, 7)  # the places of ConvNeXt's four stages among its layers
DEPTHS = (0.25, 0.5, 0.75, 1.0)  # of a transformer: after these parts of its blocks
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(nn.Module):
    """Feature maps of images, from four depths of a frozen network. Build it with `load_features`.

    The network stays in evaluation mode, and gets no gradients itself; they pass through it to the images.

    Attributes:
        name: the name of the network.
        widths: channels of the four maps.
        multiple: sides are resized to a multiple of it, the size of a transformer's patches; 1 for ConvNeXt.
        smallest_side: the smallest side in pixels that gives a map of one position in each depth.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, name: str, widths: list[int], multiple: int = 1, smallest_side: int = 32):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.name, self.widths, self.multiple, self.smallest_side = name, widths, multiple, smallest_side
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Features:
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, C, H, W) in [-1, 1], grey, RGB, or RGB and alpha, which is left out -> maps (B, widths[i], h_i, w_i)."""
        x = self._normalised(images)
        return self._of_transformer(x) if self.multiple > 1 else self._of_convnext(x)

    def last(self, images: Tensor) -> Tensor:
        """The last features of a transformer, after its last norm: (B, C, H, W) in [-1, 1] -> (B, width, h, w)."""
        x = self._normalised(images)
        height, width = (side // self.multiple for side in x.shape[2:])
        tokens = self.network(x, **self._positions()).last_hidden_state[:, -height * width :]
        return tokens.transpose(1, 2).unflatten(2, (height, width))

    def _normalised(self, images: Tensor) -> Tensor:
        """RGB images of ImageNet's mean and deviation, with sides that are multiples of a patch's."""
        x = ((colours(images) + 1) / 2).expand(-1, 3, -1, -1)
        x = (x - self.mean.to(x)) / self.std.to(x)
        sides = [max(1, round(side / self.multiple)) * self.multiple for side in x.shape[2:]]
        if tuple(sides) == tuple(x.shape[2:]):
            return x
        return F.interpolate(x, size=sides, mode="bilinear", antialias=True, align_corners=False)

    def _of_convnext(self, x: Tensor) -> list[Tensor]:
        maps = []
        for place, layer in enumerate(self.network.children()):
            x = layer(x)
            if place in STAGES:
                maps.append(x)
        return maps

    def _of_transformer(self, x: Tensor) -> list[Tensor]:
        height, width = (side // self.multiple for side in x.shape[2:])
        states = self.network(x, output_hidden_states=True, **self._positions()).hidden_states[1:]
        chosen = [states[math.ceil(depth * len(states)) - 1] for depth in DEPTHS]
        # the tokens of the image are the last ones, after those of the class and of registers
        return [tokens[:, -height * width :].transpose(1, 2).unflatten(2, (height, width)) for tokens in chosen]

    def _positions(self) -> dict[str, bool]:
        """ViT, the class of DINO, resizes its position embedding only on request; the others always do."""
        network: Any = self.network
        return {"interpolate_pos_encoding": True} if network.config.model_type == "vit" else {}


class FeatureDistance(nn.Module):
    """How far apart the feature maps of two images are: LPIPS without its heads, on another network.

    At each position of a map the vectors of features are divided by their norm; the distance is their squared
    difference, which is 2 - 2·cosine, averaged over positions and the four depths.

    Attributes:
        features: the frozen network.
        name: its name in the log.
    """

    def __init__(self, features: Features):
        super().__init__()
        self.features = features
        self.name = features.name

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """The distance between each pair of images, computed in fp32 even under autocast.

        Args:
            reconstruction: (B, C, H, W) in [-1, 1].
            images: the same shape.

        Returns:
            (B,) in fp32, from 0 to 4.
        """
        with torch.autocast(images.device.type, enabled=False):
            with torch.no_grad():
                wanted = self.features(images.float())
            pairs = zip(self.features(reconstruction.float()), wanted, strict=True)
            of_depths = [
                (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in pairs
            ]
        return torch.stack(of_depths).mean(dim=0)


def load_features(net: str, weights: str | None = None) -> Features:
    """A frozen network, on the CPU.

    Args:
        net: a key of CONVNEXTS; or a folder, or an id on the hub, of a vision transformer, such as
            facebook/dinov2-small.
        weights: for a ConvNeXt, a file in torchvision's names; None downloads it, or uses torch hub's cache.

    Raises:
        InputError: when the network is not known, or its weights cannot be loaded or do not fit.
    """
    return _convnext(net, weights) if net in CONVNEXTS else _transformer(net, weights)


def _convnext(net: str, weights: str | None) -> Features:
    build, published = CONVNEXTS[net]
    network: Any = build().features
    if weights is not None:
        found = read_weights(Path(weights), lambda keys: {key: key[9:] for key in keys if key.startswith("features.")})
    else:
        try:
            whole = download_weights(published)
        except OSError as error:
            raise InputError(
                f"no weights of {net}: the download failed ({one_line(error)}); give a local file with `weights`"
            ) from error
        found = {key[9:]: tensor for key, tensor in whole.items() if key.startswith("features.")}
    wrong = sum(misfits(network.state_dict(), found).values(), [])
    if wrong:
        raise InputError(
            f"{weights or 'the download'} is not {net}: {len(wrong)} weights are missing, unknown or of another shape, "
            f"such as features.{wrong[0]}; need torchvision's names"
        )
    network.load_state_dict(found)
    widths = [list(network.children())[place][-1].block[-2].out_features for place in STAGES]
    return Features(network, net, widths)


def _transformer(net: str, weights: str | None) -> Features:
    if weights is not None:
        raise InputError(f"got weights={weights} for {net}, which holds its own; need weights for a ConvNeXt alone")
    need = f"need one of {', '.join(CONVNEXTS)}, or a folder or hub id of a vision transformer"
    if not Path(net).is_dir() and not HUB_ID.fullmatch(net):  # the hub would be asked for it, again and again
        raise InputError(f"got {net} as a network for features, which is no folder and no owner/name; {need}")
    require("transformers", f"the features of {net}", "quickstart")
    from transformers import AutoModel

    try:
        network = AutoModel.from_pretrained(net)
    except (OSError, ValueError) as error:
        raise InputError(f"got {net} as a network for features ({one_line(error)[:200]}); {need}") from error
    patch, width = (getattr(network.config, key, None) for key in ("patch_size", "hidden_size"))
    if not isinstance(patch, int) or not isinstance(width, int):
        raise InputError(f"got {net}, a {type(network).__name__}; need a vision transformer, such as DINOv2")
    return Features(network, Path(net).name, [width] * len(DEPTHS), patch, patch)
