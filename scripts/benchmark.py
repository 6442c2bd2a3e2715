"""Time this package against diffusers' AutoencoderKL: same weights, same input, same run.

    python scripts/benchmark.py                        # SD's 83.65 M parameters at 256x256
    python scripts/benchmark.py --config configs/quickstart.yaml --size 64 --batch 4 --perceptual FILE
    python scripts/benchmark.py --device cuda          # another table, for GPUs: see scripts/benchmark_gpu.py

The training rows compare a step of this package (sdvae/training/step.py) with a plain loop over diffusers' class that
has the same losses: L1 + LPIPS + KL, and the same with a PatchGAN and LDM's adaptive weight. The loop is written as the
papers state it: fp32 weights as loaded, one sum of losses, two more backward passes for the adaptive weight, and AdamW
with its defaults. This package's side trains in the recipe's `mixed_precision`, or in `--mixed_precision`. If that is
bf16, there are also rows against the loop under autocast.

Each row alternates the two sides, A B A B …, and gives the median of the pairwise ratios, which depends less on the
changing load of the machine than the times do. diffusers' side runs in a process of its own with glibc's default
allocator, because this package's side keeps the memory that it frees (`keep_freed_memory` in sdvae/runtime.py).

--parts chooses what to measure:

- passes: encode and decode, after `speed_up` on a CPU, against diffusers' class as `from_pretrained` gives it (fp32,
  contiguous layout) and with channels last.
- rewrites (on a CPU): the model with all of this package's optimisations against the model without one of them, and a
  process that keeps freed memory against one that does not.
- calibration (on a CPU): the forms that `speed_up(vae, calibrate=)` measures to be the fastest against those of the
  rules.
- peak: the decoder's speed as a share of that of matrix products on this machine.
- training: the training rows.

`--dtype bf16` adds rows in which both sides, or only this package's side, compute in bf16. `--compile` adds rows
against diffusers' class under torch.compile.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cache, partial

import diffusers
import torch
from accelerate import Accelerator
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sdvae import AutoencoderKL, keep_freed_memory, speed_up
from sdvae.cli import parse_train_config
from sdvae.errors import exit_code
from sdvae.kernels.speed import takes_winograd
from sdvae.kernels.upsample import FastUpsample
from sdvae.kernels.winograd import FastConv3x3
from sdvae.metrics.perceptual import Perceptual, load_perceptual
from sdvae.runtime import DTYPES, resolve_precision
from sdvae.training.build import build_vae, lay_out
from sdvae.training.config import TrainConfig
from sdvae.training.discriminator import PatchDiscriminator
from sdvae.training.objective import Judges
from sdvae.training.players import Players
from sdvae.training.step import TrainStep

BOTH = ("encode", "decode")
PRODUCTS = 10  # matrix products per timing, one after the other like the convolutions of a pass
PARTS = ("passes", "rewrites", "calibration", "peak", "training")
HEAD = "| | {} (s) | {} (s) | speed-up, median | range |\n|---|---|---|---|---|"


def seconds(function: Callable[[], object]) -> float:
    time.sleep(0.1)  # let the threads of the other process come to rest
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


Timer = Callable[[], float]  # runs one pass or step and returns its seconds


def warmed(call: Callable[[], object]) -> Timer:
    call()
    return partial(seconds, call)


def compare(name: str, ours: Timer, theirs: Timer, repeats: int) -> None:
    """One row of the table: median seconds of each side, median of theirs/ours pair by pair, and its range."""
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    ratios = sorted(b / a for a, b in pairs)
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    spread = f"{ratios[0]:.2f} – {ratios[-1]:.2f}"
    print(f"| {name} | {a:.3f} | {b:.3f} | {statistics.median(ratios):.2f} | {spread} |", flush=True)


@dataclass(frozen=True)
class Request:
    """What the `Peer` is to time: by default a pass of diffusers' class.

    Attributes:
        what: "encode", "decode" or "training".
        ours: time this package's class after `speed_up` instead, without keeping freed memory.
        dtype: of weights and images.
        channels_last: the memory layout of the weights.
        compiled: use torch.compile.
        gan_weight: of the training step; 0 trains without a discriminator.
        autocast: run the training step under autocast to bf16.
    """

    what: str
    ours: bool = False
    dtype: str = "fp32"
    channels_last: bool = False
    compiled: bool = False
    gan_weight: float = 0.0
    autocast: bool = False


class Peer:
    """The side to compare with: a process that builds the same weights and images from the same arguments."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--answer"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()  # wait until it is built, so that it does not compete for the processor

    def timer(self, request: Request) -> Timer:
        self._ask(request)  # warm-up
        return partial(self._ask, request)

    def _ask(self, request: Request) -> float:
        assert self._process.stdin is not None
        print(json.dumps(asdict(request)), file=self._process.stdin, flush=True)
        return self._read()

    def _read(self) -> float:
        assert self._process.stdout is not None
        answer = self._process.stdout.readline()
        if not answer:
            raise OSError(f"the other side ended with exit code {self._process.wait()}")
        return float(answer)

    def close(self) -> None:
        self._process.communicate()


