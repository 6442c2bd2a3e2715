"""The tutorials' VAEs: the exact ELBO, labels, the cures of collapse; on scikit-learn's digits: no download."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from sklearn.datasets import load_digits
from torch.distributions import Bernoulli, Normal, kl_divergence

from sdvae import AutoencoderKL, DiagonalGaussian, InputError, load_vae
from sdvae.cli import main, parse_train_config
from sdvae.data import (
    EvaluationImages,
    ReadOptions,
    SampleKey,
    SampleOrder,
    ShardedBatches,
    TrainingImages,
    open_source,
)
from sdvae.data.dataset import NO_LABEL, read_labels, training_loader
from sdvae.model import tiling
from sdvae.model.blocks import NORM_EPS, ResnetBlock
from sdvae.noise import posterior_generators, sample_seed
from sdvae.roundtrip import bernoulli_mean, decode_output, encode_images
from sdvae.statistics import LatentHealth
from sdvae.training.build import build_vae
from sdvae.training.config import (
    DataConfig,
    DiscriminatorConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from sdvae.training.loop import train
from sdvae.training.objective import Judges, kl_weight_at, loss_terms
from sdvae.training.players import Players
from sdvae.training.step import TrainStep
from sdvae.tutorial.adversary import prior_samples
from sdvae.tutorial.conditional import ConditionalAutoencoderKL
from sdvae.tutorial.likelihood import (
    bernoulli_nll,
    draw_from_prior,
    elbo,
    free_bits_kl,
    log_likelihood,
    probabilities,
)
from tests.conftest import DIGITS_SIDE as SIDE
from tests.faults import Crash, blank, fault

ROOT = Path(__file__).parents[1]
SHAPE = ModelConfig(in_channels=1, block_out_channels=(4, 8, 16), layers_per_block=1, norm_num_groups=4)
CONDITIONAL = replace(SHAPE, num_classes=10)
FAST = OptimizerConfig(kind="adamw_fused", learning_rate=3e-3, betas=(0.9, 0.99))


@pytest.fixture(autouse=True)
def undrawn(request, monkeypatch):
    """Pictures take most of a tiny run's time; one test draws them."""
    if "reports_the_elbo_of_what_it_saves[mnist_cvae]" not in request.node.name:
        monkeypatch.setattr("sdvae.training.save.draw", blank)


