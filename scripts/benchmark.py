"""Time this package against diffusers' AutoencoderKL: same weights, same input, same run.

    python scripts/benchmark.py                        # SD's 83.65 M parameters at 256x256
    python scripts/benchmark.py --config configs/quickstart.yaml --size 64 --batch 4 --perceptual FILE

The training rows compare our step (sdvae/training/step.py) with a straightforward loop over diffusers' class that has
the same losses: L1 + LPIPS + KL, and with them the PatchGAN with LDM's adaptive weight. That loop is what one writes
from the papers: fp32 as loaded, the loss as one sum, the adaptive weight by two more backward passes, AdamW as it
comes. On a GPU our side runs as `mixed_precision: auto` would, in bf16, and so does the loop, under autocast.

Each row alternates the two sides, A B A B …, and gives the median of the pairwise ratios, which a drifting machine
moves less than the times themselves. «as loaded» is what `from_pretrained` gives: fp32, contiguous layout.
"""

from __future__ import annotations

import argparse
import copy
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import diffusers
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sdvae import AutoencoderKL, speed_up
from sdvae.cli import parse_train_config
from sdvae.evaluation import Perceptual, load_perceptual
from sdvae.model.precision import resolve_precision
from sdvae.training.build import build_vae, lay_out
from sdvae.training.config import TrainConfig
from sdvae.training.discriminator import PatchDiscriminator
from sdvae.training.players import Players
from sdvae.training.step import train_step


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], repeats: int) -> str:
    """One row of the table: median seconds of each side, median of theirs/ours pair by pair, and its range."""
    ours(), theirs()  # warm-up
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    ratios = sorted(b / a for a, b in pairs)
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    spread = f"{ratios[0]:.2f} – {ratios[-1]:.2f}"
    return f"| {name} | {a:.3f} | {b:.3f} | {statistics.median(ratios):.2f} | {spread} |"


@torch.no_grad()
def compare_passes(label: str, ours: AutoencoderKL, stock: nn.Module, x: Tensor, repeats: int) -> None:
    """Rows for encode and decode."""
    z = stock.encode(x).latent_dist.mode()
    error = float((ours.encode(x).latent_dist.mode() - z).abs().max() / z.std())
    assert error < 1e-3, f"the two sides do not compute the same: they differ by {error} std"
    for name, argument in (("encode", x), ("decode", z)):
        sides = [partial(getattr(model, name), argument) for model in (ours, stock)]
        print(compare(f"{name}, {label}", *sides, repeats), flush=True)


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
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--perceptual", default=None, help="local file with the trunk's weights; default: random")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision=resolve_precision("auto", device))
    config = parse_train_config(["--config", arguments.config])
    net = config.loss.perceptual.net
    perceptual = load_perceptual(net, arguments.perceptual, "uniform", allow_random=True).to(device)
    vae = build_vae(config.model).to(device)
    images = torch.rand(arguments.batch, vae.config.in_channels, arguments.size, arguments.size, device=device) * 2 - 1
    parameters = sum(p.numel() for p in vae.parameters()) / 1e6
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    print(
        f"{arguments.config}: {parameters:.2f} M parameters, batch {arguments.batch}, {arguments.size}², fp32, "
        f"{where}, torch {torch.__version__}, diffusers {diffusers.__version__}, {platform.machine()}\n"
    )
    print("| | ours (s) | diffusers (s) | speed-up, median | range |")
    print("|---|---|---|---|---|")
    for layout in (torch.contiguous_format, torch.channels_last):
        label = "as loaded" if layout is torch.contiguous_format else "channels_last"
        ours, stock = vae.to(memory_format=layout).eval(), vae.to_diffusers().to(memory_format=layout).eval()
        x = images.contiguous(memory_format=layout)
        compare_passes(label, ours, stock, x, arguments.repeats)
    if device == "cpu":  # this package's fast kernels against diffusers' class as it is loaded
        ours = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)
        speed_up(ours)
        stock = vae.to_diffusers().to(memory_format=torch.contiguous_format).eval()
        compare_passes("speed_up against as loaded", ours, stock, images.contiguous(), arguments.repeats)
    for label, weight in (("L1 + LPIPS + KL", 0.0), ("with the PatchGAN", 0.5)):
        gan = replace(config.loss.discriminator, weight=weight, start_step=0)
        recipe = replace(config, gradient_accumulation_steps=1, loss=replace(config.loss, discriminator=gan))
        stock = vae.to_diffusers().to(memory_format=torch.contiguous_format)
        ours = copy.deepcopy(vae).to(memory_format=torch.contiguous_format)
        sides = (
            our_step(ours, recipe, accelerator, perceptual, images),
            plain_step(stock, recipe, accelerator, perceptual, images),
        )
        print(compare(f"training step, {label}", *sides, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
