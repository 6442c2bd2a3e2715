"""The state of the latents: sums against loops over elements, and each complaint on the fault it names."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sdvae.errors import InputError
from sdvae.model import DiagonalGaussian
from sdvae.pictures import latent_plot
from sdvae.statistics import BINS, LatentHealth, LatentMoments


def healthy(channels: int = 4, count: int = 8, seed: int = 0) -> torch.Tensor:
    """Parameters (B, 2C, 16, 16) like those of SD-1: latents of std 5, log-variances around -20."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn((count, 2 * channels, 16, 16), generator=generator)
    return torch.cat([5 * noise[:, :channels], (-20 + 2 * noise[:, channels:]).clamp(-28, -12)], dim=1)


def health_of(parameters: torch.Tensor) -> LatentHealth:
    health = LatentHealth(parameters.shape[1] // 2)
    health.update(DiagonalGaussian(parameters))
    return health


def varied() -> torch.Tensor:
    """Elements of every kind: both clamps, whole numbers of nats, the prior itself, and all between."""
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn((4, 6, 5, 7), generator=generator)
    parameters[:, 3] = parameters[:, 3] * 30  # often beyond the clamps
    parameters[:, 4] = (parameters[:, 4] * 10).round()
    parameters[:, 2::3] = parameters[:, 2::3] * 0.1  # often dead
    parameters[0, 3, 0, :6] = torch.tensor([-29.5, -29.25, -30.0, -100.0, 20.0, 100.0])
    return parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_figures_equal_a_loop_over_elements(dtype):
    parameters = varied().to(dtype)
    health = health_of(parameters)

    count, channels, height, width = parameters.shape[0], 3, 5, 7
    kl_sums, histogram, logvars, dead, black_holes = [0.0] * channels, [0] * BINS, [], 0, 0
    for b in range(count):
        for c in range(channels):
            for y in range(height):
                for x in range(width):
                    mean = float(parameters[b, c, y, x])
                    logvar = min(max(float(parameters[b, channels + c, y, x]), -30.0), 20.0)
                    kl = 0.5 * (mean**2 + math.exp(logvar) - 1 - logvar)
                    kl_sums[c] += kl
                    dead += kl < 0.01
                    black_holes += logvar <= -29.5
                    logvars.append(logvar)
                    histogram[min(math.floor(logvar) + 30, BINS - 1)] += 1
    elements = count * height * width

    assert dead > 10
    assert black_holes > 3
    assert health.logvar_histogram.tolist() == histogram
    assert health.channel_kl.tolist() == pytest.approx([kl / elements for kl in kl_sums], rel=1e-12)
    metrics = health.metrics()
    assert metrics["kl_per_element"] == pytest.approx(sum(kl_sums) / len(logvars), rel=1e-12)
    assert metrics["dead_fraction"] == dead / len(logvars)
    assert metrics["black_hole_fraction"] == black_holes / len(logvars)
    assert metrics["logvar_mean"] == pytest.approx(sum(logvars) / len(logvars), rel=1e-12)
    assert metrics["logvar_min"] == math.floor(min(logvars)) == -30
    assert [metrics[f"channel_kl_{c}"] for c in range(channels)] == health.channel_kl.tolist()


def test_moments_are_those_of_latent_moments():
    posterior = DiagonalGaussian(healthy())
    health, moments = LatentHealth(4), LatentMoments(4)
    for _ in range(2):
        health.update(posterior)
        moments.update(posterior)
    torch.testing.assert_close(health.moments.channel_mean, moments.channel_mean)
    torch.testing.assert_close(health.moments.channel_std, moments.channel_std)
    assert health.metrics()["latent_std"] == pytest.approx(moments.std)
    assert health.metrics()["active_channels"] == moments.active_channels == 4


def test_parts_add_up_to_the_whole():
    parameters = varied()
    whole, merged = health_of(parameters), LatentHealth(3)
    merged.sums = health_of(parameters[:1]).sums + health_of(parameters[1:]).sums
    torch.testing.assert_close(merged.sums, whole.sums, rtol=1e-12, atol=0)
    assert merged.metrics() == pytest.approx(whole.metrics(), rel=1e-12)
    assert merged.complaints() == whole.complaints()
    merged.update(DiagonalGaussian(parameters))
    torch.testing.assert_close(merged.sums, 2 * whole.sums, rtol=1e-12, atol=0)  # it goes on after a merge


def test_a_posterior_of_the_graph_is_taken_without_its_gradient():
    health = health_of(healthy().requires_grad_())
    assert not health.sums.requires_grad


def prior(parameters: torch.Tensor, *channels: int) -> torch.Tensor:
    """These channels become all but the prior."""
    for c in channels:
        parameters[:, c] *= 0.004
        parameters[:, 4 + c] = 0.002 * parameters[:, 4 + c]
    return parameters


def noisy(parameters: torch.Tensor) -> torch.Tensor:
    """Every mean varies, by a hundredth of the noise, and no element is dead: each costs more than 0.3 nats."""
    parameters[:, :4] *= 0.01
    parameters[:, 4:] = -1.5
    return parameters


def all_dead_but_active(parameters: torch.Tensor) -> torch.Tensor:
    """Means of ±0.13 vary by more than 0.01, at a KL below 0.01 nats in every element."""
    parameters[:, :4] = 0.13 * parameters[:, :4].sign()
    parameters[:, 4:] = 0.0
    return parameters


def with_values(parameters: torch.Tensor, where: tuple, value: float) -> torch.Tensor:
    parameters[where] = value
    return parameters


def scaled(parameters: torch.Tensor, where: tuple, factor: float) -> torch.Tensor:
    parameters[where] *= factor
    return parameters


ALL_MEANS, FIRST_MEAN, LAST_LOGVAR = (slice(None), slice(0, 4)), (slice(None), 0), (slice(None), 7)
ONE_LOGVAR = (0, 4, 3, 3)


@pytest.mark.parametrize(
    ("parameters", "complaints"),
    [
        pytest.param(healthy(), [], id="healthy"),
        pytest.param(healthy().bfloat16(), [], id="healthy in bf16"),
        pytest.param(scaled(healthy(), ALL_MEANS, 0.1), [], id="std 0.5"),
        pytest.param(with_values(healthy(), ONE_LOGVAR, -29.0), [], id="low, but off the clamp"),
        pytest.param(
            prior(healthy(), 0, 1, 2, 3),
            ["posterior collapse: 4 of 4 channels (0, 1, 2, 3) do not depend on the image; KL ≥ 0.000; lower loss"],
            id="the prior",
        ),
        pytest.param(noisy(healthy()), ["posterior collapse: 4 of 4; lower loss.kl_weight"], id="drowned"),
        pytest.param(all_dead_but_active(healthy()), ["posterior collapse: 4 of 4; lower loss"], id="all dead"),
        pytest.param(
            prior(healthy(), 2).bfloat16(),
            ["partial collapse: 1 of 4 channels (2) does not depend on the image; lower loss.kl_weight"],
            id="one channel is the prior",
        ),
        pytest.param(
            with_values(healthy(), FIRST_MEAN, 7.0),
            ["partial collapse: 1 of 4 channels (0); KL ≥ 3; check that the images differ"],
            id="a constant mean, far from the prior",
        ),
        pytest.param(
            scaled(healthy(), ALL_MEANS, 0.01),
            ["latents vanish: std 0.0; 4 of 4 channels (0, 1, 2, 3); raise loss.kl_weight"],
            id="small but precise",
        ),
        pytest.param(
            scaled(healthy(), FIRST_MEAN, 0.01), ["latents vanish: std 0.0; 1 of 4 channels (0)"], id="one is small"
        ),
        pytest.param(
            scaled(healthy(), FIRST_MEAN, 40), ["latents explode: std up to 19; 1 of 4 channels (0)"], id="wide mean"
        ),
        pytest.param(
            with_values(healthy(), LAST_LOGVAR, 50.0),
            ["latents explode: std up to 2.2e+04; 1 of 4 channels (3)"],
            id="the upper clamp",
        ),
        pytest.param(
            with_values(healthy(), ONE_LOGVAR, -40.0),
            ["black holes: 0.012 % of elements; clamp of -30; raise loss.kl_weight"],
            id="one black hole in 8192",
        ),
        pytest.param(
            with_values(healthy(), (0, 1, 0, 0), math.nan),
            ["latents not finite: 1 of 4 channels (1); lower optimizer.learning_rate"],
            id="a NaN",
        ),
        pytest.param(
            with_values(healthy(), (0, 5, 0, 0), math.nan),
            ["latents not finite: 1 of 4 channels (1)"],
            id="a NaN among the log-variances",
        ),
        pytest.param(
            with_values(healthy(12), (slice(None), slice(0, 9)), 0.0),
            ["partial collapse: 9 of 12 channels (0, 1, 2, 3, 4, 5, 6, 7, …)"],
            id="many channels",
        ),
    ],
)
def test_each_fault_is_named_and_nothing_else(parameters, complaints):
    found = health_of(parameters).complaints()
    assert len(found) == len(complaints), found
    for complaint, expected in zip(found, complaints, strict=True):
        name, *parts = expected.split("; ")
        assert complaint.startswith(name), complaint
        assert all(part in complaint for part in parts), complaint
        assert "\n" not in complaint


@pytest.mark.parametrize("value", [7.0, 55.1, 117.3, 333.3])
def test_a_constant_without_noise_is_not_taken_for_a_small_signal(value):
    """Σ mean² / n - (Σ mean / n)² of these leaves 1e-12, more than the noise of e^-30."""
    parameters = with_values(healthy()[:7, :, :13, :11], FIRST_MEAN, value)
    posterior = DiagonalGaussian(with_values(parameters, (slice(None), 4), -40.0))
    health = LatentHealth(4)
    for _ in range(3):
        health.update(posterior)
    collapse, black_holes = health.complaints()
    assert collapse.startswith("partial collapse: 1 of 4 channels (0)")
    assert black_holes.startswith("black holes: 25 % of elements")


def test_another_number_of_channels_is_refused():
    with pytest.raises(InputError, match=r"got a posterior of 1 channels; need 4, or LatentHealth\(channels=1\)"):
        LatentHealth(4).update(DiagonalGaussian(torch.zeros(1, 2, 2, 2)))


@pytest.mark.parametrize("use", [LatentHealth.metrics, LatentHealth.complaints, latent_plot])
def test_no_image_is_an_error_and_not_a_nan(use):
    with pytest.raises(InputError, match="got no posterior"):
        use(LatentHealth(4))


RED = np.array([178, 34, 34])  # firebrick


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("channels", [1, 4, 32])
def test_the_figure_shows_black_holes_in_red(channels):
    parameters = healthy(channels)
    before = np.asarray(latent_plot(health_of(parameters)))
    parameters[:, channels:, :2, :2] = -40
    after = np.asarray(latent_plot(health_of(parameters)))
    assert before.shape == after.shape == (374, 1320, 3)
    below_title = (slice(40, None), slice(0, 440))  # the histogram
    assert not (before[below_title] == RED).all(axis=-1).any()
    assert (after[below_title] == RED).all(axis=-1).sum() > 500


@pytest.mark.filterwarnings("error")
def test_the_figure_of_broken_latents_is_drawn_too():
    latent_plot(health_of(healthy() * math.nan))
    latent_plot(health_of(with_values(healthy(), ONE_LOGVAR, math.inf)))
