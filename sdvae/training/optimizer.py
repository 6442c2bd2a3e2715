"""The optimizers of a recipe, `optimizer.kind`: AdamW, and Muon with AdamW for what is no matrix."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sdvae.errors import require
from sdvae.training.config import OptimizerConfig

MIN_WIDTH = 16  # layers with fewer inputs or outputs read or write images or latents
MOMENTUM = 0.95
UPDATE_RMS = 0.2  # of an orthogonal update; about that of an update by Adam, so both take the same learning rate
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """Nearly U Vᵀ, where U S Vᵀ is the singular value decomposition of a matrix.

    Each step of Newton-Schulz, X ← aX + b(XXᵀ)X + c(XXᵀ)²X, maps every singular value s to as + bs³ + cs⁵. Five steps
    bring those from about 0.002 of the Frobenius norm on to between 0.7 and 1.2, which is near enough to 1 for Muon;
    smaller ones grow by a⁵ = 485 at most (https://kellerjordan.github.io/posts/muon/). Every step multiplies X from the
    left by a polynomial of XXᵀ, so a wide matrix is multiplied only once, by the product of these polynomials, and the
    rest is done with the smaller squares.

    Args:
        matrix: (n, m), fp32 or fp64.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)

    def polynomial(gram: Tensor) -> Tensor:
        result = b * gram + c * (gram @ gram)
        result.diagonal().add_(a)
        return result

    gram = x @ x.T
    product = step = polynomial(gram)
    for _ in range(NEWTON_SCHULZ_STEPS - 1):
        gram = step @ gram @ step
        step = polynomial(gram)
        product = step @ product
    x = product @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def orthogonalised_together(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalised` of each matrix, computed by one process and sent to all others.

    Args:
        matrices: the same in every process up to rounding, contiguous.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [orthogonalised(matrix) for matrix in matrices]
    processes, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    results, sent = [], []
    for index, matrix in enumerate(matrices):
        owner = index % processes
        results.append(orthogonalised(matrix).contiguous() if owner == rank else torch.empty_like(matrix))
        sent.append(torch.distributed.broadcast(results[-1], src=owner, async_op=True))
    for work in sent:
        assert work is not None  # every process is in the default group
        work.wait()
    return results


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for all other parameters, with one learning rate.

    Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) keeps a momentum of the gradient and updates a
    weight matrix by U Vᵀ of that momentum with Nesterov's correction, so that all directions change by the same amount.
    A convolution's kernel (O, I, h, w) is the matrix (O, I·h·w). The update of an (n, m) matrix is multiplied by
    0.2 √max(n, m), so that its root mean square is 0.2 (Liu et al. 2025, «Muon is scalable for LLM training», arXiv
    2502.16982; torch's `adjust_lr_fn="match_rms_adamw"`). It does not depend on the scale of the gradient.

    Processes that train together each compute a part of the matrices' updates and send them to the others. So all have
    the same weights, also where their hardware rounds products differently, and the work is divided.

    torch's own Muon takes matrices alone, computes all of them in every process, and in bf16, which many CPUs emulate
    slowly.

    Args:
        matrices: parameters of two or more dimensions for Muon.
        others: parameters for AdamW.
        lr: learning rate of both.
        betas: decays of AdamW's moments.
        weight_decay: decoupled weight decay of both.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        groups = [{"params": list(matrices), "orthogonal": True}, {"params": list(others), "orthogonal": False}]
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": 1e-8})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            gradients = {p: p.grad for p in group["params"] if p.grad is not None}
            if group["orthogonal"]:
                self._update_matrices(gradients, group)
            else:
                self._update_others(gradients, group)

    def _update_matrices(self, gradients: dict[Tensor, Tensor], group: dict[str, Any]) -> None:
        updates = orthogonalised_together([self._direction(*pair) for pair in gradients.items()])
        for parameter, update in zip(gradients, updates, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            rate = group["lr"] * UPDATE_RMS * max(update.shape) ** 0.5
            parameter.add_(update.view_as(parameter), alpha=-rate)

    def _direction(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """The momentum with Nesterov's correction, as a matrix."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM).flatten(1)

    def _update_others(self, gradients: dict[Tensor, Tensor], group: dict[str, Any]) -> None:
        for parameter in gradients:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[parameter] for parameter in gradients]
        beta1, beta2 = group["betas"]
        adamw(
            list(gradients),
            list(gradients.values()),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def matrices_of(network: nn.Module) -> list[Tensor]:
    """The weights of convolutions and linear layers that train and have at least 16 inputs and outputs.

    Layers with fewer read or write images, latents, labels or logits, and AdamW serves these better.
    """
    return [
        module.weight
        for module in network.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and min(module.weight.shape[:2]) >= MIN_WIDTH
        and module.weight.requires_grad
    ]


def build_optimizer(network: nn.Module, config: OptimizerConfig, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """The optimizer of a recipe, over the parameters that train.

    Raises:
        InputError: when the recipe needs bitsandbytes and it is not installed.
    """
    trained = [p for p in network.parameters() if p.requires_grad]
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": betas, "weight_decay": config.weight_decay}
    if config.kind == "muon":
        matrices = matrices_of(network)
        chosen = {id(p) for p in matrices}
        return Muon(matrices, [p for p in trained if id(p) not in chosen], **settings)
    if config.kind == "adamw_8bit":
        require("bitsandbytes", "optimizer.kind=adamw_8bit", "bitsandbytes")
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(trained, **settings)
    return torch.optim.AdamW(trained, fused=config.kind == "adamw_fused" or None, **settings)
