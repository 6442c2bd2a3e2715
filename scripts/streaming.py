"""Measure memory, time and error of decoding large images: in strips, whole, and by diffusers' class.

    python scripts/streaming.py                                  # SD's 83.65 M parameters at 512² and 1024²
    python scripts/streaming.py --vae "" --sizes 1024 2048       # the packaged VAE
    python scripts/streaming.py --sizes 4096 --only "strips after speed_up"
    python scripts/streaming.py --sizes 4096 --only strips --memory_bytes 2147483648     # on a GPU

Each measurement runs in its own process, one after the other. Memory is the peak of resident (CPU) or allocated (CUDA)
memory during the pass, less what the process used once the weights were loaded. The error is the largest difference
from the image that this package's class decodes as a whole, in units of that image's standard deviation. With --vae,
the latents are those of scikit-image's photograph «retina», resized. With --config, weights and latents are random.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from jsonargparse.typing import PositiveInt
from safetensors.torch import load_file, save_file

from sdvae import AutoencoderKL, InputError, load_vae, speed_up, stream
from sdvae.cli import parse_train_config
from sdvae.data import open_source, read_image, to_tensor
from sdvae.errors import exit_code
from sdvae.metrics.memory import with_peak_memory
from sdvae.training.build import build_vae

SIDES = ("whole image", "whole after speed_up", "strips", "strips after speed_up")
SIDES += ("diffusers, whole", "diffusers, tiled", "diffusers, streamed")


def build(arguments: argparse.Namespace) -> AutoencoderKL:
    if arguments.vae is not None:
        return load_vae(arguments.vae or None, dtype=torch.float32)
    torch.manual_seed(0)
    config = parse_train_config(["--config", arguments.config, "--model.initialisation=torch"])
    return build_vae(config.model).eval()


@torch.inference_mode()
def photograph_latents(vae: AutoencoderKL, side: int) -> torch.Tensor:
    source = open_source("skimage")
    names = [source.name(i) for i in range(len(source))]
    x = to_tensor(read_image(source.read(names.index("retina"))).resize((side, side)))[None]
    vae.enable_tiling()
    z = vae.encode(x).latent_dist.mode()
    vae.disable_tiling()
    return z


@torch.inference_mode()
def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make one measurement, in this process.

    Args:
        arguments: those of the command line.
        folder: has the latents; the reference image is written there or read from there.

    Returns:
        seconds, bytes and, if there is a reference image, error.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae: Any = build(arguments)
    z = load_file(folder / f"{arguments.side}.safetensors")["z"].to(device)
    if arguments.measure.startswith("diffusers"):
        vae = vae.to_diffusers()
    vae = vae.to(device)
    if arguments.measure == "diffusers, streamed":
        vae = stream(vae, memory_bytes=arguments.memory_bytes)
    if (
        arguments.measure.endswith("speed_up") and device == "cpu"
    ):  # its Winograd convolutions add rounding to the error
        speed_up(vae)
    vae.decode(z[:, :, :8, :8])  # warm-up
    if arguments.measure.startswith("strips"):
        vae.enable_tiling(memory_bytes=arguments.memory_bytes)
    elif arguments.measure == "diffusers, tiled":
        vae.enable_tiling()

    def decode() -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        image = vae.decode(z).sample
        if device == "cuda":
            torch.cuda.synchronize()
        return image, time.perf_counter() - start

    (image, seconds), taken = with_peak_memory(decode, torch.device(device))
    if taken is None:
        raise InputError("this system does not tell a process's peak memory; need Linux, or a CUDA device")
    found = {"seconds": seconds, "bytes": taken}
    reference = folder / f"{arguments.side}-image.safetensors"
    if arguments.measure == SIDES[0]:
        save_file({"image": image.cpu().contiguous()}, reference)
    if reference.is_file():
        wanted = load_file(reference)["image"]
        found["error"] = float((image.cpu() - wanted).abs().max() / wanted.std())
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot memory and time over the side of the image."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name in SIDES:
        mine = [row for row in rows if row["name"] == name]
        sides = [row["side"] for row in mine]
        axes[0].plot(sides, [row["bytes"] / 2**30 for row in mine], "o-", label=name)
        axes[1].plot(sides, [row["seconds"] for row in mine], "o-", label=name)
    for axis, label in zip(axes, ("peak memory above the weights, GiB", "seconds"), strict=True):
        axis.set(xlabel="side of the image, pixels", ylabel=label, xscale="log", yscale="log")
        sides = sorted({row["side"] for row in rows})
        axis.set_xticks(sides, [str(side) for side in sides], minor=False)
        axis.xaxis.minorticks_off()
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/sd_f8c4.yaml", help="recipe whose model is measured")
    parser.add_argument(
        "--vae", default=None, help="trained VAE to measure instead; an empty string takes the packaged one"
    )
    parser.add_argument(
        "--sizes", type=PositiveInt, nargs="+", default=[512, 1024], help="sides of the image in pixels"
    )
    parser.add_argument("--memory_bytes", type=PositiveInt, default=None, help="budget of the strips; default: none")
    parser.add_argument("--plot", default=None, help="PNG file to plot the results into")
    parser.add_argument("--skip", nargs="*", default=[], help="measurements to leave out, NAME@SIZE")
    parser.add_argument("--only", nargs="*", choices=SIDES, default=[], help="measurements to make; default: all")
    parser.add_argument("--measure", choices=SIDES, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments, Path(arguments.folder))))
        return
    vae = build(arguments)
    f = vae.spatial_compression_ratio
    for side in arguments.sizes:
        if side <= 0 or side % f:
            raise InputError(f"--sizes: got {side}; need positive multiples of {f}")
    if unknown := set(arguments.skip) - {f"{name}@{side}" for name in SIDES for side in arguments.sizes}:
        raise InputError(f"--skip: got {', '.join(unknown)}; need NAME@SIZE, a NAME of {', '.join(SIDES)}")
    parameters = sum(p.numel() for p in vae.parameters()) / 1e6
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(f"decode, {parameters:.2f} M parameters, fp32, {where}, torch {torch.__version__}, {platform.machine()}\n")
    print("| | side | peak memory, GiB | seconds | error |\n|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for side in arguments.sizes:
            z = photograph_latents(vae, side) if arguments.vae is not None else None
            if z is None:
                generator = torch.Generator().manual_seed(0)
                z = torch.randn(1, vae.config.latent_channels, side // f, side // f, generator=generator)
            save_file({"z": z.contiguous()}, Path(folder) / f"{side}.safetensors")
            for name in SIDES:
                if f"{name}@{side}" in arguments.skip or (arguments.only and name not in arguments.only):
                    continue
                command = [sys.executable, __file__, *sys.argv[1:], "--measure", name, "--side", str(side)]
                finished = subprocess.run(
                    [*command, "--folder", folder], capture_output=True, text=True, env=os.environ, check=False
                )
                if finished.returncode != 0:
                    said = [
                        f"exit code {finished.returncode}",
                        *finished.stderr.split("\n"),
                    ]  # a killed process prints nothing
                    print(f"| {name} | {side} | failed: {[line for line in said if line][-1]} | | |", flush=True)
                    continue
                row = {"name": name, "side": side, **json.loads(finished.stdout.splitlines()[-1])}
                rows.append(row)
                error = f"{row['error']:.1e}" if "error" in row else ""
                print(f"| {name} | {side} | {row['bytes'] / 2**30:.2f} | {row['seconds']:.1f} | {error} |", flush=True)
    if arguments.plot is not None:
        draw(rows, Path(arguments.plot))


if __name__ == "__main__":
    sys.exit(exit_code("streaming", main))
