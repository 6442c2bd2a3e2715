"""`sdvae push`: a VAE to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentParser

from sdvae.cli.parsing import parse
from sdvae.cli.registry import command


@command("upload a VAE with its model card to the Hugging Face hub: VAE OWNER/NAME [--private true] …")
def push(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="sdvae push", exit_on_error=False)
    parser.add_argument("vae", type=str, help="a run folder of `sdvae train`, or whatever `sdvae export` takes")
    parser.add_argument("repo_id", type=str, help="owner/name on the hub; made if there is none")
    parser.add_argument("--subfolder", type=str, default=None, help="folder inside VAE that holds it")
    parser.add_argument("--private", type=bool, default=None, help="of a new repository; default: the owner's settings")
    parser.add_argument("--license", type=str, default=None, help="such as apache-2.0; default: what its card has")
    parser.add_argument("--revision", type=str, default=None, help="branch, made if there is none; default: main")
    parser.add_argument("--message", type=str, default=None, help="of the commit")
    parser.add_argument(
        "--data", type=str, default=None, help="measure, and draw, on these images; default: what its folder has"
    )
    parser.add_argument("--count", type=int, default=50, help="of those images, at most")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side of the square that is cropped")
    parser.add_argument("--dry_run", type=str, default=None, help="a new folder: write it there, and upload nothing")
    arguments = parse(parser, argv)
    from sdvae.studio.push import push_to_hub

    done = push_to_hub(
        arguments.vae,
        arguments.repo_id,
        subfolder=arguments.subfolder,
        private=arguments.private,
        license=arguments.license,
        revision=arguments.revision,
        message=arguments.message,
        data=arguments.data,
        count=arguments.count,
        resolution=arguments.resolution,
        dry_run=arguments.dry_run,
    )
    print(f"wrote {done}" if arguments.dry_run else f"uploaded: {done}")
