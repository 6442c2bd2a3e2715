"""Muon against the singular value decomposition and torch's own, its AdamW part against torch's, and its runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdvae.training.build import build_vae
from sdvae.training.config import ModelConfig, OptimizerConfig
from sdvae.training.optimizer import Muon, build_optimizer, matrices_of, orthogonalised
from tests.processes import launch

SETTINGS = {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}


def plain_newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(24, 216), (216, 24), (32, 32), (1, 7)])
@pytest.mark.parametrize("condition", [1e0, 1e4])
def test_orthogonalised_is_newton_schulz_and_keeps_the_singular_vectors(shape, condition):
    torch.manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    s = torch.logspace(0, -torch.tensor(condition).log10().item(), min(shape), dtype=torch.float64)
    matrix = u @ s.diag() @ v
    result = orthogonalised(matrix.float())
    torch.testing.assert_close(result.double(), plain_newton_schulz(matrix), atol=1e-3, rtol=0)
    # in the basis of the singular vectors it is diagonal, and near 1 where s is above 0.002 of the norm
    there = u.T @ result.double() @ v.T
    torch.testing.assert_close(there - there.diagonal().diag(), torch.zeros_like(there), atol=1e-3, rtol=0)
    large = there.diagonal()[s / s.norm() > 0.002]
    assert ((large > 0.65) & (large < 1.25)).all()


def test_a_gradient_of_zeros_changes_nothing():
    assert torch.equal(orthogonalised(torch.zeros(3, 5)), torch.zeros(3, 5))


def test_the_scale_of_the_gradient_does_not_matter():
    torch.manual_seed(0)
    gradient = torch.randn(24, 54)
    torch.testing.assert_close(orthogonalised(1e-3 * gradient), orthogonalised(gradient), atol=2e-3, rtol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
def test_the_matrices_steps_are_those_of_torchs_muon():
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(24, 216)) for _ in range(2))
    theirs.data.copy_(ours.data)
    muon = Muon([ours], [], **SETTINGS)
    reference = torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    start = ours.detach().clone()
    for _ in range(4):
        ours.grad = torch.randn(24, 216)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
    # torch computes in bf16
    assert (ours - theirs).norm() < 0.01 * (theirs - start).norm()


def test_the_other_parameters_steps_are_those_of_torchs_adamw():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in [(7,), (3, 5)]]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    muon, reference = Muon([], ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape) if a.ndim == 1 or step != 2 else None
            b.grad = None if a.grad is None else a.grad.clone()
        muon.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_a_convolutions_kernel_is_a_matrix_in_any_memory_format():
    torch.manual_seed(0)
    kernels = [nn.Parameter(torch.randn(24, 16, 3, 3)) for _ in range(3)]
    matrix = nn.Parameter(kernels[0].detach().flatten(1).clone())
    kernels[1].data = kernels[0].data.clone(memory_format=torch.channels_last)
    kernels[2].data = kernels[0].data.clone()
    gradient = torch.randn(24, 16, 3, 3)
    kernels[0].grad, kernels[1].grad = gradient, gradient.contiguous(memory_format=torch.channels_last)
    kernels[2].grad, matrix.grad = gradient.contiguous(memory_format=torch.channels_last), gradient.flatten(1)
    Muon([*kernels, matrix], [], **SETTINGS).step()
    for kernel in kernels:
        assert torch.equal(kernel.detach().flatten(1), matrix.detach())


def test_muon_has_the_hidden_layers_and_adamw_all_else_that_trains():
    model = ModelConfig(block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
    vae = build_vae(model)
    vae.encoder.down_blocks[0].resnets[0].conv1.requires_grad_(False)
    chosen = {id(p) for p in matrices_of(vae)}
    names = {name for name, p in vae.named_parameters() if id(p) in chosen}
    assert all(name.endswith(".weight") and "norm" not in name for name in names)
    hidden = {n for n, p in vae.named_parameters() if p.ndim > 1 and p.requires_grad}
    edges = {
        f"{name}.weight"
        for name in ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out", "quant_conv")
    } | {"post_quant_conv.weight"}
    assert names == hidden - edges
    optimizer = build_optimizer(vae, OptimizerConfig(kind="muon"), (0.9, 0.99))
    every = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in vae.parameters() if p.requires_grad)


def steps_of(rank: int, noise: float) -> list[nn.Parameter]:
    """Parameters after two steps, whose gradients differ between processes by noise, as those of other hardware do."""
    torch.manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape)) for shape in [(24, 54), (40, 16), (16, 16, 3, 3)]]
    optimizer = Muon(matrices, [], **SETTINGS)
    for _ in range(2):
        for parameter in matrices:
            parameter.grad = torch.randn(parameter.shape)
            parameter.grad += noise * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(rank))
        optimizer.step()
    return matrices


def take_steps(arguments: list[str]) -> None:
    """The steps of one of two processes, written to a file."""
    folder, noise = arguments
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.save(steps_of(rank, float(noise)), f"{folder}/{noise}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["0", "1e-5"])
def test_two_processes_have_the_same_weights_also_when_their_gradients_are_rounded_differently(noise, tmp_path):
    finished = launch(take_steps, [tmp_path, noise], tmp_path, world_size=2)
    assert finished.codes == [0, 0], finished.stderr
    first, second = (torch.load(tmp_path / f"{noise}-{rank}.pt", weights_only=False) for rank in (0, 1))
    for a, b, alone in zip(first, second, steps_of(0, float(noise)), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, alone, atol=1e-3, rtol=0)
    if noise != "0":  # or the test would show nothing
        assert not torch.equal(steps_of(0, float(noise))[0], steps_of(1, float(noise))[0])