def answer(build: Callable[[Request], Callable[[], object]]) -> None:
    """The process behind a `Peer`: answer each request on standard input by a line with its seconds."""
    asked, call = None, None
    replies, sys.stdout = sys.stdout, sys.stderr  # keep what libraries print out of the replies
    print(0.0, file=replies, flush=True)  # ready
    for line in sys.stdin:
        if line != asked:
            call = None  # free the memory of the last request first
            asked, call = line, build(Request(**json.loads(line)))
        assert call is not None
        print(seconds(call), file=replies, flush=True)


@torch.no_grad()
def one_pass(model: nn.Module, what: str, images: Tensor) -> Callable[[], object]:
    """A call of `model.encode` on the images, or of `model.decode` on their latents, in the model's dtype."""
    x = images.to(model.dtype)
    argument = x if what == "encode" else model.encode(x).latent_dist.mode()
    return torch.no_grad()(partial(getattr(model, what), argument))


def undo_class(fast: type[nn.Module]) -> Callable[[AutoencoderKL], None]:
    """A function that gives all modules of a class of sdvae/kernels/ their ordinary class back."""

    def undo(vae: AutoencoderKL) -> None:
        for module in vae.modules():
            if type(module) is fast:
                module.__class__ = fast.__mro__[1]

    return undo


def undo_in_place(vae: AutoencoderKL) -> None:
    """Add hooks that do nothing: sdvae/model/blocks.py writes in place only where no hook could keep the input."""
    for module in vae.modules():
        if isinstance(module, (nn.GroupNorm, nn.Conv2d)):
            module.register_forward_hook(lambda *_: None)


# Each optimisation of sdvae/kernels/ and sdvae/model/blocks.py: how to undo it, and the passes that use it.
# The upsamplers compute with four taps only in a VAE without Winograd convolutions.
Rewrites = dict[str, tuple[Callable[[AutoencoderKL], object], Sequence[str]]]
IN_PLACE: Rewrites = {"activations and sums in place": (undo_in_place, BOTH)}
WITH_WINOGRAD: Rewrites = {
    "Winograd convolutions": (undo_class(FastConv3x3), BOTH),
    "batches image by image": (AutoencoderKL.disable_slicing, BOTH),
    **IN_PLACE,
}
WITHOUT_WINOGRAD: Rewrites = {
    "channels_last": (partial(nn.Module.to, memory_format=torch.contiguous_format), BOTH),
    "four-tap upsampling": (undo_class(FastUpsample), ("decode",)),
    **IN_PLACE,
}


def compare_rewrites(vae: AutoencoderKL, images: Tensor, peer: Peer, repeats: int) -> None:
    """Rows of encode and decode with all optimisations against all but one."""
    whole = copy.deepcopy(vae).to(memory_format=torch.contiguous_format).eval()
    speed_up(whole)
    for name, (undo, passes) in (WITH_WINOGRAD if takes_winograd(vae) else WITHOUT_WINOGRAD).items():
        without = copy.deepcopy(whole)
        undo(without)
        assert_same(whole, without, images)
        for what in passes:
            sides = (warmed(one_pass(model, what, images)) for model in (whole, without))
            compare(f"{what}, {name}", *sides, repeats)
    for what in BOTH:
        sides = warmed(one_pass(whole, what, images)), peer.timer(Request(what, ours=True))
        compare(f"{what}, freed memory kept", *sides, repeats)


