"""The Triton kernels against float64, on a GPU if there is one, else in Triton's interpreter; and `calibrate`."""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdvae import AutoencoderKL, InputError, speed_up
from sdvae.kernels import calibration, group_norm, speed, triton_norm
from sdvae.kernels.forms import FORMS, Forms, use
from sdvae.kernels.group_norm import FastGroupNorm, FastResnetBlock
from sdvae.kernels.upsample import FastUpsample, TransposedUpsample
from sdvae.kernels.winograd import MeasuredConv3x3, has_nnpack
from sdvae.model import tiling
from sdvae.model.blocks import ResnetBlock, Upsample
from sdvae.tutorial.conditional import ConditionalAutoencoderKL
from tests.conftest import tiny_vae
from tests.test_fast import randn, relative_error
from tests.test_model_changed_layers import changed

DEVICE = torch.device(triton_norm.DEVICE_TYPE)
LAYOUTS = (torch.contiguous_format, torch.channels_last)
HALF = {torch.bfloat16: 2**-7, torch.float16: 2**-10}  # one unit of the result: Triton's interpreter cuts bf16 off


@pytest.fixture
def kernels_here(monkeypatch) -> None:
    """The forms with Triton kernels can be asked for on the device that runs them."""
    for name in ("fused", "norm with silu"):
        monkeypatch.setitem(FORMS[DEVICE.type], name, FORMS["cuda"][name])


@pytest.fixture
def small_programs(monkeypatch) -> None:
    """Several programs for a small map, each with several turns."""
    monkeypatch.setattr(triton_norm, "TILE", 32)
    monkeypatch.setattr(triton_norm, "PROGRAMS", 24)
    monkeypatch.setattr(triton_norm, "GROUP_TILE", 8)


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """How often each function that starts a kernel was called."""
    counter: Counter[str] = Counter()
    for name in ("scale_and_shift", "scaled_silu", "add"):
        own = getattr(triton_norm, name)

        def counting(*args: Any, name: str = name, own: Any = own, **kwargs: Any) -> Any:
            counter[name] += 1
            return own(*args, **kwargs)

        monkeypatch.setattr(triton_norm, name, counting)
    return counter


