"""What diffusers, its users and accelerate ask of a model: saving, offloading, casting, compiling, checkpointing."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import remove_hook_from_module
from diffusers import AutoencoderKL as StockAutoencoderKL
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import EMAModel
from torch import Tensor

from sdvae.data import BadImages
from sdvae.errors import InputError
from sdvae.kernels.speed import speed_up
from sdvae.model import AutoencoderKL, DiagonalGaussian
from sdvae.model.plain import is_replaced
from sdvae.model.tiling import can_stream
from sdvae.roundtrip import compute_device, round_trip
from sdvae.studio.report.measure import measure
from sdvae.tutorial.likelihood import draw_from_prior

CONFIG: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
}


def make_vae() -> Any:
    torch.manual_seed(0)
    return AutoencoderKL(**CONFIG).eval()


@pytest.fixture
def vae() -> Any:
    return make_vae()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def expected(images) -> Tensor:
    with torch.no_grad():
        return make_vae()(images).sample


@torch.no_grad()
def encode_decode(vae: Any, images: Tensor) -> Tensor:
    """As pipelines do: through encode and decode, never forward."""
    return vae.decode(vae.encode(images).latent_dist.mode()).sample


def public_config(vae: Any) -> dict[str, Any]:
    """As config.json has it: lists for tuples."""
    return {k: v for k, v in json.loads(vae.to_json_string()).items() if not k.startswith("_")}


def weights_file(folder: Path, variant: str = "") -> Path:
    return folder / f"diffusion_pytorch_model.{variant}safetensors"


# ---------------------------------------------------------------- outputs


@torch.no_grad()
def test_tuple_and_dict_outputs_are_the_same(vae, images):
    assert torch.equal(vae(images, return_dict=False)[0], vae(images).sample)
    assert torch.equal(vae(images)[0], vae(images)["sample"])
    posterior = vae.encode(images).latent_dist
    assert torch.equal(vae.encode(images, return_dict=False)[0].parameters, posterior.parameters)
    z = posterior.mode()
    assert torch.equal(vae.decode(z, return_dict=False)[0], vae.decode(z).sample)


@torch.no_grad()
def test_outputs_are_deterministic_and_forward_is_encode_then_decode(vae, images, expected):
    assert torch.equal(vae(images).sample, expected)
    assert torch.equal(encode_decode(vae, images), expected)


@torch.no_grad()
def test_random_draw_depends_on_the_generator_alone(vae, images):
    def draw(seed: int) -> Tensor:
        return vae(images, sample_posterior=True, generator=torch.Generator().manual_seed(seed)).sample

    one = draw(0)
    torch.manual_seed(123)
    assert torch.equal(draw(0), one)
    assert not torch.equal(draw(1), one)


@torch.no_grad()
def test_deep_copy_is_independent(vae, images, expected):
    twin = copy.deepcopy(vae)
    for parameter in vae.parameters():
        parameter.zero_()
    assert torch.equal(twin(images).sample, expected)


def test_parameters_are_counted_as_in_the_stock_class(vae):
    stock: Any = StockAutoencoderKL(**CONFIG)
    assert vae.num_parameters() == stock.num_parameters()
    assert vae.get_memory_footprint() == stock.get_memory_footprint()


# ---------------------------------------------------------------- saving and loading


@torch.no_grad()
def test_saved_model_reloads_bit_exactly(vae, images, expected, tmp_path):
    vae.save_pretrained(tmp_path)
    back = AutoencoderKL.from_pretrained(tmp_path)
    assert not back.training
    assert torch.equal(back(images).sample, expected)
    assert public_config(back) == public_config(vae)


@torch.no_grad()
def test_variant_is_loaded_only_when_asked_for(vae, images, expected, tmp_path):
    vae.save_pretrained(tmp_path, variant="ema")
    assert weights_file(tmp_path, "ema.").is_file()
    assert not weights_file(tmp_path).is_file()
    with pytest.raises(OSError, match="no file named"):
        AutoencoderKL.from_pretrained(tmp_path)
    assert torch.equal(AutoencoderKL.from_pretrained(tmp_path, variant="ema")(images).sample, expected)


@pytest.mark.parametrize("variant", [None, "fp16"])
@torch.no_grad()
def test_sharded_model_reloads_bit_exactly(vae, images, expected, variant, tmp_path):
    vae.save_pretrained(tmp_path, max_shard_size="300KB", variant=variant)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = json.loads(next(tmp_path.glob("*.index*.json")).read_text())
    assert len(shards) > 1
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["weight_map"].keys() == vae.state_dict().keys()
    assert torch.equal(AutoencoderKL.from_pretrained(tmp_path, variant=variant)(images).sample, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_casts_every_weight(vae, dtype, low_cpu_mem_usage, tmp_path):
    # keep_in_fp32: nothing is exempt, as in the stock class, which a pipeline's half precision relies on
    vae.save_pretrained(tmp_path)
    back = AutoencoderKL.from_pretrained(tmp_path, torch_dtype=dtype, low_cpu_mem_usage=low_cpu_mem_usage)
    assert back.dtype == dtype
    assert {weight.dtype for weight in back.state_dict().values()} == {dtype}
    for key, weight in back.state_dict().items():
        assert torch.equal(weight, vae.state_dict()[key].to(dtype)), key


def test_registered_configuration_is_saved(vae, tmp_path):
    vae.register_to_config(scaling_factor=0.5, latents_mean=[0.0, 1.0, 2.0, 3.0])
    vae.save_pretrained(tmp_path)
    for cls in (AutoencoderKL, StockAutoencoderKL):
        back: Any = cls.from_pretrained(tmp_path)
        assert back.config.scaling_factor == 0.5
        assert list(back.config.latents_mean) == [0.0, 1.0, 2.0, 3.0]


def test_from_config_builds_the_same_architecture(vae):
    twin = AutoencoderKL.from_config(vae.config)
    shapes = [{key: weight.shape for key, weight in model.state_dict().items()} for model in (twin, vae)]
    assert shapes[0] == shapes[1]


# ---------------------------------------------------------------- training


def gradients(vae: Any, images: Tensor) -> dict[str, Tensor]:
    vae.zero_grad()
    out = vae(images, sample_posterior=True, generator=torch.Generator().manual_seed(0))
    (out.sample.square().mean() + 1e-3 * out.posterior.kl().mean()).backward()
    return {name: parameter.grad.clone() for name, parameter in vae.named_parameters()}


def test_gradient_checkpointing_recomputes_and_keeps_every_gradient(vae, images):
    vae.train()
    calls: list[str] = []
    for name, module in vae.named_modules():
        if type(module).__name__ == "ResnetBlock":
            # before, since torch stops recomputing as soon as it has every tensor, amid the last block
            module.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
    assert not vae.is_gradient_checkpointing
    plain = gradients(vae, images)
    once = len(calls)
    assert once == len(set(calls))

    vae.enable_gradient_checkpointing()
    assert vae.is_gradient_checkpointing
    assert vae.encoder.gradient_checkpointing
    assert vae.decoder.gradient_checkpointing
    calls.clear()
    checkpointed = gradients(vae, images)
    assert len(calls) == 2 * once, "each block runs forward and again in the backward pass"
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert plain[name].abs().sum() > 0, name
        assert torch.equal(plain[name], checkpointed[name]), name

    vae.disable_gradient_checkpointing()
    assert not vae.is_gradient_checkpointing
    calls.clear()
    gradients(vae, images)
    assert len(calls) == once


def test_gradient_checkpointing_leaves_inference_alone(vae, images, expected):
    vae.enable_gradient_checkpointing()
    assert torch.equal(encode_decode(vae, images), expected)


@torch.no_grad()
def test_diffusers_ema_model_tracks_our_parameters(vae):
    before = [parameter.clone() for parameter in vae.parameters()]
    ema = EMAModel(vae.parameters(), decay=0.5)
    for parameter in vae.parameters():
        parameter.add_(1.0)
    ema.step(vae.parameters())
    ema.copy_to(vae.parameters())
    for parameter, old in zip(vae.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)
        assert ((parameter - old) < 1.0 + 1e-6).all()


# ---------------------------------------------------------------- casting


@pytest.mark.parametrize(
    ("storage", "tolerance"),
    [(torch.float8_e4m3fn, 0.3), (torch.float8_e5m2, 0.6)],  # 3 and 2 bits of mantissa
)
def test_layerwise_casting_stores_fp8_and_computes_bf16(images, storage, tolerance):
    half = make_vae().to(torch.bfloat16)
    vae = make_vae().to(torch.bfloat16)
    footprint = vae.get_memory_footprint()
    vae.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.bfloat16)
    assert vae.get_memory_footprint() < 0.6 * footprint
    stored = {name: parameter.dtype for name, parameter in vae.named_parameters()}
    assert stored["encoder.conv_in.weight"] == stored["decoder.mid_block.attentions.0.to_q.weight"] == storage
    assert stored["encoder.conv_norm_out.weight"] == torch.bfloat16  # diffusers leaves norms alone

    out, exact = encode_decode(vae, images.bfloat16()), encode_decode(half, images.bfloat16())
    assert out.dtype == torch.bfloat16
    error = (out - exact).float().norm() / exact.float().norm()
    assert 0 < error < tolerance
    assert {name: parameter.dtype for name, parameter in vae.named_parameters()} == stored


def test_layerwise_casting_trains_under_autocast(images):
    vae = make_vae().train()
    vae.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    with torch.autocast("cpu"):
        loss = vae(images).sample.square().mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in vae.decoder.parameters())


# ---------------------------------------------------------------- offloading


@pytest.mark.parametrize("offload", ["block_level", "leaf_level"])
def test_group_offloading_gives_the_same_images(vae, images, expected, offload):
    blocks = {"num_blocks_per_group": 1} if offload == "block_level" else {}
    vae.enable_group_offload(torch.device("cpu"), offload_type=offload, **blocks)
    hooked = [module for module in vae.modules() if hasattr(module, "_diffusers_hook")]
    assert hooked
    assert all(module._diffusers_hook.get_hook("group_offloading") is not None for module in hooked)
    torch.testing.assert_close(encode_decode(vae, images), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(vae(images).sample, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("offload_first", [True, False])
@pytest.mark.parametrize("offload", ["block_level", "leaf_level"])
def test_group_offloading_beside_other_kernels_gives_the_same_images(vae, images, expected, offload, offload_first):
    blocks = {"num_blocks_per_group": 1} if offload == "block_level" else {}
    if not offload_first:
        speed_up(vae)
    vae.enable_group_offload(torch.device("cpu"), offload_type=offload, **blocks)
    if offload_first:
        speed_up(vae)
    torch.testing.assert_close(encode_decode(vae, images), expected, rtol=0, atol=1e-4)


def test_group_offloading_to_disk_gives_the_same_images(vae, images, expected, tmp_path):
    vae.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert list(tmp_path.glob("*.safetensors"))
    torch.testing.assert_close(encode_decode(vae, images), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_sequential_offloading_gives_the_same_images(vae, images, expected, offload, tmp_path):
    if offload == "cpu":
        cpu_offload(vae, execution_device=torch.device("cpu"))
    else:
        disk_offload(vae, str(tmp_path), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in vae.parameters())
    torch.testing.assert_close(encode_decode(vae, images), expected, rtol=0, atol=1e-6)
    assert all(parameter.is_meta for parameter in vae.parameters())


@torch.no_grad()
@pytest.mark.parametrize("library", ["accelerate", "diffusers"])
def test_hooks_that_were_removed_leave_the_shortcuts_open(vae, images, expected, library):
    """Both libraries leave an attribute `forward` behind, which is the class's own method."""
    parts = (vae.encoder, vae.decoder, vae.quant_conv, vae.post_quant_conv)
    if library == "accelerate":
        cpu_offload(vae, execution_device=torch.device("cpu"))
        assert not any(can_stream(part, 32) for part in parts)
        remove_hook_from_module(vae, recurse=True)
    else:
        for module in vae.modules():
            HookRegistry.check_if_exists_or_initialize(module).register_hook(ModelHook(), "nothing")
        assert not any(can_stream(part, 32) for part in parts)
        for module in vae.modules():
            HookRegistry.check_if_exists_or_initialize(module).remove_hook("nothing", recurse=False)
    assert "forward" in vae.encoder.conv_in.__dict__
    assert all(can_stream(part, 32) for part in parts)
    assert all(can_stream(part, 32) for part in copy.deepcopy(vae).children())
    assert torch.equal(vae(images).sample, expected)
    speed_up(vae)
    assert not any(is_replaced(module) for module in vae.modules()), "the faster layers would not be called"
    torch.testing.assert_close(vae(images).sample, expected, rtol=0, atol=1e-4)


