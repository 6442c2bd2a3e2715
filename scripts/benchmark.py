"""Time this package against diffusers' AutoencoderKL: same weights, same input, same run.

    python scripts/benchmark.py                        # SD's 83.65 M parameters at 256x256
    python scripts/benchmark.py --config configs/quickstart.yaml --size 128 --batch 4

Each row alternates the two sides, A B A B …, and gives the median of the pairwise ratios, which a drifting machine
moves less than the times themselves. «as loaded» is what `from_pretrained` gives: fp32, contiguous layout.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import diffusers
import torch
from torch import Tensor, nn

from sdvae.cli import parse_train_config
from sdvae.training.loop import build_vae


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


def training_step(vae: nn.Module, images: Tensor) -> Callable[[], None]:
    """Forward with a sampled posterior, L1 + KL, backward, AdamW: the model's part of training, without LPIPS."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-6)

    def step() -> None:
        posterior = vae.encode(images).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        loss = (reconstruction - images).abs().mean() + 1e-6 * posterior.kl().mean() / images[0].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/sd_f8c4.yaml", help="recipe whose model is timed")
    parser.add_argument("--size", type=int, default=256, help="side of the images in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    vae = build_vae(parse_train_config(["--config", arguments.config]).model).to(device)
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
        with torch.no_grad():
            z = ours.encode(x).latent_dist.mode()
            assert torch.equal(z, stock.encode(x).latent_dist.mode()), "the two sides do not compute the same"
            for name, argument in (("encode", x), ("decode", z)):
                sides = [partial(getattr(model, name), argument) for model in (ours, stock)]
                print(compare(f"{name}, {label}", *sides, arguments.repeats), flush=True)
        steps = [training_step(model, x) for model in (ours, stock)]
        print(compare(f"training step, {label}", *steps, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