def norm_of(groups: int, channels: int) -> FastGroupNorm:
    norm = FastGroupNorm(groups, channels, eps=1e-6).to(DEVICE).requires_grad_(False)
    norm.weight.copy_(randn(channels, seed=7))
    norm.bias.copy_(randn(channels, seed=8))
    return norm


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 6, 5, 7), 3), ((1, 32, 3, 9), 1), ((2, 32, 2, 3), 32), ((1, 3, 1, 1), 1), ((1, 12, 33, 1), 2)],
)
def test_norm_and_silu_equal_float64(shape, groups, layout, small_programs):
    norm, x, conv_bias = norm_of(groups, shape[1]), randn(*shape, seed=1).to(DEVICE), randn(shape[1], seed=2).to(DEVICE)
    x = x.contiguous(memory_format=layout)
    for bias in (None, conv_bias):
        shifted = x.double() if bias is None else x.double() + bias.double()[:, None, None]
        wanted = F.silu(F.group_norm(shifted, groups, norm.weight.double(), norm.bias.double(), norm.eps))
        got = norm.then_silu(x, bias)
        assert got.is_contiguous(memory_format=layout)
        assert float((got - wanted).abs().max()) <= 2e-6 * max(1.0, float(wanted.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_and_silu_in_half_precision_round_once(dtype, layout, small_programs):
    norm, x = norm_of(2, 8).to(dtype), (300 * randn(1, 8, 9, 6, seed=1)).to(DEVICE, dtype)  # whose squares overflow
    x = x.contiguous(memory_format=layout)
    wanted = F.silu(F.group_norm(x.double(), 2, norm.weight.double(), norm.bias.double(), norm.eps))
    got = norm.then_silu(x)
    assert got.dtype == dtype
    assert float(((got.double() - wanted).abs() / wanted.abs().clamp(min=0.1)).max()) <= HALF[dtype]


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mean_of_a_thousand_standard_deviations_costs_no_more_than_its_rounding(layout, small_programs):
    """With E[x²] - E[x]² in fp32, as torch computes it on a CPU in channels last, the error here is above 1e-2."""
    norm, x = norm_of(2, 8), (1000 + randn(1, 8, 13, 12, seed=1)).to(DEVICE).contiguous(memory_format=layout)
    wanted = F.silu(F.group_norm(x.double(), 2, norm.weight.double(), norm.bias.double(), norm.eps))
    assert relative_error(norm.then_silu(x), wanted) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_rows_of_a_map_are_read_in_place(layout):
    norm, whole = norm_of(2, 4), randn(2, 4, 9, 6, seed=1).to(DEVICE).contiguous(memory_format=layout)
    for rows in (whole[:, :, 2:7], whole[:, :, 3:4], whole[:, :, 1:8, 1:5], whole.transpose(2, 3)):
        before = whole.clone()
        wanted = F.silu(F.group_norm(rows.double(), 2, norm.weight.double(), norm.bias.double(), norm.eps))
        assert relative_error(norm.then_silu(rows), wanted) <= 1e-6
        assert torch.equal(whole, before)


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out_channels", [8, 12])
@pytest.mark.parametrize("biased", [True, False])
def test_a_fused_block_equals_float64(layout, out_channels, biased, calls):
    torch.manual_seed(0)
    block = ResnetBlock(8, out_channels, 4).to(DEVICE).requires_grad_(False)
    for conv in (block.conv1, block.conv2, block.conv_shortcut):
        if conv is not None and not biased:
            conv.bias = None
    exact = copy.deepcopy(block).double()
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=layout)
    block.__class__, block.norm1.__class__, block.norm2.__class__ = FastResnetBlock, FastGroupNorm, FastGroupNorm
    x = randn(2, 8, 5, 6, seed=1).to(DEVICE)
    before = x.clone()
    got = block(x)
    assert torch.equal(x, before)
    assert calls == {"scale_and_shift": 2, "scaled_silu": 2, "add": 1}
    assert got.is_contiguous(memory_format=layout)
    assert relative_error(got, exact(x.double())) <= 1e-6


def fused_forms(vae: AutoencoderKL, layout: str = "channels_last") -> Forms:
    layers = {name: "fused" for name, module in vae.named_modules() if isinstance(module, ResnetBlock)}
    norms = {name: "norm with silu" for name, module in vae.named_modules() if type(module) is nn.GroupNorm}
    return Forms(layout, layers | norms)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_vae_with_fused_blocks_equals_float64_whole_and_in_strips(layout, kernels_here, calls, monkeypatch):
    vae = tiny_vae(block_out_channels=(4, 8), norm_num_groups=2, layers_per_block=1).to(DEVICE).eval()
    exact = copy.deepcopy(vae).double()
    names = list(vae.state_dict())
    forms = fused_forms(vae, layout)
    assert speed_up(vae, forms=forms) == forms
    assert list(vae.state_dict()) == names
    x = randn(1, 3, 8, 12, seed=4).to(DEVICE)
    wanted = exact.encode(x.double()).latent_dist.parameters
    blocks = sum(isinstance(module, ResnetBlock) for module in vae.encoder.modules())
    assert relative_error(vae.encode(x).latent_dist.parameters, wanted) <= 2e-6
    assert calls == {"scale_and_shift": 2 * blocks + 1, "scaled_silu": 2 * blocks + 1, "add": blocks}
    image = exact.decode(wanted[:, :4]).sample
    assert relative_error(vae.decode(wanted[:, :4].float()).sample, image) <= 2e-6
    monkeypatch.setattr(tiling, "STRIP_BYTES", 2**9)
    monkeypatch.setattr(tiling, "STRIPS_A_MAP", 4)
    vae.enable_tiling()
    calls.clear()
    assert relative_error(vae.decode(wanted[:, :4].float()).sample, image) <= 2e-6
    assert calls.keys() == {"scaled_silu"}, "with the moments of the whole map"


@torch.no_grad()
def test_what_the_kernels_do_not_fit_is_computed_by_the_ordinary_layers(kernels_here, calls, monkeypatch):
    vae = tiny_vae(block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1).to(DEVICE).eval()
    plain = copy.deepcopy(vae)
    use(vae, fused_forms(vae, "contiguous"))
    z = randn(1, 4, 3, 2, seed=1).to(DEVICE)
    with torch.enable_grad():
        assert torch.equal(vae.decode(z).sample, plain.decode(z).sample)
        vae.decode(z).sample.sum().backward()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(vae.decode(z).sample, plain.decode(z).sample)
    assert torch.equal(vae.double().decode(z.double()).sample, plain.double().decode(z.double()).sample)
    vae.float(), plain.float()
    torch._dynamo.reset()
    compiled = torch.compile(vae.decode, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z).sample, plain.decode(z).sample, rtol=0, atol=1e-5)
    monkeypatch.setattr(group_norm, "find_spec", lambda name: None)
    group_norm.kernels.cache_clear()
    try:
        assert torch.equal(vae.decode(z).sample, plain.decode(z).sample), "without Triton"
    finally:
        group_norm.kernels.cache_clear()
    assert not calls
    monkeypatch.undo()
    assert not torch.equal(vae.decode(z).sample, plain.decode(z).sample), "the kernels"


