"""The penalty that keeps latents in their place while an encoder trains on."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from sdvae import InputError, load_vae, save_vae
from sdvae.errors import Stopped
from sdvae.model import DiagonalGaussian
from sdvae.training.anchor import Anchor
from sdvae.training.recipe import parse_train_config
from tests.conftest import draw_photographs, tiny_arguments, tiny_vae
from tests.faults import fault
from tests.test_resume import differences, records, result, run, undrawn  # noqa: F401

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def moved(scaling_factor: float = 0.5) -> tuple[Anchor, DiagonalGaussian, DiagonalGaussianDistribution]:
    """An anchor, the posterior of the VAE after its encoder has moved, and stock's of the VAE at the start."""
    vae = tiny_vae(scaling_factor=scaling_factor)
    anchor = Anchor(vae, Accelerator(cpu=True))
    start = DiagonalGaussianDistribution(vae.encode(IMAGES).latent_dist.parameters.detach())
    with torch.no_grad():
        for parameter in vae.encoder.parameters():
            parameter.mul_(1.05)
    return anchor, vae.encode(IMAGES).latent_dist, start


def test_the_penalties_are_those_of_their_formulas_and_zero_at_the_start():
    anchor, now, start = moved()
    wanted = (0.5 * (now.mean - start.mean)).double().square().mean()
    torch.testing.assert_close(anchor.penalty(IMAGES, now, "mse").double(), wanted, rtol=1e-4, atol=1e-9)
    stock = DiagonalGaussianDistribution(now.parameters).kl(start).mean() / now.mean[0].numel()
    torch.testing.assert_close(anchor.penalty(IMAGES, now, "kl"), stock, rtol=1e-4, atol=1e-7)
    before = DiagonalGaussian(start.parameters)
    assert float(anchor.penalty(IMAGES, before, "mse")) == 0.0
    assert float(anchor.penalty(IMAGES, before, "kl").abs()) < 1e-6


@pytest.mark.parametrize("kind", ["mse", "kl"])
def test_the_gradient_reaches_the_encoder_that_trains_and_not_the_anchor(kind):
    vae = tiny_vae(scaling_factor=0.5)
    anchor = Anchor(vae, Accelerator(cpu=True))
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1.1)
    anchor.penalty(IMAGES, vae.encode(IMAGES).latent_dist, kind).backward()
    gradient = vae.encoder.conv_in.weight.grad
    assert gradient.abs().max() > 0
    with torch.no_grad():
        before = anchor.penalty(IMAGES, vae.encode(IMAGES).latent_dist, kind)
        vae.encoder.conv_in.weight.sub_(1e-3 * gradient / gradient.norm())
        assert anchor.penalty(IMAGES, vae.encode(IMAGES).latent_dist, kind) < before


@pytest.mark.slow
def test_an_anchored_run_moves_less_says_how_far_and_is_continued_exactly(tmp_path):
    source = draw_photographs(tmp_path / "photographs")
    start = tmp_path / "start"
    run(source, tmp_path / "first", steps="2", validate_every="2", data__num_workers="0")
    save_vae(load_vae(tmp_path / "first" / "model"), start)
    settings = {"steps": "6", "data__num_workers": "0", "fine_tune__source": str(start)}
    settings |= {"loss__equivariance__weight": "0", "loss__discriminator__weight": "0", "validate_raw": "false"}
    anchored = {**settings, "fine_tune__anchor_weight": "100"}
    run(source, tmp_path / "free", **settings)
    run(source, tmp_path / "whole", **anchored)
    with fault("sigterm", 3), pytest.raises(Stopped):
        run(source, tmp_path / "run", **anchored)
    run(source, tmp_path / "run", **anchored)
    assert not differences(result(tmp_path / "run"), result(tmp_path / "whole"))
    free, held = ([r for r in records(tmp_path / name) if "validation/psnr" in r][-1] for name in ("free", "whole"))
    assert 0 < held["validation/latent_shift"] < 0.7 * free["validation/latent_shift"]
    assert all("train/anchor" in line for line in records(tmp_path / "whole") if "train/loss" in line)
    with fault("sigterm", 3), pytest.raises(Stopped):
        run(source, tmp_path / "changed", **anchored)
    vae = load_vae(start)
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1.01)
    save_vae(vae, start)
    with pytest.raises(InputError, match=r"fine_tune.source, which anchors the latents, has other weights"):
        run(source, tmp_path / "changed", **anchored)


def test_an_anchor_needs_an_encoder_that_trains_on(tmp_path):
    with pytest.raises(InputError, match=r"anchor_weight=1 without fine_tune.source"):
        parse_train_config(tiny_arguments(tmp_path, tmp_path / "run", fine_tune__anchor_weight="1"))
    settings = {"fine_tune__source": "x", "fine_tune__freeze_encoder": "true", "fine_tune__anchor_weight": "1"}
    with pytest.raises(InputError, match=r"anchor_weight=1 with freeze_encoder"):
        parse_train_config(tiny_arguments(tmp_path, tmp_path / "run", **settings))
