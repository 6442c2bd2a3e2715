"""Distances between the features of originals and of reconstructions: rFID, rFDD and CMMD.

Import this module only where one of them is wanted: it needs torch-fidelity, which comes with the extra `sdvae[fid]`.

`ReconstructionFID`   Fréchet distance of Inception's features, as in published tables
`ReconstructionFDD`   Fréchet distance of DINOv2's features, which agrees better with human judgement than FID
                      (Stein et al. 2023, «Exposing flaws of generative model evaluation metrics», arXiv 2306.04675)
`ReconstructionMMD`   maximum mean discrepancy of CLIP's features, which assumes no Gaussian and has less bias with few
                      images (Jayasumana et al. 2024, «Rethinking FID», arXiv 2401.09603)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from sdvae.errors import InputError, one_line, require
from sdvae.metrics.perceptual import download_timeout
from sdvae.weights.read import read_weights

FEATURES = 2048  # width of Inception's last pooling; with fewer images the covariance does not have full rank
INCEPTION_FILE = "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
CLIP = "clip-vit-l-14-336px"  # the one of CMMD
DINOV2_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
MMD_SIGMA = 10.0  # width of the kernel; Jayasumana et al. 2024, section 4
MMD_SCALE = 1000.0  # the same: makes the numbers easy to read
CHUNK = 1024  # rows of the kernel's matrix that are held at a time


class FrechetDistance:
    """Heusel et al. 2017, eq. 6: |μ - μ'|² + tr(Σ + Σ' - 2(ΣΣ')^½), of originals and reconstructions.

    The originals' features are computed once for all VAEs.

    Args:
        network: (B, 3, H, W) uint8 -> (B, features).
        features: number of features.
        device: where the features are computed.
    """

    def __init__(self, network: nn.Module, features: int, device: torch.device):
        network.num_features = features  # type: ignore[assignment]
        self.features = features
        self._metric = FrechetInceptionDistance(network, reset_real_features=False).to(device)
        # The first update would set this, but a process without images has no update.
        self._metric.orig_dtype = torch.float32

    def add(self, images: Tensor, real: bool) -> None:
        """Count a batch of images.

        Args:
            images: (B, C, H, W) in [-1, 1], rounded to 8 bits here. Grey images are repeated to three channels.
            real: whether they are originals or reconstructions.
        """
        self._metric.update(_pixels(images), real=real)

    def compute(self) -> float:
        """The distance for the reconstructions of all processes since the last call."""
        value = float(self._metric.compute())
        self._metric.reset()
        return value


class ReconstructionFID(FrechetDistance):
    """The Fréchet distance of the features of Inception's last pooling.

    The Inception network and its resizing are torch-fidelity's, which follow the original TensorFlow code.
    torchmetrics' own resizing has antialiasing and gives other values.

    Args:
        weights: torch-fidelity's file of Inception weights; None downloads it.
        device: where the features are computed.

    Raises:
        InputError: when torch-fidelity is not installed, or when the weights cannot be downloaded or do not fit.
    """

    def __init__(self, weights: str | None, device: torch.device):
        require("torch_fidelity", "rFID", "fid")
        if weights is not None:
            read_weights(Path(weights))  # raises for other kinds of files
        with _loading("Inception", "rFID", ("inception", "fid"), weights, INCEPTION_FILE):
            network = NoTrainInceptionV3("inception-v3-compat", [str(FEATURES)], weights, antialias=False)
        super().__init__(network, FEATURES, device)


class ReconstructionFDD(FrechetDistance):
    """The Fréchet distance of the features of DINOv2's class token.

    The images are resized and normalised as torch-fidelity's `dinov2-vit-l-14` does. Its network comes by torch hub,
    with code, and takes no local file; so this one is `sdvae.metrics.dinov2`, which reads the same weights.

    Args:
        weights: file with the weights of DINOv2's ViT-S/14, ViT-B/14 or ViT-L/14 under their published names; None
            downloads ViT-L/14, that of published tables.
        device: where the features are computed.

    Raises:
        InputError: as `ReconstructionFID` does.
    """

    def __init__(self, weights: str | None, device: torch.device):
        require("torch_fidelity", "rFDD", "fid")
        from sdvae.metrics.dinov2 import DinoV2

        with _loading("DINOv2", "rFDD", ("dinov2", "fdd"), weights, "dinov2_vitl14_pretrain.pth"):
            if weights is None:
                network = DinoV2(torch.hub.load_state_dict_from_url(DINOV2_URL, map_location="cpu", weights_only=True))
            else:
                network = DinoV2(read_weights(Path(weights)))
        super().__init__(network, network.width, device)


def frechet_distances(
    fid: bool, inception: str | None, fdd: bool, dinov2: str | None, device: torch.device
) -> dict[str, FrechetDistance]:
    """`rfid` and `rfdd`, those that are wanted.

    Args:
        fid: whether rFID is wanted.
        inception: see `ReconstructionFID`.
        fdd: whether rFDD is wanted.
        dinov2: see `ReconstructionFDD`.
        device: where the features are computed.

    Raises:
        InputError: as the two classes do.
    """
    distances: dict[str, FrechetDistance] = {}
    if fid:
        distances["rfid"] = ReconstructionFID(inception, device)
    if fdd:
        distances["rfdd"] = ReconstructionFDD(dinov2, device)
    return distances


class ReconstructionMMD:
    """Jayasumana et al. 2024, «CMMD»: the squared maximum mean discrepancy of CLIP's image embeddings, times 1000.

    E k(x, x') + E k(y, y') - 2 E k(x, y) with the kernel exp(-|x - y|² / (2·10²)) of embeddings of length 1, over all
    pairs, those of an image with itself included (Gretton et al. 2012, eq. 5). CLIP is torch-fidelity's, which resizes
    images bilinearly; the published code resizes bicubically, so the values are near but not equal to published ones.

    Args:
        weights: OpenAI's TorchScript file of a CLIP model; None downloads ViT-L/14@336px, that of published tables.
        device: where the features are computed.

    Raises:
        InputError: as `ReconstructionFID` does.
    """

    def __init__(self, weights: str | None, device: torch.device):
        require("torch_fidelity", "CMMD", "fid")
        from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

        if weights is not None and not Path(weights).is_file():
            raise InputError(f"got clip={weights}, which is no file; need OpenAI's ViT-L-14-336px.pt; see --clip")
        with _loading("CLIP", "CMMD", ("clip", "cmmd"), weights, "OpenAI's ViT-L-14-336px.pt"):
            network = FeatureExtractorCLIP(CLIP, ["clip"], weights, verbose=False)
        self._network: Callable[[Tensor], tuple[Tensor]] = network.to(device).eval()
        self._real: list[Tensor] = []
        self._fake: list[Tensor] = []

    @torch.inference_mode()
    def add(self, images: Tensor, real: bool) -> None:
        """Count a batch of images; see `FrechetDistance.add`."""
        (features,) = self._network(_pixels(images))
        unit = nn.functional.normalize(features.double().cpu(), dim=1)
        (self._real if real else self._fake).append(unit)

    def compute(self) -> float:
        """The distance for the reconstructions of all processes since the last call."""
        real, fake = (torch.cat(gather_object(part)) for part in (self._real, self._fake))
        self._fake = []
        return MMD_SCALE * (_mean_kernel(real, real) + _mean_kernel(fake, fake) - 2 * _mean_kernel(real, fake))


def _mean_kernel(x: Tensor, y: Tensor) -> float:
    """The mean of exp(-|x - y|² / (2σ²)) over all pairs of rows, which have length 1: |x - y|² = 2 - 2 x·y."""
    total = sum(float(torch.exp((part @ y.T - 1) / MMD_SIGMA**2).sum()) for part in x.split(CHUNK))
    return total / (len(x) * len(y))


def _pixels(images: Tensor) -> Tensor:
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.expand(-1, 3, -1, -1)


@contextmanager
def _loading(network: str, figure: str, options: tuple[str, str], weights: str | None, file: str) -> Iterator[None]:
    """Say what is missing when weights cannot be downloaded or do not fit.

    Args:
        network: its name.
        figure: what it is for.
        options: the one that takes a file of weights, and the one that wants the figure.
        weights: the file; None for a download.
        file: what file is needed.
    """
    try:
        with download_timeout():
            yield
    except (URLError, TimeoutError) as error:
        raise InputError(
            f"no {network} weights for {figure}: the download failed ({error}); give a local file with {options[0]}, "
            f"or leave out {options[1]}"
        ) from error
    except RuntimeError as error:  # raised by load_state_dict, and by torch.jit.load
        raise InputError(
            f"{weights or 'the download'} does not hold {network}'s weights: {one_line(error)[:200]}; need {file}"
        ) from error
