"""What a run says of itself before its first step: each finding for its own fault, none for a sound recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sdvae import InputError, save_vae
from sdvae.training.build import build_vae, starting_vae
from sdvae.training.config import (
    DataConfig,
    DiscriminatorConfig,
    EquivarianceConfig,
    FineTuneConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from sdvae.training.objective import Judges
from sdvae.training.preflight import check_recipe, probe
from tests.conftest import tiny_vae

MODEL = ModelConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)
GAN = DiscriminatorConfig(weight=0.5, start_step=100, warmup_steps=50, ramp_steps=50)


def recipe(loss: LossConfig | None = None, **changes) -> TrainConfig:
    loss = LossConfig(discriminator=GAN) if loss is None else loss
    return TrainConfig(**{"steps": 1000, "model": MODEL, "loss": loss, **changes})


def findings(config: TrainConfig, **changes) -> list[str]:
    numbers = {"images_per_step": 12, "train_images": 5000, "validation_images": 16, "parameters": 84_000_000}
    numbers |= {"compression_ratio": 2, "perceptual": "lpips_vgg"}
    return check_recipe(config, **{**numbers, **changes})


def test_a_sound_recipe_has_no_finding():
    assert findings(recipe()) == []


@pytest.mark.parametrize(
    ("config", "numbers", "finding"),
    [
        (
            recipe(steps=150),
            {"train_images": 1500},
            "the discriminator acts on the VAE from step 151, after the last step, 150: it never acts",
        ),
        (recipe(steps=180), {"train_images": 2000}, "never reaches 0.5"),
        (
            recipe(optimizer=OptimizerConfig(learning_rate=2.6e-3)),
            {},
            "48 times LDM's rate of 4.5e-6 for each image in a step; it is used as given, not multiplied",
        ),
        (recipe(), {"images_per_step": 24, "train_images": 20}, "a step takes 24 images and there are only 20"),
        (recipe(), {"train_images": 300}, "300 images are few for 84 M new parameters"),
        (recipe(), {"validation_images": 2}, "only 2 validation images, so their mean is uncertain"),
        (recipe(), {"train_images": 24_000}, "the run ends after 12000 of the 24000 images"),
        (recipe(LossConfig(kl_warmup_steps=1000)), {}, "the KL term never has its full weight"),
    ],
)
def test_each_fault_is_found(config, numbers, finding):
    (found,) = findings(config, **numbers)
    assert finding in found


def test_fine_tuning_needs_fewer_images():
    assert findings(recipe(fine_tune=FineTuneConfig(source="x")), train_images=300) == []


def test_crops_too_small_for_the_discriminator_or_for_lpips_are_refused():
    small = DataConfig(resolution=16)
    with pytest.raises(InputError, match="sees images of 16 pixels; need 24 or more for one patch"):
        recipe(data=small)
    equivariant = LossConfig(equivariance=EquivarianceConfig(0.25, (0.25,)))
    with pytest.raises(InputError, match="need images of 32 pixels or more for LPIPS"):
        recipe(equivariant, data=DataConfig(resolution=64))
    replacing = LossConfig(
        equivariance=EquivarianceConfig(scales=(0.25,), probability=0.5),
        discriminator=DiscriminatorConfig(weight=0.5),
        lpips_weight=0,
    )
    with pytest.raises(InputError, match="the discriminator sees images of 16 pixels; need 24 or more"):
        recipe(replacing, data=DataConfig(resolution=64))


def test_equivariance_is_a_further_term_or_takes_the_place_of_another():
    with pytest.raises(InputError, match="need one of the two: a further term, or"):
        recipe(LossConfig(equivariance=EquivarianceConfig(weight=0.25, probability=0.5)))


def probed(config: TrainConfig, change=lambda vae: None) -> list[str]:
    torch.manual_seed(0)
    vae = build_vae(config.model)
    with torch.no_grad():
        change(vae)
    return probe(vae, torch.rand(2, 3, 32, 32) * 2 - 1, torch.tensor([0, 1]), config, Judges())


@pytest.mark.parametrize("before", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("reconstruction", ["l1", "bce"])
def test_fine_tuning_to_another_likelihood_is_warned_of(before, reconstruction, tmp_path, caplog):
    source = tiny_vae(in_channels=1, out_channels=1)
    source.set_likelihood(before)
    save_vae(source, tmp_path)
    after = "bernoulli" if reconstruction == "bce" else "gaussian"
    loss = LossConfig(reconstruction=reconstruction, lpips_weight=0)
    vae, _ = starting_vae(recipe(loss, fine_tune=FineTuneConfig(source=str(tmp_path))))
    assert vae.likelihood == after
    said = [record for record in caplog.records if "another output" in record.getMessage()]
    assert len(said) == (before != after)


def test_a_bernoulli_likelihood_asks_for_a_vae_of_grey_images(tmp_path):
    save_vae(tiny_vae(), tmp_path)
    loss = LossConfig(reconstruction="bce", lpips_weight=0)
    with pytest.raises(InputError, match="3 channels; need a VAE of grey images"):
        starting_vae(recipe(loss, fine_tune=FineTuneConfig(source=str(tmp_path))))


def test_a_new_vae_passes_the_probe():
    assert probed(recipe()) == []


def test_latents_that_vanish_or_explode_are_found():
    (small,) = probed(recipe(), lambda vae: vae.quant_conv.weight.mul_(1e-6))
    assert small.startswith("collapsing latents: their std is")
    assert probed(recipe(), lambda vae: vae.quant_conv.weight.mul_(1e6))[0].startswith("exploding latents")
    assert "not finite" in probed(recipe(), lambda vae: vae.decoder.conv_out.weight.mul_(float("inf")))[0]


def test_a_kl_weight_in_another_unit_is_found():
    heavy = recipe(replace(LossConfig(), kl_weight=1.0))
    (finding,) = probed(heavy)
    assert "is larger than the reconstruction term" in finding
    assert "LDM: 1e-6" in finding


def test_a_vae_that_does_not_reconstruct_is_not_the_one_to_fine_tune():
    (finding,) = probed(recipe(fine_tune=FineTuneConfig(source="other.safetensors")))
    assert "other.safetensors reconstructs the first images at" in finding


def test_the_discriminator_may_start_at_a_part_of_the_run():
    gan = DiscriminatorConfig(weight=0.5, start_fraction=0.3)
    config = recipe(LossConfig(discriminator=gan))
    assert config.loss.discriminator.start_step == 300
    assert recipe(config.loss).loss == config.loss  # as a recipe that a run wrote is read again
    with pytest.raises(InputError, match="need one of the two"):
        recipe(LossConfig(discriminator=replace(gan, start_step=7)))
