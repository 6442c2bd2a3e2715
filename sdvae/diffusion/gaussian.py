"""The best linear denoiser of latents at each frequency, which knows their spectrum and nothing else.

For Gaussian latents whose statistics are the same at every position it is the best denoiser of all: the Wiener filter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_basis(size: int) -> Tensor:
    """(N, N) float64: the orthonormal cosine transform (DCT-II), a frequency in each row.

    It treats an image as if mirrored at its borders, so opposite borders do not meet.
    """
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    basis = math.sqrt(2 / size) * torch.cos(math.pi * k * (2 * n + 1) / (2 * size))
    basis[0] /= math.sqrt(2)
    return basis


class GaussianDenoiser:
    """E[z | α z + σ ε] for a Gaussian z with the mean and the spectrum of a set of latents.

    The latents' cosine transform has at each frequency a covariance between channels, S, a C×C matrix. Here it depends
    on the distance from frequency zero alone, in steps of one half cycle an image side. The mean depends on the channel
    alone. Then at each frequency E[ẑ | ẑ_t] = mean + αS(α²S + σ²I)⁻¹(ẑ_t - α mean), since white noise has the
    covariance I in every orthonormal basis.

    Args:
        latents: (N, C, h, w), from which mean and spectrum are taken.

    Attributes:
        mean: (C,) float64.
        covariance: (rings, C, C) float64, S of each ring.
        ring: (h, w) int64, the ring of each frequency.
    """

    def __init__(self, latents: Tensor):
        height, width = latents.shape[2:]
        self._rows, self._columns = cosine_basis(height), cosine_basis(width)
        self.mean = latents.double().mean(dim=(0, 2, 3)).cpu()
        self.ring = torch.hypot(torch.arange(height)[:, None].double(), torch.arange(width).double()).round().long()
        channels, rings = len(self.mean), int(self.ring.max()) + 1
        sums = torch.zeros(rings, channels, channels, dtype=torch.float64)
        for part in latents.split(64):
            z = self._transform(part)
            products = torch.einsum("bchw,bdhw->hwcd", z, z)
            sums.index_add_(0, self.ring.flatten(), products.flatten(0, 1))
        self.covariance = sums / (len(latents) * self.ring.flatten().bincount()[:, None, None])

    def __call__(self, noisy: Tensor, alpha: float, sigma: float) -> Tensor:
        """Denoise α z + σ ε.

        Args:
            noisy: (B, C, h, w).
            alpha: factor of the latents.
            sigma: standard deviation of the noise, above 0.

        Returns:
            (B, C, h, w) in the dtype of `noisy` and on its device.
        """
        filters = self._filters(alpha, sigma)[self.ring]  # (h, w, C, C)
        z = torch.einsum("hwcd,bdhw->bchw", filters, self._transform(noisy, alpha))
        return (self._rows.T @ z @ self._columns + self.mean[:, None, None]).to(noisy)

    def error(self, alpha: float, sigma: float) -> float:
        """The mean squared error of an element if the latents are Gaussian: tr(S - αS(α²S + σ²I)⁻¹αS)/C, averaged."""
        left = self.covariance - alpha * self._filters(alpha, sigma) @ self.covariance
        count = self.ring.flatten().bincount()
        return float((left.diagonal(dim1=1, dim2=2).mean(dim=1) * count).sum() / count.sum())

    def _filters(self, alpha: float, sigma: float) -> Tensor:
        """αS(α²S + σ²I)⁻¹ of each ring, (rings, C, C)."""
        noisy = alpha**2 * self.covariance + sigma**2 * torch.eye(len(self.mean), dtype=torch.float64)
        return alpha * torch.linalg.solve(noisy, self.covariance).mT  # both are symmetric

    def _transform(self, latents: Tensor, scale: float = 1.0) -> Tensor:
        """The cosine transform of latents - scale · mean, (B, C, h, w) float64."""
        centred = latents.detach().cpu().double() - scale * self.mean[:, None, None]
        return self._rows @ centred @ self._columns.T
