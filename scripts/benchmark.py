"""Time this package against diffusers' AutoencoderKL: same weights, same input, same run.

    python scripts/benchmark.py                        # SD's 83.65 M parameters at 256x256
    python scripts/benchmark.py --config configs/quickstart.yaml --size 64 --batch 4 --perceptual FILE

The training rows compare our step (sdvae/training/step.py) with a straightforward loop over diffusers' class that has
the same losses: L1 + LPIPS + KL, and with them the PatchGAN with LDM's adaptive weight. That loop is what one writes
from the papers: fp32 as loaded, the loss as one sum, the adaptive weight by two more backward passes, AdamW as it
comes. On a GPU our side runs as `mixed_precision: auto` would, in bf16, and so does the loop, under autocast.

Each row alternates the two sides, A B A B …, and gives the median of the pairwise ratios, which a drifting machine
moves less than the times themselves.

--parts chooses: «passes», encode and decode, ours after `speed_up` on a CPU, against diffusers' class as
`from_pretrained` gives it (fp32, contiguous layout) and with channels last; «rewrites» (on a CPU), what each of this
package's rewrites is worth: the model with all of them against the model without that one; «peak», the decoder's
share of what matrix products reach here; «training». `--dtype bf16` adds rows in which both sides, or ours alone,
compute in bf16; `--compile`, rows against diffusers' class under torch.compile.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import diffusers
import torch
from accelerate import Accelerator
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sdvae import AutoencoderKL, speed_up
from sdvae.cli import parse_train_config
from sdvae.errors import exit_code
from sdvae.evaluation.perceptual import Perceptual, load_perceptual
from sdvae.model.fast import FastConv3x3, FastUpsample, takes_winograd
from sdvae.model.precision import DTYPES, resolve_precision
from sdvae.training.build import build_vae, lay_out
from sdvae.training.config import TrainConfig
from sdvae.training.discriminator import PatchDiscriminator
from sdvae.training.players import Players
from sdvae.training.step import train_step

BOTH = ("encode", "decode")
PARTS = ("passes", "rewrites", "peak", "training")
HEAD = "| | {} (s) | {} (s) | speed-up, median | range |\n|---|---|---|---|---|"


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> str:
    """One row of the table: median seconds of each side, median of theirs/ours pair by pair, and its range."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    ratios = sorted(b / a for a, b in pairs)
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    spread = f"{ratios[0]:.2f} – {ratios[-1]:.2f}"
    return f"| {name} | {a:.3f} | {b:.3f} | {statistics.median(ratios):.2f} | {spread} |"


