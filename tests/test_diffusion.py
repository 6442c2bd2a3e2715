"""The linear denoiser against closed forms and brute force, and the probe against denoisers that are known."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor

from sdvae.diffusion.denoiser import NO_CLASS, denoising_loss, new_denoiser, new_scheduler, train
from sdvae.diffusion.linear import LinearDenoiser, cosine_basis
from sdvae.diffusion.probe import HELD_OUT, LOG_SNR, Probe, denoise, run_probe

CPU = torch.device("cpu")


def smooth_latents(count: int, channels: int = 2, side: int = 8, seed: int = 0) -> Tensor:
    """Gaussian latents whose channels depend on each other, with power that falls with frequency."""
    generator = torch.Generator().manual_seed(seed)
    basis = cosine_basis(side)
    radius = torch.hypot(torch.arange(side)[:, None].double(), torch.arange(side).double()).round()
    noise = torch.randn(count, channels, side, side, generator=generator, dtype=torch.float64)
    mix = torch.eye(channels, dtype=torch.float64) + 0.5
    z = torch.einsum("cd,bdhw->bchw", mix, noise / (1 + radius))
    z = basis.T @ z @ basis
    return (z / z.std(dim=(0, 2, 3), keepdim=True)).float()


def test_the_cosine_basis_is_orthonormal_and_begins_with_the_mean():
    basis = cosine_basis(7)
    torch.testing.assert_close(basis @ basis.T, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(basis[0], torch.full((7,), 7**-0.5, dtype=torch.float64))


def test_the_linear_denoiser_is_the_conditional_mean_of_a_gaussian_with_its_spectrum():
    """Against the full covariance matrix of all elements, by the textbook formula, in float64."""
    side, channels, signal = 4, 2, 0.3
    linear = LinearDenoiser(smooth_latents(50, channels, side) + torch.tensor([1.0, -2.0])[:, None, None]).double()
    basis = torch.kron(cosine_basis(side), cosine_basis(side))  # (16, 16)
    covariance = linear.axes @ torch.diag_embed(linear.power) @ linear.axes.mT  # (rings, C, C)
    size = channels * side**2
    full = torch.zeros(channels, side**2, channels, side**2, dtype=torch.float64)
    for position, ring in enumerate(linear.ring.flatten().tolist()):
        outer = torch.outer(basis[position], basis[position])
        full += torch.einsum("cd,xy->cxdy", covariance[ring], outer)
    full = full.reshape(size, size)
    mean = linear.mean.expand(channels, side, side).reshape(size)
    alpha, sigma = math.sqrt(signal), math.sqrt(1 - signal)
    noisy = torch.randn(3, channels, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inverse = torch.linalg.inv(signal * full + (1 - signal) * torch.eye(size, dtype=torch.float64))
    z = mean + (noisy.flatten(1) - alpha * mean) @ (alpha * full @ inverse).T
    wanted = (alpha * noisy.flatten(1) - z) / sigma
    found = linear(noisy, torch.tensor([signal] * 3, dtype=torch.float64)).flatten(1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)  # the buffers are fp32
    closed = float(torch.trace(full - signal * full @ inverse @ full)) / size
    assert linear.error(signal) == pytest.approx(closed, rel=1e-5)


def test_no_noise_and_no_signal_leave_finite_predictions():
    linear, z = LinearDenoiser(smooth_latents(20)), smooth_latents(2, seed=1)
    torch.testing.assert_close(linear(z, torch.ones(2)), torch.zeros_like(z))  # v = αε - σz with σ = 0 and unknown ε
    torch.testing.assert_close(linear(z, torch.zeros(2)), -linear.mean.expand_as(z))


def test_before_training_the_probe_is_the_linear_denoiser_and_its_error_is_the_closed_form():
    latents = smooth_latents(400)
    torch.manual_seed(0)
    probe = Probe(LinearDenoiser(latents), 2, 8).eval()
    result = denoise(probe, smooth_latents(100, seed=1), list(range(100)), torch.Generator().manual_seed(0))
    assert result.ratio.mean().item() == pytest.approx(1, abs=1e-6)
    assert [level.log_snr for level in result.levels] == pytest.approx(LOG_SNR, abs=0.02)
    for level in result.levels:
        signal = 1 / (1 + math.exp(-level.log_snr))
        assert level.error == pytest.approx(probe.linear.error(signal), rel=0.05)


class Known(Probe):
    """A probe that knows that all latents are one pattern or its negative: E[z | z_t] = tanh(α z_t·p / σ²) p."""

    def __init__(self, pattern: Tensor, linear: LinearDenoiser):
        super().__init__(linear, *pattern.shape[:2])
        self.pattern = pattern

    def forward(self, noisy, timestep, class_labels=None):
        signal = self.scheduler.alphas_cumprod[timestep][:, None, None, None]
        product = (noisy * self.pattern).sum(dim=(1, 2, 3), keepdim=True)
        z = torch.tanh(signal.sqrt() * product / (1 - signal)) * self.pattern
        return UNet2DOutput(sample=(signal.sqrt() * noisy - z) / (1 - signal).sqrt())


def test_a_denoiser_that_knows_more_than_the_spectrum_has_a_ratio_below_one():
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randn(2, 8, 8, generator=generator) / 8  # so faint that one element says little
    pattern[0] = 0.5 * pattern[0]
    signs = torch.randint(2, (200, 1, 1, 1), generator=generator) * 2.0 - 1
    latents = signs * pattern
    result = denoise(Known(pattern, LinearDenoiser(latents)), latents, list(range(200)), generator)
    assert result.ratio.mean().item() < 0.9
    for level, log_snr in zip(result.levels, LOG_SNR, strict=True):  # E (1 - tanh(x))² of a Gaussian x, by quadrature
        power = math.exp(log_snr) * float(pattern.square().sum())
        x = torch.linspace(-12, 12, 20001, dtype=torch.float64)
        density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
        gap = torch.trapezoid(density * (1 - torch.tanh(power + math.sqrt(power) * x)).square(), x)
        assert level.error == pytest.approx(float(gap) * float(pattern.square().mean()), rel=0.3, abs=1e-6)


def test_the_probe_repeats_to_the_bit_and_depends_on_the_seed():
    latents = smooth_latents(20)
    first, again = (run_probe(latents, steps=2, seed=0, device=CPU) for _ in range(2))
    assert first.held_out == [4, 9, 14, 19] == [i for i in range(20) if i % HELD_OUT == HELD_OUT - 1]
    assert torch.equal(first.ratio, again.ratio)
    assert not torch.equal(run_probe(latents, steps=2, seed=1, device=CPU).ratio, first.ratio)
    state = torch.get_rng_state()
    run_probe(latents, steps=1, seed=0, device=CPU)
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator is left alone"


def test_the_held_out_latents_are_not_trained_on(monkeypatch):
    seen = []
    monkeypatch.setattr("sdvae.diffusion.denoiser.denoising_loss", lambda model, s, z, *_: seen.append(z) or loss(z))

    def loss(z):
        return torch.zeros((), requires_grad=True) * z.sum()

    latents = torch.arange(20.0)[:, None, None, None].expand(20, 2, 8, 8) / 10
    run_probe(latents, steps=3, seed=0, device=CPU)
    trained = {round(float(z[0, 0, 0]) * 10) for batch in seen for z in batch}
    assert trained == {i for i in range(20) if i % HELD_OUT != HELD_OUT - 1}


def test_an_unconditional_denoiser_takes_no_labels_and_training_gives_the_loss_of_each_step():
    torch.manual_seed(0)
    model, scheduler = new_denoiser(2, 8, (8, 8)), new_scheduler()
    z = smooth_latents(4)
    losses = list(train(model, scheduler, iter([(z, None)] * 9), steps=3))
    assert len(losses) == 3
    assert not model.training
    with_classes = new_denoiser(2, 8, (8, 8), classes=True)
    assert with_classes.class_embedding.weight.shape[0] == NO_CLASS + 1
    generator = torch.Generator().manual_seed(0)
    first = denoising_loss(model, scheduler, z, generator=generator)
    assert first.item() == denoising_loss(model, scheduler, z, generator=generator.manual_seed(0)).item()