# Changes of the block, and of the last norm and activation, which the kernels would bypass.
OF_THE_BLOCK = [
    *("nothing", "hook on the activation", "hook before the activation", "subclass of the activation"),
    *("another forward of the activation", "hook on the norm", "no norm", "norm of other groups"),
    *("another forward of the last norm", "hook on the last activation", "hook on a conv", "no conv"),
    *("another layer for a conv", "weight norm", "spectral norm", "weights stored in fp8", "circular padding"),
    *("another forward within a conv", "another middle block", "LoRA on all layers"),
]


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("change", OF_THE_BLOCK)
def test_a_changed_layer_acts_as_in_diffusers(change, kernels_here):
    vae = tiny_vae(block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1).to(DEVICE).eval()
    stock = vae.to_diffusers()
    z = randn(1, 4, 3, 2, seed=1).to(DEVICE)
    changed(stock, change)
    want = stock.decode(z).sample
    fast = ("decoder.mid_block.resnets.0", "decoder.conv_norm_out")
    for change_first in (True, False):
        ours = copy.deepcopy(vae)
        if change_first:
            changed(ours, change)
        layers = {name: form for name, form in fused_forms(ours).layers.items() if name.startswith(fast)}
        use(ours, Forms("contiguous", layers))
        if not change_first:
            changed(ours, change)
        got = ours.decode(z).sample
        assert float((got - want).norm() / want.norm()) <= 2e-5, change_first


