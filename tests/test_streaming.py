"""`enable_tiling`: the whole-image result from strips, and in less memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sdvae import AutoencoderKL, InputError, load_vae
from sdvae.data import open_source, read_image, to_tensor
from sdvae.kernels import winograd
from sdvae.kernels.speed import speed_up
from sdvae.model import tiling as streaming

SD = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "norm_num_groups": 32,
}


SMALL = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 12, 16),
    "norm_num_groups": 4,
}


def vae_of(**changes) -> AutoencoderKL:
    """A tiny VAE with random weights."""
    torch.manual_seed(0)
    return AutoencoderKL(**{**SMALL, **changes}).eval()


@pytest.fixture(scope="module")
def trained() -> AutoencoderKL:
    return load_vae(dtype=torch.float32)


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """Two views of the coffee cup, 240x328."""
    source = open_source("skimage")
    names = [source.name(i) for i in range(len(source))]
    x = to_tensor(read_image(source.read(names.index("coffee"))).resize((328, 240)))
    return torch.stack([x, x.flip(2)])


def error(found: Tensor, wanted: Tensor) -> float:
    """The greatest difference, in units of the wanted values' std."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().std())


@torch.no_grad()
def both_passes(
    vae: AutoencoderKL, x: Tensor, monkeypatch, strip_bytes: int
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """moments and image: (streamed, whole, whole in float64)."""
    monkeypatch.setattr(streaming, "STRIP_BYTES", strip_bytes)
    monkeypatch.setattr(streaming, "STRIPS_A_MAP", 1)
    exact = copy.deepcopy(vae).double()
    exact.disable_tiling()
    vae.disable_tiling()
    z = exact.encode(x.double()).latent_dist.mode()
    results = {}
    for name, run in (
        ("moments", lambda model, dtype: model.encode(x.to(dtype)).latent_dist.parameters),
        ("image", lambda model, dtype: model.decode(z.to(dtype)).sample),
    ):
        vae.disable_tiling()
        whole = run(vae, vae.dtype)
        vae.enable_tiling()
        results[name] = (run(vae, vae.dtype), whole, run(exact, torch.float64))
    vae.disable_tiling()
    return results


@pytest.mark.parametrize("strip_bytes", [1, 20_000, 2**30])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"mid_block_add_attention": False},
        {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D")}
        | {"up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D")},
        {"layers_per_block": 2, "in_channels": 1, "out_channels": 1, "latent_channels": 16},
    ],
    ids=["plain", "no quant convs", "no attention", "attention in a level", "deep grey"],
)
def test_strips_of_any_height_give_the_whole_image_of_any_vae(changes, strip_bytes, monkeypatch):
    vae = vae_of(**changes)
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 5e-5)):  # in fp32, rounding of the network itself
        vae = vae.to(dtype)
        for batch, height, width in ((1, 4, 4), (2, 20, 44), (1, 52, 8)):
            x = torch.randn(batch, vae.config.in_channels, height, width, generator=torch.Generator().manual_seed(1))
            for name, (streamed, whole, _) in both_passes(vae, x, monkeypatch, strip_bytes).items():
                assert streamed.shape == whole.shape
                assert streamed.dtype == whole.dtype
                assert error(streamed, whole) <= bound, name


@pytest.mark.slow
def test_photographs_through_trained_weights_are_exact_and_stock_tiles_are_not(trained, photographs, monkeypatch):
    passes = both_passes(trained, photographs, monkeypatch, strip_bytes=2**17)
    for name, (streamed, whole, exact) in passes.items():
        assert error(streamed, exact) <= 2e-5, name
        assert error(streamed, whole) <= 1e-4, name
    stock = trained.to_diffusers()
    stock.enable_tiling()
    stock.tile_sample_min_size, stock.tile_latent_min_size = 128, 16
    with torch.no_grad():
        z = trained.encode(photographs).latent_dist.mode()
        assert error(stock.decode(z).sample, passes["image"][1]) > 0.1


@pytest.mark.parametrize("kind", ["bright corner", "constant", "noise", "one hot pixel"])
def test_inputs_made_to_break_statistics_by_strips_are_exact(trained, kind, monkeypatch):
    x = torch.full((1, 3, 96, 128), -0.9)
    if kind == "bright corner":
        x[:, :, :16, :16] = 1.0
    elif kind == "noise":
        x = torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    elif kind == "one hot pixel":
        x[0, 0, 50, 50] = 50.0
    for name, (streamed, whole, exact) in both_passes(trained, x, monkeypatch, strip_bytes=2**16).items():
        bound = max(1e-5, 2 * error(whole, exact))  # a constant image is hard for fp32 itself
        assert error(streamed, exact) <= bound, name


