"""Print one table of everything that a GPU is asked to do: `python scripts/benchmark.py --device cuda` runs this file.

    python scripts/benchmark.py --device cuda                  # SD's 83.65 M parameters, random weights
    python scripts/benchmark.py --device cuda --only decode_1024 parity
    python scripts/benchmark.py --device cpu --small true      # the same rows at small sizes, to see that they run

The rows of a part take turns, and each is compared with the first, diffusers' class as loaded, turn by turn. On CUDA
the time is that between two events on the stream, around as many calls as take 0.1 s; the rows were warmed up before,
so that nothing compiles meanwhile. The memory is the peak of what torch allocated during a call, beyond what it held
before. The error is the largest difference to diffusers' class in fp32 without TF32, over its standard deviation.

- decode_1024, decode_2048: one image in bf16.
- encode_256: 64 images of 256x256 in bf16.
- tiled_4096: one image in bf16 in strips, with 2 GiB beside weights, input and output; and diffusers' own tiles. Its
  error is against the whole image in bf16.
- training, training_gan: a step at 256x256 under autocast to bf16, with L1 + LPIPS + KL, and with the PatchGAN too. The
  batch is in memory, so no time is spent on data.
- parity: 256x256, in fp32 without TF32, bf16 and fp16, against diffusers' class in float64.

«calibrated» is after `speed_up(vae, calibrate=(height, width))`, and what it chose is printed above the table;
«compiled» is after `encoder.compile()` and `decoder.compile()`. Compiling takes long: `--only` divides the table. A row
that needs more memory than there is says so.
"""

from __future__ import annotations

import argparse
import copy
import gc
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from benchmark import like_the_loop, our_step, plain_step
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from sdvae import AutoencoderKL, speed_up
from sdvae.cli import parse_train_config
from sdvae.errors import InputError, exit_code
from sdvae.metrics.perceptual import Perceptual, load_perceptual
from sdvae.training.build import build_vae
from sdvae.training.config import TrainConfig

LEAST_SECONDS = 0.1  # of the calls between two events
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
HEAD = "| {} | ms | images/s | against the first row | range | GiB | error |\n|---|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Sizes:
    """Sides of the images in pixels, batches, and the bytes for tiles."""

    decode: tuple[int, int] = (1024, 2048)
    encode: tuple[int, int] = (256, 64)  # side, batch
    tiled: tuple[int, int] = (4096, 2 * 2**30)  # side, bytes
    training: tuple[int, int] = (256, 16)  # side, batch
    parity: int = 256


SMALL = Sizes(decode=(64, 96), encode=(32, 2), tiled=(96, 2**21), training=(32, 1), parity=32)

Call = Callable[[], Any]
Row = tuple[str, Callable[[], Call]]  # name, and what builds the call


@dataclass
class Measured:
    """What was measured of a row: seconds of a call by turn, peak bytes, and the error as it is printed."""

    seconds: list[float]
    peak: float
    error: str


