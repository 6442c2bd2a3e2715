"""rFID: the Fréchet distance between the Inception features of originals and of their reconstructions.

Import this module only where rFID is wanted: it needs torch-fidelity, which comes with the extra `sdvae[fid]`.
"""

from __future__ import annotations

from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3

from sdvae.errors import InputError, one_line, require
from sdvae.metrics.perceptual import download_timeout
from sdvae.weights.read import read_weights

FEATURES = 2048  # width of Inception's last pooling; with fewer images the covariance does not have full rank


class ReconstructionFID:
    """Heusel et al. 2017, eq. 6: |μ - μ'|² + tr(Σ + Σ' - 2(ΣΣ')^½), of originals and reconstructions.

    The Inception network and its resizing are torch-fidelity's, which follow the original TensorFlow code.
    torchmetrics' own resizing has antialiasing and gives other values. The originals' features are computed once for
    all VAEs.

    Args:
        weights: torch-fidelity's file of Inception weights; None downloads it.
        device: where the features are computed.

    Raises:
        InputError: when torch-fidelity is not installed, or when the weights cannot be downloaded or do not fit.
    """

    def __init__(self, weights: str | None, device: torch.device):
        require("torch_fidelity", "rFID", "fid")
        if weights is not None:
            read_weights(Path(weights), lambda keys: {key: key for key in keys})  # raises for other kinds of files
        try:
            with download_timeout():
                network = NoTrainInceptionV3("inception-v3-compat", [str(FEATURES)], weights, antialias=False)
        except (URLError, TimeoutError) as error:
            raise InputError(
                f"no Inception weights for rFID: the download failed ({error}); give a local file with --inception, or "
                "leave out --fid"
            ) from error
        except RuntimeError as error:  # raised by load_state_dict
            raise InputError(
                f"{weights or 'the download'} does not hold Inception's weights: {one_line(error)[:200]}; need "
                "torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
            ) from error
        network.num_features = FEATURES
        self._metric = FrechetInceptionDistance(network, reset_real_features=False).to(device)
        # The first update would set this, but a process without images has no update.
        self._metric.orig_dtype = torch.float32

    def add(self, images: Tensor, real: bool) -> None:
        """Count a batch of images.

        Args:
            images: (B, C, H, W) in [-1, 1], rounded to 8 bits here. Grey images are repeated to three channels.
            real: whether they are originals or reconstructions.
        """
        pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        self._metric.update(pixels.expand(-1, 3, -1, -1), real=real)

    def compute(self) -> float:
        """The distance for the reconstructions of all processes since the last call."""
        value = float(self._metric.compute())
        self._metric.reset()
        return value
