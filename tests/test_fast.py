"""The fast layers against plain ones in float64."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae import AutoencoderKL
from sdvae.kernels import upsample
from sdvae.kernels import winograd as fast
from sdvae.kernels.speed import speed_up
from sdvae.kernels.upsample import FastUpsample, TransposedUpsample
from sdvae.kernels.winograd import FastConv3x3
from sdvae.latents.encoder import MomentEncoder
from sdvae.model.blocks import Upsample
from sdvae.training.build import build_accelerator, lay_out
from sdvae.training.config import TrainConfig
from tests.conftest import tiny_vae

TOLERANCE = 1e-5  # Winograd in fp32 has 3e-6


@pytest.fixture(autouse=True)
def avx2(monkeypatch) -> None:
    """On other machines `speed_up` may leave Winograd out; its kernels run there too."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.fixture
def winograd_on_small_maps(monkeypatch) -> None:
    monkeypatch.setattr(fast, "winograd_pays", lambda *shape: fast.has_nnpack() and min(shape[:2]) >= 96)


def relative_error(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want).norm() / want.norm()).detach())


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_vae() -> AutoencoderKL:
    return tiny_vae(block_out_channels=(96, 96), norm_num_groups=8).train()


def outputs_and_gradients(layer: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("winograd", [True, False])
@pytest.mark.parametrize(
    ("channels", "out_channels", "size"),
    [(96, 104, (2, 33, 35)), (136, 128, (1, 131, 129)), (512, 512, (2, 33, 32)), (64, 70, (1, 260, 255))],
)
def test_conv_and_its_gradients_equal_float64(channels, out_channels, size, winograd, monkeypatch):
    if not winograd:  # as on a machine without NNPACK
        monkeypatch.setattr(torch, "_nnpack_available", lambda: False)
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, out_channels, 3, padding=1)
    layer = copy.deepcopy(plain)
    layer.__class__ = FastConv3x3
    batch, height, width = size
    x, grad = randn(batch, channels, height, width, seed=1), randn(batch, out_channels, height, width, seed=2)
    want = outputs_and_gradients(plain.double(), x.double(), grad.double())
    for name, got in outputs_and_gradients(layer, x, grad).items():
        assert relative_error(got, want[name]) <= TOLERANCE, name


@pytest.mark.parametrize("size", [(1, 4, 1, 1), (2, 8, 7, 4), (1, 8, 4, 9), (2, 4, 13, 2)])
def test_weight_gradient_equals_float64(size):
    x, grad = randn(*size, seed=1), randn(size[0], 5, *size[2:], seed=2)
    weight = torch.zeros(5, size[1], 3, 3, dtype=torch.float64, requires_grad=True)
    F.conv2d(x.double(), weight, padding=1).backward(grad.double())
    assert relative_error(fast.weight_gradient(x, grad), weight.grad) <= TOLERANCE


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(1, 8, 1, 1), (2, 8, 5, 3), (2, 8, 4, 6)])
@pytest.mark.parametrize("form", [FastUpsample, TransposedUpsample])
def test_upsampling_and_its_gradients_equal_float64(size, layout, form):
    torch.manual_seed(0)
    plain = Upsample(8)
    layer = copy.deepcopy(plain)
    layer.__class__ = form
    x, grad = randn(*size, seed=1).contiguous(memory_format=layout), randn(*size[:2], 2 * size[2], 2 * size[3], seed=2)
    want = outputs_and_gradients(plain.double(), x.double(), grad.double())
    for name, got in outputs_and_gradients(layer, x, grad).items():
        assert relative_error(got, want[name]) <= TOLERANCE, name


