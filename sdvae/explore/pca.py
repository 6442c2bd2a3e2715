"""The directions in which the latents' channels vary together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdvae.errors import InputError
from sdvae.model import DiagonalGaussian


@dataclass(frozen=True)
class PrincipalComponents:
    """Directions of the latents at one position, by falling variance.

    Attributes:
        mean: (C,). axes: (C, C), one unit vector a row, the sign such that its largest number is positive.
        variance: (C,), along each. All float64.
    """

    mean: Tensor
    axes: Tensor
    variance: Tensor

    @property
    def explained(self) -> Tensor:
        """(C,): the share of the variance that is each one's."""
        return self.variance / self.variance.sum()

    def coefficients(self, z: Tensor) -> Tensor:
        """axes · (z - mean): (N, C, h, w) -> (N, C, h, w), along each axis."""
        return torch.einsum("kc,nchw->nkhw", self.axes.to(z), z - self.mean.to(z)[:, None, None])

    def keep(self, z: Tensor, count: int) -> Tensor:
        """The latents with all components but the first `count` at their mean: (N, C, h, w) -> the same."""
        kept = self.coefficients(z)[:, :count]
        return torch.einsum("kc,nkhw->nchw", self.axes[:count].to(z), kept) + self.mean.to(z)[:, None, None]


class LatentCovariance:
    """Mean and covariance of the posterior's mean over images and positions, between channels, in float64.

    Attributes:
        sums: (C + 1, C) float64 on the CPU: Σ z zᵀ, and Σ z below. Sums of two sets of images add up.
        count: of positions.
    """

    def __init__(self, channels: int):
        self.sums = torch.zeros(channels + 1, channels, dtype=torch.float64)
        self.count = 0

    def update(self, posterior: DiagonalGaussian) -> None:
        z = posterior.mean.detach().cpu().double()  # (B, C, h, w)
        z = z.transpose(0, 1).flatten(1)  # (C, positions)
        self.sums += torch.cat([z @ z.T, z.sum(dim=1)[None]])
        self.count += z.shape[1]

    @property
    def mean(self) -> Tensor:
        """(C,) float64."""
        return self.sums[-1] / self.count

    @property
    def covariance(self) -> Tensor:
        """(C, C) float64: E[z zᵀ] - E[z] E[z]ᵀ."""
        return self.sums[:-1] / self.count - torch.outer(self.mean, self.mean)

    def principal_components(self) -> PrincipalComponents:
        """The eigenvectors of the covariance (Pearson 1901; Bishop 2006, section 12.1). Exact: C is small.

        Raises: InputError when nothing varies.
        """
        if not self.count or not float(self.covariance.trace()) > 0:
            raise InputError("got latents that do not vary; need photographs; take other --data")
        variance, axes = torch.linalg.eigh(self.covariance)  # rising; eigenvectors in columns
        variance, axes = variance.flip(0).clamp(min=0), axes.flip(1).T
        largest = axes.gather(1, axes.abs().argmax(dim=1, keepdim=True))
        return PrincipalComponents(self.mean, axes * largest.sign(), variance)
