"""Metrics and figures against independent computations."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import structural_similarity

from sdvae.metrics.image import image_metrics
from sdvae.model import DiagonalGaussian
from sdvae.pictures import AMPLIFICATION, CAPTION_HEIGHT, GAP, reconstruction_grid, training_curves
from sdvae.statistics import LatentMoments


def smooth_images(count: int, size: int = 48, seed: int = 0, channels: int = 3) -> torch.Tensor:
    coarse = torch.rand((count, channels, 6, 6), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)


def test_psnr_and_ssim_equal_their_definitions():
    x = smooth_images(3)
    y = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))) * 1.1  # leaves [-1, 1]
    posterior = DiagonalGaussian(torch.randn(3, 8, 6, 6))
    rows = image_metrics(x, y, posterior, None)
    for i, row in enumerate(rows):
        a = ((x[i] + 1) / 2).permute(1, 2, 0).double().numpy()
        b = ((y[i].clamp(-1, 1) + 1) / 2).permute(1, 2, 0).double().numpy()
        assert row["psnr"] == pytest.approx(-10 * math.log10(((a - b) ** 2).mean()), abs=1e-3)
        ssim = structural_similarity(
            a, b, channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        assert row["ssim"] == pytest.approx(ssim, abs=1e-4)
        assert row["kl"] == pytest.approx(float(posterior.kl()[i]) / (3 * 48 * 48), rel=1e-5)


def test_an_exact_reconstruction_has_a_finite_psnr():
    x = smooth_images(2)
    rows = image_metrics(x, x, DiagonalGaussian(torch.zeros(2, 8, 6, 6)), None)
    assert [row["psnr"] for row in rows] == [100.0, 100.0]
    assert [row["ssim"] for row in rows] == pytest.approx([1.0, 1.0])
    assert [row["kl"] for row in rows] == [0.0, 0.0]


def test_metrics_of_an_image_do_not_depend_on_its_batch():
    x, y = smooth_images(3), smooth_images(3, seed=1)
    posterior = DiagonalGaussian(torch.randn(3, 8, 6, 6))
    together = image_metrics(x, y, posterior, None)
    alone = image_metrics(x[1:2], y[1:2], DiagonalGaussian(posterior.parameters[1:2]), None)
    assert together[1] == pytest.approx(alone[0], rel=1e-5)


def test_latent_moments_are_those_of_sampled_latents():
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn((64, 8, 12, 12), generator=generator)
    parameters[:, :4] = parameters[:, :4] * 3 + torch.tensor([5.0, -2.0, 0.0, 1.0]).view(1, 4, 1, 1)
    posterior = DiagonalGaussian(parameters)
    moments = LatentMoments(4)
    for part in parameters.split(10):
        moments.update(DiagonalGaussian(part))
    z = torch.stack([posterior.sample(generator) for _ in range(20)]).double()
    assert moments.mean == pytest.approx(float(z.mean()), abs=0.02)
    assert moments.std == pytest.approx(float(z.std()), rel=0.01)
    torch.testing.assert_close(moments.channel_mean, z.mean((0, 1, 3, 4)), rtol=0, atol=0.03)
    torch.testing.assert_close(moments.channel_std, z.std((0, 1, 3, 4)), rtol=0.02, atol=0)


def test_moments_of_parts_add_up():
    parameters = torch.randn(6, 8, 4, 4)
    whole, first, second = LatentMoments(4), LatentMoments(4), LatentMoments(4)
    whole.update(DiagonalGaussian(parameters))
    first.update(DiagonalGaussian(parameters[:2]))
    second.update(DiagonalGaussian(parameters[2:]))
    torch.testing.assert_close(first.sums + second.sums, whole.sums)


def test_collapsed_channels_are_not_active():
    parameters = torch.randn(16, 8, 4, 4)
    parameters[:, 1] = 0.01 * parameters[:, 1]  # the mean hardly depends on the image: collapsed
    parameters[:, 2] = 7.0  # constant, however large
    moments = LatentMoments(4)
    moments.update(DiagonalGaussian(parameters))
    assert moments.active_channels == 2


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_shows_original_reconstruction_and_amplified_difference(channels):
    x = smooth_images(2, channels=channels)
    y = x + 0.1
    grid = np.asarray(reconstruction_grid(x, y)).astype(float)
    assert grid.shape == (CAPTION_HEIGHT + 2 * 48 + GAP, 3 * 48 + 2 * GAP, 3)
    tile = grid[CAPTION_HEIGHT + 48 + GAP :, :48]
    drawn = x[1].expand(3, -1, -1)
    assert np.abs(tile - ((drawn + 1) * 127.5).permute(1, 2, 0).numpy()).max() <= 0.51
    difference = grid[CAPTION_HEIGHT : CAPTION_HEIGHT + 48, 2 * (48 + GAP) :]
    middle = np.abs(x[0][:1].numpy()) < 0.8  # where x + 0.1 is not clamped
    assert difference[middle[0]][:, 0] == pytest.approx(AMPLIFICATION * 0.1 / 2 * 255, abs=1)


def test_curves_are_drawn_from_the_metrics_file(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "train/loss": 1 / s, "train/learning_rate": 0.0} for s in (1, 2, 3)]
    lines.append({"step": 3, "validation/psnr": 20.0})
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    training_curves(metrics, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert (pixels != 255).any(axis=2).mean() > 0.02, "something is drawn"