COMPILE = """
import json, re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from sdvae.kernels import triton_norm

POINTERS = {"x": "bf16", "h": "bf16", "out": "bf16", "weight": "bf16", "bias": "bf16", "conv_bias": "bf16"}
POINTERS |= dict.fromkeys(("means", "squares", "scale", "shift"), "fp32")

def compiled(kernel, capability, constants):
    names = kernel.arg_names
    types = {name: f"*{POINTERS[name]}" if name in POINTERS else "fp32" if name == "eps" else "i32" for name in names}
    constants = {name: value for name, value in constants.items() if name in names}
    aligned = [name for name in names if name not in constants and name != "eps"]
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]

found = {}
for capability in (80, 90, 100):
    for layout, unit, tile in (("NHWC", "c", (32, 128)), ("NCHW", "p", (4096, 1))):
        constants = {f"{name}_{unit}": 1 for name in ("x", "h", "out")} | dict(zip(("ROWS", "COLUMNS"), tile))
        for kernel in (triton_norm._moments, triton_norm._scaled, triton_norm._summed):
            ptx = compiled(kernel, capability, constants)
            accesses = set(re.findall(r"(?:ld|st)\\.global[.\\w]*", ptx))
            found[f"{kernel.__name__} {layout} {capability}"] = sorted(accesses)
    compiled(triton_norm._scale_and_shift, capability, dict(EACH=12, CHANNELS=16, PARTS=64, HAS_CONV_BIAS=True))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_and_read_and_write_16_bytes_at_a_time(tmp_path):
    """Triton needs no GPU to compile for one. Narrower accesses would halve the bandwidth."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = tmp_path / "compile.py"
    script.write_text(COMPILE)
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 18
    for name, accesses in found.items():
        assert "ld.global.v4.b32" in accesses, name
        assert name.startswith("_moments") or [a for a in accesses if a.startswith("st")] == ["st.global.v4.b32"], name


# Calibration


@pytest.fixture
def clock(monkeypatch) -> dict[type[nn.Module], float]:
    """Seconds that a layer of each class takes; 1 for others, and 1.2 times as much in the contiguous layout."""
    times: dict[type[nn.Module], float] = {}

    def seconds(call: Any, device: torch.device) -> float:
        form, x = call.func, call.args[0]
        took = sum(times.get(type(module), 1.0) for module in form.modules())
        return took * (1.0 if x.is_contiguous(memory_format=torch.channels_last) else 1.2)

    monkeypatch.setattr(calibration, "_seconds", seconds)
    monkeypatch.setattr(speed, "by_rules", lambda *_: Forms("channels_last"))
    return times


def wide_vae() -> AutoencoderKL:
    return tiny_vae(block_out_channels=(64, 64), norm_num_groups=4, layers_per_block=1).eval()


@torch.no_grad()
@pytest.mark.skipif(not has_nnpack(), reason="no NNPACK")
def test_the_fastest_forms_and_layout_are_kept(clock, monkeypatch):
    vae, x = wide_vae(), randn(1, 3, 32, 40, seed=1)
    plain, wanted = copy.deepcopy(vae), copy.deepcopy(vae).double()(x.double()).sample
    state = torch.get_rng_state()
    clock |= {FastUpsample: 0.9, TransposedUpsample: 0.5, MeasuredConv3x3: 0.1}
    forms = speed_up(vae, calibrate=(32, 40))
    kinds = Counter(type(module) for module in vae.modules())
    blocks = sum(isinstance(module, ResnetBlock) for module in vae.modules())
    assert forms.layout == "contiguous", "for Winograd"
    assert kinds[MeasuredConv3x3] == 2 * blocks + 1, "those of blocks and of the upsampler"
    assert forms.seconds["contiguous"] < forms.seconds["channels_last"]
    assert vae.use_slicing
    assert relative_error(vae(x).sample, wanted) <= 1e-5
    assert not torch.equal(vae(x).sample, plain(x).sample)

    clock[MeasuredConv3x3] = 1.0
    again = copy.deepcopy(vae)  # whose layers have other forms already
    forms = speed_up(again, calibrate=(32, 40))
    assert forms.layout == "channels_last"
    assert forms.layers == {"decoder.up_blocks.0.upsamplers.0": "transposed"}
    assert type(again.decoder.up_blocks[0].upsamplers[0]) is TransposedUpsample
    assert MeasuredConv3x3 not in {type(module) for module in again.modules()}
    assert relative_error(again(x).sample, wanted) <= 1e-5

    clock |= {TransposedUpsample: 1.0, FastUpsample: 0.99}
    assert speed_up(again, calibrate=(32, 40)).layers == {}, "a gain within the noise is none"
    assert type(again.decoder.up_blocks[0].upsamplers[0]) is Upsample
    speed_up(vae, forms=forms)
    assert type(vae.decoder.up_blocks[0].upsamplers[0]) is TransposedUpsample, "the choice of an earlier call"

    def slow_as_a_whole(call: Any, device: torch.device) -> float:
        transposed = any(type(module) is TransposedUpsample for module in call.func.modules())
        return float(transposed) if isinstance(call.func, AutoencoderKL) else 1.0 - 0.5 * transposed

    monkeypatch.setattr(calibration, "_seconds", slow_as_a_whole)
    vae.disable_slicing()
    assert speed_up(vae, calibrate=(32, 40)) == speed.by_rules(vae), "where the whole is faster by the rules"
    assert not vae.use_slicing
    assert torch.equal(torch.get_rng_state(), state)


