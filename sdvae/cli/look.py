"""`sdvae reconstruct`, `sdvae evaluate`: see what a VAE does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from sdvae.cli.parsing import parse, parse_fields
from sdvae.cli.registry import command


@command("encode and decode photographs: FILE … [--vae SOURCE] [--output FOLDER]; works right after the install")
def reconstruct(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="sdvae reconstruct", exit_on_error=False)
    parser.add_argument("files", type=str, nargs="+", help="image files")
    parser.add_argument(
        "--vae", type=str, default=None, help="whatever `sdvae export` takes as SOURCE; default: the packaged VAE"
    )
    parser.add_argument("--subfolder", type=str, default=None, help="folder inside the source that holds the VAE")
    parser.add_argument("--output", type=str, default="reconstructions", help="folder for NAME.png of each file")
    parser.add_argument(
        "--max_side", type=int, default=2048, help="shrink larger images first; memory grows as its square"
    )
    arguments = parse(parser, argv)
    from sdvae.reconstruct import reconstruct_files

    reconstruct_files(
        arguments.files,
        vae=arguments.vae,
        subfolder=arguments.subfolder,
        output=Path(arguments.output),
        max_side=arguments.max_side,
    )


@command("measure VAEs side by side: VAE … --data DATA [--preset coco_val_5k_256] [--fid true] …")
def evaluate(argv: Sequence[str]) -> None:
    from sdvae.evaluation.config import EvaluateConfig

    config = parse_fields(
        EvaluateConfig, argv, "sdvae evaluate", positional=("vaes", "VAEs; default: the packaged one")
    )
    from sdvae.evaluation.evaluate import evaluate as run

    run(config)
