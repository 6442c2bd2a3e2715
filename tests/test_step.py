"""One step of both players, against plain autograd."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from sdvae.metrics.perceptual import Perceptual, load_perceptual
from sdvae.model import DiagonalGaussian
from sdvae.noise import posterior_generators
from sdvae.training.build import build_vae
from sdvae.training.config import (
    DiscriminatorConfig,
    EquivarianceConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from sdvae.training.objective import Judges, learning_rate_at, loss_terms, transformation_at
from sdvae.training.players import Player, Players, freeze_encoder, frozen
from sdvae.training.step import TrainStep

SEEDS = torch.tensor([5, 6])
MODEL = ModelConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4)


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def perceptual(trunk) -> Perceptual:
    return load_perceptual("squeeze", trunk, heads="uniform")


def recipe(**loss) -> TrainConfig:
    gan = loss.pop("discriminator", {})
    settings = DiscriminatorConfig(**{"weight": 0.5, "start_step": 0, "layers": 2, "width": 8, **gan})
    return TrainConfig(
        model=MODEL,
        steps=10,
        channels_last=False,
        loss=LossConfig(**{"lpips_weight": 0.3, "kl_weight": 1e-3, "discriminator": settings, **loss}),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )


def players_of(config: TrainConfig, accelerator: Accelerator) -> Players:
    torch.manual_seed(0)
    vae = build_vae(replace(config.model, initialisation="torch")).train()
    players = Players(vae, config, accelerator)
    with torch.no_grad():  # away from the initial weights, at which many gradients are tiny
        for parameter in players.discriminator.network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return players


def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def relative_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert found.keys() == wanted.keys()
    a, b = (torch.cat([side[name].flatten() for name in sorted(side)]).double() for side in (found, wanted))
    return float((a - b).norm() / b.norm())


def plainly(config: TrainConfig, players: Players, perceptual, adaptive: bool) -> tuple[dict, float]:
    """The objective as LDM writes it: sums over C·H·W, two extra backward passes for the weight, one for all."""
    x = images()
    values = x[0].numel()
    transformation = transformation_at(0, config.seed, config.loss.equivariance)
    vae = players.vae
    posterior = vae.encode(x).latent_dist
    z = posterior.sample(posterior_generators(SEEDS))
    pair = None
    alone = transformation is not None and config.loss.equivariance.probability > 0
    if alone:
        reconstruction = vae.decode(transformation(z, transformation.latent_size(z))).sample
        x = transformation(x, reconstruction.shape[2:])
        values = x[0].numel()
    else:
        reconstruction = vae.decode(z).sample
    if transformation is not None and not alone:
        decoded = vae.decode(transformation(z, transformation.latent_size(z))).sample
        pair = (transformation(x, decoded.shape[2:]), decoded)
    logvar = players.generator.network.logvar
    terms = loss_terms(x, reconstruction, posterior, config.loss, Judges(perceptual), pair, logvar)
    nll = values * terms.nll(config.loss)
    g = -players.discriminator.network(reconstruction).mean()
    last = vae.decoder.conv_out.weight
    weight = 1.0
    if adaptive:
        # of the reconstruction alone: what the transformed image asks of the last layer does not weigh the GAN
        alone = values * loss_terms(x, reconstruction, posterior, config.loss, Judges(perceptual), None, logvar).nll(
            config.loss
        )
        of_nll, of_g = (torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (alone, g))
        weight = float((of_nll / (of_g + 1e-4)).clamp(0, 1e4)) / values
    loss = nll / values + config.loss.discriminator.weight * weight * g + config.loss.kl_weight * terms.kl
    loss.backward()
    found = gradients(players.generator.network)
    players.generator.optimizer.zero_grad()
    players.discriminator.optimizer.zero_grad()
    return found, float(loss)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize(
    "extras",
    [
        {},
        {"learn_logvar": True},
        {"equivariance": EquivarianceConfig(0.25, (0.5,))},
        {"equivariance": EquivarianceConfig(scales=(0.5625,), rotations=True, probability=1.0)},
    ],
)
def test_the_vaes_gradient_is_that_of_ldms_loss(accelerator, perceptual, adaptive, extras):
    config = recipe(discriminator={"adaptive": adaptive}, **extras)
    players = players_of(config, accelerator)
    if "learn_logvar" in extras:
        with torch.no_grad():
            players.generator.network.logvar.fill_(-0.7)
    wanted, loss = plainly(config, players, perceptual, adaptive)
    values, *_ = TrainStep(config, players, Judges(perceptual), accelerator).generator_pass(0, images(), SEEDS)
    assert relative_error(gradients(players.generator.network), wanted) < 1e-5
    assert float(values["loss"]) == pytest.approx(loss, rel=1e-5)


def test_generator_step_leaves_discriminator_gradients_empty(accelerator, perceptual):
    config = recipe()
    players = players_of(config, accelerator)
    TrainStep(config, players, Judges(perceptual), accelerator).generator_pass(0, images(), SEEDS)
    assert gradients(players.vae)
    assert not gradients(players.discriminator.network)
    assert all(p.requires_grad for p in players.discriminator.network.parameters()), "frozen for the step only"


@pytest.mark.parametrize("extras", [{}, {"r1_weight": 1.0, "lecam_weight": 0.1}])
def test_discriminator_step_leaves_vae_gradients_empty(accelerator, perceptual, extras):
    config = recipe(discriminator=extras)
    players = players_of(config, accelerator)
    _, _, reconstruction = TrainStep(config, players, Judges(perceptual), accelerator).generator_pass(
        0, images(), SEEDS
    )
    players.generator.optimizer.zero_grad()
    TrainStep(config, players, Judges(), accelerator).discriminator_pass(images(), reconstruction, SEEDS)
    assert gradients(players.discriminator.network)
    assert not gradients(players.generator.network)


def test_r1_and_lecam_are_in_the_discriminators_gradient(accelerator, perceptual):
    found = {}
    for name, extras in {"plain": {}, "r1": {"r1_weight": 1.0}, "lecam": {"lecam_weight": 1.0}}.items():
        config = recipe(discriminator=extras)
        players = players_of(config, accelerator)
        players.lecam.update(0.5, -0.5)
        TrainStep(config, players, Judges(), accelerator).discriminator_pass(images(), images().flip(0), SEEDS)
        found[name] = gradients(players.discriminator.network)
    assert relative_error(found["r1"], found["plain"]) > 1e-3
    assert relative_error(found["lecam"], found["plain"]) > 1e-3


def test_lpips_gradient_reaches_the_decoder(accelerator, perceptual):
    config = recipe(lpips_weight=1.0, kl_weight=0.0, discriminator={"weight": 0.0})
    with_lpips, without = {}, {}
    for found, trunk in ((with_lpips, perceptual), (without, None)):
        players = Players(players_of(recipe(), accelerator).vae, config, accelerator)
        TrainStep(config, players, Judges(trunk), accelerator).generator_pass(0, images(), SEEDS)
        found.update(gradients(players.vae.decoder))
    assert relative_error(with_lpips, without) > 1e-2


def test_before_the_gan_starts_nothing_of_it_is_computed(accelerator, perceptual):
    config = recipe(discriminator={"start_step": 2, "warmup_steps": 1})
    players = players_of(config, accelerator)
    calls = []
    players.discriminator.network.register_forward_pre_hook(lambda *_: calls.append(1))
    train_step = TrainStep(config, players, Judges(perceptual), accelerator)
    batch = {"image": images(), "noise_seed": SEEDS, "index": torch.tensor([0, 1]), "bad": []}
    before = [p.clone() for p in players.discriminator.network.parameters()]
    for step, learns, acts in ((0, False, False), (1, False, False), (2, True, False), (3, True, True)):
        calls.clear()
        result = train_step(step, iter([batch]))
        assert ("discriminator" in result.values[0]) == learns
        assert ("generator" in result.values[0]) == acts
        assert len(calls) == learns + acts
        if step == 2:
            after = list(players.discriminator.network.parameters())
            assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), "it learns alone"


def test_accumulated_halves_give_both_players_the_whole_batchs_gradient(accelerator, perceptual, monkeypatch):
    found: dict[str, list[dict]] = {}
    for name, micro_steps in (("whole", 1), ("halves", 2)):
        config = replace(recipe(discriminator={"adaptive": False}), gradient_accumulation_steps=micro_steps)
        players = players_of(config, accelerator)
        found[name] = []

        def keep(player, *_, seen=found[name]):
            seen.append(gradients(player.network))
            return torch.ones(())

        monkeypatch.setattr(Player, "clip", keep)
        parts = [slice(0, 2)] if micro_steps == 1 else [slice(0, 1), slice(1, 2)]
        batches = [
            {"image": images()[part], "noise_seed": SEEDS[part], "index": torch.arange(2)[part], "bad": []}
            for part in parts
        ]
        TrainStep(config, players, Judges(perceptual), accelerator)(0, iter(batches))
    for whole, halves in zip(found["whole"], found["halves"], strict=True):
        assert relative_error(halves, whole) < 1e-5


def test_a_learned_logvar_is_optimised_towards_the_error(accelerator):
    """d/ds [n e^-s + s] = 1 - n e^-s, zero where e^s is the error itself."""
    config = recipe(learn_logvar=True, lpips_weight=0.0, kl_weight=0.0, discriminator={"weight": 0.0})
    torch.manual_seed(0)
    players = Players(build_vae(config.model).train(), config, accelerator)
    values, *_ = TrainStep(config, players, Judges(), accelerator).generator_pass(0, images(), SEEDS)
    logvar = players.generator.network.logvar
    assert float(logvar.grad) == pytest.approx(1 - float(values["reconstruction"]), rel=1e-4)
    assert any(p is logvar for p in players.generator.trained)


def test_the_logged_logvar_is_the_one_that_the_logged_loss_was_computed_with(accelerator):
    config = recipe(learn_logvar=True, lpips_weight=0.0, kl_weight=0.0, discriminator={"weight": 0.0})
    torch.manual_seed(0)
    players = Players(build_vae(config.model).train(), config, accelerator)
    batch = {"image": images(), "noise_seed": SEEDS, "index": torch.tensor([0, 1]), "bad": []}
    train_step = TrainStep(config, players, Judges(), accelerator)
    for step in range(2):
        logged = train_step(step, iter([batch])).values[0]
        s = logged["logvar"]
        assert logged["loss"] == pytest.approx(logged["reconstruction"] * math.exp(-s) + s, rel=1e-6)
    assert s != 0


def test_a_frozen_encoder_gets_no_gradient_and_no_place_in_the_optimizer(accelerator):
    config = recipe(lpips_weight=0.0)
    torch.manual_seed(0)
    vae = build_vae(config.model).train()
    freeze_encoder(vae)
    players = Players(vae, config, accelerator)
    before = {name: p.clone() for name, p in vae.named_parameters()}
    batch = {"image": images(), "noise_seed": SEEDS, "index": torch.tensor([0, 1]), "bad": []}
    TrainStep(config, players, Judges(), accelerator)(0, iter([batch]))
    changed = {name for name, p in vae.named_parameters() if not torch.equal(p, before[name])}
    assert changed
    assert all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)
    averaged = dict(players.ema.model.named_parameters())
    latents = [name for name in before if name.startswith(("encoder.", "quant_conv."))]
    assert latents
    assert all(torch.equal(averaged[name], before[name]) for name in latents), "nor does the average drift"


def test_a_step_with_nan_changes_nothing(accelerator):
    config = recipe(lpips_weight=0.0)
    players = players_of(config, accelerator)
    before = [p.clone() for _, player in players for p in player.network.parameters()]
    spoilt = images()
    spoilt[1, 0, 0, 0] = math.nan
    batch = {"image": spoilt, "noise_seed": SEEDS, "index": torch.tensor([3, 4]), "bad": []}
    result = TrainStep(config, players, Judges(), accelerator)(0, iter([batch]))
    assert result.skipped
    assert "reconstruction nan" in result.culprits
    assert result.indices == [3, 4]
    after = [p for _, player in players for p in player.network.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert players.ema.updates == 0
    assert not gradients(players.generator.network)


def test_gradients_are_found_in_fp16s_range(accelerator, perceptual):
    """With a loss scaler the pulls are computed from scaled losses, and are the same numbers."""
    config = recipe()
    players = players_of(config, accelerator)
    TrainStep(config, players, Judges(perceptual), accelerator).generator_pass(0, images(), SEEDS)
    wanted = gradients(players.generator.network)
    players.generator.optimizer.zero_grad()
    scale = 1024.0
    scaled = SimpleNamespace(
        scaler=SimpleNamespace(scale=lambda loss: loss * scale),
        autocast=accelerator.autocast,
        reduce=accelerator.reduce,
        backward=lambda loss: (loss * scale).backward(),
    )
    TrainStep(config, players, Judges(perceptual), scaled).generator_pass(0, images(), SEEDS)
    found = {name: gradient / scale for name, gradient in gradients(players.generator.network).items()}
    assert relative_error(found, wanted) < 1e-5


def test_frozen_gives_back_what_trained_before():
    layer = torch.nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with frozen(layer):
        assert not layer.weight.requires_grad
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad


def test_learning_rate_warms_up_and_falls():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=3, schedule="cosine")
    rates = [learning_rate_at(step, 1.0, config, 11) for step in range(11)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[7] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert learning_rate_at(10, 1.0, replace(config, schedule="constant"), 11) == 1.0


def test_schedules_end_at_their_floor_and_wsd_is_constant_until_it_falls():
    cosine = OptimizerConfig(schedule="cosine", final_fraction=0.1)
    assert learning_rate_at(100, 2.0, cosine, 100) == pytest.approx(0.2)
    assert learning_rate_at(50, 2.0, cosine, 100) == pytest.approx(0.2 + 1.8 / 2)
    wsd = OptimizerConfig(schedule="wsd", warmup_steps=10, decay_fraction=0.25, final_fraction=0.1)
    rates = [learning_rate_at(step, 2.0, wsd, 100) for step in range(101)]
    assert rates[9] == pytest.approx(2.0 * 10 / 11)
    assert set(rates[10:76]) == {2.0}
    assert rates[76:] == pytest.approx([0.2 + 1.8 * (1 - math.sqrt(i / 25)) for i in range(1, 26)])
    assert rates[100] == pytest.approx(0.2)
    whole = replace(wsd, decay_fraction=1.0)  # never before the end of the warm-up
    assert [learning_rate_at(step, 2.0, whole, 100) for step in range(11)] == pytest.approx(rates[:11])


def test_a_rotation_and_a_scale_take_image_and_latents_alike(accelerator):
    """Means over patches stand for the encoder. A ramp, which every filter keeps, shows what goes where."""
    config = EquivarianceConfig(1.0, (0.5,), rotations=True)
    across, down = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="xy")
    x = torch.stack([across, down, across * 0.5 + down])[None]
    turned = set()
    for step in range(8):
        transformation = transformation_at(step, 3, config)
        turned.add(transformation.quarter_turns)
        z = torch.nn.functional.avg_pool2d(x, 8)
        small = transformation(z, transformation.latent_size(z))
        image = transformation(x, tuple(8 * side for side in small.shape[2:]))
        assert image.shape == (1, 3, 32, 32)
        inside = (..., slice(1, -1), slice(1, -1))
        torch.testing.assert_close(torch.nn.functional.avg_pool2d(image, 8)[inside], small[inside], atol=0.01, rtol=0)
        assert transformation == transformation_at(step, 3, config)
    assert len(turned) > 1


def test_a_step_has_a_transformation_with_the_probability_that_is_given():
    config = EquivarianceConfig(scales=(0.5, 0.75), rotations=True, probability=0.3)
    drawn = [transformation_at(step, 3, config) for step in range(2000)]
    found = [transformation for transformation in drawn if transformation is not None]
    assert len(found) == pytest.approx(600, abs=60)  # three standard deviations
    assert {(t.scale, t.quarter_turns) for t in found} == {(s, turns) for s in (0.5, 0.75) for turns in range(4)}
    assert all(transformation_at(step, 3, EquivarianceConfig(0.5)) is not None for step in range(20))


def test_the_discriminator_sees_the_transformed_images(accelerator, perceptual):
    config = recipe(equivariance=EquivarianceConfig(scales=(0.5,), probability=1.0))
    _, real, fake = TrainStep(config, players_of(config, accelerator), Judges(perceptual), accelerator).generator_pass(
        0, images(), SEEDS
    )
    assert real.shape == fake.shape == (2, 3, 32, 32)
    turned = torch.rot90(images(), transformation_at(0, config.seed, config.loss.equivariance).quarter_turns, (2, 3))
    torch.testing.assert_close(real.mean((2, 3)), turned.mean((2, 3)), atol=0.02, rtol=0)


def test_kl_of_the_posterior_is_untouched_by_the_discriminator(accelerator):
    config = recipe(lpips_weight=0.0)
    players = players_of(config, accelerator)
    values, *_ = TrainStep(config, players, Judges(), accelerator).generator_pass(0, images(), SEEDS)
    moments = players.generator.network(images(), posterior_generators(SEEDS), None)[1]
    assert float(values["kl"]) == pytest.approx(float(DiagonalGaussian(moments).kl().mean()) / 12288, rel=1e-5)
