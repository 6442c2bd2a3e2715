"""`sdvae fp16`: the rescaling changes no bit in fp32, and fp16 works after it."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL as StockAutoencoderKL
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn.utils import spectral_norm

from sdvae import AutoencoderKL, InputError, load_vae, save_vae
from sdvae.cli import main
from sdvae.kernels.speed import speed_up
from sdvae.model.fp16 import FP16_MAX, audit, fix

IMAGES = [torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1 for seed in range(2)]


def sound_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
    ).eval()


@torch.no_grad()
def overflowing_vae() -> AutoencoderKL:
    """With weights scaled up in every place that the rescaling reaches."""
    vae = sound_vae()
    for net in (vae.encoder, vae.decoder):
        net.conv_in.weight.mul_(2e5)
        net.mid_block.resnets[0].conv2.weight.mul_(3e5)
        net.mid_block.resnets[1].conv1.weight.mul_(7e5)
        net.mid_block.attentions[0].to_v.weight.mul_(9e5)
        net.mid_block.attentions[0].to_v.bias.mul_(9e5)
    vae.decoder.up_blocks[0].upsamplers[0].conv.weight.mul_(3)
    vae.encoder.down_blocks[0].downsamplers[0].conv.bias.add_(5e4)
    return vae


@torch.no_grad()
def reconstruct(vae, x: Tensor) -> Tensor:
    dtype = next(vae.parameters()).dtype
    return vae.decode(vae.encode(x.to(dtype)).latent_dist.mode()).sample.float()


def test_the_audit_gives_the_largest_value_of_each_layer():
    vae = sound_vae()
    largest = audit(vae, IMAGES)
    with torch.no_grad():
        wanted = max(float(vae.encoder.conv_in(x).abs().max()) for x in IMAGES)
        stream = max(float(vae.encoder.down_blocks[0].resnets[0](vae.encoder.conv_in(x)).abs().max()) for x in IMAGES)
    assert largest["encoder.conv_in"] == wanted
    assert largest["encoder.down_blocks.0.resnets.0"] == stream
    assert {"decoder.conv_out", "decoder.mid_block.attentions.0.to_v", "quant_conv"} <= largest.keys()


def test_a_vae_that_overflows_is_the_same_in_fp32_to_the_bit_and_right_in_fp16(tmp_path):
    vae = overflowing_vae()
    wanted = [reconstruct(vae, x) for x in IMAGES]
    broken = copy.deepcopy(vae).half()
    assert not reconstruct(broken, IMAGES[0]).isfinite().all(), "fp16 must fail before, or this test shows nothing"
    done = fix(vae, IMAGES)
    assert {"encoder", "decoder"} <= done.scales.keys()
    assert any(name.endswith("conv1") for name in done.scales)
    assert any(name.endswith("to_v") for name in done.scales)
    for x, y in zip(IMAGES, wanted, strict=True):
        assert torch.equal(reconstruct(vae, x), y)
    assert max(audit(vae, IMAGES).values()) <= FP16_MAX / 4

    save_vae(vae, tmp_path / "fixed")
    stock = StockAutoencoderKL.from_pretrained(tmp_path / "fixed", torch_dtype=torch.float16)
    sound = sound_vae()
    for x, y in zip(IMAGES, wanted, strict=True):
        half_error = (reconstruct(stock, x) - y).abs().max() / y.std()
        healthy = reconstruct(sound, x)
        usual_error = (reconstruct(copy.deepcopy(sound).half(), x) - healthy).abs().max() / healthy.std()
        assert half_error <= 4 * usual_error, (float(half_error), float(usual_error))


def test_what_stock_eps_costs_is_within_the_bound(tmp_path):
    vae = overflowing_vae()
    exact = [reconstruct(copy.deepcopy(vae).double(), x.double()) for x in IMAGES]
    norms_before = norm_outputs(vae)
    done = fix(vae, IMAGES)
    save_vae(vae, tmp_path / "fixed")
    loaded = load_vae(tmp_path / "fixed")
    norms_after = norm_outputs(loaded)
    assert 0 < done.eps_bound < 0.05
    changes = [float((norms_after[name] - y).norm() / y.norm()) for name, y in norms_before.items()]
    first = float((norms_after[FIRST] - norms_before[FIRST]).norm() / norms_before[FIRST].norm())
    assert first <= done.eps_bound + 1e-6, "of the first norm, whose input is only scaled"
    assert max(changes) < 20 * done.eps_bound + 1e-4
    for x, y in zip(IMAGES, exact, strict=True):
        assert float((reconstruct(loaded, x) - y).abs().max() / y.std()) < 20 * done.eps_bound + 1e-3


FIRST = "encoder.down_blocks.0.resnets.0.norm1"


@torch.no_grad()
def norm_outputs(vae: AutoencoderKL) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    norms = {name: m for name, m in vae.named_modules() if isinstance(m, torch.nn.GroupNorm)}
    handles = [m.register_forward_hook(lambda _, x, y, name=n: outputs.update({name: y})) for n, m in norms.items()]
    reconstruct(vae, IMAGES[0])
    for handle in handles:
        handle.remove()
    return outputs


def test_a_sound_vae_is_left_as_it_is():
    vae = sound_vae()
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    done = fix(vae, IMAGES)
    assert done.scales == {}
    assert done.eps_bound == 0
    assert all(torch.equal(before[name], weight) for name, weight in vae.state_dict().items())


def test_what_no_rescaling_reaches_is_said():
    vae = sound_vae()
    with torch.no_grad():
        vae.decoder.conv_out.weight.mul_(1e7)
    with pytest.raises(InputError, match=r"decoder\.conv_out.*rescaling cannot reduce"):
        fix(vae, IMAGES)
    with pytest.raises(InputError, match="need fp32"):
        audit(sound_vae().half(), IMAGES)


@pytest.mark.parametrize("tiling", [False, True])
def test_the_audit_and_the_fix_of_a_vae_with_cpu_kernels_are_those_of_the_plain_one(tiling):
    plain, fast = overflowing_vae(), overflowing_vae()
    speed_up(fast)
    fast.enable_tiling(tiling)
    largest, found = audit(plain, IMAGES), audit(fast, IMAGES)
    assert found.keys() == largest.keys()
    assert all(found[name] == pytest.approx(largest[name], rel=1e-3) for name in largest)
    assert fix(fast, IMAGES).scales == fix(plain, IMAGES).scales
    torch.testing.assert_close(reconstruct(fast, IMAGES[0]), reconstruct(plain, IMAGES[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("layer", "change"),
    [
        ("conv2", lambda block: spectral_norm(block.conv2)),
        ("conv2", lambda block: block.conv2.register_forward_hook(lambda module, inputs, output: output + 1)),
        ("conv1", lambda block: inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv1"]), block)),
        ("norm1", lambda block: setattr(block, "norm1", torch.nn.Identity())),
    ],
)
def test_a_layer_that_is_not_scaled_by_its_weights_is_refused(layer, change):
    vae = overflowing_vae()
    change(vae.decoder.mid_block.resnets[0])
    before = copy.deepcopy(vae.state_dict())
    with pytest.raises(InputError, match=rf"decoder\.mid_block\.resnets\.0\.{layer} .*merge adapters"):
        fix(vae, IMAGES)
    assert all(torch.equal(weight, before[name]) for name, weight in vae.state_dict().items())


def test_the_commands_audit_and_fix(tmp_path, capsys):
    save_vae(overflowing_vae(), tmp_path / "vae")
    small = ["--resolution", "32", "--count", "2"]
    assert main(["fp16", "audit", str(tmp_path / "vae"), *small]) == 0
    said = capsys.readouterr().out
    assert "beyond fp16's 65504" in said
    assert not said.startswith("0 of")
    assert main(["fp16", "fix", str(tmp_path / "vae"), str(tmp_path / "fixed"), *small]) == 0
    said = capsys.readouterr().out
    assert "the same to the bit" in said
    assert said.splitlines()[-6].startswith("0 of")
    assert load_vae(tmp_path / "fixed").config.norm_num_groups == 4
    assert main(["fp16", "fix", str(tmp_path / "vae"), *small]) == 2
    assert "need a target for fix" in capsys.readouterr().err
