"""Layers that users have hooked, replaced, changed or adapted do what they do in diffusers' class, on every fast way.

The fast ways: writing over outputs in inference, strips (`enable_tiling`), and the CPU kernels of `speed_up`.
"""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize, spectral_norm
from torch.nn.utils.parametrizations import spectral_norm as spectral_parametrization
from torch.nn.utils.parametrizations import weight_norm

from sdvae import AutoencoderKL
from sdvae.kernels import winograd
from sdvae.kernels.speed import speed_up
from sdvae.model import tiling
from tests.conftest import tiny_vae


class TwiceSiLU(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Mirror(nn.Module):
    """A block of another kind."""

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        return x.flip(2, 3)


def circular(conv: nn.Conv2d) -> None:
    conv.padding_mode = "circular"


def padded_by(mode: str, vae: Any) -> None:
    """As the model card of a VAE that was trained with other padding asks for."""
    for module in vae.modules():
        if isinstance(module, nn.Conv2d) and any(module.padding):
            module.padding_mode = mode


def seamless(conv: nn.Conv2d) -> None:
    """As scripts for seamless textures do."""
    conv._conv_forward = lambda x, weight, bias: nn.functional.conv2d(
        nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias
    )


def block(vae: Any) -> Any:
    """A ResNet block that is followed by a residual sum with its own input."""
    return vae.decoder.mid_block.resnets[0]


def upsampler_conv(vae: Any) -> nn.Conv2d:
    return vae.decoder.up_blocks[0].upsamplers[0].conv


def twice(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return 2 * output


def replaced_forward(module: nn.Module) -> None:
    own = module.forward
    module.forward = lambda *inputs: 2 * own(*inputs)


ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVS = r".*(conv1|conv2|conv_in|conv_out|conv_shortcut|samplers\.0\.conv)"
EVERYTHING = rf"{CONVS}|.*to_[qkv]|.*to_out\.0|quant_conv|post_quant_conv"


def adapted(vae: Any, add: Callable[[Any, Any], Any], config: Any) -> None:
    """Adapters with weights that depend only on their names."""
    own = set(vae.parameters())
    add(vae, copy.deepcopy(config))
    random_adapters(vae, own)


def random_adapters(vae: Any, own: set[Tensor]) -> None:
    for name, parameter in vae.named_parameters():
        if parameter not in own:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator) + (parameter.data.mean() > 0.5)


def inject(vae: Any, config: Any) -> None:
    inject_adapter_in_model(config, vae)


def add_adapter(vae: Any, config: Any) -> None:
    vae.add_adapter(config)


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    f"{kind} on {where}": partial(adapted, add=add, config=config(target_modules=layers))
    for kind, where, layers, config, add in (
        ("LoRA", "all layers", EVERYTHING, partial(LoraConfig, r=2), get_peft_model),
        ("LoRA", "attention", ATTENTION, partial(LoraConfig, r=2), inject),
        ("DoRA", "all layers", EVERYTHING, partial(LoraConfig, r=2, use_dora=True), add_adapter),
        ("LoHa", "all layers", EVERYTHING, partial(LoHaConfig, r=2, use_effective_conv2d=True), inject),
        ("LoKr", "all layers", EVERYTHING, partial(LoKrConfig, r=2), inject),
        ("IA3", "all layers", EVERYTHING, partial(IA3Config, feedforward_modules=[]), inject),
        ("OFT", "convs", CONVS, partial(OFTConfig, r=2, oft_block_size=0), inject),
    )
}

CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda vae: None,
    "hook on the activation": lambda vae: block(vae).nonlinearity.register_forward_hook(twice),
    "hook before the activation": lambda vae: block(vae).nonlinearity.register_forward_pre_hook(
        lambda module, inputs: (2 * inputs[0],)
    ),
    "subclass of the activation": lambda vae: setattr(block(vae), "nonlinearity", TwiceSiLU()),
    "another forward of the activation": lambda vae: replaced_forward(block(vae).nonlinearity),
    "hook on the norm": lambda vae: block(vae).norm2.register_forward_hook(twice),
    "no norm": lambda vae: setattr(block(vae), "norm1", nn.Identity()),
    "norm of other groups": lambda vae: setattr(block(vae), "norm1", nn.GroupNorm(2, block(vae).norm1.num_channels)),
    "another forward of the last norm": lambda vae: replaced_forward(vae.decoder.conv_norm_out),
    "hook on the last activation": lambda vae: vae.decoder.conv_act.register_forward_hook(twice),
    "hook on a conv": lambda vae: block(vae).conv2.register_forward_hook(twice),
    "no conv": lambda vae: setattr(block(vae), "conv2", nn.Identity()),
    "another layer for a conv": lambda vae: setattr(block(vae), "conv1", Twice()),
    "weight norm": lambda vae: weight_norm(block(vae).conv1),
    "spectral norm": lambda vae: spectral_norm(block(vae).conv1),
    "spectral norm of an upsampler": lambda vae: spectral_norm(upsampler_conv(vae)),
    "parametrized spectral norm": lambda vae: spectral_parametrization(upsampler_conv(vae)),
    "weights stored in fp8": lambda vae: vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
    "parametrized weight": lambda vae: parametrize.register_parametrization(upsampler_conv(vae), "weight", Twice()),
    "circular padding": lambda vae: [circular(m) for m in vae.decoder.modules() if isinstance(m, nn.Conv2d)],
    "reflect padding": partial(padded_by, "reflect"),
    "replicate padding": partial(padded_by, "replicate"),
    "circular padding of an upsampler": lambda vae: circular(upsampler_conv(vae)),
    "another forward within a conv": lambda vae: seamless(block(vae).conv1),
    "another forward within an upsampler's conv": lambda vae: seamless(upsampler_conv(vae)),
    "hook on an upsampler's conv": lambda vae: upsampler_conv(vae).register_forward_hook(twice),
    "hook on an upsampler": lambda vae: vae.decoder.up_blocks[0].upsamplers[0].register_forward_hook(twice),
    "hook on a query": lambda vae: vae.decoder.mid_block.attentions[0].to_q.register_forward_hook(twice),
    "another attention processor": lambda vae: vae.set_attn_processor(AttnProcessor()),
    "another layer for attention": lambda vae: vae.decoder.mid_block.attentions.__setitem__(0, Mirror()),
    "another middle block": lambda vae: setattr(vae.decoder, "mid_block", Mirror()),
    "a conv in groups": lambda vae: setattr(vae, "post_quant_conv", nn.Conv2d(4, 4, 1, bias=False, groups=4)),
    **ADAPTERS,
}