def compare_calibrated(vae: AutoencoderKL, images: Tensor, repeats: int) -> None:
    """Rows of encode and decode in the forms that were measured, against those of the rules."""
    calibrated, rules = (copy.deepcopy(vae).to(memory_format=torch.contiguous_format).eval() for _ in range(2))
    height, width = images.shape[2:]
    begun = time.perf_counter()
    chosen = speed_up(calibrated, calibrate=(height, width))
    print(f"calibrated in {time.perf_counter() - begun:.1f} s: {chosen}\nrules: {speed_up(rules)}\n")
    print(HEAD.format("calibrated", "rules"))
    for what in BOTH:
        compare(
            f"{what}, calibrated", *(warmed(one_pass(model, what, images)) for model in (calibrated, rules)), repeats
        )


@torch.no_grad()
def assert_same(ours: nn.Module, theirs: nn.Module, images: Tensor) -> None:
    corner = images[:1, :, :64, :64]
    wanted = theirs.encode(corner.to(theirs.dtype)).latent_dist.mode()
    error = float((ours.encode(corner.to(ours.dtype)).latent_dist.mode() - wanted).abs().max() / wanted.std())
    rounding = 4e3 * torch.finfo(ours.dtype).eps
    assert error < rounding, f"the two sides do not compute the same: they differ by {error} std"


@torch.no_grad()
def peak_line(vae: AutoencoderKL, x: Tensor, side: int, repeats: int) -> str:
    """The decoder's FLOP/s, counted for direct convolutions, beside those of (side, side) matrix products."""
    stock = vae.to_diffusers().eval()
    z = stock.encode(x).latent_dist.mode()
    counter = FlopCounterMode(display=False)
    with counter:
        stock.decode(z)
    flops = counter.get_total_flops()
    if x.device.type == "cpu":
        speed_up(vae)
    a, b = torch.randn(2, side, side, dtype=x.dtype, device=x.device)

    def products() -> None:
        for _ in range(PRODUCTS):
            torch.matmul(a, b)

    decode = partial(vae.decode, z)
    decode(), products()
    pairs = [(seconds(decode), seconds(products)) for _ in range(repeats)]
    decoder, gemm = (statistics.median(times) for times in zip(*pairs, strict=True))
    reached, peak = flops / decoder / 1e9, PRODUCTS * 2 * side**3 / gemm / 1e9
    return (
        f"decoder: {flops / 1e9:.0f} GFLOP of direct convolutions and products in {decoder:.3f} s, {reached:.0f} "
        f"GFLOP/s; products of {side}x{side} matrices: {peak:.0f} GFLOP/s; share {reached / peak:.0%}"
    )


def our_step(
    vae: AutoencoderKL, config: TrainConfig, accelerator: Accelerator, perceptual: Perceptual, images: Tensor
) -> Callable[[], None]:
    """A step of this package's training; if the recipe has a discriminator, one after it has started."""
    config = lay_out(vae, config, accelerator)
    players = Players(vae.train(), config, accelerator)
    batch = {
        "image": images.contiguous(),
        "noise_seed": torch.arange(len(images)),
        "index": torch.arange(len(images)),
        "bad": [],
    }

    train_step = TrainStep(config, players, Judges(perceptual), accelerator)

    def step() -> None:
        result = train_step(1, iter([batch]))
        assert not result.skipped

    return step


