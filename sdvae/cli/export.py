"""`sdvae export` and `sdvae fp16`: a VAE to other files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from jsonargparse import ArgumentParser

from sdvae.cli.parsing import parse
from sdvae.cli.registry import command
from sdvae.errors import InputError


@command("write a VAE in another format: SOURCE TARGET [--dtype fp16]")
def export(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="sdvae export", exit_on_error=False)
    parser.add_argument("source", type=str, help="diffusers folder, hub id, or a .safetensors or .ckpt file")
    parser.add_argument(
        "target", type=str, help="FILE.safetensors for ComfyUI, A1111 and kohya, or a folder for diffusers"
    )
    parser.add_argument("--subfolder", type=str, default=None, help="folder inside SOURCE that holds the VAE")
    parser.add_argument("--config", type=str, default=None, help="config.json for a SOURCE that is a single file")
    parser.add_argument(
        "--dtype", choices=["file", "fp32", "fp16", "bf16"], default="file", help="of the weights; file: as in SOURCE"
    )
    parser.add_argument(
        "--latents",
        type=str,
        default=None,
        help="folder that `sdvae encode` wrote: take the scaling_factor (and shift_factor, for a VAE that has one) "
        "measured there",
    )
    arguments = parse(parser, argv)

    from sdvae.weights import export_targets, load_vae, save_ldm, save_vae

    if arguments.target.endswith((".ckpt", ".pt", ".pth", ".bin")):
        raise InputError(f"got target {arguments.target}; need FILE.safetensors or a folder: pickles are not written")
    source = partial(load_vae, arguments.source, subfolder=arguments.subfolder, config=arguments.config)
    vae = source(dtype=arguments.dtype)
    if arguments.latents is not None:
        from sdvae.latents.encoder import encoder_sha256
        from sdvae.latents.folder import LatentFolder

        factors = LatentFolder(arguments.latents).factors(vae.config, encoder_sha256(source(dtype="file")))
        vae.register_to_config(**factors)
        print(", ".join(f"{key} {value}" for key, value in factors.items()))
    if arguments.target.endswith(".safetensors"):
        save_ldm(vae, arguments.target)
    else:
        save_vae(vae, arguments.target)
    print(f"wrote {arguments.target}")
    for program, reason in export_targets(vae).items():
        print(f"  {program:10} {'loads it' if reason is None else 'will not load it: ' + reason}")


@command("fp16 without overflow: audit VAE, or fix VAE OUT [--images DATA] …")
def fp16(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="sdvae fp16", exit_on_error=False)
    parser.add_argument("action", choices=["audit", "fix"], help="say each layer's largest value; or rescale the VAE")
    parser.add_argument("vae", type=str, help="whatever `sdvae export` takes as SOURCE")
    parser.add_argument("target", type=str, nargs="?", default=None, help="of fix: a folder for diffusers")
    parser.add_argument("--subfolder", type=str, default=None, help="folder inside the source that holds the VAE")
    parser.add_argument("--images", type=str, default="skimage", help="photographs; whatever data.source takes")
    parser.add_argument("--count", type=int, default=8, help="of photographs")
    parser.add_argument("--resolution", type=int, default=512, help="pixels a side of the square that is cropped")
    parser.add_argument(
        "--layers", type=int, default=12, help="of audit: so many layers, those with the largest values"
    )
    arguments = parse(parser, argv)
    if (arguments.action == "fix") != (arguments.target is not None):
        raise InputError(f"got fp16 {arguments.action} with target {arguments.target}; need one for fix and none else")
    from sdvae.fp16 import audit_vae, fix_vae

    images = (arguments.images, arguments.count, arguments.resolution)
    if arguments.action == "audit":
        audit_vae(arguments.vae, arguments.subfolder, *images, layers=arguments.layers)
    else:
        fix_vae(arguments.vae, arguments.subfolder, Path(arguments.target), *images)
