"""The adversarial term of the VAE's objective, and the weight that LDM gives it.

The VAE minimises nll + w · g + kl_weight · KL with g = -E[D(x̂)]. LDM multiplies w by

    |∂nll/∂W| / |∂g/∂W|,    W: the weight of the decoder's last convolution (Esser et al. 2021, eq. 7),

so that the gradients of both terms at W have the same norm. Computed directly, this would need two more backward passes
through LPIPS and the discriminator. But x̂ is the output of that convolution. So by the chain rule, ∂nll/∂W follows from
∂nll/∂x̂ (a tensor as large as the images) by the backward pass of one convolution, and ∂g/∂W from ∂g/∂x̂. The two
gradients at x̂ are therefore computed once. They give the last layer's gradients and with them the weight, and the
backward pass through the VAE starts from their weighted sum.
"""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

# LDM, ldm/modules/losses/contperceptual.py, calculate_adaptive_weight. Both are for LDM's loss, a sum over C·H·W.
ADAPTIVE_EPS = 1e-4
ADAPTIVE_MAX = 1e4


def adaptively_weighted(
    outputs: list[Tensor], nll: Tensor, g: Tensor, weight: float, last_layer: Tensor, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """nll + weight · adaptive weight · g, as a function of the VAE's outputs.

    Args:
        outputs: the outputs of the VAE that nll depends on, the reconstruction (B, C, H, W) first.
        nll: a scalar, a function of all outputs.
        g: a scalar, a function of the reconstruction.
        weight: a factor of the adaptive weight.
        last_layer: the weight W of the convolution that gives the reconstruction.

    Returns:
        A scalar whose gradient with respect to the outputs is that of the weighted sum (its value has no meaning), and
        the weight of g, which is the same on every process.
    """
    reconstruction = outputs[0]
    scale = loss_scale(nll, accelerator)
    nll_gradients = [gradient / scale for gradient in torch.autograd.grad(nll * scale, outputs)]
    g_gradient = torch.autograd.grad(g * scale, reconstruction)[0] / scale

    layer_gradients = [
        torch.autograd.grad(reconstruction, last_layer, grad_outputs=gradient * scale, retain_graph=True)[0] / scale
        for gradient in (nll_gradients[0], g_gradient)
    ]
    nll_norm, g_norm = norms_over_processes(layer_gradients, accelerator)
    values = reconstruction[0].numel()  # here nll is divided by C·H·W
    adaptive = (values * nll_norm / (g_norm + ADAPTIVE_EPS)).clamp(max=ADAPTIVE_MAX) / values
    gan_weight = weight * adaptive

    gradients = [nll_gradients[0] + gan_weight * g_gradient, *nll_gradients[1:]]
    objective = reconstruction.new_zeros(())
    for output, gradient in zip(outputs, gradients, strict=True):
        objective = objective + (output * gradient).sum()  # its gradient at `output` is `gradient`
    return objective, gan_weight


def loss_scale(like: Tensor, accelerator: Accelerator) -> Tensor:
    """The factor of losses whose gradients are then divided by it, since fp16 rounds small gradients to 0; else 1."""
    scale = like.new_ones(())
    # `get_scale` would wait for the device
    return scale if accelerator.scaler is None else accelerator.scaler.scale(scale)


def norms_over_processes(gradients: list[Tensor], accelerator: Accelerator) -> Tensor:
    """The norm of each gradient, averaged over processes before, so that it is that of the whole batch."""
    return accelerator.reduce(torch.stack(gradients), reduction="mean").flatten(1).norm(dim=1)