class Table:
    """The device, and how rows are measured and printed on it."""

    def __init__(self, device: torch.device, repeats: int, *, small: bool):
        self.device = device
        self.repeats = repeats
        self.backend = "eager" if small else "inductor"  # small: whether the row runs, not how fast it is

    def part(self, title: str, images: int, rows: Iterable[Row], reference: Tensor | None = None) -> None:
        """Measure rows in turns and print them. `images`: how many a call computes."""
        torch.compiler.reset()  # torch compiles a function for a few models only, and then leaves it as it is
        print("\n" + HEAD.format(title), flush=True)
        calls: dict[str, Call] = {}
        found: dict[str, Measured] = {}
        for name, build in rows:
            try:
                calls[name] = build()
                found[name] = self.first(calls[name], reference)
            except torch.OutOfMemoryError:
                calls.pop(name, None)
                print(f"| {name} | out of memory | | | | | |", flush=True)
            self.free()
        for _ in range(self.repeats):
            for name, call in calls.items():
                found[name].seconds.append(self.seconds(call))
        first = next(iter(found.values()), None)
        for name, row in found.items():
            assert first is not None
            ratios = sorted(a / b for a, b in zip(first.seconds, row.seconds, strict=True))
            took = statistics.median(row.seconds)
            print(
                f"| {name} | {took * 1e3:.2f} | {images / took:.1f} | {statistics.median(ratios):.2f} | "
                f"{ratios[0]:.2f} – {ratios[-1]:.2f} | {row.peak / 2**30:.2f} | {row.error} |",
                flush=True,
            )
        calls.clear()
        self.free()

    def first(self, call: Call, reference: Tensor | None) -> Measured:
        """Warm a row up, and measure its peak memory and error."""
        call()
        self.free()
        before = self._allocated()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        output = call()
        peak = torch.cuda.max_memory_allocated(self.device) - before if self.device.type == "cuda" else float("nan")
        if reference is None:
            return Measured([], peak, "")
        return Measured([], peak, f"{difference(_values(output), reference):.1e}")

    def seconds(self, call: Call) -> float:
        """Seconds of one call, over as many as take `LEAST_SECONDS`."""
        count, took = 1, self._seconds(call, 1)
        while took < LEAST_SECONDS and self.device.type == "cuda":
            count = max(2 * count, int(count * LEAST_SECONDS / max(took, 1e-6)))
            took = self._seconds(call, count)
        return took / count

    def _seconds(self, call: Call, count: int) -> float:
        if self.device.type != "cuda":
            begun = time.perf_counter()
            for _ in range(count):
                call()
            return time.perf_counter() - begun
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()

    def compiled(self, model: Any) -> Any:
        for part in (model.encoder, model.decoder):
            part.compile(backend=self.backend, dynamic=False)
        return model


def _values(output: Any) -> Tensor:
    """The image, or the mean of the posterior."""
    return output.sample if hasattr(output, "sample") else output.latent_dist.mean


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, in standard deviations of `wanted`; image by image, to need little memory."""
    found = found.to(wanted.device)
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in zip(found, wanted, strict=True))
    return largest / float(wanted.float().std())


def exactly(call: Call) -> Tensor | None:
    """The values of a call without TF32, kept in the host's memory; None if there is too little on the device."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        try:
            return _values(call()).cpu()
        except torch.OutOfMemoryError:
            return None


def copied(model: Any, dtype: torch.dtype, layout: str = "contiguous") -> Any:
    """A copy in evaluation mode; diffusers' own `to` logs a warning about the dtype."""
    return nn.Module.to(copy.deepcopy(model).eval(), dtype=dtype, memory_format=LAYOUTS[layout])


