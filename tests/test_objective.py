"""The loss: its formula, where its gradient goes, and LPIPS's trunk."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from skimage.metrics import structural_similarity as skimage_ssim

from sdvae import InputError
from sdvae.metrics import perceptual as perceptual_module
from sdvae.metrics.perceptual import Perceptual, load_perceptual
from sdvae.model import DiagonalGaussian
from sdvae.noise import posterior_generators
from sdvae.training.config import DataConfig, EquivarianceConfig, LossConfig, TrainConfig
from sdvae.training.objective import Judges, compare, kl_weight_at, loss_terms
from tests.conftest import tiny_vae


@pytest.fixture(scope="module")
def trunk_file(tmp_path_factory) -> Path:
    """SqueezeNet weights under torchvision's names: random, but as a local file has them, classifier included."""
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("trunk") / "squeezenet.safetensors"
    save_file(torchvision.models.squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def perceptual(trunk_file) -> Perceptual:
    return load_perceptual("squeeze", trunk_file)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setenv("TORCH_HOME", "/nonexistent-cache")


def images(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_objective_is_ldms_sum_divided_by_the_number_of_values(kind, perceptual):
    x, y = images(3, 3, 64, 64), images(3, 3, 64, 64, seed=1)
    parameters = torch.randn(3, 8, 8, 8, generator=torch.Generator().manual_seed(2))
    config = LossConfig(reconstruction=kind, lpips_weight=0.7, kl_weight=1e-3)
    terms = loss_terms(x, y, DiagonalGaussian(parameters), config, Judges(perceptual))

    values = 3 * 64 * 64
    error = (y - x).double()
    error = error.abs() if kind == "l1" else error**2
    mean, logvar = parameters.double().chunk(2, dim=1)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    distance = perceptual(y, x).double()
    # contperceptual.py: the per-image LPIPS is broadcast over all values, sums are averaged over the batch
    ldm = sum(
        (error[i] + 0.7 * distance[i]).sum() + 1e-3 * kl[i].sum()
        for i in range(3)
    ) / 3  # fmt: skip
    torch.testing.assert_close(terms.total(config, config.kl_weight).double(), ldm / values, rtol=1e-5, atol=0)


def test_a_sum_of_terms_is_what_it_says_and_each_term_is_logged():
    x, y = images(2, 3, 32, 32), images(2, 3, 32, 32, seed=1)
    config = LossConfig(reconstruction="0.2 l1 + 0.4*l2 + charbonnier + 0.6 ssim", lpips_weight=0.0)
    found = loss_terms(x, y, DiagonalGaussian(torch.zeros(2, 8, 4, 4)), config, Judges())
    error = (x - y).double()
    similar = [
        skimage_ssim(
            *(((image[i] + 1) / 2).permute(1, 2, 0).double().numpy() for image in (x, y)),
            channel_axis=2, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
        )
        for i in range(2)
    ]  # fmt: skip
    wanted = {"l1": error.abs().mean(), "l2": (error**2).mean(), "charbonnier": (error**2 + 1e-6).sqrt().mean()}
    wanted["ssim"] = 1 - torch.tensor(similar).mean()
    logged = found.logged(Judges())
    for name, value in wanted.items():
        torch.testing.assert_close(logged[name].double(), value, rtol=1e-4, atol=1e-6, msg=name)
    total = sum(weight * wanted[name] for name, weight in config.reconstruction_terms.items())
    torch.testing.assert_close(found.nll(config).double(), total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["l1", "l2", "charbonnier", "ssim", "ms_ssim"])
def test_the_gradient_of_each_term_leads_downhill_and_is_that_of_finite_differences(kind):
    side = 176 if kind == "ms_ssim" else 24
    x = images(1, 1, side, side)
    y = (0.5 * x).requires_grad_()
    config = LossConfig(reconstruction=kind, lpips_weight=0.0)

    def value(output: torch.Tensor) -> torch.Tensor:
        return compare(x, output, config, Judges()).reconstruction

    loss = value(y)
    (gradient,) = torch.autograd.grad(loss, y)
    direction = gradient / gradient.norm()
    step = 0.5
    numeric = (value(y.detach() + step * direction) - value(y.detach() - step * direction)) / (2 * step)
    assert float(numeric) == pytest.approx(float(gradient.norm()), rel=0.05)
    assert value(x) < value(y.detach() - 0.01 * direction) < loss
    assert value(x) < 2e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("l1 + 0.2 l1", "no term"),
        ("l1 + ssim 0.2", "'ssim 0.2' is no term"),
        ("l1 + -1 l2", "no term"),
        ("nan l1", "no term"),
        ("", "no term"),
        ("l1 +", "no term"),
        ("0.5 bce", "stands alone"),
        ("l1 + bce", "stands alone"),
    ],
)
def test_what_is_no_sum_of_terms_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(loss=LossConfig(reconstruction=text))


def test_windows_of_ssim_must_fit_into_the_crops():
    with pytest.raises(InputError, match=r"got ms_ssim .* 128 pixels .* need 176"):
        TrainConfig(loss=LossConfig(reconstruction="l1 + ms_ssim"), data=DataConfig(resolution=128))
    loss = LossConfig(reconstruction="ms_ssim", equivariance=EquivarianceConfig(weight=0.1, scales=(0.5,)))
    with pytest.raises(InputError, match=r"got ms_ssim .* 88 pixels"):
        TrainConfig(loss=loss, data=DataConfig(resolution=176))