def plain_step(
    vae: nn.Module, config: TrainConfig, perceptual: Perceptual, images: Tensor, *, autocast: bool
) -> Callable[[], None]:
    """A step with the same losses over diffusers' class, written in the simplest way."""
    vae.train()
    half = partial(torch.autocast, images.device.type, dtype=torch.bfloat16, enabled=autocast)
    gan = config.loss.discriminator
    lpips = perceptual.network
    vae_optimizer = torch.optim.AdamW(vae.parameters(), lr=config.optimizer.learning_rate)
    if gan.weight > 0:
        discriminator = PatchDiscriminator(images.shape[1], gan.layers, gan.width).to(images.device)
        optimizer = torch.optim.AdamW(discriminator.parameters(), lr=config.optimizer.learning_rate)
    values = images[0].numel()

    def step() -> None:
        with half():
            posterior = vae.encode(images).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample.float()
        nll = (reconstruction - images).abs().mean() + config.loss.lpips_weight * lpips(reconstruction, images).mean()
        loss = nll + config.loss.kl_weight * posterior.kl().mean() / values
        if gan.weight > 0:
            with half():
                g = -discriminator(reconstruction).float().mean()
            last = vae.decoder.conv_out.weight
            (of_nll,) = torch.autograd.grad(nll, last, retain_graph=True)
            (of_g,) = torch.autograd.grad(g, last, retain_graph=True)
            weight = (values * of_nll.norm() / (of_g.norm() + 1e-4)).clamp(0, 1e4).detach() / values
            loss = loss + gan.weight * weight * g
        vae_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        vae_optimizer.step()
        if gan.weight > 0:
            with half():
                real, fake = discriminator(images).float(), discriminator(reconstruction.detach()).float()
            optimizer.zero_grad()
            (0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())).backward()
            nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
            optimizer.step()

    return step


def main() -> None:
    if any(argument.split("=")[0] == "--device" for argument in sys.argv[1:]):
        import benchmark_gpu  # the rows that a GPU is asked for, with options of its own

        benchmark_gpu.main()
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/sd_f8c4.yaml", help="recipe whose model is timed")
    parser.add_argument("--size", type=PositiveInt, default=256, help="side of the images in pixels")
    parser.add_argument("--batch", type=PositiveInt, default=1)
    parser.add_argument("--repeats", type=PositiveInt, default=5)
    parser.add_argument("--perceptual", default=None, help="local file with LPIPS's network; default: random weights")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of encode and decode, beside fp32")
    parser.add_argument(
        "--mixed_precision",
        choices=("auto", "no", "bf16"),
        default=None,
        help="precision of this package's training steps; default: the recipe's",
    )
    parser.add_argument("--compile", action="store_true", help="also compare with diffusers' class under torch.compile")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)  # run as the Peer
    parser.add_argument("--gemm", type=PositiveInt, default=2048, help="side of the matrices whose product is the peak")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    config = parse_train_config(["--config", arguments.config])
    precision = resolve_precision(arguments.mixed_precision or config.mixed_precision, device)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=precision)
    vae = build_vae(config.model).to(device)
    images = torch.rand(arguments.batch, vae.config.in_channels, arguments.size, arguments.size, device=device) * 2 - 1

    @cache
    def perceptual() -> Perceptual:
        net = config.loss.perceptual.net
        return load_perceptual(net, arguments.perceptual, "uniform", allow_random=True).to(device)

    if arguments.answer:
        answer(lambda request: other_side(request, vae, images, config, perceptual))
        return
    parameters = sum(p.numel() for p in vae.parameters()) / 1e6
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{arguments.config}: {parameters:.2f} M parameters, batch {arguments.batch}, {arguments.size}², fp32, "
        f"{where}, torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.machine()}\n"
    )
    repeats = arguments.repeats
    with closing(Peer()) as peer:
        if "passes" in arguments.parts:
            print(HEAD.format("ours", "diffusers"))
            compare_passes(vae, images, arguments.dtype, peer, repeats, compiled=arguments.compile)
        if "training" in arguments.parts:
            print("\n" + HEAD.format("ours", "diffusers"))
            compare_training(vae, images, config, accelerator, perceptual(), peer, repeats)
        if "rewrites" in arguments.parts and device == "cpu":
            print("\n" + HEAD.format("with all", "without this one"))
            compare_rewrites(vae, images, peer, repeats)
    if "calibration" in arguments.parts and device == "cpu":
        print()
        compare_calibrated(vae, images, repeats)
    if "peak" in arguments.parts:
        x = images.to(DTYPES[arguments.dtype])
        print("\n" + peak_line(nn.Module.to(copy.deepcopy(vae), x.dtype).eval(), x, arguments.gemm, repeats))


