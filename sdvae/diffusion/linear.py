"""The best linear denoiser of latents at each frequency, which knows their spectrum and nothing else.

For Gaussian latents whose statistics are the same at every position it is the best denoiser of all: the Wiener filter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def cosine_basis(size: int) -> Tensor:
    """(N, N) float64: the orthonormal cosine transform (DCT-II), a frequency in each row.

    It treats an image as if mirrored at its borders, so opposite borders do not meet.
    """
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    basis = math.sqrt(2 / size) * torch.cos(math.pi * k * (2 * n + 1) / (2 * size))
    basis[0] /= math.sqrt(2)
    return basis


class LinearDenoiser(nn.Module):
    """E[v | z_t] for z_t = αz + σε and v = αε - σz, α² + σ² = 1, if z is Gaussian with the spectrum of some latents.

    At each frequency their cosine transform has a covariance between channels, S = QΛQᵀ, a C×C matrix. Here it depends
    on the distance from frequency zero alone, in steps of a half cycle an image side, and the mean depends on the
    channel alone. White noise has the covariance I in every orthonormal basis, so E[z | z_t] = mean + αS(α²S + σ²I)⁻¹
    (z_t - α mean), and E[v | z_t] = (α z_t - E[z | z_t]) / σ = Q ασ(I - Λ)(α²Λ + σ²I)⁻¹ Qᵀ(z_t - α mean) - σ mean.

    Args:
        latents: (N, C, h, w), from which mean and spectrum are taken.

    Attributes:
        mean: (C, 1, 1), as all tensors in fp32.
        power: (rings, C), Λ of each ring.
        axes: (rings, C, C), Q of each ring, an axis in each column.
        ring: (h, w) int64, the ring of each frequency.
    """

    mean: Tensor
    power: Tensor
    axes: Tensor
    ring: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, latents: Tensor):
        super().__init__()
        latents = latents.detach().cpu()
        _, channels, height, width = latents.shape
        rows, columns = cosine_basis(height), cosine_basis(width)
        ring = torch.hypot(torch.arange(height)[:, None].double(), torch.arange(width).double()).round().long()
        mean = latents.double().mean(dim=(0, 2, 3))[:, None, None]
        sums = torch.zeros(int(ring.max()) + 1, channels, channels, dtype=torch.float64)
        for part in latents.split(64):
            z = rows @ (part.double() - mean) @ columns.T
            sums.index_add_(0, ring.flatten(), torch.einsum("bchw,bdhw->hwcd", z, z).flatten(0, 1))
        power, axes = torch.linalg.eigh(sums / (len(latents) * ring.flatten().bincount()[:, None, None]))
        tensors = {"mean": mean, "power": power.clamp(min=0), "axes": axes, "rows": rows, "columns": columns}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.float())
        self.register_buffer("ring", ring)

    def forward(self, noisy: Tensor, signal: Tensor) -> Tensor:
        """E[v | z_t].

        Args:
            noisy: (B, C, h, w), z_t.
            signal: (B,), α² of each.

        Returns:
            (B, C, h, w).
        """
        signal = signal.to(noisy)[:, None, None, None]
        alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
        axes, power = self.axes[self.ring], self.power[self.ring].permute(2, 0, 1)  # (h, w, C, C), (C, h, w)
        coefficients = torch.einsum("hwcd,bchw->bdhw", axes, self.rows @ (noisy - alpha * self.mean) @ self.columns.T)
        coefficients = coefficients * (alpha * sigma * (1 - power) / (signal * power + 1 - signal))
        return self.rows.T @ torch.einsum("hwcd,bdhw->bchw", axes, coefficients) @ self.columns - sigma * self.mean

    def error(self, signal: float) -> float:
        """E |z - E[z | z_t]|² of an element, for Gaussian latents: σ²Λ / (α²Λ + σ²), averaged."""
        power = self.power.double()
        left = (1 - signal) * power / (signal * power + 1 - signal)
        count = self.ring.flatten().bincount()
        return float((left.mean(dim=1) * count).sum() / count.sum())
