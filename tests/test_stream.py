"""`stream`: a VAE of diffusers, in strips, around its own parameters."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import AsymmetricAutoencoderKL, DDIMScheduler, DiffusionPipeline
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from sdvae import AutoencoderKL, AutoencoderTiny, InputError, stream
from sdvae.metrics.memory import with_peak_memory
from sdvae.model import tiling
from tests.test_streaming import SMALL

pytestmark = pytest.mark.filterwarnings("error:tiling is not used")


def stock_vae(**changes: Any) -> Any:
    torch.manual_seed(0)
    return StockAutoencoderKL(**{**SMALL, **changes}).eval()


@pytest.fixture(autouse=True)
def low_strips(monkeypatch) -> None:
    monkeypatch.setattr(tiling, "STRIP_BYTES", 2**12)
    monkeypatch.setattr(tiling, "STRIPS_A_MAP", 4)


@torch.no_grad()
def outputs(vae: Any, *shape: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(vae.dtype) * 2 - 1
    posterior = vae.encode(x).latent_dist
    return posterior.parameters, vae.decode(posterior.mode()).sample


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.std())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16, "force_upcast": False},
        {"mid_block_add_attention": False, "layers_per_block": 2},
        {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D")}
        | {"up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D")},
    ],
    ids=["SD", "Flux", "no attention", "attention in a level"],
)
def test_a_streamed_vae_has_the_outputs_of_the_whole_image_and_copies_no_weight(changes):
    stock = stock_vae(**changes).double()
    wanted = outputs(stock, 2, 3, 48, 28)
    vae = stream(stock)
    assert isinstance(vae, AutoencoderKL)
    assert isinstance(vae, StockAutoencoderKL), "which pipelines ask for"
    for found, whole in zip(outputs(vae, 2, 3, 48, 28), wanted, strict=True):
        assert error(found, whole) <= 1e-10
    theirs = dict(stock.named_parameters())
    assert {name: id(weight) for name, weight in vae.named_parameters()} == {k: id(w) for k, w in theirs.items()}
    assert all(weight.requires_grad for weight in theirs.values())
    assert {**vae.config} == {**stock.config}
    # it is in strips: one value of a map that is not finite is refused there, and not on the whole image
    with torch.no_grad(), pytest.raises(InputError, match="NaN"):
        vae.decode(torch.full((1, vae.config.latent_channels, 4, 4), float("nan"), dtype=torch.float64))


def test_frozen_weights_stay_frozen_and_moves_reach_both_models():
    stock = stock_vae().requires_grad_(False)
    stock.enable_slicing()
    vae = stream(stock)
    assert not any(weight.requires_grad for weight in [*stock.parameters(), *vae.parameters()])
    assert vae.use_slicing
    assert not vae.training
    stock.to(torch.bfloat16)
    assert vae.dtype == torch.bfloat16
    nn.Module.to(vae, torch.float64)
    assert stock.dtype == torch.float64
    with torch.no_grad():
        stock.decoder.conv_out.weight.mul_(2)
    assert error(outputs(vae, 1, 3, 16, 16)[1], outputs(stock, 1, 3, 16, 16)[1]) <= 1e-10


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_layers_that_were_told_to_reflect_do_so_in_strips(mode):
    stock = stock_vae().double()
    zeros = outputs(stock, 1, 3, 32, 24)[1]
    for module in stock.modules():
        if isinstance(module, nn.Conv2d) and any(module.padding):
            module.padding_mode = mode
    vae = stream(stock)
    assert vae.padding_mode == mode
    assert "padding_mode" not in stock.config, "the given VAE stays as it is"
    wanted = outputs(stock, 1, 3, 32, 24)
    assert error(wanted[1], zeros) > 1e-2
    for found, whole in zip(outputs(vae, 1, 3, 32, 24), wanted, strict=True):
        assert error(found, whole) <= 1e-10


class Pipeline(DiffusionPipeline):
    """What a pipeline does with its VAE, alone."""

    model_cpu_offload_seq = "vae"

    def __init__(self, vae: StockAutoencoderKL, scheduler: DDIMScheduler):
        super().__init__()
        self.register_modules(vae=vae, scheduler=scheduler)


def test_a_pipeline_takes_it_and_is_told_to_tile_as_before():
    pipe = Pipeline(stock_vae().double(), DDIMScheduler())
    wanted = outputs(pipe.vae, 1, 3, 32, 32)
    pipe.vae = stream(pipe.vae)
    pipe.vae.enable_tiling()
    assert pipe.components["vae"] is pipe.vae
    pipe.to(torch.float64)
    for found, whole in zip(outputs(pipe.vae, 1, 3, 32, 32), wanted, strict=True):
        assert error(found, whole) <= 1e-10
    pipe.vae.disable_tiling()
    assert torch.equal(outputs(pipe.vae, 1, 3, 32, 32)[1], wanted[1])


def test_offloading_that_was_enabled_before_goes_on():
    moves = []

    stock = stock_vae()
    stock, hook = cpu_offload_with_hook(stock, execution_device=torch.device("cpu"))
    wanted = outputs(stock, 1, 3, 32, 32)
    own = hook.hook.pre_forward
    hook.hook.pre_forward = lambda module, *inputs, **named: moves.append(module) or own(module, *inputs, **named)
    vae = stream(stock)
    found = outputs(vae, 1, 3, 32, 32)
    assert moves == [vae, vae], "encode and decode each call the hook that brings the weights to the device"
    assert error(found[1], wanted[1]) <= 1e-4
    hook.offload()
    assert {weight.device.type for weight in vae.parameters()} == {"cpu"}


def test_an_adapter_that_is_added_later_takes_part_and_leaves_again():
    stock = stock_vae().double()
    before = outputs(stock, 1, 3, 16, 16)[1]
    vae = stream(stock)
    torch.manual_seed(1)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False), vae)
    vae.double()
    with pytest.warns(UserWarning, match="tiling is not used.*adapted"):
        adapted = outputs(vae, 1, 3, 16, 16)[1]
    assert error(adapted, before) > 1e-3
    vae.fuse_lora()
    vae.unload_lora()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert error(outputs(vae, 1, 3, 16, 16)[1], adapted) <= 1e-10


class Doubled(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def circular(vae: Any) -> None:
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            module.padding_mode = "circular"


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a hook on a layer": (lambda vae: vae.encoder.conv_in.register_forward_hook(print), "encoder.conv_in"),
    "a hook on a block": (lambda vae: vae.decoder.mid_block.register_forward_hook(print), "decoder.mid_block"),
    "a hook on the VAE": (lambda vae: vae.register_forward_hook(print), "hooked as a whole"),
    "another call": (lambda vae: setattr(vae, "decode", print), "hooked as a whole"),
    "another activation": (lambda vae: setattr(vae.decoder, "conv_act", Doubled()), "decoder.conv_act"),
    "another processor": (lambda vae: vae.set_attn_processor(AttnProcessor()), "attentions.0"),
    "another eps": (lambda vae: setattr(vae.decoder.conv_norm_out, "eps", 1e-3), "decoder.conv_norm_out"),
    "fused projections": (lambda vae: vae.fuse_qkv_projections(), "to_qkv"),
    "an adapter": (
        lambda vae: inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q"]), vae),
        "adapter that is not merged",
    ),
    "layers in 8 bits": (
        lambda vae: vae.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32),
        "hooked",
    ),
    "offloading in groups": (
        lambda vae: vae.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        "hooked",
    ),
    "circular padding": (circular, "pad with circular.*need one of zeros, reflect, replicate"),
    "two paddings": (
        lambda vae: setattr(vae.encoder.conv_in, "padding_mode", "reflect"),
        "need one of zeros, reflect, replicate in all",
    ),
    "another padding than it says": (
        lambda vae: vae.register_to_config(padding_mode="reflect"),
        "need one of zeros, reflect, replicate in all",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_compute_otherwise_is_refused(change):
    act, said = CHANGES[change]
    stock = stock_vae()
    act(stock)
    before = copy.copy(stock.__dict__)
    with pytest.raises(InputError, match=said):
        stream(stock)
    assert stock.__dict__ == before


def test_other_classes_are_refused_in_one_line():
    for other in (AsymmetricAutoencoderKL(), AutoencoderTiny(), nn.Linear(1, 1)):
        with pytest.raises(InputError, match=rf"got a {type(other).__name__} to stream; need diffusers.AutoencoderKL"):
            stream(other)
    own = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    assert stream(own) is own
    assert own.use_tiling


def test_a_vae_loaded_by_diffusers_streams_with_its_name_and_saves_again(tmp_path):
    stock_vae().save_pretrained(tmp_path / "vae")
    stock = StockAutoencoderKL.from_pretrained(tmp_path / "vae")
    vae = stream(stock)
    vae.save_pretrained(tmp_path / "again")
    first, again = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("vae", "again"))
    again.pop("_name_or_path", None)
    assert again == first
    assert torch.equal(outputs(StockAutoencoderKL.from_pretrained(tmp_path / "again"), 1, 3, 16, 16)[1],
                       outputs(stock, 1, 3, 16, 16)[1])  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux")
def test_streaming_takes_a_fraction_of_the_memory(monkeypatch):
    monkeypatch.undo()  # strips of the ordinary size
    stock = stock_vae(block_out_channels=(32, 32, 32), norm_num_groups=32)
    z = torch.randn(1, 4, 72, 72)
    with torch.no_grad():
        stock.decode(z[:, :, :8, :8])
        whole, most = with_peak_memory(lambda: stock.decode(z).sample, torch.device("cpu"))
        streamed, least = with_peak_memory(lambda: stream(stock).decode(z).sample, torch.device("cpu"))
    assert error(streamed, whole) <= 1e-4
    if most is not None and least is not None:
        assert least < most / 2, (least, most)
