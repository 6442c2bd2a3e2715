"""Radially averaged power spectra: which scales of an image the VAE loses or invents."""

from __future__ import annotations

import torch
from torch import Tensor


def radial_power(images: Tensor) -> Tensor:
    """Power at 1, 2, …, N/2 cycles an image side, averaged over direction.

    The periodogram of the channels' mean under a Hann window (Welch 1967), without which the jump from one border
    to the opposite one would lay a cross over the spectrum; the window's own mean goes first, so that nothing of
    frequency zero leaks into the first rings. A ring takes the frequencies whose radius rounds to its number.

    Args: images: (B, C, N, N), in any range; power is in its square, a pixel of white noise has its variance.

    Returns: (B, N // 2) float64, on the CPU.
    """
    grey = images.detach().cpu().double().mean(dim=1)  # (B, N, N); in this order: MPS has no float64
    side = grey.shape[-1]
    hann = torch.hann_window(side, periodic=True, dtype=torch.float64)
    window = hann[:, None] * hann
    grey = grey - (grey * window).sum(dim=(1, 2), keepdim=True) / window.sum()
    power = torch.fft.fft2(grey * window).abs().square() / window.square().sum()  # (B, N, N)
    frequency = torch.fft.fftfreq(side, d=1 / side, dtype=torch.float64)  # 0, 1, …, -1 cycles a side
    ring = torch.hypot(frequency[:, None], frequency).round().long().flatten()  # (N²,)
    sums = torch.zeros(len(grey), int(ring.max()) + 1, dtype=torch.float64).index_add_(1, ring, power.flatten(1))
    return (sums / ring.bincount())[:, 1 : side // 2 + 1]