def test_a_round_trip_through_an_offloaded_vae_uses_the_device_that_computes(vae, images, expected):
    cpu_offload(vae, execution_device=torch.device("cpu"))
    assert vae.device.type == "meta"
    assert compute_device(vae) == torch.device("cpu")
    torch.testing.assert_close(round_trip(vae, images).reconstruction, expected, rtol=0, atol=1e-6)


def test_figures_and_draws_of_an_offloaded_vae_are_those_of_the_vae(vae, images):
    batch = {"image": images, "name": ["a", "b"], "index": [0, 1], "bad": []}
    want = [measure(vae, [batch], None, BadImages()).mean("psnr")]
    want.append(draw_from_prior(vae, 2, 16, generator=torch.Generator().manual_seed(0)))
    cpu_offload(vae, execution_device=torch.device("cpu"))
    assert measure(vae, [batch], None, BadImages()).mean("psnr") == pytest.approx(want[0], abs=1e-4)
    drawn = draw_from_prior(vae, 2, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, want[1], rtol=0, atol=1e-6)


def test_names_that_offloading_goes_by_exist_in_the_model(vae):
    # A stale name is silently ignored: the block is split between devices, or is not offloaded.
    classes = {type(module).__name__ for module in vae.modules()}
    assert set(AutoencoderKL._no_split_modules) <= classes
    assert set(AutoencoderKL._group_offload_block_modules) <= {name for name, _ in vae.named_children()}
    assert set(AutoencoderKL._repeated_blocks or ()) <= classes