def arguments(recipe: str, digits: Path, output: Path, **changes: object) -> list[str]:
    settings = {
        "steps": 4,
        "batch_size": 8,
        "log_every": 2,
        "validate_every": 4,
        "scale_images": 16,
        "grid_images": 2,
        "model.block_out_channels": [4, 8, 16],
        "data.source": digits,
        "data.validation_source": "null",
        "data.validation_count": 20,
        "data.resolution": SIDE,
        "data.num_workers": 0,
        "optimizer.warmup_steps": 0,
        "checkpoint.every_steps": 1000,
        "trackers": [],
        "output_dir": output,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    config = str(ROOT / "configs" / f"{recipe}.yaml")
    return ["--config", config, *(f"--{key}={value}" for key, value in settings.items())]


def records(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def grey(count: int, side: int = SIDE, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def vae_of(config: ModelConfig, seed: int = 0) -> AutoencoderKL:
    """A small VAE whose every weight matters: residual branches start at zero, here they do not."""
    torch.manual_seed(seed)
    return build_vae(replace(config, initialisation="torch")).eval()


# the likelihood and the bounds


def test_the_bernoulli_likelihood_is_torchs_on_black_and_white_and_linear_in_grey():
    logits = torch.randn(3, 1, 5, 4, generator=torch.Generator().manual_seed(1)) * 4
    white = torch.rand(logits.shape, generator=torch.Generator().manual_seed(2)) < 0.3
    want = -Bernoulli(logits=logits.double()).log_prob(white.double()).sum((1, 2, 3))
    torch.testing.assert_close(bernoulli_nll(white * 2.0 - 1, logits).double(), want, rtol=1e-5, atol=0)
    other = torch.rand(logits.shape) * 2 - 1
    mixed = bernoulli_nll(0.25 * (white * 2.0 - 1) + 0.75 * other, logits)
    want = 0.25 * want.float() + 0.75 * bernoulli_nll(other, logits)
    torch.testing.assert_close(mixed, want, rtol=1e-5, atol=0)


def test_pictures_are_the_probabilities_of_the_logits_and_stay_finite():
    logits = torch.tensor([[-200.0, -3.0, 0.0, 0.7, 200.0]])
    torch.testing.assert_close(probabilities(bernoulli_mean(logits)), torch.sigmoid(logits))
    image = torch.tensor([[[[-1.0, 1.0]]]])
    assert float(bernoulli_nll(image, torch.tensor([[[[-200.0, 200.0]]]]))) == 0.0
    assert float(bernoulli_nll(image, torch.tensor([[[[200.0, -200.0]]]]))) == 400.0


def test_the_objective_with_beta_one_is_the_negative_elbo_of_torchs_distributions():
    x, logits = grey(3), torch.randn(3, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    parameters = torch.randn(3, 8, 5, 5, generator=torch.Generator().manual_seed(2))
    config = LossConfig(reconstruction="bce", lpips_weight=0.0, kl_weight=1.0)
    terms = loss_terms(x, logits, DiagonalGaussian(parameters), config, Judges())
    mean, logvar = parameters.double().chunk(2, dim=1)
    kl = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    p, t = torch.sigmoid(logits.double()), (x.double() + 1) / 2
    want = float((-(t * p.log() + (1 - t) * (1 - p).log()).sum((1, 2, 3)) + kl).mean())
    assert float(terms.nelbo) == pytest.approx(want, rel=1e-5)
    assert float(terms.total(config, config.kl_weight)) * SIDE**2 == pytest.approx(want, rel=1e-5)
    assert float(terms.total(config, 3.0)) * SIDE**2 == pytest.approx(want + 2 * float(kl.mean()), rel=1e-5)
    assert float(terms.nelbo) == float(loss_terms(x, logits, DiagonalGaussian(parameters), config, Judges()).nelbo)


@pytest.mark.parametrize("config", [SHAPE, CONDITIONAL])
def test_padding_is_for_the_network_only(config):
    """28 -> 32 at MNIST's size, 18 -> 20 here: the loss sees the image's own pixels, and no others."""
    vae, x = vae_of(config), grey(2)
    posterior = encode_images(vae, x)
    padded = F.pad(x, (0, 2, 0, 2), mode="replicate")
    assert torch.equal(posterior.parameters, vae.encode(padded).latent_dist.parameters)
    decoded = decode_output(vae, posterior.mode(), x.shape[2:])
    assert torch.equal(decoded, vae.decode(posterior.mode()).sample[..., :SIDE, :SIDE])
    found = elbo(vae, x, generator=posterior_generators(torch.tensor([1, 2])))
    z = posterior.sample(posterior_generators(torch.tensor([1, 2])))
    want = bernoulli_nll(x, vae.decode(z).sample[..., :SIDE, :SIDE])
    torch.testing.assert_close(found.distortion, want)
    torch.testing.assert_close(found.nelbo, want + posterior.kl())
    at_mean = elbo(vae, x, sample_posterior=False)
    torch.testing.assert_close(at_mean.distortion, bernoulli_nll(x, decoded))


class OneLatent:
    """p(x|z) of four pixels with logits a·z + b, one latent, and a posterior that is not the right one."""

    spatial_compression_ratio = 2
    a, b = torch.tensor([3.0, -2.0, 1.0, 0.5]), torch.tensor([-1.0, 0.5, 0.0, 0.3])

    def encode(self, x):
        parameters = torch.cat([x.mean((2, 3), keepdim=True) + 0.3, torch.full((len(x), 1, 1, 1), -0.5)], dim=1)
        return type("Output", (), {"latent_dist": DiagonalGaussian(parameters)})

    def decode(self, z):
        return type("Output", (), {"sample": (z.view(-1, 1) * self.a + self.b).view(-1, 1, 2, 2)})


def test_the_importance_weighted_bound_converges_to_log_p_and_the_elbo_lies_below():
    vae, x = OneLatent(), grey(3, side=2)
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    logits = z[:, None] * vae.a + vae.b
    t = probabilities(x).double().flatten(1)
    likelihood = torch.stack([(row * F.logsigmoid(logits) + (1 - row) * F.logsigmoid(-logits)).sum(1) for row in t])
    density = Normal(0.0, 1.0).log_prob(z)
    exact = torch.logsumexp(likelihood + density, dim=1) + math.log(18 / 20_000)  # by quadrature
    generator = torch.Generator().manual_seed(0)
    estimate = log_likelihood(vae, x, samples=2000, generator=generator)
    torch.testing.assert_close(estimate.double(), exact, atol=0.03, rtol=0)
    many = x.repeat_interleave(2000, 0)  # 2000 draws of each
    bounds = [log_likelihood(vae, many, samples=k, generator=generator).view(3, -1).mean(1) for k in (1, 5)]
    elbos = -elbo(vae, many, generator=generator).nelbo.view(3, -1).mean(1)
    torch.testing.assert_close(bounds[0], elbos, atol=0.05, rtol=0)
    assert (bounds[0] < bounds[1]).all()
    assert (bounds[1] < exact).all()


# labels in the model


def randomised(config: ModelConfig = CONDITIONAL) -> ConditionalAutoencoderKL:
    vae = vae_of(config)
    assert isinstance(vae, ConditionalAutoencoderKL)
    return vae


def test_with_silent_labels_it_is_the_plain_vae_and_has_its_weights():
    plain, conditional = vae_of(SHAPE), randomised()
    names = {name for name in conditional.state_dict() if "label" not in name}
    assert names == set(plain.state_dict())
    conditional.load_state_dict(plain.state_dict(), strict=False)
    for block in conditional.modules():
        if isinstance(block, ResnetBlock):
            torch.nn.init.zeros_(block.label_proj.weight)
            torch.nn.init.zeros_(block.label_proj.bias)
    x, labels = grey(3, 20), torch.tensor([1, 2, 3])
    with torch.no_grad():
        torch.testing.assert_close(conditional(x, labels=labels).sample, plain(x).sample)
        assert len([m for m in conditional.modules() if isinstance(m, ResnetBlock)]) == 3 + 2 + 2 + 6


def test_a_new_conditional_vae_starts_with_silent_labels_that_can_be_heard_later():
    torch.manual_seed(0)
    vae = build_vae(CONDITIONAL)
    blocks = [module for module in vae.modules() if isinstance(module, ResnetBlock)]
    assert not any(block.label_proj.weight.any() for block in blocks)
    assert 0.8 < float(vae.label_embedding.weight.detach().std()) < 1.2


def test_encoder_and_decoder_both_hear_the_label_of_each_image_alone():
    vae, x = randomised(), grey(3, 20)
    one, other = torch.tensor([4, 5, 6]), torch.tensor([4, 7, 6])
    with torch.no_grad():
        moments = [vae.encode(x, labels=labels).latent_dist.parameters for labels in (one, other)]
        z = torch.randn(3, 4, 5, 5)
        images = [vae.decode(z, labels=labels).sample for labels in (one, other)]
    for a, b in (moments, images):
        torch.testing.assert_close(a[[0, 2]], b[[0, 2]])
        assert float((a[1] - b[1]).abs().max()) > 1e-3


def test_no_label_is_a_class_of_its_own():
    vae, x = randomised(), grey(2, 20)
    with torch.no_grad():
        without = vae(x).sample
        torch.testing.assert_close(vae(x, labels=torch.tensor([-1, -1])).sample, without)
        assert all(float((vae(x, labels=torch.tensor([c, c])).sample - without).abs().max()) > 1e-4 for c in range(10))


@pytest.mark.parametrize("labels", [[1], [3, 10], [0.5, 1.0]])
def test_labels_that_do_not_fit_are_refused(labels):
    vae = randomised()
    with pytest.raises(InputError, match="need 2 integers up to 9, or below 0 for no label"):
        vae.encode(grey(2, 20), labels=torch.tensor(labels))
    with pytest.raises(InputError, match="need 2 integers up to 9"):
        vae.decode(torch.zeros(2, 4, 5, 5), labels=torch.tensor(labels))


def test_diffusers_has_no_such_class():
    with pytest.raises(InputError, match="conditional VAE"):
        randomised().to_diffusers()


@pytest.mark.parametrize("switch", ["enable_slicing", "enable_tiling"])
def test_labels_reach_every_slice_and_every_strip(switch, monkeypatch):
    monkeypatch.setattr(tiling, "STRIP_BYTES", 2**9)
    monkeypatch.setattr(tiling, "STRIPS_A_MAP", 1)
    vae, x, labels = randomised().double(), grey(3, 20).double(), torch.tensor([4, -1, 7])
    with torch.no_grad():
        want = vae(x, labels=labels)
        getattr(vae, switch)()
        got = vae(x, labels=labels)
    torch.testing.assert_close(got.posterior.parameters, want.posterior.parameters)
    torch.testing.assert_close(got.sample, want.sample)


@pytest.mark.parametrize("widths", [(8, 8), (8, 12)])
def test_a_block_with_an_embedding_is_diffusers_block(widths):
    """Bit for bit, called as diffusers calls its own."""
    block = ResnetBlock(*widths, num_groups=4, temb_channels=6)
    stock = ResnetBlock2D(in_channels=widths[0], out_channels=widths[1], temb_channels=6, groups=4, eps=NORM_EPS)
    names = {name: name.replace("label_proj", "time_emb_proj") for name in block.state_dict()}
    stock.load_state_dict({names[name]: weight for name, weight in block.state_dict().items()})
    x, temb = torch.randn(2, widths[0], 5, 7), torch.randn(2, 6)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert torch.equal(block(x, temb=temb), stock(x, temb=temb))


def test_a_conditional_vae_comes_back_from_its_folder_and_load_vae_refuses_it(tmp_path):
    vae = randomised()
    vae.save_pretrained(tmp_path)
    again = ConditionalAutoencoderKL.from_pretrained(tmp_path)
    assert dict(again.config)["num_classes"] == 10
    x, labels = grey(2, 20), torch.tensor([3, -1])
    with torch.no_grad():
        assert torch.equal(again(x, labels=labels).sample, vae(x, labels=labels).sample)
    with pytest.raises(InputError, match="is for ConditionalAutoencoderKL; need an AutoencoderKL"):
        load_vae(tmp_path)


def test_gradient_checkpointing_gives_labels_the_same_gradients():
    vae, x, labels = randomised().train(), grey(2, 20), torch.tensor([3, -1])

    def gradients() -> dict[str, torch.Tensor]:
        vae.zero_grad()
        vae(x, labels=labels).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in vae.named_parameters()}

    plain = gradients()
    vae.enable_gradient_checkpointing()
    recomputed = gradients()
    assert plain.keys() == recomputed.keys()
    assert plain["label_embedding.weight"][[3, 10]].abs().min() > 0, "of the two labels that were there"
    assert not plain["label_embedding.weight"][[0, 1, 2, 4, 5, 6, 7, 8, 9]].any()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_pictures_from_the_prior_have_the_images_size_and_are_the_seeds():
    vae, labels = randomised(), torch.tensor([3, 3, 5])
    with torch.no_grad():
        drawn = [draw_from_prior(vae, 3, SIDE, labels, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert drawn[0].shape == (3, 1, SIDE, SIDE)
    assert float(drawn[0].abs().max()) <= 1
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_guidance_moves_the_logits_along_what_the_label_changes():
    vae, labels = randomised(), torch.tensor([3, 3, 5])

    def drawn(labels: torch.Tensor | None, **guidance: float) -> torch.Tensor:
        return draw_from_prior(vae, 3, SIDE, labels, torch.Generator().manual_seed(1), **guidance)

    with torch.no_grad():
        given, none = (2 * torch.atanh(drawn(which).double()) for which in (labels, None))
        for w in (0.0, 1.0, 2.5):
            want = bernoulli_mean(none + w * (given - none))
            torch.testing.assert_close(drawn(labels, guidance=w).double(), want, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="without labels"):
        drawn(None, guidance=2.0)


# labels in the data


def test_labels_are_read_in_the_order_of_the_images(digits):
    source = open_source(str(digits))
    labels = read_labels(source, "label", 10)
    assert labels.tolist() == load_digits().target.tolist()
    images = EvaluationImages(source, SIDE, ReadOptions(channels=1), labels=labels)
    assert [images[i]["label"] for i in (3, 14, 1000)] == labels[[3, 14, 1000]].tolist()


def test_labels_that_are_missing_or_out_of_range_are_refused(digits, photographs):
    with pytest.raises(InputError, match="no column 'label' of labels; need one of: none"):
        read_labels(open_source(str(photographs)), "label", 10)
    source = open_source(str(digits))
    with pytest.raises(InputError, match=r"no column 'digit' .* need one of: label"):
        read_labels(source, "digit", 10)
    with pytest.raises(InputError, match=r"holds 0 \.\. 9; need 0 \.\. 8.*set model.num_classes=10"):
        read_labels(source, "label", 9)


def test_a_label_is_dropped_by_its_sample_alone_and_as_often_as_asked(digits):
    source = open_source(str(digits))
    labels = read_labels(source, "label", 10)

    def images(dropout: float) -> TrainingImages:
        return TrainingImages(
            source, resolution=SIDE, seed=7, reading=ReadOptions(channels=1), labels=labels, label_dropout=dropout
        )

    keys = [SampleKey(epoch, index) for epoch in (0, 1) for index in range(400)]
    dropped = images(0.25)
    first = [dropped[key]["label"] for key in keys]
    missing = [label == NO_LABEL for label in first]
    assert 0.2 < np.mean(missing) < 0.3
    assert missing[:400] != missing[400:], "another epoch drops others"
    assert all(m or label == labels[key.index] for m, label, key in zip(missing, first, keys, strict=True))
    assert [dropped[key]["label"] for key in reversed(keys)] == first[::-1]
    assert [images(0.0)[key]["label"] for key in keys[:50]] == labels[:50].tolist()


def test_a_substitute_brings_its_own_label(digits):
    source = open_source(str(digits))

    class Spoilt:
        features, columns, name = source.features, source.columns, source.name

        def __len__(self):
            return len(source)

        def read(self, index):
            return b"" if index == 5 else source.read(index)

    labels = read_labels(source, "label", 10)
    images = TrainingImages(
        Spoilt(), resolution=SIDE, seed=7, reading=ReadOptions(channels=1), flip=0, crop_scale=(1, 1), labels=labels
    )
    differed = False
    for epoch in range(6):
        sample = images[SampleKey(epoch, 5)]
        stand_in = sample_seed(7, epoch, 5, "substitute-0") % len(source)
        assert sample["label"] == labels[stand_in]
        differed |= labels[stand_in] != labels[5]
    assert differed


def test_the_gradient_does_not_depend_on_how_labels_and_free_bits_are_divided(digits):
    """One process with batch 4 and two with batch 2."""
    source = open_source(str(digits))
    labels = read_labels(source, "label", 10)
    loss = LossConfig(reconstruction="bce", lpips_weight=0.0, kl_weight=1.0, free_bits=30.0)
    config = TrainConfig(model=CONDITIONAL, loss=loss, channels_last=False)
    images = TrainingImages(
        source, resolution=SIDE, seed=3, reading=ReadOptions(channels=1), labels=labels, label_dropout=0.5
    )
    found = []
    for world, size in ((1, 4), (2, 2)):
        accelerator = Accelerator(cpu=True)
        players = Players(vae_of(CONDITIONAL).train(), config, accelerator)
        step = TrainStep(config, players, Judges(), accelerator)
        seen = []
        for rank in range(world):
            order = ShardedBatches(SampleOrder(len(source), 3), size, rank, world, num_batches=1)
            for batch in training_loader(images, order, num_workers=0):
                seen += batch["label"].tolist()
                step.generator_pass(0, batch["image"], batch["noise_seed"], labels=batch["label"])
        gradients = [p.grad / world for p in players.vae.parameters()]
        found.append((seen, torch.cat([g.flatten() for g in gradients])))
    assert found[0][0] == found[1][0]
    assert NO_LABEL in found[0][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-7)


# free bits


def test_free_bits_charge_each_channel_its_floor_and_pull_at_none_below():
    parameters = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    posterior = DiagonalGaussian(parameters)
    each = posterior.kl_map().sum((2, 3))
    floor = float(each.detach().median())
    want = [sum(max(kl, floor) for kl in row) for row in each.tolist()]
    got = free_bits_kl(posterior, floor)
    assert got.tolist() == pytest.approx(want, rel=1e-5)
    got.sum().backward()
    pulled = parameters.grad[:, :2].abs().sum((2, 3)) > 0  # of the means
    assert torch.equal(pulled, each > floor)


def test_free_bits_are_in_the_objective_and_the_log_keeps_the_true_kl():
    x, posterior = grey(2), DiagonalGaussian(torch.zeros(2, 8, 5, 5))
    config = LossConfig(reconstruction="bce", lpips_weight=0.0, kl_weight=1.0, free_bits=3.0)
    terms = loss_terms(x, torch.zeros_like(x), posterior, config, Judges())
    nll = SIDE**2 * math.log(2)
    assert float(terms.total(config, 1.0)) * SIDE**2 == pytest.approx(nll + 4 * 3.0, rel=1e-5)
    assert float(terms.kl) == 0
    assert float(terms.nelbo) == pytest.approx(nll, rel=1e-5)


@pytest.mark.slow
def test_a_posterior_that_collapses_is_named_and_warm_up_or_free_bits_cure_it():
    """β = 3, torch's initial weights: the KL term acts before any signal of the digits has come through."""
    x = F.interpolate(torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1, size=16, mode="bilinear")
    nelbo, complaints = {}, {}
    for name, cure in {"none": {}, "warm-up": {"kl_warmup_steps": 150}, "free bits": {"free_bits": 0.5}}.items():
        config = LossConfig(reconstruction="bce", lpips_weight=0.0, kl_weight=3.0, **cure)
        vae = vae_of(SHAPE).train()
        optimizer = torch.optim.AdamW(vae.parameters(), 3e-3, betas=(0.9, 0.99), fused=True)
        torch.manual_seed(0)
        for step in range(200):
            batch = x[torch.randint(len(x), (32,))]
            output = vae(batch, sample_posterior=True)
            terms = loss_terms(batch, output.sample, output.posterior, config, Judges())
            optimizer.zero_grad()
            terms.total(config, kl_weight_at(step, config)).backward()
            torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
            optimizer.step()
        health = LatentHealth(4)
        with torch.no_grad():
            health.update(encode_images(vae, x[:200]))
            nelbo[name] = float(elbo(vae, x[:200]).nelbo.mean())
        complaints[name] = " ".join(health.complaints())
    print(nelbo, complaints)
    assert "posterior collapse: 4 of 4 channels" in complaints["none"]
    assert all("posterior collapse" not in complaints[name] for name in ("warm-up", "free bits"))
    assert max(nelbo["warm-up"], nelbo["free bits"]) < nelbo["none"] - 3


# a discriminator of latents


def adversarial(weight: float, **changes: object) -> TrainConfig:
    discriminator = DiscriminatorConfig(sees="latents", weight=weight, start_step=0, layers=2, width=32, **changes)
    loss = LossConfig(reconstruction="bce", lpips_weight=0.0, kl_weight=0.0, discriminator=discriminator)
    return TrainConfig(
        model=SHAPE, loss=loss, data=DataConfig(resolution=SIDE, pad=True), mixed_precision="no", channels_last=False
    )


def test_the_adversary_pulls_the_encoder_and_learns_from_draws_of_the_prior():
    """Both players' gradients against autograd on the formulas."""
    config, accelerator = adversarial(0.3, loss="vanilla"), Accelerator(cpu=True)
    vae, x, seeds = vae_of(SHAPE).train(), grey(3), torch.tensor([5, 6, 7])
    players = Players(vae, config, accelerator)
    network = players.discriminator.network
    posterior = encode_images(vae, x)
    z = posterior.sample(posterior_generators(seeds))
    nll = bernoulli_nll(x, decode_output(vae, z, x.shape[2:])).mean() / SIDE**2
    want = torch.autograd.grad(nll - 0.3 * network(z).mean(), list(vae.parameters()))

    step = TrainStep(config, players, Judges(), accelerator)
    values, real, fake = step.generator_pass(0, x, seeds)
    assert torch.equal(fake, z.detach())
    assert torch.equal(real, prior_samples(fake, seeds))
    torch.testing.assert_close(values["loss"], nll + 0.3 * values["generator"])
    for parameter, gradient in zip(vae.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-8)
    assert all(p.grad is None for p in network.parameters())

    want = torch.autograd.grad(
        0.5 * (F.softplus(-network(real)).mean() + F.softplus(network(fake)).mean()), list(network.parameters())
    )
    vae.zero_grad()
    step.discriminator_pass(real, fake, torch.arange(len(real)))
    for parameter, gradient in zip(network.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-8)
    assert all(p.grad is None for p in vae.parameters())


def test_draws_of_the_prior_are_each_images_own_and_not_its_posteriors_noise():
    like, seeds = torch.zeros(2000, 4, 3, 3), torch.arange(2000)
    real = prior_samples(like, seeds)
    assert torch.equal(prior_samples(like[7:8], seeds[7:8]), real[7:8])
    noise = DiagonalGaussian(torch.zeros(2000, 8, 3, 3)).sample(posterior_generators(seeds))
    assert abs(float((real * noise).mean())) < 0.02
    assert abs(float(real.mean())) < 0.02
    assert abs(float(real.std()) - 1) < 0.02


@pytest.mark.slow
def test_an_adversary_in_the_kls_place_brings_all_latents_to_the_prior():
    """Neither has a KL term: what the latents' mean, std and fourth moment are is the adversary's doing."""
    x = F.interpolate(torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1, size=16, mode="bilinear")
    far = {}
    for weight in (0.0, 0.02):
        config, accelerator = adversarial(weight), Accelerator(cpu=True)
        config = replace(config, data=replace(config.data, resolution=16), steps=150, optimizer=FAST)
        players = Players(vae_of(SHAPE).train(), config, accelerator)
        torch.manual_seed(0)
        picks = [torch.randint(len(x), (32,)) for _ in range(config.steps)]
        batches = iter(
            {"image": x[pick], "noise_seed": pick + 2000 * step, "index": pick} for step, pick in enumerate(picks)
        )
        train_step = TrainStep(config, players, Judges(), accelerator)
        for step in range(config.steps):
            train_step(step, batches)
        with torch.no_grad():
            z = encode_images(players.vae.eval(), x).sample(torch.Generator().manual_seed(0))
        moments = torch.stack([z.mean(0), z.square().mean(0), z.pow(4).mean(0) / 3])
        far[weight] = float((moments - torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1, 1)).abs().mean())
        with torch.no_grad():
            distortion = float(elbo(players.vae, x).distortion.mean())
        print(f"weight {weight}: {far[weight]:.2f}, std {float(z.std(0).mean()):.2f}, distortion {distortion:.1f}")
    assert far[0.02] < 0.3 * far[0.0]


# runs


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mnist_vae", "mnist_cvae"])
def test_a_run_of_each_recipe_reports_the_elbo_of_what_it_saves(recipe, digits, tmp_path):
    assert main(["train", *arguments(recipe, digits, tmp_path / "run", steps=6, log_every=3, validate_every=6)]) == 0
    lines = records(tmp_path / "run")
    training = [line for line in lines if "train/loss" in line]
    for line in training:
        assert line["train/loss"] * SIDE**2 == pytest.approx(line["train/nelbo"], rel=1e-4)
    assert training[1]["train/nelbo"] < training[0]["train/nelbo"]
    last = [line for line in lines if "validation/nelbo" in line][-1]
    assert last["validation/nelbo"] == pytest.approx(last["validation/distortion"] + last["validation/rate"], rel=1e-6)
    assert last["validation/kl"] * SIDE**2 == pytest.approx(last["validation/rate"], rel=1e-5)

    kind = ConditionalAutoencoderKL if recipe == "mnist_cvae" else AutoencoderKL
    vae = kind.from_pretrained(tmp_path / "run" / "model").eval()
    assert type(vae) is kind
    config = parse_train_config(arguments(recipe, digits, tmp_path / "run"))
    from sdvae.training.data import open_sources

    _, held_out = open_sources(config.data, config.seed)
    images = EvaluationImages(held_out, SIDE, ReadOptions(channels=1), labels=read_labels(held_out, "label", 10))
    x = torch.stack([images[i]["image"] for i in range(len(images))])
    labels = torch.tensor([images[i]["label"] for i in range(len(images))]) if recipe == "mnist_cvae" else None
    seeds = torch.tensor([sample_seed(config.seed, 0, i, "validation") for i in range(len(images))])
    with torch.no_grad():
        want = float(elbo(vae, x, labels, posterior_generators(seeds)).nelbo.mean())
    assert last["validation/nelbo"] == pytest.approx(want, rel=1e-4)
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    (snippet,) = [line for line in card.splitlines() if line.endswith(f"import {kind.__name__}")]
    exec(snippet)  # what the card tells its reader to type
    assert "gives the logits" in card
    if recipe == "mnist_cvae":
        with Image.open(tmp_path / "run" / "images" / "step-00000006.png") as picture:
            assert picture.width >= 3 * 96, "small digits are drawn large enough for their captions"


@pytest.mark.slow
def test_a_run_with_labels_and_an_adversary_that_was_killed_continues_to_the_same_bits(digits, tmp_path):
    changes = {"data__label_dropout": 0.3, "loss__kl_warmup_steps": 3, "checkpoint__every_steps": 2}
    adversary = {"sees": "latents", "weight": 0.02, "start_step": 1, "width": 8}
    changes |= {f"loss__discriminator__{key}": value for key, value in adversary.items()}
    whole = train(parse_train_config(arguments("mnist_cvae", digits, tmp_path / "whole", **changes)))
    recipe = parse_train_config(arguments("mnist_cvae", digits, tmp_path / "cut", **changes))
    with fault("crash", 3), pytest.raises(Crash):
        train(recipe)
    cut = train(recipe)
    a, b = (ConditionalAutoencoderKL.from_pretrained(folder).state_dict() for folder in (whole, cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__in_channels": 3}, "need grey images"),
        ({"loss__discriminator__weight": 0.5}, "a discriminator would see logits"),
        ({"loss__learn_logvar": "true"}, "has no variance"),
        ({"loss__equivariance__weight": 0.5}, "need a resolution without padding"),
        ({"data__pad": "false"}, "need a positive multiple of 4"),
        ({"fine_tune__source": "some/vae"}, "which has no labels"),
        ({"compile": "true"}, "a conditional VAE is not compiled"),
        ({"loss__free_bits": -1}, "need 0 or more"),
        ({"data__label_dropout": 1.5}, "need a number from 0 to 1"),
        ({"model__num_classes": -1}, "need 0 for none"),
        ({"model__num_classes": 5}, r"need 0 \.\. 4"),
        ({"data__label_column": "digit"}, "set data.label_column"),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(changes, message, digits, tmp_path, capsys):
    assert main(["train", *arguments("mnist_cvae", digits, tmp_path / "run", **changes)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


def test_the_elbo_is_a_best_metric_only_where_it_is_measured(digits, tmp_path):
    changes = {"loss__reconstruction": "l2", "checkpoint__best_metric": "nelbo"}
    with pytest.raises(InputError, match="need one of psnr, ssim"):
        train(parse_train_config(arguments("mnist_vae", digits, tmp_path / "run", **changes)))


# scripts/mnist.py


@pytest.fixture(scope="module")
def script():
    """scripts/mnist.py as a module; it imports its neighbour."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("mnist")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.mark.slow
def test_the_script_fills_its_table_and_draws_its_pictures(script, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "BETAS", (0.1, 10.0))
    monkeypatch.setattr(script, "train_baseline", lambda x, y, epochs: script.TutorialVAE(y is not None).eval())
    sizes = [
        "--short_steps=2",
        "--collapse_steps=2",
        "--test_images=300",
        "--iw_images=20",
        "--iw_samples=3",
        "--drawn=3",
    ]
    recipe = ["--steps=2", "--batch_size=4", "--validate_every=2", "--data.num_workers=0", "--optimizer.warmup_steps=0"]
    recipe += ["--scale_images=8", "--grid_images=1", "--data.validation_count=20", "--log_every=1"]
    given = ["--output", str(tmp_path), "--train", str(digits), "--test", str(digits), "--classifier_epochs=1"]
    script.main([*given, *sizes, *recipe])
    figures = json.loads((tmp_path / "figures.json").read_text())
    rows = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert len(rows) == len(figures["table"]) == 5
    for row, found in zip(rows, figures["table"].values(), strict=True):
        assert found["nelbo"] == pytest.approx(found["distortion"] + found["rate"], rel=1e-5)
        assert f"| {found['nelbo']:.2f} |" in row
    assert figures["table"]["mlp"]["parameters"] == 785 * 400 + 401 * 40 + 21 * 400 + 401 * 784
    assert set(figures["sweep"]) == {"0.1", "10"}
    assert set(figures["collapse"]) == {"no cure", "KL warm-up", "free bits"}
    assert set(figures["digits"]["drawn"]) == {"1", "1.5", "2"}
    assert all(0 <= row["recognised"] <= 1 and row["diversity"] > 0 for row in figures["digits"]["drawn"].values())
    for name in ("digits", "rate_distortion", "collapse"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 10, name


def test_the_tutorials_mlp_learns_with_and_without_labels(script, digits):
    x, y = script.load_digits(str(digits), "train", 640)
    assert x.shape == (640, 1, 28, 28)
    assert y[:10].tolist() == list(range(10))
    with torch.no_grad():
        before = float(elbo(script.TutorialVAE(False), x).nelbo.mean())
    for labels in (None, y):
        vae = script.train_baseline(x, labels, epochs=2)
        with torch.no_grad():
            assert float(elbo(vae, x, labels).nelbo.mean()) < 0.7 * before


def test_diversity_is_the_mean_distance_within_a_class(script):
    labels = torch.arange(10).repeat(3)
    images = torch.rand(30, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    each = [
        float(((images[i] - images[j]) / 2).square().sum().sqrt())
        for i in range(30)
        for j in range(i)
        if labels[i] == labels[j]
    ]
    assert script.diversity(images, labels) == pytest.approx(np.mean(each), rel=1e-5)