def compare_passes(vae: AutoencoderKL, images: Tensor, dtype: str, peer: Peer, repeats: int, *, compiled: bool) -> None:
    """Rows of encode and decode against diffusers' class."""

    def rows(label: str, ours: AutoencoderKL, stock: Request) -> None:
        for what in BOTH:
            sides = warmed(one_pass(ours, what, images)), peer.timer(replace(stock, what=what))
            compare(f"{what}, {label}", *sides, repeats)

    stock, last = Request("encode"), Request("encode", channels_last=True)
    ours = copy.deepcopy(vae).to(memory_format=torch.contiguous_format).eval()
    if images.device.type == "cpu":
        speed_up(ours)
    assert_same(ours, vae.to_diffusers().eval(), images)
    rows("against as loaded", ours, stock)
    if images.device.type != "cpu":
        nn.Module.to(ours, memory_format=torch.channels_last)
    rows("against channels_last", ours, last)
    if compiled:
        rows("against channels_last, compiled", ours, replace(last, compiled=True))
    if dtype != "fp32":
        ours = copy.deepcopy(vae).eval()
        nn.Module.to(ours, dtype=DTYPES[dtype], memory_format=torch.channels_last)
        if images.device.type == "cpu":
            speed_up(ours)
        same = replace(last, dtype=dtype)
        rows(f"both in {dtype}, channels_last", ours, same)
        if compiled:
            rows(f"both in {dtype}, channels_last, against compiled", ours, replace(same, compiled=True))
        rows(f"{dtype}, channels_last, against as loaded", ours, stock)


def compare_training(
    vae: AutoencoderKL,
    images: Tensor,
    config: TrainConfig,
    accelerator: Accelerator,
    perceptual: Perceptual,
    peer: Peer,
    repeats: int,
) -> None:
    precision = "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision
    for label, weight in (("L1 + LPIPS + KL", 0.0), ("with the PatchGAN", 0.5)):
        ours = warmed(our_step(copy.deepcopy(vae), like_the_loop(config, weight), accelerator, perceptual, images))
        for autocast in (False,) if precision == "fp32" else (False, True):
            theirs = peer.timer(Request("training", gan_weight=weight, autocast=autocast))
            against = precision if autocast else "fp32"
            compare(f"training step, {label}, {precision} against {against}", ours, theirs, repeats)


def other_side(
    request: Request,
    vae: AutoencoderKL,
    images: Tensor,
    config: TrainConfig,
    perceptual: Callable[[], Perceptual],
) -> Callable[[], object]:
    if request.ours:
        ours = copy.deepcopy(vae).eval()
        speed_up(ours)
        keep_freed_memory(False)
        return one_pass(ours, request.what, images)
    model, layout = vae.to_diffusers(), torch.channels_last if request.channels_last else torch.contiguous_format
    nn.Module.to(
        model, dtype=DTYPES[request.dtype], memory_format=layout
    )  # diffusers' `to` logs a warning about the dtype
    if request.what == "training":
        config = like_the_loop(config, request.gan_weight)
        return plain_step(model, config, perceptual(), images, autocast=request.autocast)
    if request.compiled:
        model.encoder.compile()
        model.decoder.compile()
    return one_pass(model.eval(), request.what, images)


def like_the_loop(config: TrainConfig, gan_weight: float) -> TrainConfig:
    """The recipe with the losses and the optimizer that `plain_step` has."""
    gan = replace(config.loss.discriminator, weight=gan_weight, start_step=0)
    loss = replace(config.loss, reconstruction="l1", discriminator=gan)
    return replace(config, gradient_accumulation_steps=1, loss=loss, optimizer=replace(config.optimizer, kind="adamw"))


if __name__ == "__main__":
    sys.exit(exit_code("benchmark", main))