@torch.no_grad()
def compare_passes(
    label: str,
    ours: AutoencoderKL,
    stock: nn.Module,
    x: Tensor,
    repeats: int,
    passes: Sequence[str] = BOTH,
    *,
    eager: bool = True,
) -> None:
    """Rows for encode and decode, each side in its own dtype."""
    z = stock.encode(x.to(stock.dtype)).latent_dist.mode()
    error = float((ours.encode(x.to(ours.dtype)).latent_dist.mode() - z).abs().max() / z.std())
    rounding = 4e3 * torch.finfo(ours.dtype).eps
    assert error < rounding, f"the two sides do not compute the same: they differ by {error} std"
    for name in passes:
        argument = x if name == "encode" else z
        corner = max(1, z.shape[3] // 4) * (argument.shape[3] // z.shape[3])
        sides = []
        for model in (ours, stock):
            call, typed = getattr(model, name), argument.to(model.dtype)
            if eager and x.device.type == "cpu":
                call(typed[:, :, :corner, :corner])  # warm-up on a corner: at 1024² a pass takes a minute
            else:
                call(typed)  # kernels are chosen or compiled for this size
            sides.append(partial(call, typed))
        print(compare(f"{name}, {label}", *sides, repeats), flush=True)


def undo_class(fast: type[nn.Module]) -> Callable[[AutoencoderKL], None]:
    """Give the modules of this class of sdvae/model/fast.py their ordinary class back."""

    def undo(vae: AutoencoderKL) -> None:
        for module in vae.modules():
            if type(module) is fast:
                module.__class__ = fast.__mro__[1]

    return undo


def undo_in_place(vae: AutoencoderKL) -> None:
    """Hooks that do nothing: what they could have kept is not written over (sdvae/model/blocks.py)."""
    for module in vae.modules():
        if isinstance(module, (nn.GroupNorm, nn.Conv2d)):
            module.register_forward_hook(lambda *_: None)


# what `speed_up` does (sdvae/model/fast.py), and blocks.py: how to undo it, and the passes that have it.
# Without Winograd, a VAE's upsamplers take four taps.
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


def compare_rewrites(vae: AutoencoderKL, x: Tensor, repeats: int) -> None:
    """Rows for encode and decode: without one rewrite against with all of them."""
    whole = copy.deepcopy(vae).to(memory_format=torch.contiguous_format).eval()
    speed_up(whole)
    for name, (undo, passes) in (WITH_WINOGRAD if takes_winograd(vae) else WITHOUT_WINOGRAD).items():
        without = copy.deepcopy(whole)
        undo(without)
        compare_passes(name, whole, without, x, repeats, passes)


@torch.no_grad()
def peak_line(vae: AutoencoderKL, x: Tensor, side: int, repeats: int) -> str:
    """The decoder's direct FLOPs over its time, beside those of a product of two (side, side) matrices in its dtype."""
    stock = vae.to_diffusers().eval()
    z = stock.encode(x).latent_dist.mode()
    counter = FlopCounterMode(display=False)
    with counter:
        stock.decode(z)
    flops = counter.get_total_flops()
    if x.device.type == "cpu" and x.dtype == torch.float32:
        speed_up(vae)
    a, b = torch.randn(2, side, side, dtype=x.dtype, device=x.device)
    decode, product = partial(vae.decode, z), partial(torch.matmul, a, b)
    decode(), product()
    pairs = [(seconds(decode), seconds(product)) for _ in range(repeats)]
    decoder, gemm = (statistics.median(times) for times in zip(*pairs, strict=True))
    reached, peak = flops / decoder / 1e9, 2 * side**3 / gemm / 1e9
    return (
        f"decoder: {flops / 1e9:.0f} GFLOP of direct convolutions and products in {decoder:.3f} s, {reached:.0f} "
        f"GFLOP/s; a product of {side}x{side} matrices: {peak:.0f} GFLOP/s; share {reached / peak:.0%}"
    )


def our_step(
    vae: AutoencoderKL, config: TrainConfig, accelerator: Accelerator, perceptual: Perceptual, images: Tensor
) -> Callable[[], None]:
    """A step of this package's training, after the discriminator's start where there is one."""
    config = lay_out(vae, config, accelerator)
    players = Players(vae.train(), config, accelerator)
    batch = {
        "image": images.contiguous(),
        "noise_seed": torch.arange(len(images)),
        "index": torch.arange(len(images)),
        "bad": [],
    }

    def step() -> None:
        result = train_step(1, players, iter([batch]), config, accelerator, perceptual)
        assert not result.skipped

    return step


def plain_step(
    vae: nn.Module, config: TrainConfig, accelerator: Accelerator, perceptual: Perceptual, images: Tensor
) -> Callable[[], None]:
    """The same losses over diffusers' class, as one writes them down."""
    vae.train()
    gan = config.loss.discriminator
    lpips = perceptual.network
    vae_optimizer = torch.optim.AdamW(vae.parameters(), lr=config.optimizer.learning_rate)
    if gan.weight > 0:
        discriminator = PatchDiscriminator(images.shape[1], gan.layers, gan.width).to(images.device)
        optimizer = torch.optim.AdamW(discriminator.parameters(), lr=config.optimizer.learning_rate)
    values = images[0].numel()

    def step() -> None:
        with accelerator.autocast():
            posterior = vae.encode(images).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample.float()
        nll = (reconstruction - images).abs().mean() + config.loss.lpips_weight * lpips(reconstruction, images).mean()
        loss = nll + config.loss.kl_weight * posterior.kl().mean() / values
        if gan.weight > 0:
            with accelerator.autocast():
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
            with accelerator.autocast():
                real, fake = discriminator(images).float(), discriminator(reconstruction.detach()).float()
            optimizer.zero_grad()
            (0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean())).backward()
            nn.utils.clip_grad_norm_(discriminator.parameters(), 1.0)
            optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/sd_f8c4.yaml", help="recipe whose model is timed")
    parser.add_argument("--size", type=PositiveInt, default=256, help="side of the images in pixels")
    parser.add_argument("--batch", type=PositiveInt, default=1)
    parser.add_argument("--repeats", type=PositiveInt, default=5)
    parser.add_argument("--perceptual", default=None, help="local file with the trunk's weights; default: random")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of encode and decode, beside fp32")
    parser.add_argument("--compile", action="store_true", help="rows against diffusers' class under torch.compile too")
    parser.add_argument("--gemm", type=PositiveInt, default=2048, help="side of the matrices whose product is the peak")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=resolve_precision("auto", device))
    config = parse_train_config(["--config", arguments.config])
    vae = build_vae(config.model).to(device)
    images = torch.rand(arguments.batch, vae.config.in_channels, arguments.size, arguments.size, device=device) * 2 - 1
    parameters = sum(p.numel() for p in vae.parameters()) / 1e6
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{arguments.config}: {parameters:.2f} M parameters, batch {arguments.batch}, {arguments.size}², fp32, "
        f"{where}, torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.machine()}\n"
    )
    if "passes" in arguments.parts:
        print(HEAD.format("ours", "diffusers"))
        passes(vae, images, DTYPES[arguments.dtype], arguments.repeats, compiled=arguments.compile)
    if "rewrites" in arguments.parts and device == "cpu":
        print("\n" + HEAD.format("with all", "without this one"))
        compare_rewrites(vae, images, arguments.repeats)
    if "peak" in arguments.parts:
        x = images.to(DTYPES[arguments.dtype])
        print("\n" + peak_line(nn.Module.to(copy.deepcopy(vae), x.dtype).eval(), x, arguments.gemm, arguments.repeats))
    if "training" in arguments.parts:
        print("\n" + HEAD.format("ours", "diffusers"))
        net = config.loss.perceptual.net
        perceptual = load_perceptual(net, arguments.perceptual, "uniform", allow_random=True).to(device)
        training(vae, config, accelerator, perceptual, images, arguments.repeats)