def loss_and_gradients(vae: AutoencoderKL) -> dict[str, Tensor]:
    x = randn(1, 3, 32, 32, seed=3).to(vae.dtype)
    image = vae(x).sample
    loss = (image - x).abs().mean()
    loss.backward()
    return {"loss": loss.detach(), "image": image.detach()} | {
        name: p.grad for name, p in vae.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("checkpointing", [False, True])
def test_vae_and_its_gradients_equal_the_plain_one(checkpointing, winograd_on_small_maps):
    vae = small_vae()
    want = loss_and_gradients(copy.deepcopy(vae).double())
    if checkpointing:
        vae.enable_gradient_checkpointing()
    speed_up(vae)
    got = loss_and_gradients(vae)
    assert got.keys() == want.keys()
    for name in want:
        # softmax does not see the keys' bias: its gradient is zero, and in fp32 all rounding
        error = (got[name] - want[name]).norm() / want[name].norm().clamp(min=1e-4)
        assert error <= 5e-5, name


def test_frozen_weights_get_no_gradient_and_pass_it_on(winograd_on_small_maps):
    vae = small_vae()
    speed_up(vae)
    vae.decoder.requires_grad_(False)
    loss_and_gradients(vae)
    assert all(p.grad is None for p in vae.decoder.parameters())
    assert all(p.grad is not None for p in vae.encoder.parameters())


def test_state_dict_and_copies_stay():
    vae = small_vae()
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    speed_up(vae)
    speed_up(vae)  # a second call changes nothing
    copied = copy.deepcopy(vae)
    for after in (vae.state_dict(), copied.state_dict(), vae.to_diffusers().state_dict()):
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        copied.encoder.conv_in.weight.zero_()
    assert torch.equal(vae.encoder.conv_in.weight, before["encoder.conv_in.weight"])


@pytest.mark.parametrize("shape", [(512, 512, 32, 32), (128, 256, 128, 128), (64, 64, 300, 256)])
def test_winograd_is_for_wide_convs_on_large_maps(shape, monkeypatch):
    monkeypatch.setattr(torch, "_nnpack_available", lambda: True)
    channels, out_channels, height, width = shape
    assert fast.winograd_pays(*shape)
    assert fast.winograd_pays(out_channels, channels, height, width), "the gradient of x is the same conv turned round"
    assert not fast.winograd_pays(channels, out_channels, height // 2, width // 2)
    assert not fast.winograd_pays(channels // 2, out_channels, height, width)


def test_a_narrow_vae_takes_channels_last_and_a_wide_one_does_not(monkeypatch):
    monkeypatch.setattr(torch, "_nnpack_available", lambda: True)
    narrow, wide = tiny_vae(block_out_channels=(8, 16), norm_num_groups=4), small_vae()
    nn.Module.to(wide, memory_format=torch.channels_last)
    for vae, last in ((narrow, True), (wide, False)):
        speed_up(vae)
        classes = {type(module) for module in vae.modules()}
        assert FastUpsample in classes
        assert (FastConv3x3 in classes) is not last
        assert vae.use_slicing is not last
        weight = vae.decoder.mid_block.resnets[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) is last
    with torch.no_grad():
        moments = narrow.encode(randn(2, 3, 16, 12, seed=1)).latent_dist.parameters
        for result in (moments, narrow.decode(moments[:, :4]).sample):
            assert result.is_contiguous(memory_format=torch.channels_last), "kept from end to end"


ZEN_4 = {"cpu_name": "AMD EPYC", "avx512_bf16": True, "avx_vnni": False}


@pytest.mark.parametrize(
    ("capability", "features", "nnpack", "winograd"),
    [
        ("AVX2", {}, True, True),
        ("AVX2", {}, False, False),
        ("AVX512", ZEN_4, True, True),
        ("AVX512", ZEN_4, False, False),
        ("AVX512", ZEN_4 | {"avx_vnni": True}, True, False),  # Zen 5
        ("AVX512", ZEN_4 | {"cpu_name": "Intel(R) Xeon(R) Platinum"}, True, False),
        ("AVX512", {}, True, False),  # a torch that does not tell
        ("DEFAULT", ZEN_4 | {"avx512_bf16": False}, True, False),
    ],
)
def test_winograd_is_for_machines_that_multiply_256_bits(capability, features, nnpack, winograd, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    monkeypatch.setattr(torch, "_nnpack_available", lambda: nnpack)
    vae = small_vae()
    speed_up(vae)
    assert (FastConv3x3 in {type(module) for module in vae.modules()}) is winograd
    assert vae.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last) is not winograd


@pytest.mark.slow
def test_a_vae_in_bf16_takes_four_taps_and_channels_last_and_is_as_exact_as_plain_bf16():
    plain = tiny_vae(block_out_channels=(96, 96), norm_num_groups=8).eval().requires_grad_(False)
    x = randn(2, 3, 96, 80, seed=4)
    moments = plain.double().encode(x.double()).latent_dist.parameters
    image = plain.decode(moments[:, :4]).sample
    plain.to(torch.bfloat16)
    vae = copy.deepcopy(plain)
    speed_up(vae)
    classes = {type(module) for module in vae.modules()}
    assert FastConv3x3 not in classes
    assert FastUpsample in classes
    assert vae.encoder.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    z = moments[:, :4].bfloat16()
    got, by_nine_taps = vae.decode(z).sample, plain.decode(z).sample
    assert got.dtype == torch.bfloat16
    assert not torch.equal(got, by_nine_taps), "took the plain path"
    assert relative_error(got, image) <= 1.5 * relative_error(by_nine_taps, image)


@pytest.mark.slow
@pytest.mark.parametrize("widths", [(8, 16), (128, 128)])
def test_the_layers_that_should_take_their_own_path_do(widths, monkeypatch):
    taken = set()
    for module, name in ((fast, "_nnpack"), (upsample, "upsample_conv"), (fast, "weight_gradient")):
        own = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, own=own, name=name: taken.add(name) or own(*args))
    vae = tiny_vae(block_out_channels=widths, norm_num_groups=4).train()
    speed_up(vae)
    vae.decode(randn(1, 4, 96, 96, seed=1)).sample.sum().backward()
    winograd = widths[0] == 128 and fast.has_nnpack()
    assert taken == ({"_nnpack", "weight_gradient"} if winograd else {"upsample_conv"})


@pytest.mark.parametrize("gradients", [True, False])
def test_an_upsampler_takes_four_taps_where_its_map_is_too_small_for_winograd(gradients, monkeypatch):
    monkeypatch.setattr(torch, "_nnpack_available", lambda: True)
    calls = []
    monkeypatch.setattr(upsample, "upsample_conv", lambda *args: calls.append("four taps"))
    monkeypatch.setattr(Upsample, "forward", lambda *args: calls.append("plain"))
    layer = Upsample(128)
    layer.__class__, layer.conv.__class__ = FastUpsample, FastConv3x3
    with torch.set_grad_enabled(gradients):
        layer(randn(1, 128, 63, 64, seed=1))
        layer(randn(1, 128, 64, 64, seed=1))
    assert calls == ["four taps", "plain"]


def test_autocast_and_other_dtypes_take_the_plain_path(winograd_on_small_maps):
    torch.manual_seed(0)
    plain = nn.Conv2d(96, 96, 3, padding=1)
    layer = copy.deepcopy(plain)
    layer.__class__ = FastConv3x3
    x = randn(1, 96, 32, 32, seed=1)
    assert (type(layer(x).grad_fn).__name__ == "_Conv3x3Backward") is fast.has_nnpack()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.double()(x.double()), plain.double()(x.double()))


@pytest.mark.parametrize("widths", [(8, 16), pytest.param((96, 96), marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_equals_float64(mode, widths):
    vae = tiny_vae(block_out_channels=widths, norm_num_groups=8).eval()
    exact, plain = copy.deepcopy(vae).double(), copy.deepcopy(vae)
    speed_up(vae)
    x = randn(2, 3, 184, 176, seed=4)
    with mode():
        moments, wanted = vae.encode(x).latent_dist.parameters, exact.encode(x.double()).latent_dist.parameters
        assert relative_error(moments, wanted) <= TOLERANCE
        z = moments[:, :4]
        image = vae.decode(z).sample
        assert relative_error(image, exact.decode(z.double()).sample) <= TOLERANCE
        assert not torch.equal(image, plain.decode(z).sample), "took the plain path"


@torch.no_grad()
@pytest.mark.parametrize("widths", [(8, 16), (96, 96)])
def test_a_compiler_gets_the_ordinary_layers_in_one_graph(widths, winograd_on_small_maps):
    vae = tiny_vae(block_out_channels=widths, norm_num_groups=4).eval()
    x = randn(1, 3, 16, 16, seed=4)
    wanted = vae(x).sample
    speed_up(vae)
    torch._dynamo.reset()
    found = torch.compile(vae, fullgraph=True, backend="eager")(x).sample
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("widths", [(8, 16), (96, 96)])
def test_training_and_data_sets_take_the_layers_that_gain(widths, winograd_on_small_maps):
    """Winograd for a wide VAE, for a narrow one channels last and four taps, in both."""
    wide = widths[0] == 96 and fast.has_nnpack()
    vae = tiny_vae(block_out_channels=widths, norm_num_groups=4)
    recipe = TrainConfig(mixed_precision="no")
    config = lay_out(vae, recipe, build_accelerator(recipe))
    assert (FastConv3x3 in {type(module) for module in vae.modules()}) is wide
    assert config.channels_last is not wide
    assert FastUpsample in {type(module) for module in vae.modules()}

    vae = tiny_vae(block_out_channels=widths, norm_num_groups=4)
    exact = copy.deepcopy(vae).double()
    encoder = MomentEncoder(vae, torch.device("cpu"), "fp32", mirror=True)
    assert (FastConv3x3 in {type(module) for module in encoder._vae.modules()}) is wide
    pixels = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 127.5 - 1
    for moments, view in zip(encoder.launch(list(pixels)).moments(), (x, x.flip(3)), strict=True):
        assert relative_error(moments, exact.encode(view).latent_dist.parameters) <= TOLERANCE
