"""Alignment of latents with a vision transformer's features, as in VA-VAE."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import Dinov2Config, Dinov2Model

from sdvae import InputError
from sdvae.errors import Stopped
from sdvae.metrics.features import load_features
from sdvae.model import DiagonalGaussian
from sdvae.noise import posterior_generators
from sdvae.training.alignment import alignment_penalty, features_at_latents
from sdvae.training.checkpoint import checkpoints, read_checkpoint
from sdvae.training.config import AlignmentConfig
from sdvae.training.objective import Judges
from sdvae.training.players import Players
from sdvae.training.recipe import parse_train_config
from sdvae.training.step import TrainStep
from tests.conftest import draw_photographs, tiny_arguments, tiny_vae
from tests.faults import fault
from tests.test_resume import differences, records, result, run, undrawn  # noqa: F401

SEEDS = torch.tensor([1, 2])
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> str:
    torch.manual_seed(0)
    shape = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    folder = str(tmp_path_factory.mktemp("dinov2"))
    Dinov2Model(Dinov2Config(patch_size=7, image_size=28, **shape)).save_pretrained(folder)
    return folder


def test_the_penalty_is_that_of_a_loop_over_positions_and_pairs():
    generator = torch.Generator().manual_seed(1)
    z, f = (torch.randn(2, 5, 3, 4, generator=generator) for _ in range(2))
    config = AlignmentConfig(cosine_margin=0.6, distance_margin=0.2)

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(F.cosine_similarity(a.double(), b.double(), dim=0))

    along, apart = [], []
    places = [(i, j) for i in range(3) for j in range(4)]
    for n in range(2):
        for i, j in places:
            along.append(max(0.0, 1 - 0.6 - cosine(z[n, :, i, j], f[n, :, i, j])))
            for k, m in places:
                of_z, of_f = (cosine(x[n, :, i, j], x[n, :, k, m]) for x in (z, f))
                apart.append(max(0.0, abs(of_z - of_f) - 0.2))
    wanted = sum(along) / len(along) + sum(apart) / len(apart)
    assert float(alignment_penalty(z, f, config)) == pytest.approx(wanted, rel=1e-5)
    assert float(alignment_penalty(3 * f, f, config)) == pytest.approx(0.0, abs=1e-6)


def test_the_features_are_the_last_ones_of_the_patch_at_each_position(dinov2):
    features = load_features(dinov2)
    network = Dinov2Model.from_pretrained(dinov2).eval()
    images = torch.rand(2, 3, 21, 14) * 2 - 1  # whole patches: nothing is resized
    found = features_at_latents(features, images, (3, 2))
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        tokens = network(((images + 1) / 2 - mean) / std).last_hidden_state[:, 1:]
    torch.testing.assert_close(found, tokens.transpose(1, 2).unflatten(2, (3, 2)), rtol=1e-4, atol=1e-5)
    assert features_at_latents(features, IMAGES, (8, 8)).shape == (2, 12, 8, 8)


@pytest.mark.parametrize("adaptive", [True, False])
def test_a_step_adds_the_term_with_the_ratio_of_gradients_at_the_encoders_last_layer(dinov2, tmp_path, adaptive):
    settings = {"loss__alignment__weight": "0.3", "loss__alignment__net": dinov2, "loss__kl_weight": "0"}
    settings |= {"data__resolution": "16", "loss__alignment__adaptive": str(adaptive).lower(), "channels_last": "false"}
    settings["model__block_out_channels"] = "[8, 16]"
    config = parse_train_config(tiny_arguments(tmp_path, tmp_path / "run", **settings))
    accelerator, features, vae = Accelerator(cpu=True), load_features(dinov2), tiny_vae()
    players = Players(vae, config, accelerator, None, 12)
    step = TrainStep(config, players, Judges(alignment=features), accelerator)
    values, *_ = step.generator_pass(0, IMAGES, SEEDS)
    found = {name: p.grad.clone() for name, p in players.generator.network.named_parameters()}
    players.generator.optimizer.zero_grad()

    projection = players.generator.network.projection
    posterior = DiagonalGaussian(vae.encode(IMAGES).latent_dist.parameters)
    z = posterior.sample(posterior_generators(SEEDS))
    nll = (vae.decode(z).sample - IMAGES).abs().mean()
    penalty = alignment_penalty(
        projection(z), features_at_latents(features, IMAGES, z.shape[2:]), config.loss.alignment
    )
    layer = vae.encoder.conv_out.weight
    of_nll, of_penalty = (torch.autograd.grad(x, layer, retain_graph=True)[0].norm() for x in (nll, penalty))
    weight = 0.3 * of_nll / (of_penalty + 1e-4) if adaptive else torch.tensor(0.3)
    assert float(values["alignment"]) == pytest.approx(float(penalty), rel=1e-4)
    assert float(values["loss"]) == pytest.approx(float(nll + weight * penalty), rel=1e-4)
    (nll + weight.detach() * penalty).backward()
    for name, p in players.generator.network.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert found["projection.weight"].abs().max() > 0
    assert not any(p.requires_grad for p in features.parameters())


@pytest.mark.slow
def test_an_aligned_run_is_continued_exactly_with_its_projection(dinov2, tmp_path):
    source = draw_photographs(tmp_path / "photographs")
    settings = {"steps": "5", "data__num_workers": "0"}
    settings |= {"loss__alignment__weight": "0.1", "loss__alignment__net": dinov2}
    run(source, tmp_path / "whole", **settings)
    with fault("sigterm", 3), pytest.raises(Stopped):
        run(source, tmp_path / "run", **settings)
    run(source, tmp_path / "run", **settings)
    assert not differences(result(tmp_path / "run"), result(tmp_path / "whole"))
    weights = read_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[0]).weights
    assert any("projection.weight" in network for network in weights.values())
    assert all("train/alignment_weight" in line for line in records(tmp_path / "run") if "train/loss" in line)


def test_what_cannot_be_aligned_is_refused(tmp_path):
    settings = {"fine_tune__source": "x", "fine_tune__freeze_encoder": "true", "loss__alignment__weight": "1"}
    with pytest.raises(InputError, match=r"got loss.alignment.weight=1 with fine_tune.freeze_encoder"):
        parse_train_config(tiny_arguments(tmp_path, tmp_path / "run", **settings))
