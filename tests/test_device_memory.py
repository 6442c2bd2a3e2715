"""GPU memory, counted without a GPU: the count itself, and the budget of `enable_tiling`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sdvae import AutoencoderKL, InputError
from sdvae.model import tiling

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (32, 64, 64),
}
LEVELS = {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D")}
LEVELS |= {"up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D")}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no attention, reflect padding": {"mid_block_add_attention": False, "padding_mode": "reflect"},
    "attention in a level": LEVELS,
    "wider below": {"block_out_channels": (32, 64, 128)},
    "wider above": {"block_out_channels": (64, 32, 32)},
}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """scripts/device_memory.py as a module."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        yield importlib.import_module("device_memory")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_one_convolution_takes_its_output_and_for_a_cut_its_input_once_more(script):
    with script.fake_gpu():
        conv = nn.Conv2d(3, 5, 3, padding=1, device="cuda")
        x = torch.empty(1, 3, 10, 7, device="cuda")
        with script.AllocatedMemory() as memory:
            y = conv(x)
            assert y.shape == (1, 5, 10, 7)
            assert memory.peak == memory.now == 1536  # 1 400 bytes
            del y
            assert memory.now == 0
            conv(x[:, :, 2:8])
            assert memory.peak == 1536, "840 bytes in two blocks, and 504 in one for the copy"
            conv(x.repeat(1, 1, 1, 2)[..., :7])
            assert memory.peak == 2048 + 1536 + 1024, "the repeated map, the output, the copy"
        assert memory.now == 0


def test_tensors_that_were_there_before_and_views_take_nothing(script):
    with script.fake_gpu():
        x = torch.empty(100, 100, device="cuda")
        with script.AllocatedMemory() as memory:
            y = x[3:].t().reshape(100, 97, 1).squeeze(2)
            x.add_(1)
        assert memory.peak == 0
        assert y.shape == (100, 97)


def test_the_count_is_that_of_torchs_profiler(script):
    """On the CPU, with real tensors, and operations whose kernels allocate nothing else."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 64), nn.SiLU(), nn.Linear(64, 32), nn.GroupNorm(4, 32), nn.GELU(), nn.Linear(32, 8)]
    network = nn.Sequential(*layers).requires_grad_(False)
    x = torch.randn(50, 16)

    def compute() -> torch.Tensor:
        h = network(x)
        return torch.cat([h, h * 2]).exp_().softmax(dim=1)

    compute()
    with script.AllocatedMemory("cpu", block_bytes=1) as memory:
        result = compute()
        assert memory.now == result.nbytes
    with torch.profiler.profile(profile_memory=True) as profile:
        compute()
    now = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        now += event.nbytes()
        peak = max(peak, now)
    assert peak > 2 * result.nbytes
    assert memory.peak == peak


def test_fake_tensors_take_what_real_ones_take(script):
    with script.fake_gpu():
        vae = script.build(AutoencoderKL, torch.float32, {**SMALL, "mid_block_add_attention": False})
        found = script.peak_bytes(vae, "decode", 1, 64, 48)
    real = AutoencoderKL(**SMALL, mid_block_add_attention=False).eval()
    z = torch.randn(1, 4, 16, 12)
    with torch.no_grad(), script.AllocatedMemory("cpu") as memory:
        image = real.decode(z).sample
        assert found == memory.peak - image.nbytes


def budgets(vae: AutoencoderKL, shape: tuple[int, int, int], dtype: torch.dtype, fused: bool) -> dict[str, int]:
    """The smallest budget, and about the smallest one with which the maps are on the device."""
    batch, height, width = shape
    rows = tiling.STRIPS_AT_ONCE * tiling.row_bytes(vae, *shape, dtype)
    held = tiling.attention_bytes(vae, *shape, dtype, fused)
    maps = max(tiling.map_bytes(vae, *shape, dtype), 2 * held)
    beside_maps = (
        limit
        for limit in range(maps + 3 * rows, 10 * (maps + rows), rows)
        if tiling.plan(vae, (batch, 3, height, width), torch.device("cuda"), dtype, limit).store.type == "cuda"
    )
    return {"cpu": held + 3 * rows, "cuda": next(beside_maps)}


def check(script: ModuleType, changes: dict[str, Any], part: str, shape: tuple[int, int, int], dtype: torch.dtype):
    batch, height, width = shape
    with script.fake_gpu():
        vae = script.build(AutoencoderKL, dtype, {**SMALL, **changes})
        for store, limit in budgets(vae, shape, dtype, fused=True).items():
            plan = tiling.plan(vae, (batch, 3, height, width), torch.device("cuda"), dtype, limit)
            assert plan.store.type == store
            vae.enable_tiling(memory_bytes=limit)
            peak = script.peak_bytes(vae, part, *shape)
            assert 0.2 * limit < peak <= 0.9 * limit, "some is left for cuDNN's workspaces"


@pytest.mark.parametrize("part", ["decode", "encode"])
@pytest.mark.parametrize("name", SHAPES)
def test_strips_stay_within_the_budget(script, name, part):
    check(script, SHAPES[name], part, (2, 20, 40), torch.bfloat16)
    check(script, SHAPES[name], part, (1, 16, 100), torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["decode", "encode"])
def test_strips_of_a_tall_image_stay_within_the_budget(script, part):
    """There, keys and values, or the maps, take more than the strips."""
    check(script, LEVELS, part, (1, 100, 16), torch.float32)


def test_strips_stay_within_the_budget_where_torch_builds_the_scores(script):
    shape, dtype = (2, 20, 40), torch.bfloat16
    with FakeTensorMode(), torch.no_grad():  # without a GPU, torch takes the product that every device has
        vae = script.build(AutoencoderKL, dtype, SMALL)
        for limit in budgets(vae, shape, dtype, fused=False).values():
            vae.enable_tiling(memory_bytes=limit)
            assert script.peak_bytes(vae, "decode", *shape) <= limit


@pytest.mark.slow
def test_sds_model_stays_within_a_budget(script):
    for part, dtype in (("decode", torch.bfloat16), ("encode", torch.float32)):
        with script.fake_gpu():
            vae = script.build(AutoencoderKL, dtype, script.SD)
            vae.enable_tiling(memory_bytes=2**30)
            assert script.peak_bytes(vae, part, 1, 1024, 1032) <= 0.9 * 2**30
            whole = tiling.map_bytes(vae, 1, 1024, 1032, dtype)
            vae.disable_tiling()
            assert script.peak_bytes(vae, part, 1, 1024, 1032) > whole


def test_the_table_has_a_dash_where_the_budget_is_too_small(script, monkeypatch, capsys):
    monkeypatch.setattr(script, "SD", SMALL)
    arguments = ["--sizes", "64", "--dtypes", "fp32", "--budgets", "0.0001", "1"]
    monkeypatch.setattr(sys, "argv", ["device_memory.py", *arguments])
    script.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [(row[0], row[5]) for row in rows] == [("| decode", "-"), ("| encode", "-")]
    monkeypatch.setattr(sys, "argv", ["device_memory.py", "--sizes", "60"])
    with pytest.raises(InputError, match="multiples of 8"):
        script.main()