def plain(vae: AutoencoderKL) -> None:
    pass


def strips(vae: AutoencoderKL) -> None:
    vae.enable_tiling()


def cpu_kernels(vae: AutoencoderKL) -> None:
    speed_up(vae)


def cpu_kernels_and_strips(vae: AutoencoderKL) -> None:
    speed_up(vae)
    vae.enable_tiling()


@pytest.fixture
def every_way_is_taken(monkeypatch) -> None:
    """Winograd on small maps, strips of a few rows."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(winograd, "winograd_pays", lambda *shape: winograd.has_nnpack() and min(shape[:2]) >= 96)
    monkeypatch.setattr(tiling, "STRIP_BYTES", 2**12)
    monkeypatch.setattr(tiling, "STRIPS_A_MAP", 4)


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_layer_acts_as_in_diffusers(change, every_way_is_taken):
    z = torch.randn(2, 4, 12, 10, generator=torch.Generator().manual_seed(1))
    for widths in ((8, 16), (96, 96)):  # the second takes Winograd
        vae = tiny_vae(block_out_channels=widths, norm_num_groups=4).eval()
        stock = vae.to_diffusers()
        changed(stock, change)
        want = stock.decode(z).sample
        both_orders = [(way, before) for way in (cpu_kernels, cpu_kernels_and_strips) for before in (True, False)]
        for way, change_first in [(plain, True), (strips, True), *both_orders]:
            ours = copy.deepcopy(vae)
            for step in (partial(changed, ours, change), partial(way, ours))[:: 1 if change_first else -1]:
                step()
            got = ours.decode(z).sample
            if way is plain:
                assert torch.equal(got, want)
            assert float((got - want).norm() / want.norm()) <= 2e-5, (widths, way.__name__, change_first)


def changed(vae: Any, change: str) -> None:
    torch.manual_seed(1)
    CHANGES[change](vae)


@torch.no_grad()
def test_hooks_on_all_modules_see_every_layer_of_diffusers():
    vae = tiny_vae().eval()
    vae.enable_tiling()
    stock = vae.to_diffusers()
    seen: list[type[nn.Module]] = []
    handle = register_module_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    try:
        z = torch.randn(1, 4, 8, 8)
        stock.decode(z)
        wanted = {kind: seen.count(kind) for kind in (nn.SiLU, nn.GroupNorm, nn.Conv2d, nn.Linear)}
        seen.clear()
        vae.decode(z)
    finally:
        handle.remove()
    assert {kind: seen.count(kind) for kind in wanted} == wanted


@pytest.mark.parametrize("kind", [nn.GroupNorm, nn.SiLU, nn.Conv2d])
@torch.no_grad()
def test_what_a_hook_has_kept_stays_as_it_was(kind):
    vae = tiny_vae().eval()
    kept: list[tuple[Tensor, Tensor]] = []
    for module in vae.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda module, inputs, output: kept.append((output, output.clone())))
    vae(torch.randn(1, 3, 16, 16))
    assert len(kept) > 10
    assert all(torch.equal(output, then) for output, then in kept)


def test_gradients_are_seen_by_hooks_on_an_upsamplers_conv(every_way_is_taken):
    vae = tiny_vae().train()
    speed_up(vae)
    seen = []
    upsampler_conv(vae).register_full_backward_hook(lambda *arguments: seen.append(1))
    vae.decode(torch.randn(1, 4, 8, 8)).sample.sum().backward()
    assert seen


@torch.no_grad()
def test_inference_writes_over_what_nobody_else_reads(monkeypatch):
    """The trick itself: without hooks or gradients, activations and sums take no memory of their own."""
    taken = []
    silu, add = nn.functional.silu, Tensor.add_
    monkeypatch.setattr(nn.functional, "silu", lambda h, inplace=False: taken.append(inplace) or silu(h, inplace))
    monkeypatch.setattr(Tensor, "add_", lambda h, x: taken.append("sum") or add(h, x))
    vae = tiny_vae().eval()
    resnets = sum(type(module).__name__ == "ResnetBlock" for module in vae.modules())
    vae(torch.randn(1, 3, 16, 16))
    assert taken.count(True) == 2 * resnets + 2
    assert taken.count(False) == 0
    assert taken.count("sum") >= resnets // 2, "after attention, the two operands have different memory layouts"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_learns_as_in_diffusers(adapter, every_way_is_taken):
    """All gradients, those of the VAE's own weights too if the adapter leaves them trainable."""
    x = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = tiny_vae().train()
    want = gradients(vae.to_diffusers(), adapter, x)
    assert want
    for way in (plain, strips, cpu_kernels):
        for change_first in (True, False):
            ours = copy.deepcopy(vae)
            if not change_first:
                way(ours)
            got = gradients(ours, adapter, x, after=way if change_first else plain)
            assert got.keys() == want.keys()
            for name in want:
                torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-6, msg=f"{name}, {way.__name__}")


