"""The paths that a GPU takes, on a simulated one: results as on the CPU, no mixed devices, and few waits."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn

from sdvae.kernels.speed import speed_up
from sdvae.kernels.upsample import FastUpsample, upsample_conv, upsample_conv_transposed
from sdvae.kernels.winograd import FastConv3x3
from sdvae.latents.encoder import MomentEncoder
from sdvae.metrics.perceptual import Perceptual, load_perceptual
from sdvae.model import AutoencoderKL
from sdvae.roundtrip import round_trip
from sdvae.training.build import build_vae, lay_out
from sdvae.training.config import EquivarianceConfig, OptimizerConfig, TrainConfig
from sdvae.training.objective import Judges
from sdvae.training.players import Players
from sdvae.training.step import TrainStep
from sdvae.tutorial.conditional import ConditionalAutoencoderKL
from tests.conftest import tiny_vae
from tests.simulated_cuda import OnGPU, Simulation, simulated_cuda
from tests.test_step import SEEDS, images, recipe

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
ON_HOST = 2**17  # elements, too few for the maps of the images below

# The host cuts windows out of the strips that it keeps, so each must have arrived before it is read, and a window is
# no contiguous piece of pinned memory. The copies themselves take longer than these waits.
COPIES_OF_STRIPS = {"model/tiling.py:append", "model/tiling.py:__getitem__"}


@pytest.fixture
def cuda() -> Iterator[Simulation]:
    with simulated_cuda() as simulation:
        yield simulation
    AcceleratorState._reset_state()
    PartialState._reset_state()


def waits_of(cuda: Simulation) -> Counter[str]:
    """How often each line waited since the last call."""
    counted = Counter(wait.where for wait in cuda.waits)
    cuda.waits.clear()
    return counted


def on_both(vae: AutoencoderKL, dtype: torch.dtype = torch.float32) -> tuple[AutoencoderKL, AutoencoderKL]:
    """The same VAE on the GPU and on the CPU."""
    gpu, cpu = copy.deepcopy(vae).eval(), copy.deepcopy(vae).eval()
    for side in (gpu, cpu):
        nn.Module.to(side, dtype=dtype)
    gpu.to("cuda")
    return gpu, cpu


def equal(found: Tensor, wanted: Tensor) -> bool:
    assert isinstance(found, OnGPU)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found.host, wanted, atol=TOLERANCE[wanted.dtype], rtol=0)
    return True


# The simulation itself


def test_tensors_of_two_devices_do_not_mix(cuda):
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(2)
    with pytest.raises(RuntimeError, match="'cuda' device type for generator"):
        torch.randn(2, device="cuda", generator=torch.Generator())
    assert (x + torch.tensor(1.0)).tolist() == [2, 2]  # a number may be on the CPU


@pytest.mark.parametrize(
    ("read", "count"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool(x.any()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: torch.tensor([1.0], device=x.device), 1),
        (lambda x: torch.ones(2).to(x.device), 1),
        (lambda x: torch.ones(2).to(x.device, non_blocking=True), 1),
        (lambda x: torch.ones(2).pin_memory().to(x.device, non_blocking=True), 0),
        (lambda x: x.to("cuda") + x.new_zeros(()) + 1.5, 0),
        (lambda x: x.cpu().sum().item(), 1),
        (lambda x: x[[1, 0]], 1),
    ],
)
def test_what_waits_is_counted(cuda, read, count):
    x = torch.ones(2, device="cuda")
    read(x)
    assert len(cuda.waits) == count


def test_a_list_of_indices_has_its_values_on_the_device(cuda):
    x = torch.tensor([5, 6, 7], device="cuda")
    assert x[[2, 0]].tolist() == [7, 5]
    assert x[None, [1]].tolist() == [[6]]
    x[[0, 1]] = 1
    assert x.tolist() == [1, 1, 7]


def test_memory_without_values_is_not_zero_by_luck(cuda):
    assert torch.empty(3, device="cuda").isnan().all()


def test_an_asynchronous_copy_to_the_host_arrives_at_the_event(cuda):
    x = torch.ones(2, device="cuda")
    target = torch.empty(2, pin_memory=True).copy_(x, non_blocking=True)
    assert target.isnan().all()
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    assert target.tolist() == [1, 1]


# Encoding and decoding


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("mode", ["whole", "sliced", "tiled", "maps on the device", "maps on the host"])
def test_encode_and_decode_equal_the_cpu_and_do_not_wait(cuda, dtype, mode):
    gpu, cpu = on_both(tiny_vae(), dtype)
    budget = {"tiled": None, "maps on the device": 2**22}
    if mode == "maps on the host":
        gpu.enable_tiling(memory_bytes=ON_HOST * dtype.itemsize)
    elif mode in budget:
        gpu.enable_tiling(memory_bytes=budget[mode])
    if mode == "sliced":
        gpu.enable_slicing()
    x = (torch.rand(2, 3, 64, 48) * 2 - 1).to(dtype)
    on_gpu = x.to("cuda")
    waits_of(cuda)
    with torch.no_grad():
        posterior = gpu.encode(on_gpu).latent_dist
        image = gpu.decode(posterior.mode()).sample
        waits = waits_of(cuda)
        assert equal(posterior.parameters, cpu.encode(x).latent_dist.parameters)
        assert equal(image, cpu.decode(posterior.mode().cpu()).sample)
    assert waits.keys() == (COPIES_OF_STRIPS if mode == "maps on the host" else set())


def test_maps_on_the_host_are_used_when_the_device_is_full():
    x = torch.rand(1, 3, 64, 48) * 2 - 1
    with simulated_cuda(free_bytes=2**18) as cuda, torch.no_grad():
        gpu, cpu = on_both(tiny_vae())
        gpu.enable_tiling()
        on_gpu = x.to("cuda")
        waits_of(cuda)
        parameters = gpu.encode(on_gpu).latent_dist.parameters
        assert waits_of(cuda).keys() == COPIES_OF_STRIPS
        assert equal(parameters, cpu.encode(x).latent_dist.parameters)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_half_precision(cuda, precision):
    gpu, _ = on_both(tiny_vae())
    x = torch.rand(1, 3, 32, 32, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype=precision):
        posterior = gpu.encode(x).latent_dist
        assert posterior.parameters.dtype == precision
        assert gpu.decode(posterior.mode()).sample.dtype == precision


def test_a_conditional_vae_takes_labels_of_the_cpu_without_waiting(cuda):
    gpu, cpu = on_both(
        ConditionalAutoencoderKL(num_classes=3, block_out_channels=(8,), norm_num_groups=4).requires_grad_(False)
    )
    x, labels = torch.rand(2, 3, 16, 16), torch.tensor([2, -1])
    on_gpu, pinned = x.to("cuda"), labels.pin_memory()
    waits_of(cuda)
    posterior = gpu.encode(on_gpu, labels=pinned).latent_dist
    image = gpu.decode(posterior.mode(), labels=pinned).sample
    gpu.decode(posterior.mode())
    assert not waits_of(cuda)
    assert equal(image, cpu.decode(cpu.encode(x, labels=labels).latent_dist.mode(), labels=labels).sample)
    assert equal(gpu.encode(on_gpu, labels=labels.to("cuda")).latent_dist.mode(), posterior.mode().cpu())


@pytest.mark.parametrize("latents", ["mode", "sample"])
def test_a_round_trip_waits_only_to_measure_time(cuda, latents):
    gpu, cpu = on_both(tiny_vae())
    x = torch.rand(2, 3, 30, 21)
    on_gpu = x.to("cuda")
    waits_of(cuda)
    trip = round_trip(gpu, on_gpu, latents=latents, generator=[torch.Generator().manual_seed(i) for i in range(2)])
    assert waits_of(cuda) == {"roundtrip.py:_now": 3}
    wanted = round_trip(cpu, x, latents=latents, generator=[torch.Generator().manual_seed(i) for i in range(2)])
    assert equal(trip.reconstruction, wanted.reconstruction)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_moment_encoder_waits_once_a_batch(cuda, precision):
    pixels = [np.random.default_rng(i).integers(0, 256, (32, 24, 3), dtype=np.uint8) for i in range(3)]
    vae = tiny_vae().eval()
    encoder = MomentEncoder(vae, torch.device("cuda"), precision, mirror=True)
    waits_of(cuda)
    pending = encoder.launch(pixels)
    assert not waits_of(cuda)
    moments = pending.moments()
    assert waits_of(cuda) == {"latents/encoder.py:moments": 1}
    again = encoder.again(pending.pixels)
    assert sum(waits_of(cuda).values()) > 0  # rare, and the result is read at once
    wanted = MomentEncoder(vae, torch.device("cpu"), "fp32", mirror=True).launch(pixels).moments()
    torch.testing.assert_close(again, wanted, atol=1e-4, rtol=0)
    assert float((moments - wanted).abs().max()) < 0.2


def test_speed_up_leaves_a_vae_on_a_gpu_as_it_is(cuda, caplog):
    gpu, _ = on_both(tiny_vae(block_out_channels=(64,)))
    speed_up(gpu)
    assert not gpu.use_slicing
    assert not any(isinstance(module, FastConv3x3 | FastUpsample) for module in gpu.modules())
    assert "keeps torch's layers" in caplog.text


@pytest.mark.parametrize("form", [upsample_conv, upsample_conv_transposed])
def test_the_forms_of_upsampling_do_not_make_a_gpu_wait(cuda, form):
    x, weight = (torch.randn(shape, device="cuda") for shape in ((1, 8, 5, 6), (4, 8, 3, 3)))
    cuda.waits.clear()
    y = form(x, weight, None)
    assert y.shape == (1, 4, 10, 12)
    assert not cuda.waits


# Training


def step_on(
    device: str, precision: str, trunk: Path, accumulation: int, compute: Any, **loss: Any
) -> tuple[list[list[dict[str, float]]], Players]:
    """Two training steps. Returns the values of each, and the players."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision)
    assert accelerator.device.type == device
    base: TrainConfig = recipe(**loss)
    config = replace(
        base,
        data=replace(base.data, resolution=64),
        gradient_accumulation_steps=accumulation,
        channels_last=True,
        fast_convolutions=False,
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )
    torch.manual_seed(0)
    vae = build_vae(replace(config.model, initialisation="torch")).train()
    config = lay_out(vae, config, accelerator)
    players = Players(vae, config, accelerator)
    perceptual: Perceptual = load_perceptual("squeeze", trunk, heads="uniform").to(accelerator.device)
    step = TrainStep(config, players, Judges(perceptual), accelerator)
    steps = []
    for number in range(10):
        batch = {"image": images(), "noise_seed": SEEDS, "index": torch.arange(2), "bad": []}
        if device == "cuda":
            batch["image"] = batch["image"].pin_memory()  # as the loader does
        with compute:
            result = step(number, iter([batch] * accumulation))
        if not result.skipped:
            steps.append(result.values)
        if number > 0 and not result.skipped:
            break
        assert precision == "fp16" or number == 0  # whose scale is at first too large
    assert not result.skipped
    return steps, players