def test_a_form_that_fails_or_is_wrong_is_left_out_and_named(clock, monkeypatch, caplog):
    class Failing(FastUpsample):
        stands_in_for = Upsample

        def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            raise RuntimeError("no compiler")

    class Wrong(FastUpsample):
        stands_in_for = Upsample

        def computed(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return 1.01 * super().computed(x, weight, bias)

    monkeypatch.setitem(FORMS["cpu"], "four taps", Failing)
    monkeypatch.setitem(FORMS["cpu"], "transposed", Wrong)
    clock |= {Failing: 0.0, Wrong: 0.0, MeasuredConv3x3: 2.0}
    assert speed_up(wide_vae(), calibrate=(16, 16)).layers == {}
    assert "left out «four taps» for decoder.up_blocks.0.upsamplers.0: no compiler" in caplog.text
    assert "left out «transposed» for decoder.up_blocks.0.upsamplers.0: its result is off by 1.0e-02" in caplog.text


def test_the_forms_are_chosen_for_each_size_of_maps(monkeypatch, caplog):
    """With a clock by which four taps win on small maps alone; large ones are cut, and their time extrapolated."""

    def seconds(call: Any, device: torch.device) -> float:
        form, x = call.func, call.args[0]
        if isinstance(form, AutoencoderKL):
            return 9.0 - sum(isinstance(module, FastUpsample) for module in form.modules())
        layout = 1.0 if x.is_contiguous(memory_format=torch.channels_last) else 2.0
        return layout * (x.shape[2] if type(form) is not FastUpsample else 10 + x.shape[2] / 4)

    monkeypatch.setattr(calibration, "_seconds", seconds)
    monkeypatch.setattr(speed, "by_rules", lambda *_: Forms("channels_last"))
    vae = tiny_vae(block_out_channels=(8, 8, 8), norm_num_groups=4, layers_per_block=1).eval()
    names = [f"decoder.up_blocks.{level}.upsamplers.0" for level in (0, 1)]
    assert speed_up(vae, calibrate=(32, 16)).layers == {names[1]: "four taps"}, "of 8 and 16 rows"
    monkeypatch.setitem(calibration.PRODUCTS, "cpu", 1)
    with caplog.at_level(logging.INFO):
        assert speed_up(vae, calibrate=(64, 16)).layers == dict.fromkeys(names, "four taps"), "of 16 and 32, cut to 12"
    assert "layout channels_last, 2 layers «four taps»" in caplog.text


class Wrapped(nn.Module):
    """A block around one that the VAE's own class does not have under that name."""

    def __init__(self) -> None:
        super().__init__()
        self.block = ResnetBlock(16, 16, 8)

    def forward(self, x: Tensor, temb: None = None) -> Tensor:
        return self.block(x)


def test_calibration_times_what_is_there():
    """Without a clock of its own, and with layers that were hooked and replaced: what is chosen computes the same."""
    vae = tiny_vae().eval()
    vae.decoder.up_blocks[0].resnets[0].register_forward_hook(lambda *_: None)
    vae.decoder.mid_block.resnets[0] = Wrapped()
    vae.encoder.down_blocks[0].downsamplers[0].conv = nn.Conv2d(8, 8, 2, stride=2)
    x = randn(1, 3, 16, 24, seed=1)
    with torch.no_grad():
        wanted = vae(x).sample
        forms = speed_up(vae, calibrate=(16, 24))
        torch.testing.assert_close(vae(x).sample, wanted, rtol=0, atol=1e-5)
    assert not any(name.startswith("decoder.up_blocks.0.resnets.0") for name in forms.layers)
    assert all(0 < seconds < 60 for seconds in forms.seconds.values())


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (tiny_vae, {"calibrate": (15, 16)}, "height 15 is not a positive multiple of 2"),
        (tiny_vae, {"forms": Forms("contiguous", {"decoder": "magic"})}, "got form 'magic' on cpu; need one of"),
        (tiny_vae, {"forms": Forms("contiguous", {"decoder.x": "four taps"})}, "for layer 'decoder.x', which this VAE"),
        (tiny_vae, {"forms": Forms("NHWC", {})}, "got layout 'NHWC'; need one of contiguous, channels_last"),
        (
            lambda: ConditionalAutoencoderKL(
                num_classes=3,
                block_out_channels=(8, 8),
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                norm_num_groups=4,
            ),
            {"calibrate": (16, 16)},
            "got calibrate for a conditional VAE",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_line(make, arguments, message):
    with pytest.raises(InputError, match=message):
        speed_up(make(), **arguments)


WAYS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: torch.func.vmap(f)(x[None])[0],
    "forward gradients": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "trace": lambda f, x: torch.jit.trace(f, x[:1])(x),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["four taps", "winograd"])
def test_transformed_and_traced_layers_are_the_ordinary_ones(form, way):
    """torch.func and the tracer look into a layer, and know torch's own operations alone."""
    if form == "winograd" and not has_nnpack():
        pytest.skip("needs NNPACK")
    vae = tiny_vae(block_out_channels=(64,) * 2).requires_grad_(False)
    layer, x = vae.decoder.up_blocks[0].upsamplers[0], randn(2, 64, 8, 8, seed=1)
    expected = WAYS[way](layer, x)
    names = dict(vae.named_modules())
    at = next(name for name, module in names.items() if module is layer)
    use(vae, Forms("contiguous", {at: "four taps"} if form == "four taps" else {f"{at}.conv": "winograd"}))
    torch.testing.assert_close(WAYS[way](layer, x), expected, atol=1e-4, rtol=1e-4)


def test_an_image_without_a_batch_is_computed_as_before():
    vae, x = tiny_vae(), randn(3, 16, 16, seed=1)
    with torch.no_grad():
        expected = vae.encoder.conv_in(x)
        use(vae, Forms("contiguous", {"encoder.conv_in": "winograd"} if has_nnpack() else {}))
        torch.testing.assert_close(vae.encoder.conv_in(x), expected)


@pytest.mark.parametrize("given", [64, (32.0, 32.0), (64, 64, 3), "64x64"])
def test_calibrate_needs_height_and_width(given):
    with pytest.raises(InputError, match="need height and width of the images, in pixels"):
        speed_up(tiny_vae(), calibrate=given)


def test_a_calibration_that_fails_leaves_torchs_layers():
    vae = tiny_vae()
    vae.enable_tiling(memory_bytes=1)
    with pytest.raises(InputError):
        speed_up(vae, calibrate=(64, 64))
    assert not any(isinstance(module, tuple(FORMS["cpu"].values())) for module in vae.modules())
    assert vae.encoder.conv_in.weight.is_contiguous()
    assert not vae.use_slicing


def test_a_triton_that_cannot_be_imported_is_not_used(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('no driver')")
    code = "from sdvae.kernels.group_norm import kernels; print(kernels())"
    path = os.pathsep.join([str(tmp_path), *sys.path])
    ran = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "None"
    assert "Triton is installed, but cannot be imported, and is not used: no driver" in ran.stderr