def test_in_bf16_strips_are_as_near_to_the_truth_as_the_whole_image(trained, photographs, monkeypatch):
    vae = copy.deepcopy(trained).to(torch.bfloat16)
    for name, (streamed, whole, exact) in both_passes(vae, photographs[:1, :, :96, :96], monkeypatch, 2**16).items():
        rms = [float((found.double() - exact).square().mean().sqrt()) for found in (streamed, whole)]
        assert rms[0] <= 1.1 * rms[1], name
        assert streamed.dtype == torch.bfloat16


@pytest.mark.parametrize("widths", [(96, 96, 96), (8, 16, 16)])
def test_fast_layers_stream_as_well(widths, monkeypatch):
    vae = vae_of(block_out_channels=widths)
    plain = copy.deepcopy(vae).double()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(winograd, "winograd_pays", lambda *shape: winograd.has_nnpack() and min(shape[:2]) >= 96)
    taken = []
    own = winograd._nnpack
    monkeypatch.setattr(winograd, "_nnpack", lambda *args: taken.append(1) or own(*args))
    speed_up(vae)
    x = torch.randn(1, 3, 128, 64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(streaming, "STRIP_BYTES", 40 * widths[0] * 64 * 4)
    monkeypatch.setattr(streaming, "STRIPS_A_MAP", 1)
    vae.enable_tiling()
    with torch.no_grad():
        moments = vae.encode(x).latent_dist.parameters
        assert error(moments, plain.encode(x.double()).latent_dist.parameters) <= 5e-5
        z = moments[:, :4]
        assert error(vae.decode(z).sample, plain.decode(z.double()).sample) <= 5e-5
    assert bool(taken) is (widths[0] >= 96 and winograd.has_nnpack())


def test_maps_take_no_more_than_planned(monkeypatch):
    """Counts the bytes of all strips that are alive; the whole-image pass would hold several times as much."""
    alive, most = {}, 0
    append, free_above = streaming.Rows.append, streaming.Rows.free_above

    def count(self: streaming.Rows) -> None:
        nonlocal most
        alive[id(self)] = sum(rows.untyped_storage().nbytes() for _, rows in self._strips)
        most = max(most, sum(alive.values()))

    def counting_append(self, rows):
        append(self, rows)
        count(self)

    def counting_free_above(self, row):
        free_above(self, row)
        count(self)

    monkeypatch.setattr(streaming.Rows, "append", counting_append)
    monkeypatch.setattr(streaming.Rows, "free_above", counting_free_above)
    vae = vae_of(block_out_channels=(16, 32, 32), norm_num_groups=8)
    row = 4 * 16 * 2 * 64 * 4
    monkeypatch.setattr(streaming, "STRIP_BYTES", row)
    monkeypatch.setattr(streaming, "STRIPS_A_MAP", 1)
    vae.enable_tiling()
    with torch.no_grad():
        vae.decode(torch.randn(1, 4, 64, 16))
    planned = streaming.map_bytes(vae, 1, 256, 64, torch.float32)
    assert planned == 40 * 256 * 64 * 4  # the last upsampler's two maps: 32 channels, and 32 at a quarter
    assert 0.8 * planned < most < 1.2 * planned


def test_where_gradients_are_on_the_whole_image_is_computed(monkeypatch):
    vae = vae_of()
    vae.enable_tiling()
    x = torch.randn(1, 3, 16, 16)
    vae.encode(x).latent_dist.mean.sum().backward()
    assert vae.encoder.conv_in.weight.grad is not None


def test_slicing_and_disabling_work_as_in_diffusers():
    vae = vae_of()
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        wanted = vae.encode(x).latent_dist.parameters
        vae.enable_tiling()
        vae.enable_slicing()
        assert error(vae.encode(x).latent_dist.parameters, wanted) <= 1e-5
        vae.disable_tiling()
        vae.disable_slicing()
        assert torch.equal(vae.encode(x).latent_dist.parameters, wanted)


def test_a_budget_decides_on_strips_and_one_too_small_says_what_is_needed():
    vae = vae_of()
    z = torch.randn(1, 4, 32, 16)
    maps = streaming.map_bytes(vae, 1, 128, 64, torch.float32)
    least = maps + 3 * streaming.STRIPS_AT_ONCE * streaming.row_bytes(vae, 1, 128, 64, torch.float32)
    with torch.no_grad():
        wanted = vae.decode(z).sample
        vae.enable_tiling(memory_bytes=least)
        assert error(vae.decode(z).sample, wanted) <= 5e-5
        vae.enable_tiling(memory_bytes=least - 1)
        with pytest.raises(
            InputError, match=rf"memory_bytes={least - 1} for images of 128 x 64.*need at least {least}"
        ):
            vae.decode(z)


def test_on_an_accelerator_maps_that_do_not_fit_go_to_the_host(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "can_use_efficient_attention", lambda _: True)
    vae = vae_of()
    gpu = torch.device("cuda")  # nothing is computed there
    shape = (1, 3, 512, 512)
    maps = streaming.map_bytes(vae, 1, 512, 512, torch.float32)
    rows = streaming.row_bytes(vae, 1, 512, 512, torch.float32)
    with FakeTensorMode():
        assert streaming.plan(vae, shape, gpu, torch.float32, 4 * maps).store == gpu
        beside = streaming.plan(vae, shape, gpu, torch.float32, maps + streaming.STRIPS_AT_ONCE * 2**20)
        assert beside.store == gpu, "with smaller strips they fit"
        assert (
            maps + streaming.STRIPS_AT_ONCE * (beside.strip_bytes + 2 * rows) <= maps + streaming.STRIPS_AT_ONCE * 2**20
        )
        budget = streaming.plan(vae, shape, gpu, torch.float32, maps // 2)
    assert budget.store == torch.device("cpu")
    assert 0 < streaming.STRIPS_AT_ONCE * budget.strip_bytes <= maps // 2


@pytest.mark.parametrize("side", [4096, 8192])
def test_a_budget_with_room_for_the_maps_is_accepted_however_large_the_image(side):
    with torch.device("meta"):
        vae = vae_of(**SD)
    maps = streaming.map_bytes(vae, 1, side, side, torch.float32)
    budget = streaming.plan(vae, (1, 3, side, side), torch.device("cpu"), torch.float32, 2 * maps)
    assert budget.strip_bytes <= streaming.STRIP_BYTES


@pytest.mark.parametrize(
    ("latents", "said"),
    [
        (torch.zeros(1, 5, 8, 8), "need .batch, 4, height, width"),
        (torch.zeros(1, 4, 0, 8), "zero"),
        (torch.zeros(4, 8, 8), "need .batch, 4, height, width"),
    ],
)
@pytest.mark.parametrize("tiling", [False, True])
def test_bad_latents_are_refused(latents, said, tiling):
    vae = vae_of()
    if tiling:
        vae.enable_tiling()
    with pytest.raises(InputError, match=said), torch.no_grad():
        vae.decode(latents)


def test_a_flag_turns_it_off_as_in_older_diffusers():
    vae = vae_of()
    vae.enable_tiling(True)
    assert vae.use_tiling
    vae.enable_tiling(False)
    assert not vae.use_tiling


def test_layers_with_hooks_see_whole_maps_and_what_they_keep_stays():
    vae = vae_of()
    vae.enable_tiling()
    kept = {}
    norm, conv = vae.decoder.mid_block.resnets[0].norm1, vae.decoder.mid_block.resnets[0].conv2
    norm.register_forward_hook(lambda _, x, y: kept.update(norm=y, norm_then=y.clone()))
    conv.register_forward_hook(lambda _, x, y: kept.update(conv=y, conv_then=y.clone()))
    with torch.no_grad():
        vae.decode(torch.randn(1, 4, 40, 8))
    assert kept["norm"].shape[2] == 40
    assert torch.equal(kept["norm"], kept["norm_then"])
    assert torch.equal(kept["conv"], kept["conv_then"])


def test_offloading_layer_by_layer_works_with_tiling():
    from accelerate import cpu_offload

    vae = vae_of()
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        wanted = vae.decode(z).sample
        vae.enable_tiling()
        cpu_offload(vae, execution_device=torch.device("cpu"))
        assert error(vae.decode(z).sample, wanted) <= 1e-5


def test_latents_with_nan_are_refused_before_the_work():
    vae = vae_of()
    vae.enable_tiling()
    z = torch.zeros(1, 4, 8, 8)
    z[0, 1, 2, 3] = float("nan")
    with torch.no_grad(), pytest.raises(InputError, match="NaN or infinite values; need finite ones"):
        vae.decode(z)