def gradients(vae: Any, adapter: str, x: Tensor, after: Callable[[Any], Any] = lambda vae: None) -> dict[str, Tensor]:
    changed(vae, adapter)
    after(vae)
    vae(x).sample.square().mean().backward()
    return {name: weight.grad for name, weight in vae.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("way", [plain, strips, cpu_kernels, cpu_kernels_and_strips])
@torch.no_grad()
def test_adapters_are_added_weighed_fused_saved_and_removed_as_in_diffusers(way, every_way_is_taken, tmp_path):
    x = torch.rand(2, 3, 12, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    vae = tiny_vae().eval()
    stock = vae.to_diffusers()
    way(vae)
    before = vae(x).sample

    def add(model: Any, name: str) -> None:
        own = set(model.parameters())
        model.add_adapter(LoraConfig(r=2, target_modules=EVERYTHING), adapter_name=name)
        random_adapters(model, own)

    steps: dict[str, Callable[[Any], Any]] = {
        "add": lambda model: add(model, "one"),
        "add another": lambda model: add(model, "two"),
        "both": lambda model: model.set_adapters(["one", "two"], [0.5, -2.0]),
        "one": lambda model: model.set_adapter("one"),
        "disable": lambda model: model.disable_adapters(),
        "enable": lambda model: model.enable_adapters(),
        "fuse": lambda model: model.fuse_lora(lora_scale=0.5),
        "unfuse": lambda model: model.unfuse_lora(),
        "save": lambda model: model.save_lora_adapter(tmp_path / type(model).__module__, adapter_name="one"),
        "delete": lambda model: model.delete_adapters("one"),
        "unload": lambda model: model.unload_lora(),
        # what either class has saved is read by the other one
        "load": lambda model: model.load_lora_adapter(
            tmp_path / type(stock if model is vae else vae).__module__,
            prefix=None,
            adapter_name="read",
            use_safetensors=True,
        ),
        "unload again": lambda model: model.unload_lora(),
    }
    seen = {}
    for name, step in steps.items():
        for model in (stock, vae):
            step(model)
        seen[name], want = vae(x).sample, stock(x).sample
        torch.testing.assert_close(seen[name], want, rtol=1e-4, atol=1e-5, msg=name)
        assert vae.active_adapters() == stock.active_adapters() if "unload" not in name else True
    torch.testing.assert_close(seen["load"], seen["add"], rtol=1e-4, atol=1e-5)
    assert float((seen["add"] - before).norm() / before.norm()) > 1e-2
    torch.testing.assert_close(seen["unload again"], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradients_are_on", [True, False])
def test_tiling_that_cannot_be_used_is_said(gradients_are_on):
    vae = tiny_vae().eval()
    vae.enable_tiling()
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        vae.decode(z)
    if not gradients_are_on:
        block(vae).conv1.register_forward_hook(twice)
    reason = "gradients are on" if gradients_are_on else "a layer was replaced, adapted or hooked"
    with torch.set_grad_enabled(gradients_are_on), pytest.warns(UserWarning, match=f"tiling is not used.*{reason}"):
        vae.decode(z)


@pytest.mark.parametrize("way", [plain, strips, cpu_kernels, cpu_kernels_and_strips])
@torch.no_grad()
def test_an_empty_batch_gives_the_empty_result_of_diffusers(way, every_way_is_taken):
    vae = tiny_vae(block_out_channels=(96, 96), mid_block_add_attention=False).eval()
    stock = vae.to_diffusers()
    way(vae)
    x, z = torch.zeros(0, 3, 16, 16), torch.zeros(0, 4, 8, 8)
    assert vae.encode(x).latent_dist.mean.shape == stock.encode(x).latent_dist.mean.shape == (0, 4, 8, 8)
    assert vae.decode(z).sample.shape == stock.decode(z).sample.shape == (0, 3, 16, 16)
