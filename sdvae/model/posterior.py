"""The approximate posterior q(z|x) = N(mean, diag(exp(logvar))) that the encoder predicts."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.utils._pytree as pytree
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sdvae.model.config import LOGVAR_RANGE
from sdvae.model.patches import PatchSize, patched


class DiagonalGaussian(DiagonalGaussianDistribution):
    """A diagonal Gaussian over latents, one for each image of a batch.

    It has diffusers' `mean`, `std`, `var` and `logvar`, (B, C, h, w) each. `kl` and `nll` are summed in fp32 or wider,
    since a half-precision sum over 4·64·64 terms loses digits.

    The constructor is diffusers'. It takes `parameters`, (B, 2C, h, w) float, the encoder's output: mean and
    log-variance stacked along channels. If `deterministic` is true, `std` and `var` are zero, and so are `kl` and
    `nll`, of shape (1,).
    """

    @classmethod
    def point(cls, latents: Tensor) -> DiagonalGaussian:
        """The latents (B, C, h, w) of an encoder that predicts no variance: every sample is equal to them."""
        return cls(torch.cat([latents, torch.full_like(latents, LOGVAR_RANGE[0])], dim=1), deterministic=True)

    def to(self, *args: Any) -> DiagonalGaussian:
        """The same on another device or in another dtype, given as to `Tensor.to`."""
        return DiagonalGaussian(self.parameters.to(*args), self.deterministic)

    def patched(self, size: PatchSize) -> DiagonalGaussian:
        """The posterior over patches of the latents, (B, C·p·q, h/p, w/q): see `sdvae.model.patches`."""
        return DiagonalGaussian(patched(self.parameters, size), self.deterministic)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """z = mean + std · eps with eps ~ N(0, I): the reparametrisation trick (Kingma & Welling 2014, 2.4).

        Args:
            generator: one for the batch, or a list with one for each image. With a list, an image's noise does not
                depend on the other images in its batch.

        Returns:
            (B, C, h, w) in the dtype of the parameters.
        """
        return self.mean + self.std * noise_like(self.mean, generator)

    def kl_map(self) -> Tensor:
        """KL(q || N(0, I)) of each latent element, in nats: (B, C, h, w) in fp32 or wider.

        ½ (mean² + var - 1 - log var) (Kingma & Welling 2014, appendix B).
        """
        mean, logvar = at_least_fp32(self.mean), at_least_fp32(self.logvar)
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)

    def kl(self, other: DiagonalGaussianDistribution | None = None) -> Tensor:
        """KL(q || other), by default against N(0, I), summed over each image's latents, in nats: (B,)."""
        if self.deterministic:
            return super().kl(other)  # type: ignore[arg-type]
        if other is None:
            return self.kl_map().sum(dim=(1, 2, 3))
        mean, logvar = at_least_fp32(self.mean), at_least_fp32(self.logvar)
        other_mean, other_logvar = at_least_fp32(other.mean), at_least_fp32(other.logvar)
        difference = (mean - other_mean).square() / other_logvar.exp()
        return 0.5 * (difference + (logvar - other_logvar).exp() - 1.0 - logvar + other_logvar).sum(dim=(1, 2, 3))

    def nll(self, sample: Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> Tensor:
        """-log q(sample), summed over `dims`, in nats: (B,) by default."""
        if self.deterministic:
            return super().nll(sample, dims)
        mean, logvar = at_least_fp32(self.mean), at_least_fp32(self.logvar)
        squared = (at_least_fp32(sample) - mean).square() / logvar.exp()
        return 0.5 * (math.log(2.0 * math.pi) + logvar + squared).sum(dim=dims)


# torch.export has to flatten a model's output into tensors and rebuild it
pytree.register_pytree_node(
    DiagonalGaussian,
    lambda posterior: ([posterior.parameters], None),
    lambda children, _: DiagonalGaussian(*children),
    serialized_type_name="sdvae.model.posterior.DiagonalGaussian",
)


def noise_like(like: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """N(0, I) in the shape and dtype of `like`, on its device, drawn on the device of the generators.

    From the CPU to a GPU the noise is copied out of pinned memory, without waiting for what the GPU still computes.

    Args:
        like: (B, …).
        generator: one for the batch, a list with one for each image, or None for the device's own.
    """
    first = generator[0] if isinstance(generator, list) else generator
    if like.device.type != "cuda" or first is None or first.device.type != "cpu":
        return randn_tensor(like.shape, generator, like.device, like.dtype)
    return randn_tensor(like.shape, generator, first.device, like.dtype).pin_memory().to(like.device, non_blocking=True)


def at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
