"""VAEs that pad by reflection or replication: on every path they equal diffusers' class with its layers so changed."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from torch import Tensor, nn

from sdvae import AutoencoderKL, EncodeConfig, InputError, export_targets, load_vae, save_ldm, save_vae
from sdvae.cli import main, parse_train_config
from sdvae.kernels import upsample, winograd
from sdvae.kernels.speed import speed_up
from sdvae.latents.task import EncodeTask
from sdvae.model import tiling
from sdvae.model.fp16 import fix
from sdvae.training.build import build_vae, starting_vae
from sdvae.training.model_card import loading_text
from sdvae.tutorial.conditional import ConditionalAutoencoderKL

MODES = ("reflect", "replicate")
SHAPE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 12, 16),
    "norm_num_groups": 4,
}


def vae_of(mode: str, **changes: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**{**SHAPE, **changes}, padding_mode=mode).eval()


def oracle(vae: AutoencoderKL, mode: str) -> Any:
    """diffusers' class with the same weights, changed by the lines that those who train such VAEs publish."""
    config = {key: value for key, value in vae.config.items() if key != "padding_mode" and not key.startswith("_")}
    stock: Any = StockAutoencoderKL(**config)
    stock.load_state_dict(vae.state_dict())
    for module in stock.modules():
        if isinstance(module, nn.Conv2d) and module.padding != (0, 0):
            module.padding_mode = mode
    return stock.train(vae.training)


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def outputs(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    moments = vae.encode(x).latent_dist.parameters
    return moments, vae.decode(vae.encode(x).latent_dist.mode()).sample


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize("mode", MODES)
def test_the_whole_image_is_that_of_diffusers_bit_for_bit_and_not_that_of_zeros(mode):
    vae, x = vae_of(mode), images(2, 3, 24, 40)
    zeros = copy.deepcopy(vae)
    zeros.set_padding_mode("zeros")
    for found, wanted, other in zip(outputs(vae, x), outputs(oracle(vae, mode), x), outputs(zeros, x), strict=True):
        assert torch.equal(found, wanted)
        assert error(found, other) > 1e-2


@pytest.mark.filterwarnings("error:tiling is not used")
@pytest.mark.parametrize("strip_bytes", [1, 20_000, 2**30])
@pytest.mark.parametrize("mode", MODES)
def test_strips_of_any_height_are_exact(mode, strip_bytes, monkeypatch):
    monkeypatch.setattr(tiling, "STRIP_BYTES", strip_bytes)
    monkeypatch.setattr(tiling, "STRIPS_A_MAP", 1)
    vae = vae_of(mode).double()
    stock = oracle(vae, mode).double()
    vae.enable_tiling()
    for shape in ((1, 3, 8, 8), (2, 3, 20, 44), (1, 3, 52, 8)):
        x = images(*shape).double()
        for found, wanted in zip(outputs(vae, x), outputs(stock, x), strict=True):
            assert error(found, wanted) <= 1e-10


@pytest.mark.filterwarnings("error:tiling is not used")
@pytest.mark.parametrize(("mode", "strips"), [("reflect", False), ("replicate", False), ("reflect", True)])
def test_fast_layers_are_taken_and_exact(mode, strips, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(winograd, "winograd_pays", lambda *shape: winograd.has_nnpack() and min(shape[:2]) >= 96)
    monkeypatch.setattr(tiling, "STRIPS_A_MAP", 4)
    taken = []
    own, taps = winograd._nnpack, upsample.upsample_conv
    monkeypatch.setattr(winograd, "_nnpack", lambda *given: taken.append("winograd") or own(*given))
    monkeypatch.setattr(upsample, "upsample_conv", lambda *given: taken.append("taps") or taps(*given))
    for widths in ((96, 96), (8, 16)):
        vae = vae_of(mode, block_out_channels=widths, down_block_types=["DownEncoderBlock2D"] * 2,
                     up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
        x = images(2, 3, 16, 20)
        wanted = outputs(oracle(vae, mode), x)
        speed_up(vae)
        if strips:
            vae.enable_tiling()
        for found, truth in zip(outputs(vae, x), wanted, strict=True):
            assert error(found, truth) <= 2e-4
    assert "winograd" in taken or not winograd.has_nnpack()
    assert strips or "taps" in taken


@pytest.mark.parametrize("form", ["four taps", "transposed"])
@pytest.mark.parametrize("mode", MODES)
def test_an_upsampler_as_one_conv_has_the_output_and_gradients_of_the_two_layers(form, mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(5, 5, 3, padding=1, padding_mode=mode).double()
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64, requires_grad=True)
    wanted = conv(nn.functional.interpolate(x, scale_factor=2.0))
    layer = {"four taps": upsample.FastUpsample, "transposed": upsample.TransposedUpsample}[form](5).double()
    layer.conv = conv
    found = layer(x)
    torch.testing.assert_close(found, wanted)
    weights = [x, *conv.parameters()]
    grad = torch.randn_like(wanted)
    torch.testing.assert_close(torch.autograd.grad(found, weights, grad), torch.autograd.grad(wanted, weights, grad))


@pytest.mark.skipif(not winograd.has_nnpack(), reason="torch lacks NNPACK here")
@pytest.mark.parametrize(
    ("channels", "mode"), [(64, "reflect"), (128, "replicate")]
)  # 128: its gradient of weights too
def test_winograds_gradients_are_those_of_the_padded_conv(channels, mode, monkeypatch):
    monkeypatch.setattr(winograd, "winograd_pays", lambda *shape: True)
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, channels, 3, padding=1, padding_mode=mode)
    fast = copy.deepcopy(plain)
    fast.__class__ = winograd.FastConv3x3
    x, grad = torch.randn(2, channels, 13, 9), torch.randn(2, channels, 13, 9)
    results = []
    for conv in (plain.double(), fast):
        inputs = x.to(conv.weight.dtype).requires_grad_()
        y = conv(inputs)
        results.append([y, *torch.autograd.grad(y, [inputs, *conv.parameters()], grad.to(y.dtype))])
    assert (
        isinstance(results[1][0].grad_fn, torch.autograd.Function) or "Conv3x3" in type(results[1][0].grad_fn).__name__
    )
    for found, wanted in zip(*reversed(results), strict=True):
        assert float((found.double() - wanted).detach().norm() / wanted.detach().norm()) <= 2e-5


# ---------------------------------------------------------------- files


def test_config_json_names_the_padding_only_if_it_is_not_zeros(tmp_path):
    for mode in ("zeros", *MODES):
        vae_of(mode).save_pretrained(tmp_path / mode)
        config = json.loads((tmp_path / mode / "config.json").read_text())
        assert config.get("padding_mode", "zeros") == mode
        assert ("padding_mode" in config) == (mode != "zeros")
    changed = vae_of("zeros")
    changed.set_padding_mode("reflect")
    assert AutoencoderKL.from_config(changed.config).padding_mode == "reflect"
    changed.set_padding_mode("zeros")
    assert "padding_mode" not in changed.config


def test_every_form_of_a_saved_vae_keeps_its_padding(tmp_path):
    vae, x = vae_of("reflect"), images(1, 3, 16, 24)
    wanted = outputs(oracle(vae, "reflect"), x)
    vae.save_pretrained(tmp_path / "pretrained")
    save_vae(vae, tmp_path / "folder")
    save_ldm(vae, tmp_path / "file.safetensors")
    assert main(["export", str(tmp_path / "file.safetensors"), str(tmp_path / "exported")]) == 0
    stock = vae.to_diffusers()
    stock.save_pretrained(tmp_path / "stock")
    again = [load_vae(tmp_path / name) for name in ("pretrained", "folder", "file.safetensors", "exported", "stock")]
    again += [AutoencoderKL.from_pretrained(tmp_path / name) for name in ("pretrained", "stock")]
    for model in (*again, copy.deepcopy(vae), stock):
        for found, truth in zip(outputs(model, x), wanted, strict=True):
            assert torch.equal(found, truth)


def test_a_file_that_does_not_tell_its_padding_takes_it_from_config(tmp_path):
    vae, x = vae_of("reflect"), images(1, 3, 16, 24)
    vae.set_padding_mode("zeros")
    save_ldm(vae, tmp_path / "vae.safetensors")
    assert load_vae(tmp_path / "vae.safetensors").padding_mode == "zeros"
    told = load_vae(tmp_path / "vae.safetensors", config={"padding_mode": "reflect"})
    assert torch.equal(outputs(told, x)[1], outputs(oracle(vae, "reflect"), x)[1])
    for wrong in ("reflection", "circular", 1):
        with pytest.raises(InputError, match=r"padding_mode = .*; need one of zeros, reflect, replicate"):
            load_vae(tmp_path / "vae.safetensors", config={"padding_mode": wrong})


def test_a_published_vae_that_needs_reflection_and_does_not_say_so_is_named(tmp_path, caplog):
    folder = tmp_path / "MS-LC-EQ-D-VR_VAE"
    save_vae(vae_of("zeros"), folder)
    load_vae(folder)
    assert "trained with reflect padding" in caplog.text
    caplog.clear()
    load_vae(folder, config={"padding_mode": "zeros"})
    save_vae(vae_of("zeros"), tmp_path / "EQ-SDXL-VAE")
    load_vae(tmp_path / "EQ-SDXL-VAE")
    assert "reflect" not in caplog.text


def test_programs_that_pad_with_zeros_are_named_where_a_vae_leaves_for_them(tmp_path, caplog, monkeypatch):
    vae = vae_of("reflect")
    assert all("pads with zeros" in (reason or "") for reason in export_targets(vae).values())
    assert export_targets(vae_of("zeros"))["diffusers"] is None
    for leave in (vae.to_diffusers, lambda: save_ldm(vae, tmp_path / "vae.safetensors")):
        caplog.clear()
        leave()
        assert "reflect" in caplog.text
        assert "set" in caplog.text
    assert 'module.padding_mode = "reflect"' in loading_text(vae, "folder")
    assert "padding" not in loading_text(vae_of("zeros"), "folder")
    # diffusers' class reads the folder, and itself says what it ignores
    vae.save_pretrained(tmp_path / "folder")
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    caplog.clear()
    StockAutoencoderKL.from_pretrained(tmp_path / "folder")
    assert (
        "{'padding_mode': 'reflect'} were passed to AutoencoderKL, but are not expected and will be ignored"
        in caplog.text
    )


def test_layers_that_pad_otherwise_than_the_configuration_says_are_not_saved(tmp_path):
    vae = vae_of("zeros")
    stock = oracle(vae, "reflect")
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and any(module.padding):
            module.padding_mode = "reflect"
    for model, remedy in ((vae, r"set_padding_mode\('reflect'\)"), (stock, r"register_to_config\(padding_mode='refl")):
        for save, target in ((save_ldm, "vae.safetensors"), (save_vae, "vae")):
            with pytest.raises(InputError, match=f"pads with reflect, and its configuration says zeros.*{remedy}"):
                save(model, tmp_path / target)
    assert not list(tmp_path.iterdir())
    vae.set_padding_mode("reflect")
    stock.register_to_config(padding_mode="reflect")
    for model in (vae, stock):
        save_ldm(model, tmp_path / "vae.safetensors")
        assert load_vae(tmp_path / "vae.safetensors").padding_mode == "reflect"


def test_a_map_too_small_to_reflect_is_refused():
    vae = vae_of("reflect")
    with torch.no_grad():
        for call in (lambda: vae.encode(images(1, 3, 4, 16)), lambda: vae.decode(torch.zeros(1, 4, 4, 1))):
            with pytest.raises(InputError, match=r"pads by reflection; need at least [82] on each side"):
                call()
        vae.set_padding_mode("replicate")
        assert vae.decode(torch.zeros(1, 4, 4, 1)).sample.shape == (1, 3, 16, 4)


# ---------------------------------------------------------------- commands


def recipe(*arguments: str) -> Any:
    shape = ["--model.block_out_channels=[8,16]", "--model.norm_num_groups=4", "--data.source=skimage"]
    return parse_train_config([*shape, *arguments])


def test_a_recipe_sets_the_padding_and_a_fine_tuned_vae_keeps_it(tmp_path):
    for classes in ("0", "3"):
        built = build_vae(recipe("--model.padding_mode=reflect", f"--model.num_classes={classes}").model)
        assert isinstance(built, ConditionalAutoencoderKL) == (classes != "0")
        padded = [m.padding_mode for m in built.modules() if isinstance(m, nn.Conv2d) and any(m.padding)]
        assert set(padded) == {"reflect"} == {built.padding_mode}
    save_vae(vae_of("replicate"), tmp_path / "vae")
    vae, described = starting_vae(recipe(f"--fine_tune.source={tmp_path / 'vae'}"))
    assert vae.padding_mode == described.model.padding_mode == "replicate"
    with pytest.raises(InputError, match="padding_mode"):
        recipe("--model.padding_mode=mirror")


def test_gradients_are_those_of_diffusers_layers():
    vae, x = vae_of("reflect").train(), images(2, 3, 16, 24)
    stock = oracle(vae, "reflect")
    for model in (vae, stock):
        model(x).sample.square().mean().backward()
    for name, weight in stock.named_parameters():
        torch.testing.assert_close(vae.get_parameter(name).grad, weight.grad, rtol=1e-4, atol=1e-7)


def test_fp16_fix_changes_no_bit_of_a_vae_that_reflects(tmp_path):
    vae, x = vae_of("reflect"), images(1, 3, 16, 24)
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(2e5)
    wanted = outputs(vae, x)
    assert "decoder" in fix(vae, [x]).scales
    for found, truth in zip(outputs(vae, x), wanted, strict=True):
        assert torch.equal(found, truth)
    save_vae(vae, tmp_path / "fixed")
    assert load_vae(tmp_path / "fixed").padding_mode == "reflect"


def test_latents_of_another_padding_are_not_mixed_into_a_folder(tmp_path):
    prints = []
    for mode in ("zeros", "reflect"):
        save_vae(vae_of(mode), tmp_path / mode)
        config = EncodeConfig(
            source="skimage", output=str(tmp_path / "latents"), vae=str(tmp_path / mode), resolution=16
        )
        prints.append(EncodeTask(config).targets[0].fingerprint["vae"])
    assert prints[0]["encoder_sha256"] == prints[1]["encoder_sha256"]
    assert "padding_mode" not in prints[0], "latents that were begun before this key can be continued"
    assert prints[1]["padding_mode"] == "reflect"