# ---------------------------------------------------------------- compiling


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@torch.no_grad()
def test_encoder_and_decoder_compile_without_a_graph_break(vae, images, expected, fresh_compiler):
    vae.encoder.compile(fullgraph=True, backend="aot_eager")
    vae.decoder.compile(fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(encode_decode(vae, images), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_forward_compiles_without_a_graph_break(vae, images, expected, fresh_compiler):
    compiled = torch.compile(vae, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            torch.testing.assert_close(compiled(images).sample, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_decoder_compiles_with_dynamic_shapes(vae, fresh_compiler):
    latents = [torch.randn(1, 4, side, side + 4, generator=torch.Generator().manual_seed(side)) for side in (8, 12)]
    expected = [vae.decoder(z) for z in latents]
    vae.decoder.compile(fullgraph=True, dynamic=True, backend="eager")
    for z, image in zip(latents, expected, strict=True):
        torch.testing.assert_close(vae.decoder(z), image, rtol=0, atol=1e-5)


def compile_decoder(vae: Any) -> None:
    vae.decoder = torch.compile(vae.decoder, backend="eager")


def compile_blocks(vae: Any) -> None:
    vae.encoder.mid_block = torch.compile(vae.encoder.mid_block, backend="eager")
    resnets = vae.decoder.up_blocks[0].resnets
    resnets[0] = torch.compile(resnets[0], backend="eager")
    vae.decoder.up_blocks[0].upsamplers[0].compile(backend="eager")


def compile_methods(vae: Any) -> None:
    vae._encode, vae.decode = (torch.compile(method, backend="eager") for method in (vae._encode, vae.decode))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:tiling is not used")
@pytest.mark.parametrize(
    ("compile_part", "compile_first"),
    [(compile_decoder, True), (compile_decoder, False), (compile_blocks, True), (compile_methods, False)],
)
def test_compiled_parts_stay_right_beside_other_kernels_and_strips(
    vae, images, expected, compile_part, compile_first, fresh_compiler
):
    steps = [compile_part, speed_up, lambda vae: vae.enable_tiling()]
    for step in steps if compile_first else reversed(steps):
        step(vae)
        torch.testing.assert_close(encode_decode(vae, images), expected, rtol=0, atol=1e-4)
    assert all(grad.abs().sum() > 0 for grad in gradients(vae, images).values())


@pytest.mark.slow
@torch.no_grad()
def test_strips_are_no_part_of_a_compiled_graph(vae, images, expected, fresh_compiler):
    """They took minutes to compile: each strip of each layer was traced."""
    targets: list[Any] = []

    def note(graph: Any, inputs: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    vae.enable_tiling()
    compiled = torch.compile(vae, backend=note)
    torch.testing.assert_close(compiled(images).sample, expected, rtol=0, atol=1e-5)
    assert torch.nn.functional.silu not in targets
    vae.disable_tiling()
    torch.testing.assert_close(compiled(images).sample, expected, rtol=0, atol=1e-5)
    assert torch.nn.functional.silu in targets


# ---------------------------------------------------------------- attention processors, fused projections


@pytest.mark.filterwarnings("ignore:Accessing config attribute")
def test_whatever_diffusers_touches_on_a_vae_is_there():
    """Every `vae.name` in the source of the installed diffusers, and every public attribute of its class."""
    stock: Any = StockAutoencoderKL(**CONFIG)
    source = "\n".join(path.read_text() for path in Path(diffusers.__file__).parent.rglob("*.py"))
    touched = {name for name in re.findall(r"\bvae\.([a-zA-Z_]\w*)", source) if hasattr(stock, name)}
    assert {"fuse_qkv_projections", "encode", "post_quant_conv", "set_attn_processor", "use_tiling"} <= touched
    public = {name for name in dir(stock) if not name.startswith("_")}
    vae = make_vae()
    assert [name for name in sorted(touched | public) if not hasattr(vae, name)] == []
    assert isinstance(vae, StockAutoencoderKL), "pipelines ask for it"
    for name in ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor"):
        assert getattr(vae, name) == getattr(stock, name), name


@torch.no_grad()
def test_methods_of_diffusers_own_tiles_give_what_they_give_there(vae):
    stock = vae.to_diffusers()
    for model in (vae, stock):
        model.tile_sample_min_size, model.tile_latent_min_size = 16, 8
    z, x = noise(1, 4, 12, 20, seed=0), noise(1, 3, 24, 40, seed=0)
    assert torch.equal(vae.tiled_decode(z).sample, stock.tiled_decode(z).sample)
    assert torch.equal(vae._tiled_encode(x), stock._tiled_encode(x))
    assert torch.equal(vae._encode(x), stock._encode(x))


@torch.no_grad()
def test_attention_processors_are_named_set_and_reset_as_in_diffusers(vae, images):
    stock = vae.to_diffusers()
    assert vae.attn_processors.keys() == stock.attn_processors.keys()
    assert [type(p) for p in vae.attn_processors.values()] == [type(p) for p in stock.attn_processors.values()]
    seen = []

    class Watched(AttnProcessor):
        def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(attn)
            return super().__call__(attn, *args, **kwargs)

    for tiling in (False, True):  # strips leave an unknown processor to the whole image
        seen.clear()
        for model in (vae, stock):
            model.set_attn_processor(Watched())
        vae.enable_tiling(tiling)
        assert torch.equal(encode_decode(vae, images), encode_decode(stock, images))
        assert len(seen) == 2 * len(vae.attn_processors)
    for model in (vae, stock):
        model.set_attn_processor({name: AttnProcessor2_0() for name in model.attn_processors})
        model.set_default_attn_processor()
    assert {type(p) for p in vae.attn_processors.values()} == {type(p) for p in stock.attn_processors.values()}
    with pytest.raises(ValueError, match="number of processors"):
        vae.set_attn_processor({})


@torch.no_grad()
def test_fused_projections_give_the_same_and_leave_no_trace(vae, images, expected, tmp_path):
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    stock = vae.to_diffusers()
    vae.unfuse_qkv_projections()  # nothing is fused yet
    for _ in range(2):
        vae.fuse_qkv_projections()
        stock.fuse_qkv_projections()
    assert {type(p) for p in vae.attn_processors.values()} == {FusedAttnProcessor2_0}
    for tiling in (False, True):
        vae.enable_tiling(tiling)
        torch.testing.assert_close(encode_decode(vae, images), expected, rtol=1e-4, atol=1e-5)
    vae.disable_tiling()
    assert torch.equal(encode_decode(vae, images), encode_decode(stock, images))
    assert vae.state_dict().keys() == before.keys()
    vae.save_pretrained(tmp_path)
    for cls in (AutoencoderKL, StockAutoencoderKL):
        back: Any = cls.from_pretrained(tmp_path)
        assert all(torch.equal(weight, before[name]) for name, weight in back.state_dict().items())
        assert torch.equal(encode_decode(back, images), expected)
    vae.unfuse_qkv_projections()
    vae.unfuse_qkv_projections()
    assert {type(p) for p in vae.attn_processors.values()} == {AttnProcessor2_0}
    assert torch.equal(encode_decode(vae, images), expected)


def test_the_optimizer_state_of_a_stock_vae_is_continued_in_its_order_of_parameters(vae, images):
    """Optimizers know parameters by their place, and the order of diffusers' class is another."""
    stock = vae.to_diffusers()
    stock_optimizer = torch.optim.SGD(stock.parameters(), lr=0.1, momentum=0.9)

    def step(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        model(images).sample.square().mean().backward()
        optimizer.step()

    step(stock, stock_optimizer)
    vae.load_state_dict(stock.state_dict())
    names = [name for name, _ in vae.to_diffusers().named_parameters()]
    assert names != [name for name, _ in vae.named_parameters()]
    optimizer = torch.optim.SGD([vae.get_parameter(name) for name in names], lr=0.1, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(stock_optimizer.state_dict()))
    step(stock, stock_optimizer)
    step(vae, optimizer)
    for name, parameter in stock.named_parameters():
        torch.testing.assert_close(vae.get_parameter(name), parameter, rtol=1e-4, atol=1e-6)


def test_fused_projections_train_the_weights_themselves(vae, images):
    plain = gradients(vae, images)
    vae.fuse_qkv_projections()
    fused = gradients(vae, images)
    assert plain.keys() == fused.keys()
    for name in plain:
        torch.testing.assert_close(fused[name], plain[name], rtol=1e-3, atol=1e-6)


@torch.no_grad()
def test_fused_projections_hear_hooks_on_the_three_layers(vae, images):
    layer = vae.decoder.mid_block.attentions[0].to_v
    layer.register_forward_hook(lambda module, inputs, output: 2 * output)
    want = encode_decode(vae, images)
    vae.fuse_qkv_projections()
    torch.testing.assert_close(encode_decode(vae, images), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_middle_block_in_half_precision_beside_fp32_is_as_in_diffusers(vae):
    """AnimateDiff's `upcast_vae` puts parts of an upcast VAE back into half precision."""
    stock = vae.to_diffusers()
    for model in (vae, stock):
        assert isinstance(model.decoder.mid_block.attentions[0].processor, AttnProcessor2_0)
        for part in (model.post_quant_conv, model.decoder.conv_in, model.decoder.mid_block):
            part.to(torch.bfloat16)
    z = noise(1, 4, 8, 8, seed=0).bfloat16()
    outcomes = []
    for model in (stock, vae):
        try:
            outcomes.append(model.decode(z).sample)
        except RuntimeError as error:
            outcomes.append(str(error))
    assert type(outcomes[0]) is type(outcomes[1])
    assert outcomes[0] == outcomes[1] if isinstance(outcomes[0], str) else torch.equal(*outcomes)


# ---------------------------------------------------------------- the public surface

GENERAL = "a setting of diffusers' general class, which is constant in a VAE"
SCALE = "takes diffusers' `scale`, which does nothing there since it was deprecated"
RESAMPLER = "its conv has in_channels and out_channels"

# (diffusers' class, a public name of its instances) -> why ours has no such name
ABSENT = {
    ("ResnetBlock2D", "dropout"): "it is always 0 there, and config.json has no key for it",
    ("ResnetBlock2D", "time_emb_proj"): "None there; our conditional VAE has label_proj",
    **{
        ("ResnetBlock2D", name): GENERAL
        for name in ("down", "downsample", "up", "upsample", "output_scale_factor", "pre_norm", "skip_time_act")
    },
    ("ResnetBlock2D", "time_embedding_norm"): GENERAL,
    ("ResnetBlock2D", "use_conv_shortcut"): "false there, also where there is a conv_shortcut",
    **{
        (kind, name): RESAMPLER if name in ("channels", "out_channels") else GENERAL
        for kind in ("Downsample2D", "Upsample2D")
        for name in ("channels", "out_channels", "name", "norm", "use_conv")
    },
    ("Downsample2D", "padding"): GENERAL,
    ("Upsample2D", "interpolate"): GENERAL,
    ("Upsample2D", "use_conv_transpose"): GENERAL,
    ("UNetMidBlock2D", "add_attention"): "it is in the model's config as mid_block_add_attention",
    ("UNetMidBlock2D", "gradient_checkpointing"): "the encoder's and the decoder's switch covers their middle blocks",
    ("UpDecoderBlock2D", "resolution_idx"): "None there",
    ("AttnUpDecoderBlock2D", "resolution_idx"): "None there",
}

# (diffusers' class, method, argument) -> why ours does not take it; a call that passes it ends in a TypeError
ARGUMENTS_ABSENT = {
    **{
        (kind, "forward", name): SCALE
        for kind in ("ResnetBlock2D", "Downsample2D", "Upsample2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D")
        for name in ("args", "kwargs")
    },
    ("Upsample2D", "forward", "output_size"): "no VAE passes it",
}


def public(thing: Any) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


def pairs(vae: Any, stock: Any) -> list[tuple[str, Any, Any]]:
    """(name, diffusers' module, ours): the model and all its parts that both have, and a posterior."""
    ours = dict(vae.named_modules())
    found = [(name, theirs, ours[name]) for name, theirs in stock.named_modules() if name in ours]
    x = noise(1, 3, 16, 16, seed=0)
    return [*found, ("posterior", stock.encode(x).latent_dist, vae.encode(x).latent_dist)]


@pytest.mark.filterwarnings("ignore:Accessing config attribute")
def test_every_public_name_of_the_stock_model_and_its_parts_exists_or_is_listed_with_the_reason():
    vae, stock = make_vae(), StockAutoencoderKL(**CONFIG)
    assert {name for name, _ in stock.named_modules()} - {name for name, _ in vae.named_modules()} == {
        name for name, _ in stock.named_modules() if name.endswith(".dropout")
    }
    absent = {
        (type(theirs).__name__, name)
        for _, theirs, ours in pairs(vae, stock)
        for name in public(theirs)
        if not hasattr(ours, name)
    }
    assert absent == ABSENT.keys()


def test_every_argument_of_stock_methods_is_taken_at_its_place_or_listed_with_the_reason():
    refused = set()
    for _, theirs, ours in pairs(make_vae(), StockAutoencoderKL(**CONFIG)):
        for name in public(type(theirs)):
            stock_method, method = getattr(type(theirs), name), getattr(type(ours), name, None)
            if not inspect.isroutine(stock_method) or method is None or method is stock_method:
                continue
            parameters = inspect.signature(method).parameters
            general = {p.kind for p in parameters.values()} & {inspect.Parameter.VAR_KEYWORD}
            for place, argument in enumerate(inspect.signature(stock_method).parameters):
                if list(parameters)[place : place + 1] != [argument] and not general:
                    refused.add((type(theirs).__name__, name, argument))
    assert refused == ARGUMENTS_ABSENT.keys()


@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_every_part_called_as_diffusers_calls_its_own_gives_the_same(attention):
    """Each call that the stock model makes of a part, with the names of its arguments, made of ours."""
    config = CONFIG if attention else {"block_out_channels": (32, 64), "mid_block_add_attention": False}
    config = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, **config}
    torch.manual_seed(0)
    vae = AutoencoderKL(**config).eval()
    stock, parts = vae.to_diffusers(), dict(vae.named_modules())
    seen = set()

    def repeat(name: str, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        named = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        got, want = parts[name](**named), output
        assert torch.equal(got.sample, want.sample) if name == "" else torch.equal(got, want), name
        seen.add(name)

    for name, module in stock.named_modules():
        if name in parts:
            module.register_forward_hook(functools.partial(repeat, name), with_kwargs=True)
    stock(noise(1, 3, 16, 16, seed=0))
    lists = {name for name, module in parts.items() if isinstance(module, torch.nn.ModuleList)}
    assert seen == parts.keys() - lists - {name for name in parts if name.endswith(".to_out")}
    assert len(vae.encoder.mid_block.attentions) == len(stock.encoder.mid_block.attentions) == 1


def test_an_embedding_that_no_block_takes_is_refused(vae):
    with pytest.raises(InputError, match="got an embedding"):
        vae.decoder(noise(1, 4, 8, 8, seed=0), latent_embeds=noise(1, 64, seed=1))


@torch.no_grad()
def test_the_posterior_is_one_of_diffusers(vae):
    parameters, other = 2 * noise(2, 8, 4, 4, seed=0), noise(2, 8, 4, 4, seed=1)
    z = noise(2, 4, 4, 4, seed=2)
    for deterministic in (False, True):
        ours, stock = (kind(parameters, deterministic) for kind in (DiagonalGaussian, DiagonalGaussianDistribution))
        assert isinstance(ours, DiagonalGaussianDistribution)
        assert ours.deterministic == deterministic
        for name in ("parameters", "mean", "logvar", "std", "var"):
            assert torch.equal(getattr(ours, name), getattr(stock, name)), name
        draws = [q.sample(generator=torch.Generator().manual_seed(3)) for q in (ours, stock)]
        assert torch.equal(*draws)
        assert torch.equal(ours.mode(), stock.mode())
        torch.testing.assert_close(ours.kl(), stock.kl())
        torch.testing.assert_close(ours.kl(DiagonalGaussian(other)), stock.kl(DiagonalGaussianDistribution(other)))
        torch.testing.assert_close(ours.nll(z), stock.nll(z))
        torch.testing.assert_close(ours.nll(z, dims=[1]), stock.nll(z, dims=[1]))
        ours.std = torch.zeros_like(ours.std)  # how some trainers ask for the mean
        assert torch.equal(ours.sample(), ours.mean)
    assert isinstance(vae.encode(noise(1, 3, 16, 16, seed=0)).latent_dist, DiagonalGaussianDistribution)


@torch.no_grad()
def test_encode_and_decode_go_through_the_methods_that_diffusers_calls_within_them(vae, images, expected):
    assert torch.equal(vae._decode(vae._encode(images)[:, :4]).sample, expected)
    assert torch.equal(vae._decode(vae._encode(images)[:, :4], return_dict=False)[0], expected)
    vae.enable_tiling()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # in strips, which diffusers' own `_decode` does not know
        torch.testing.assert_close(vae._decode(vae._encode(images)[:, :4]).sample, expected, rtol=0, atol=1e-5)
    calls = []
    for name in ("_encode", "_decode"):
        own = getattr(vae, name)
        setattr(vae, name, lambda *args, own=own, name=name: calls.append(name) or own(*args))
    vae.enable_slicing()
    encode_decode(vae, images)
    assert calls == ["_encode"] * 2 + ["_decode"] * 2


@torch.no_grad()
def test_a_sample_size_of_two_numbers_is_read_as_in_diffusers(tmp_path):
    stock: Any = StockAutoencoderKL(**CONFIG, sample_size=[64, 64])
    stock.save_pretrained(tmp_path)
    vae = AutoencoderKL.from_pretrained(tmp_path)
    assert vae.config.sample_size == [64, 64]
    assert vae.tile_latent_min_size == stock.tile_latent_min_size == 32


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
