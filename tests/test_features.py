"""Feature maps of frozen networks, and the discriminator that looks at them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from sdvae import InputError
from sdvae.errors import Stopped
from sdvae.metrics.features import FeatureDistance, load_features
from sdvae.training.checkpoint import checkpoints, read_checkpoint
from sdvae.training.discriminator import FeatureDiscriminator, r1_penalty
from tests.conftest import draw_photographs
from tests.faults import fault
from tests.test_resume import differences, records, result, run, undrawn  # noqa: F401

SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
TRANSFORMERS = {
    "dino": (ViTModel, ViTConfig(patch_size=8, image_size=32, **SMALL)),
    "dinov2": (Dinov2Model, Dinov2Config(patch_size=7, image_size=28, **SMALL)),
    "registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig(patch_size=7, image_size=28, **SMALL)),
}


@pytest.fixture(scope="module")
def convnext(tmp_path_factory) -> tuple[str, torch.nn.Module]:
    """(file of weights, the network)."""
    torch.manual_seed(0)
    network = torchvision.models.convnext_tiny().eval()
    path = tmp_path_factory.mktemp("convnext") / "convnext_tiny.pth"
    torch.save(network.state_dict(), path)
    return str(path), network


@pytest.fixture(scope="module")
def transformers(tmp_path_factory) -> dict[str, str]:
    folders = {}
    for name, (kind, config) in TRANSFORMERS.items():
        torch.manual_seed(0)
        folders[name] = str(tmp_path_factory.mktemp(name))
        kind(config).save_pretrained(folders[name])
    return folders


def normalised(images: torch.Tensor) -> torch.Tensor:
    return torchvision.transforms.functional.normalize((images + 1) / 2, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_the_maps_of_convnext_are_its_four_stages_of_normalised_images(convnext):
    path, network = convnext
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    stages = create_feature_extractor(network, {f"features.{place}": str(place) for place in (1, 3, 5, 7)})
    features = load_features("convnext_tiny", path)
    with torch.no_grad():
        wanted, found = list(stages(normalised(images)).values()), features(images)
    assert [x.shape[1] for x in found] == features.widths
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    grey = images[:, :1]
    with torch.no_grad():
        torch.testing.assert_close(features(grey)[3], features(grey.expand(-1, 3, -1, -1))[3])
        torch.testing.assert_close(features(torch.cat([images, grey], dim=1))[3], found[3])  # alpha is left out


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_last_map_of_a_transformer_is_its_patches_in_their_places(name, transformers):
    kind, config = TRANSFORMERS[name]
    features, network = load_features(transformers[name]), kind.from_pretrained(transformers[name])
    side = config.patch_size
    images = torch.rand(2, 3, 3 * side, 5 * side) * 2 - 1
    extra = {"interpolate_pos_encoding": True} if name == "dino" else {}
    with torch.no_grad():
        states = network(normalised(images), output_hidden_states=True, **extra).hidden_states
        maps = features(images)
    assert [tuple(x.shape) for x in maps] == [(2, 16, 3, 5)] * 4
    for row in range(3):
        for column in range(5):
            token = states[-1].shape[1] - 15 + row * 5 + column
            torch.testing.assert_close(maps[3][:, :, row, column], states[-1][:, token])
    assert torch.equal(maps[0].flatten(2), states[1][:, -15:].transpose(1, 2))
    with torch.no_grad():
        assert features(torch.rand(1, 1, 2 * side + 1, 2 * side - 1))[0].shape == (1, 16, 2, 2)


def test_a_discriminator_of_features_trains_its_heads_alone_and_passes_gradients_to_the_images(convnext):
    features = load_features("convnext_tiny", convnext[0])
    discriminator = FeatureDiscriminator(features, width=8)
    images = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_(True)
    logits = discriminator(images)
    assert logits.shape == (2, 64 + 16 + 4 + 1)
    logits.mean().backward()
    assert images.grad.abs().sum() > 0
    assert all(key.startswith("heads.") for key in discriminator.state_dict())
    assert all(p.requires_grad and p.grad is not None for p in discriminator.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in features.parameters())
    assert not discriminator.train().heads[0][0].weight.is_meta
    assert not features.network.training
    r1_penalty(discriminator.layers(inputs := images.detach().requires_grad_(True)), inputs).backward()
    discriminator.double()
    assert next(features.parameters()).dtype == torch.float64, "the frozen network goes where the heads go"


def test_the_distance_of_features_is_twice_one_minus_the_cosine_and_its_gradient_reaches_the_image_alone(transformers):
    distance = FeatureDistance(load_features(transformers["dinov2"]))
    x, y = (torch.rand(2, 3, 28, 35) * 2 - 1 for _ in range(2))
    cosines = [
        F.cosine_similarity(a.double(), b.double(), dim=1).mean(dim=(1, 2))
        for a, b in zip(distance.features(x), distance.features(y), strict=True)
    ]
    torch.testing.assert_close(distance(y, x).double(), 2 - 2 * torch.stack(cosines).mean(dim=0), rtol=1e-4, atol=1e-6)
    assert float(distance(x, x).abs().max()) < 1e-6
    output = y.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value = distance(output, x).sum()
    assert value.dtype == torch.float32
    value.backward()
    closer = y - 1e-2 * output.grad / output.grad.norm()
    assert distance(closer, x).sum() < value
    assert all(p.grad is None for p in distance.parameters())


def test_what_is_not_such_a_network_is_refused_in_one_line(convnext, tmp_path):
    path, _ = convnext
    with pytest.raises(InputError, match=r"is not convnext_small: .* weights are missing, unknown or of another"):
        load_features("convnext_small", path)
    with pytest.raises(InputError, match=r"need one of convnext_tiny, .* or a folder or hub id of a"):
        load_features(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="which holds its own"):
        load_features("facebook/dinov2-small", path)


@pytest.mark.parametrize("key", ["discriminator__features", "features__net", "alignment__net"])
def test_a_run_whose_network_cannot_be_read_writes_nothing(tmp_path, key):
    source = draw_photographs(tmp_path / "photographs")
    section = key.partition("__")[0]
    settings = {f"loss__{section}__weight": "0.5", f"loss__{key}": str(tmp_path / "nothing")}
    settings["loss__discriminator__layers"] = "3"
    with pytest.raises(InputError, match=r"as a network for features, which is no folder and no owner/name"):
        run(source, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_frozen_features_is_continued_exactly_and_does_not_save_them(transformers, tmp_path):
    source = draw_photographs(tmp_path / "photographs")
    settings = {
        "steps": "4",
        "optimizer__warmup_steps": "0",
        "data__num_workers": "0",
        "loss__equivariance__weight": "0",
        "loss__discriminator__layers": "3",
        "loss__discriminator__features": transformers["dino"],
        "loss__features__weight": "0.5",
        "loss__features__net": transformers["dinov2"],
    }
    run(source, tmp_path / "whole", **settings)
    with fault("sigterm", 3), pytest.raises(Stopped):
        run(source, tmp_path / "run", **settings)
    run(source, tmp_path / "run", **settings)
    assert not differences(result(tmp_path / "run"), result(tmp_path / "whole"))
    weights = read_checkpoint(checkpoints(tmp_path / "run" / "checkpoints")[0]).weights["discriminator"]
    assert all(key.startswith("heads.") for key in weights)
    logged = [line for line in records(tmp_path / "whole") if "train/loss" in line]
    assert all(0 < line[f"train/{Path(transformers['dinov2']).name}"] < 4 for line in logged)
    with pytest.raises(InputError, match="with layers, norm or downsampling, which are of the PatchGAN"):
        run(source, tmp_path / "other", **settings, loss__discriminator__norm="none")