def passes(vae: AutoencoderKL, images: Tensor, dtype: torch.dtype, repeats: int, *, compiled: bool) -> None:
    stock = vae.to_diffusers().to(memory_format=torch.contiguous_format).eval()
    ours = copy.deepcopy(vae).to(memory_format=torch.contiguous_format).eval()
    if images.device.type == "cpu":
        speed_up(ours)
    compare_passes("against as loaded", ours, stock, images, repeats)
    if images.device.type != "cpu":
        nn.Module.to(ours, memory_format=torch.channels_last)
    compare_passes("against channels_last", ours, stock.to(memory_format=torch.channels_last), images, repeats)
    if compiled:
        compare_passes("against channels_last, compiled", ours, compile_parts(stock), images, repeats, eager=False)
    if dtype != torch.float32:
        ours = copy.deepcopy(vae).eval()
        nn.Module.to(ours, dtype=dtype, memory_format=torch.channels_last)  # diffusers' own speaks of the dtype
        same = ours.to_diffusers().to(memory_format=torch.channels_last).eval()
        name = str(dtype).removeprefix("torch.")
        compare_passes(f"both in {name}, channels_last", ours, same, images, repeats)
        if compiled:
            label = f"both in {name}, channels_last, against compiled"
            compare_passes(label, ours, compile_parts(same), images, repeats, eager=False)
        stock = vae.to_diffusers().to(memory_format=torch.contiguous_format).eval()
        compare_passes(f"{name}, channels_last, against as loaded", ours, stock, images, repeats)


def compile_parts(vae: nn.Module) -> nn.Module:
    """torch.compile, in place, of what encode and decode spend their time in."""
    vae.encoder.compile()
    vae.decoder.compile()
    return vae


def training(
    vae: AutoencoderKL,
    config: TrainConfig,
    accelerator: Accelerator,
    perceptual: Perceptual,
    images: Tensor,
    repeats: int,
) -> None:
    for label, weight in (("L1 + LPIPS + KL", 0.0), ("with the PatchGAN", 0.5)):
        gan = replace(config.loss.discriminator, weight=weight, start_step=0)
        recipe = replace(config, gradient_accumulation_steps=1, loss=replace(config.loss, discriminator=gan))
        stock = vae.to_diffusers().to(memory_format=torch.contiguous_format)
        ours = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)
        sides = (
            our_step(ours, recipe, accelerator, perceptual, images),
            plain_step(stock, recipe, accelerator, perceptual, images),
        )
        for step in sides:
            step()  # warm-up
        print(compare(f"training step, {label}", *sides, repeats), flush=True)


if __name__ == "__main__":
    sys.exit(exit_code("benchmark", main))
