"""Radially averaged power spectra, which show the scales at which a VAE loses or invents detail."""

from __future__ import annotations

import torch
from torch import Tensor


def radial_power(images: Tensor) -> Tensor:
    """Power at 1, 2, …, N/2 cycles an image side, averaged over direction.

    This is the periodogram of the channels' mean under a Hann window (Welch 1967). Without the window, the jump from
    one border of the image to the opposite one would put a cross into the spectrum. The weighted mean is subtracted
    first, so that frequency zero does not leak into the first rings. Ring k averages the frequencies whose radius
    rounds to k.

    Args:
        images: (B, C, N, N), in any range. The power of white noise is its variance.

    Returns:
        (B, N // 2) float64, on the CPU.
    """
    grey = images.detach().cpu().double().mean(dim=1)  # (B, N, N); CPU first: MPS has no float64
    side = grey.shape[-1]
    hann = torch.hann_window(side, periodic=True, dtype=torch.float64)
    window = hann[:, None] * hann
    grey = grey - (grey * window).sum(dim=(1, 2), keepdim=True) / window.sum()
    power = torch.fft.fft2(grey * window).abs().square() / window.square().sum()  # (B, N, N)
    frequency = torch.fft.fftfreq(side, d=1 / side, dtype=torch.float64)  # 0, 1, …, -1 cycles a side
    ring = torch.hypot(frequency[:, None], frequency).round().long().flatten()  # (N²,)
    sums = torch.zeros(len(grey), int(ring.max()) + 1, dtype=torch.float64).index_add_(1, ring, power.flatten(1))
    return (sums / ring.bincount())[:, 1 : side // 2 + 1]
