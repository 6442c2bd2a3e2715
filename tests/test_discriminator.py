"""The discriminator: what it sees, its losses against their formulas, its schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sdvae.training.config import DiscriminatorConfig
from sdvae.training.discriminator import (
    LeCam,
    PatchDiscriminator,
    discriminator_learns_at,
    discriminator_loss,
    generator_loss,
    generator_weight_at,
    r1_penalty,
)


@pytest.mark.parametrize(("layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_score_sees_a_patch_of_the_published_size(layers, patch):
    """pix2pix, appendix 6.1.2: 16x16, 34x34 (by the same rule) and 70x70 pixels."""
    discriminator = PatchDiscriminator(3, layers, width=4, norm="none")
    images = torch.rand(1, 3, 160, 160, requires_grad=True)
    logits = discriminator(images)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = images.grad[0].abs().sum(0).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [patch, patch]


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_image_has_one_score(layers):
    discriminator = PatchDiscriminator(3, layers, width=4)
    side = DiscriminatorConfig(layers=layers).smallest_side
    assert discriminator(torch.rand(1, 3, side, side)).shape == (1, 1, 1, 1)


def test_an_images_scores_do_not_depend_on_its_batch():
    """What LDM's batch norm does not give, and what makes gradients the same however a batch is divided."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, 3, width=16)
    images = torch.rand(3, 3, 64, 64)
    together = discriminator(images)
    alone = torch.cat([discriminator(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)


def test_losses_are_their_formulas():
    torch.manual_seed(0)
    real, fake = torch.randn(2, 4, 1, 5, 5, dtype=torch.float64) * 2
    hinge = 0.5 * (torch.clamp(1 - real, min=0).mean() + torch.clamp(1 + fake, min=0).mean())
    vanilla = 0.5 * (-torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean())
    assert float(discriminator_loss(real, fake, "hinge")) == pytest.approx(float(hinge), rel=1e-6)
    assert float(discriminator_loss(real, fake, "vanilla")) == pytest.approx(float(vanilla), rel=1e-6)
    assert float(generator_loss(fake)) == pytest.approx(-float(fake.mean()), rel=1e-6)


def test_r1_is_the_squared_gradient_and_has_a_gradient_itself():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(3, 1, width=4).double()
    with torch.no_grad():
        for parameter in discriminator.parameters():  # the initial std of 0.02 leaves nothing to compare
            parameter.add_(torch.randn_like(parameter) * 0.3)
    images = torch.rand(2, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(discriminator(images), images)
    step, total = 1e-6, 0.0
    with torch.no_grad():
        for index in range(images[0].numel()):
            for image in range(2):
                shifted = images.clone()
                shifted[image].view(-1)[index] += step
                total += ((discriminator(shifted).sum() - discriminator(images).sum()) / step).item() ** 2
    assert penalty.item() == pytest.approx(total / 2, rel=1e-3)
    penalty.backward()
    assert discriminator.layers[0].weight.grad.abs().sum() > 0


def test_lecam_pulls_scores_towards_the_other_sides_average():
    lecam = LeCam()
    real, fake = torch.tensor([2.0, 4.0]), torch.tensor([-1.0, -3.0])
    assert float(lecam.penalty(real, fake)) == 0
    lecam.update(1.0, -1.0)
    assert lecam.averages == (1.0, -1.0)
    assert float(lecam.penalty(real, fake)) == pytest.approx((9 + 25) / 2 + (4 + 16) / 2)
    lecam.update(2.0, -1.0)
    assert lecam.averages == pytest.approx((1.001, -1.0))


def test_discriminator_learns_alone_then_its_weight_ramps():
    config = DiscriminatorConfig(weight=0.5, start_step=10, warmup_steps=5, ramp_steps=4)
    assert [step for step in range(30) if discriminator_learns_at(step, config)] == list(range(10, 30))
    weights = [generator_weight_at(step, config) for step in range(21)]
    assert weights[:15] == [0.0] * 15
    assert weights[15:] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    off = replace(config, weight=0.0)
    assert not any(discriminator_learns_at(step, off) or generator_weight_at(step, off) for step in range(30))