def passes(table: Table, vae: AutoencoderKL, what: str, side: int, batch: int) -> None:
    """Rows of encode or decode in bf16."""
    stock, dtype = vae.to_diffusers(), torch.bfloat16
    generator = torch.Generator(table.device).manual_seed(0)
    shape = (batch, vae.config.in_channels, side, side)
    images = torch.rand(shape, device=table.device, generator=generator) * 2 - 1
    f = vae.spatial_compression_ratio
    latents = torch.randn((batch, vae.config.latent_channels, side // f, side // f), device=table.device,
                          generator=generator)  # fmt: skip
    x = (images if what == "encode" else latents).to(dtype)

    def call(model: Any) -> Call:
        return torch.no_grad()(partial(getattr(model, what), x))

    def calibrated() -> Any:
        ours = copied(vae, dtype)
        forms = speed_up(ours, calibrate=(side, side))
        print(f"<!-- calibrated: {forms} -->", flush=True)
        return ours

    def row(model: Callable[[], Any]) -> Callable[[], Call]:
        return lambda: call(model())

    exact = torch.no_grad()(lambda: getattr(copied(stock, torch.float32), what)(x.float()))
    rows: list[Row] = [
        ("stock", row(lambda: copied(stock, dtype))),
        ("stock, channels_last", row(lambda: copied(stock, dtype, "channels_last"))),
        ("stock, compiled", row(lambda: table.compiled(copied(stock, dtype)))),
        ("stock, channels_last, compiled", row(lambda: table.compiled(copied(stock, dtype, "channels_last")))),
        ("ours", row(lambda: copied(vae, dtype))),
        ("ours, channels_last", row(lambda: copied(vae, dtype, "channels_last"))),
        ("ours, calibrated", row(calibrated)),
        ("ours, compiled", row(lambda: table.compiled(copied(vae, dtype)))),
        ("ours, channels_last, compiled", row(lambda: table.compiled(copied(vae, dtype, "channels_last")))),
    ]
    table.part(f"{what} {side}², bf16, batch {batch}", batch, rows, exactly(exact))


def tiled(table: Table, vae: AutoencoderKL, side: int, memory_bytes: int) -> None:
    """Rows of decoding in tiles, against the whole image."""
    dtype, f = torch.bfloat16, vae.spatial_compression_ratio
    generator = torch.Generator(table.device).manual_seed(0)
    shape = (1, vae.config.latent_channels, side // f, side // f)
    z = torch.randn(shape, device=table.device, generator=generator).to(dtype)

    def call(model: Any) -> Call:
        return torch.no_grad()(partial(model.decode, z))

    def stock() -> Call:
        theirs = copied(vae.to_diffusers(), dtype)
        theirs.enable_tiling()
        return call(theirs)

    def strips(*, calibrate: bool) -> Call:
        ours = copied(vae, dtype)
        if calibrate:
            speed_up(ours, calibrate=(side, side))
        ours.enable_tiling(memory_bytes=memory_bytes)
        return call(ours)

    whole = exactly(call(copied(vae, dtype)))
    rows: list[Row] = [
        ("stock, tiled", stock),
        ("ours, whole", lambda: call(copied(vae, dtype))),
        ("ours, strips", lambda: strips(calibrate=False)),
        ("ours, strips, calibrated", lambda: strips(calibrate=True)),
    ]
    title = f"tiled decode {side}², bf16, {memory_bytes / 2**30:.3g} GiB"
    table.part(title, 1, rows, whole)


def training(
    table: Table, vae: AutoencoderKL, config: TrainConfig, perceptual: Perceptual, side: int, batch: int, *, gan: bool
) -> None:
    """Rows of a training step under autocast to bf16."""
    accelerator = Accelerator(cpu=table.device.type == "cpu", mixed_precision="bf16")
    config = like_the_loop(config, 0.5 if gan else 0.0)
    shape = (batch, vae.config.in_channels, side, side)
    images = torch.rand(shape, device=table.device, generator=torch.Generator(table.device).manual_seed(0)) * 2 - 1

    def loop(layout: str, *, compiled: bool) -> Call:
        model = nn.Module.to(vae.to_diffusers(), memory_format=LAYOUTS[layout])
        model = table.compiled(model) if compiled else model
        given = images.contiguous(memory_format=LAYOUTS[layout])
        return plain_step(model, config, perceptual, given, autocast=True)

    def ours(layout: str, *, compiled: bool) -> Call:
        recipe = replace(config, channels_last=layout == "channels_last", fast_convolutions=False)
        model = table.compiled(copy.deepcopy(vae)) if compiled else copy.deepcopy(vae)
        return our_step(model, recipe, accelerator, perceptual, images)

    rows: list[Row] = [
        (f"{name}{', channels_last' * (layout == 'channels_last')}{', compiled' * compiled}",
         partial(build, layout, compiled=compiled))
        for name, build in (("loop on stock", loop), ("ours", ours))
        for compiled in (False, True)
        for layout in LAYOUTS
    ]  # fmt: skip
    losses = "L1 + LPIPS + KL" + " + PatchGAN" * gan
    table.part(f"training step {side}², bf16, batch {batch}, {losses}", batch, rows)


@torch.no_grad()
def parity(table: Table, vae: AutoencoderKL, side: int) -> None:
    """The errors of encode and decode in each precision, against diffusers' class in float64."""
    f, generator = vae.spatial_compression_ratio, torch.Generator(table.device).manual_seed(0)
    x = torch.rand((1, vae.config.in_channels, side, side), device=table.device, generator=generator) * 2 - 1
    z = torch.randn((1, vae.config.latent_channels, side // f, side // f), device=table.device, generator=generator)
    stock = vae.to_diffusers()
    exact = copied(stock, torch.float64)
    inputs = {"encode": x, "decode": z}
    wanted = {what: _values(getattr(exact, what)(given.double())) for what, given in inputs.items()}
    del exact
    print(f"\n| parity at {side}², error in standard deviations | encode | decode |\n|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        calibrated = copied(vae, dtype)
        speed_up(calibrated, calibrate=(side, side))
        strips = copy.deepcopy(calibrated)
        strips.enable_tiling()
        models = {"stock": copied(stock, dtype), "ours": copied(vae, dtype), "ours, calibrated": calibrated}
        models["ours, calibrated, strips"] = strips
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            for name, model in models.items():
                errors = [
                    f"{difference(_values(getattr(model, what)(given.to(dtype))), wanted[what]):.1e}"
                    for what, given in inputs.items()
                ]
                print(f"| {name}, {str(dtype).removeprefix('torch.')} | {' | '.join(errors)} |", flush=True)


def where(device: torch.device) -> str:
    """The card and its driver, or the CPU."""
    if device.type != "cuda":
        return f"{platform.machine()}, {torch.get_num_threads()} threads"
    driver = "unknown"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
    memory = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)}, {memory:.0f} GiB, driver {driver}, CUDA {torch.version.cuda}"


def main() -> None:
    parts = ("decode_1024", "decode_2048", "encode_256", "tiled_4096", "training", "training_gan", "parity")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", type=lambda text: text == "true", default=False, help="true: small sizes, to test")
    parser.add_argument("--config", default="configs/sd_f8c4.yaml", help="recipe whose model is timed")
    parser.add_argument("--repeats", type=PositiveInt, default=7, help="turns")
    parser.add_argument("--perceptual", default=None, help="local file with LPIPS's network; default: random weights")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts; small sizes keep these names")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("got --device cuda; need a GPU that torch can use, and it finds none; give --device cpu")
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    config = parse_train_config(["--config", arguments.config])
    vae = build_vae(config.model)
    nn.Module.to(vae, device)
    sizes = SMALL if arguments.small else Sizes()
    parameters = sum(p.numel() for p in vae.parameters()) / 1e6
    print(
        f"{arguments.config}: {parameters:.2f} M parameters, {where(device)}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}",
        flush=True,
    )
    table = Table(device, arguments.repeats, small=arguments.small)
    runs: dict[str, Callable[[], None]] = {
        "decode_1024": lambda: passes(table, vae, "decode", sizes.decode[0], 1),
        "decode_2048": lambda: passes(table, vae, "decode", sizes.decode[1], 1),
        "encode_256": lambda: passes(table, vae, "encode", *sizes.encode),
        "tiled_4096": lambda: tiled(table, vae, *sizes.tiled),
    }
    for gan in (False, True):

        def step(gan: bool = gan) -> None:
            net, file = config.loss.perceptual.net, arguments.perceptual
            perceptual = load_perceptual(net, file, "uniform", allow_random=True).to(device)
            training(table, vae, config, perceptual, *sizes.training, gan=gan)

        runs["training_gan" if gan else "training"] = step
    runs["parity"] = lambda: parity(table, vae, sizes.parity)
    for name in parts:
        if name in arguments.only:
            runs[name]()


if __name__ == "__main__":
    sys.exit(exit_code("benchmark_gpu", main))
