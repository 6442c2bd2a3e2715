"""The discriminator: what it sees, its losses against their formulas, its schedule."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sdvae import InputError
from sdvae.training.augment import augmented
from sdvae.training.config import DiscriminatorConfig, LossConfig, TrainConfig
from sdvae.training.discriminator import (
    Blur,
    LeCam,
    PatchDiscriminator,
    consistency_penalty,
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


@pytest.mark.parametrize("downsampling", ["stride", "blur"])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_smallest_image_has_one_score(layers, downsampling):
    discriminator = PatchDiscriminator(3, layers, width=4, downsampling=downsampling)
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


KINDS = ["color", "translation", "cutout"]


@pytest.mark.parametrize("kinds", [[kind] for kind in KINDS] + [KINDS])
def test_augmentation_of_an_image_depends_on_its_seed_alone_and_passes_gradients(kinds):
    images = torch.rand(3, 3, 24, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seeds = torch.tensor([5, 6, 7])
    together = augmented(images, kinds, seeds, "real")
    alone = torch.cat([augmented(images[i : i + 1], kinds, seeds[i : i + 1], "real") for i in range(3)])
    assert torch.equal(together, alone)
    assert together.shape == images.shape
    assert not torch.equal(together, augmented(images, kinds, seeds, "fake"))
    assert not torch.equal(together, augmented(images, kinds, seeds + 10, "real"))
    doubles = images.double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: augmented(x, kinds, seeds, "real"), doubles[:, :, ::4, ::4])


def test_translation_is_a_shift_of_at_most_an_eighth_with_zeros_behind_it():
    images = torch.rand(40, 1, 24, 16) + 1
    shifts = set()
    for image, moved in zip(images, augmented(images, ["translation"], torch.arange(40), "real"), strict=True):
        padded = torch.nn.functional.pad(image, (2, 2, 3, 3))  # 24 / 8 and 16 / 8
        found = [(y, x) for y in range(7) for x in range(5) if torch.equal(padded[:, y : y + 24, x : x + 16], moved)]
        assert len(found) == 1
        shifts.add(found[0])
    assert {y for y, _ in shifts} == set(range(7))
    assert {x for _, x in shifts} == set(range(5))


def test_cutout_is_a_rectangle_of_zeros_no_longer_than_half_a_side():
    images = torch.ones(40, 1, 24, 16)
    sizes = set()
    for image in augmented(images, ["cutout"], torch.arange(40), "real"):
        hole = (image[0] == 0).nonzero()
        height, width = (hole.max(0).values - hole.min(0).values + 1).tolist()
        assert len(hole) == height * width
        sizes.add((height, width))
    assert max(sizes) == (12, 8)
    assert len(sizes) > 5


def test_color_changes_brightness_saturation_and_contrast_and_nothing_else():
    """It is affine in the image, and a grey image stays grey."""
    a, b = torch.rand(2, 5, 3, 8, 8, dtype=torch.float64)
    seeds = torch.arange(5)
    at_zero = augmented(torch.zeros_like(a), ["color"], seeds, "real")
    change = lambda x: augmented(x, ["color"], seeds, "real") - at_zero  # noqa: E731
    torch.testing.assert_close(change(a + 3 * b), change(a) + 3 * change(b))
    grey = augmented(a[:, :1].expand(-1, 3, -1, -1), ["color"], seeds, "real")
    torch.testing.assert_close(grey[:, 0], grey[:, 2])
    assert at_zero.abs().max() <= 0.5
    assert len(at_zero.flatten(1)[:, 0].unique()) == 5


def test_consistency_is_of_the_mean_score_of_each_image():
    changed, plain = torch.randn(2, 3, 1, 4, 5, dtype=torch.float64)
    wanted = sum((float(changed[i].mean()) - float(plain[i].mean())) ** 2 for i in range(3)) / 3
    assert float(consistency_penalty(changed, plain)) == pytest.approx(wanted, rel=1e-5)


def test_blur_keeps_even_areas_and_removes_what_every_second_value_would_alias():
    blur = Blur(2)
    assert torch.equal(blur(torch.full((1, 2, 8, 8), 0.5)), torch.full((1, 2, 4, 4), 0.5))
    stripes = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 2, 8, 8)
    assert blur(stripes).abs().max() < 1e-6
    discriminator = PatchDiscriminator(3, 2, width=4, downsampling="blur")
    assert all("weight" not in name or p.requires_grad for name, p in discriminator.layers[0].named_parameters())
    assert [p.requires_grad for p in discriminator.layers[2].parameters()] == [False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"consistency_weight": 1.0}, "need something to be consistent under"),
        ({"sees": "latents", "augment": ("cutout",)}, "they are of images; leave them out"),
        ({"sees": "latents", "downsampling": "blur"}, "they are of images; leave them out"),
    ],
)
def test_settings_that_do_nothing_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(loss=LossConfig(discriminator=DiscriminatorConfig(weight=0.5, **settings)))
