"""`sdvae encode` and `sdvae convert`: latent data sets."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from sdvae.cli.parsing import parse, parse_fields
from sdvae.cli.registry import command
from sdvae.latents.config import EncodeConfig


@command("encode a data set of images to latents: --source DATA --output FOLDER [--vae SOURCE] [--mirror true …]")
def encode(argv: Sequence[str]) -> None:
    config = parse_fields(EncodeConfig, argv, "sdvae encode")
    from sdvae.latents.encode import encode as run

    run(config)


@command("write encoded latents in another format: FOLDER TARGET --to safetensors|webdataset|kohya")
def convert(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="sdvae convert", exit_on_error=False)
    parser.add_argument("folder", type=str, help="a finished data set that `sdvae encode` wrote")
    parser.add_argument("target", type=str, help="a new or empty folder")
    parser.add_argument("--to", choices=["safetensors", "webdataset", "kohya"], required=True)
    arguments = parse(parser, argv)
    from sdvae.latents.convert import export_latents

    written = export_latents(arguments.folder, arguments.target, arguments.to)
    print(f"wrote {written[0]}" if len(written) == 1 else f"wrote {len(written)} files to {arguments.target}")
