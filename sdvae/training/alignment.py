"""Alignment of the latents with a vision transformer's features: VA-VAE's «VF loss».

Yao et al. 2025, «Reconstruction vs. Generation» (arXiv 2501.01423), section 3: latents of many channels reconstruct
better and are harder to generate. So a matrix W that learns projects the latents z of each position to the features f
of a frozen network at that position, and two penalties with margins keep them alike (in LightningDiT,
vavae/ldm/modules/losses/contperceptual.py):

    mean relu(1 - m_cos - cos(W z_i, f_i))                          over positions i
  + mean relu(|cos(W z_i, W z_j) - cos(f_i, f_j)| - m_dist)         over pairs of positions i, j of an image

The sum is weighted by |∂nll/∂w| / |∂penalty/∂w|, with w the weight of the encoder's last convolution, times a factor,
as LDM weights its discriminator. That ratio costs one more backward pass through the decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from sdvae.metrics.features import Features
from sdvae.training.adversarial import ADAPTIVE_EPS, loss_scale, norms_over_processes
from sdvae.training.config import AlignmentConfig

ADAPTIVE_MAX = 1e8  # LightningDiT, calculate_adaptive_weight_vf


def alignment_penalty(projected: Tensor, features: Tensor, config: AlignmentConfig) -> Tensor:
    """The sum of the two penalties, a scalar in fp32, averaged over the batch.

    Args:
        projected: (B, D, h, w), the projected latents.
        features: (B, D, h, w), the features of the same positions.
        config: the margins.
    """
    z, f = (F.normalize(x.float().flatten(2), dim=1) for x in (projected, features))
    along = F.relu(1 - config.cosine_margin - (z * f).sum(dim=1)).mean()
    apart = (z.transpose(1, 2) @ z - f.transpose(1, 2) @ f).abs()
    return along + F.relu(apart - config.distance_margin).mean()


@torch.no_grad()
def features_at_latents(features: Features, images: Tensor, size: tuple[int, int]) -> Tensor:
    """The network's last features, one for each position of the latents.

    Args:
        features: a vision transformer.
        images: (B, C, H, W) in [-1, 1]; they are resized so that a patch stands for each position.
        size: (h, w) of the latents.

    Returns:
        (B, D, h, w) in fp32.
    """
    height, width = (side * features.multiple for side in size)
    with torch.autocast(images.device.type, enabled=False):
        resized = F.interpolate(images.float(), size=(height, width), mode="bilinear", antialias=True)
        return features.last(resized)


def balanced_weight(
    nll: Tensor, penalty: Tensor, weight: float, last_layer: Tensor, accelerator: Accelerator
) -> Tensor:
    """weight · |∂nll/∂w| / |∂penalty/∂w|, the same on every process. The graphs of both are kept.

    Args:
        nll: a scalar, LDM's divided by C·H·W.
        penalty: a scalar.
        weight: a factor.
        last_layer: w, the weight of the encoder's last convolution.
    """
    scale = loss_scale(nll, accelerator)
    gradients = [torch.autograd.grad(x * scale, last_layer, retain_graph=True)[0] / scale for x in (nll, penalty)]
    nll_norm, norm = norms_over_processes(gradients, accelerator)
    return weight * (nll_norm / (norm + ADAPTIVE_EPS)).clamp(max=ADAPTIVE_MAX)