def test_lpips_gradient_reaches_encoder_and_decoder_and_stops_at_the_trunk(perceptual):
    vae, x = tiny_vae(), images(2, 3, 64, 64)
    output = vae(x, sample_posterior=True, generator=posterior_generators(torch.tensor([1, 2])))
    loss_terms(x, output.sample, output.posterior, LossConfig(), Judges(perceptual)).comparison.lpips.backward()
    for name in ("encoder.conv_in.weight", "decoder.conv_out.weight"):
        assert vae.get_parameter(name).grad.abs().max() > 1e-6, name
    assert all(p.grad is None and not p.requires_grad for p in perceptual.parameters())


def test_lpips_stays_in_evaluation_mode_and_fp32(perceptual):
    x, y = images(2, 3, 64, 64), images(2, 3, 64, 64, seed=1)
    want = perceptual(y, x)
    perceptual.train()
    assert not any(module.training for module in perceptual.modules())
    with torch.autocast("cpu", torch.bfloat16):
        got = perceptual(y.bfloat16().float(), x)
        assert torch.equal(perceptual(y, x), want)
    assert got.dtype == torch.float32


def test_lpips_of_other_channel_counts_is_that_of_grey_images(perceptual):
    x, y = images(2, 4, 64, 64), images(2, 4, 64, 64, seed=1)
    each = [perceptual(y[:, [c]].expand(-1, 3, -1, -1), x[:, [c]].expand(-1, 3, -1, -1)) for c in range(4)]
    torch.testing.assert_close(perceptual(y[:, :1], x[:, :1]), each[0])
    torch.testing.assert_close(perceptual(y, x), torch.stack(each).mean(0))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("net", ["squeeze", "alex", "vgg"])
def test_a_local_trunk_computes_what_lpips_computes_with_it(net, suffix, tmp_path, monkeypatch):
    build = {"squeeze": "squeezenet1_1", "alex": "alexnet", "vgg": "vgg16"}[net]
    if net == "vgg":  # without the classifier, which has 0.5 GB
        monkeypatch.setattr(torchvision.models.VGG, "_", None, raising=False)
        torch.manual_seed(1)
        model = torch.nn.Module()
        model.features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    else:
        torch.manual_seed(1)
        model = getattr(torchvision.models, build)(weights=None)
    weights = model.state_dict()
    path = tmp_path / f"trunk{suffix}"
    if suffix == ".pth":
        torch.save(weights, path)
    else:
        save_file(weights, path)

    ours = load_perceptual(net, path)
    assert ours.name == f"lpips_{net}"
    loaded = ours.network.net.state_dict()
    assert len(loaded) > 0
    for key, tensor in loaded.items():
        assert torch.equal(tensor, weights["features." + key.split(".", 1)[1]]), key
    assert ours.network.lpips, "the published heads"
    assert all(head.model[-1].weight.min() >= 0 for head in ours.network.lins), "LPIPS's heads are non-negative"
    x = images(1, 3, 64, 64)
    assert float(ours(x, x)) == 0.0
    assert float(ours(x, images(1, 3, 64, 64, seed=1))) > 0


def test_uniform_heads_are_named_and_count_all_features_the_same(trunk_file):
    uniform = load_perceptual("squeeze", trunk_file, heads="uniform")
    assert uniform.name == "lpips_squeeze_uniform"
    x, y = images(1, 3, 64, 64), images(1, 3, 64, 64, seed=1)
    network = uniform.network
    want = 0.0
    for a, b in zip(network.net(network.scaling_layer(x)), network.net(network.scaling_layer(y)), strict=True):
        a, b = (f / (f.square().sum(1, keepdim=True).sqrt() + 1e-10) for f in (a, b))
        want += (a - b).square().sum(1).mean()
    torch.testing.assert_close(uniform(y, x)[0], want, rtol=1e-4, atol=1e-6)


def test_a_file_that_is_no_such_trunk_is_refused(trunk_file, tmp_path):
    with pytest.raises(InputError, match=r"is not the trunk alex: .* missing"):
        load_perceptual("alex", trunk_file)
    with pytest.raises(InputError, match="there is no file"):
        load_perceptual("squeeze", tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="need one of vgg, alex, squeeze"):
        load_perceptual("resnet")


def test_without_weights_it_stops_unless_random_is_asked_for(no_network, caplog):
    with pytest.raises(InputError, match=r"no ImageNet weights .*perceptual\.weights=FILE.*allow_random=true"):
        load_perceptual("squeeze")
    with caplog.at_level("WARNING"):
        random = load_perceptual("squeeze", allow_random=True)
    assert "RANDOM trunk" in caplog.text
    assert random.name == "lpips_squeeze_random"
    assert not random.network.lpips, "uniform heads"
    torch.manual_seed(99)
    again = load_perceptual("squeeze", allow_random=True)
    x, y = images(1, 3, 64, 64), images(1, 3, 64, 64, seed=1)
    assert torch.equal(random(y, x), again(y, x)), "the same trunk in every process"


def test_the_download_goes_through_torchvisions_checked_weights(monkeypatch, trunk_file):
    seen = {}

    def fetch(url, **options):
        seen.update(url=url, **options)
        return torchvision.models.squeezenet1_1(weights=None).state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    assert load_perceptual("squeeze").name == "lpips_squeeze"
    assert "squeezenet1_1" in seen["url"]
    assert seen["check_hash"] is True
    assert seen["weights_only"] is True


def test_loading_a_trunk_leaves_the_random_state_alone(no_network):
    torch.manual_seed(7)
    want = torch.rand(1)
    torch.manual_seed(7)
    perceptual_module.load_perceptual("squeeze", allow_random=True)
    assert torch.equal(torch.rand(1), want)


def test_kl_weight_grows_linearly_and_stays():
    config = LossConfig(kl_weight=1.0, kl_warmup_steps=4)
    assert [kl_weight_at(step, config) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert kl_weight_at(0, LossConfig(kl_weight=0.5)) == 0.5