class Counted:
    """A context that keeps the waits inside it."""

    def __init__(self, cuda: Simulation):
        self.cuda = cuda
        self.waits: Counter[str] = Counter()

    def __enter__(self) -> None:
        waits_of(self.cuda)

    def __exit__(self, *_: Any) -> None:
        self.waits = waits_of(self.cuda)


NO_GAN: dict[str, Any] = {"discriminator": {"weight": 0.0}}
STEPS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "no discriminator": ("no", 1, NO_GAN),
    "bf16, no discriminator": ("bf16", 1, NO_GAN),
    "fp16, no discriminator": ("fp16", 1, NO_GAN),
    "discriminator": ("no", 1, {}),
    "bf16, discriminator": ("bf16", 1, {}),
    "fp16, discriminator": ("fp16", 1, {}),
    "R1, LeCam, accumulation": ("no", 2, {"discriminator": {"r1_weight": 1.0, "lecam_weight": 0.1}}),
    "fp16, R1, LeCam": ("fp16", 1, {"discriminator": {"r1_weight": 1.0, "lecam_weight": 0.1}}),
    "equivariance, learned variance": (
        "no",
        1,
        {"learn_logvar": True, "equivariance": EquivarianceConfig(weight=0.5, scales=(0.75,))},
    ),
    "discriminator of latents": ("no", 1, {"discriminator": {"sees": "latents", "adaptive": False}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step_equals_the_cpu_and_waits_once(cuda, trunk, name):
    precision, accumulation, loss = STEPS[name]
    counted = Counted(cuda)
    steps, players = step_on("cuda", precision, trunk, accumulation, counted, **loss)
    assert counted.waits == {"training/step.py:_agree": 1}
    if precision != "fp16":  # which a CPU refuses
        wanted, on_cpu = step_on("cpu", precision, trunk, accumulation, Counted(cuda), **loss)
        # in bf16, the first step moves weights by their gradients' sign, so rounding makes the second step another
        tolerances = (0.05, 0.2) if precision == "bf16" else (1e-3, 1e-3)
        for values, others, tolerance in zip(steps, wanted, tolerances, strict=True):
            for found, expected in zip(values, others, strict=True):
                assert found == pytest.approx(expected, rel=tolerance, abs=tolerance)
        if precision == "no":  # Adam moves weights by their gradients' sign, so the rounding of bf16 is not small
            pairs = zip(players.ema.model.parameters(), on_cpu.ema.model.parameters(), strict=True)
            distance = torch.cat([(found.host - expected).abs().flatten() for found, expected in pairs]).mean()
            assert float(distance) < 3e-5  # a step moves each weight by 1e-3
