"""`sdvae reconstruct`, `evaluate`, `explore`, `demo`, `report`: see what a VAE does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from sdvae.cli.parsing import parse, parse_fields
from sdvae.cli.registry import command
from sdvae.errors import InputError


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

    config = parse_fields(EvaluateConfig, argv, "sdvae evaluate", first="vaes")
    from sdvae.evaluation.evaluate import evaluate as run

    run(config)


@command("latent space in pictures: interpolate|traverse|pca|prior|arithmetic|anomaly|denoise|all [--images A B] …")
def explore(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="sdvae explore", exit_on_error=False)
    choices = ["interpolate", "traverse", "pca", "prior", "arithmetic", "anomaly", "denoise", "all"]
    parser.add_argument(
        "what", choices=choices, help="each writes a picture and its figures; docs/explore.md shows them"
    )
    parser.add_argument(
        "--vae", type=str, default=None, help="whatever `sdvae export` takes as SOURCE; default: the packaged VAE"
    )
    parser.add_argument("--subfolder", type=str, default=None, help="folder inside the source that holds the VAE")
    parser.add_argument("--data", type=str, default="skimage", help="what is measured; whatever data.source takes")
    parser.add_argument("--count", type=int, default=16, help="of images that are measured, at most")
    parser.add_argument(
        "--images", type=str, nargs="+", default=[], help="what is drawn: image files, or names of images in --data"
    )
    parser.add_argument(
        "--anomalies", type=str, default=None, help="of anomaly: images that are not normal; default: synthetic defects"
    )
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side of the square that is cropped")
    parser.add_argument("--steps", type=int, default=7, help="of interpolate and traverse: columns")
    parser.add_argument(
        "--sigmas", type=float, nargs="+", default=[5.0, 15.0, 25.0, 50.0], help="of denoise: noise in levels of 0..255"
    )
    parser.add_argument("--seed", type=int, default=0, help="of samples, defects and noise")
    parser.add_argument("--output", type=str, default="explorations", help="folder for WHAT.png and WHAT.json")
    arguments = parse(parser, argv)
    from sdvae.studio.explore import Settings
    from sdvae.studio.explore import explore as run

    settings = Settings(
        data=arguments.data,
        images=tuple(arguments.images),
        anomalies=arguments.anomalies,
        count=arguments.count,
        resolution=arguments.resolution,
        steps=arguments.steps,
        sigmas=tuple(arguments.sigmas),
        seed=arguments.seed,
    )
    run(arguments.what, settings, vae=arguments.vae, subfolder=arguments.subfolder, output=Path(arguments.output))


@command("a page to drop photographs on and to edit latents: [VAE] [--compare VAE] [--port P]")
def demo(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="sdvae demo", exit_on_error=False)
    parser.add_argument(
        "vae", type=str, nargs="?", default=None, help="whatever `sdvae export` takes as SOURCE; default: the packaged"
    )
    parser.add_argument("--compare", type=str, default=None, help="a second VAE, beside the first")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="0.0.0.0 lets other machines use the page")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max_side", type=int, default=1024, help="pixels; larger photographs are shrunk to it")
    parser.add_argument("--max_megabytes", type=float, default=20.0, help="of an uploaded file")
    arguments = parse(parser, argv)
    try:
        from sdvae.studio.demo.page import serve
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise InputError('got no gradio; need it for the page; pip install "sdvae[demo]"') from error

    serve(
        arguments.vae,
        arguments.compare,
        host=arguments.host,
        port=arguments.port,
        max_side=arguments.max_side,
        max_megabytes=arguments.max_megabytes,
    )


@command("one HTML file about a VAE or a run: [VAE or RUN FOLDER] [--data DATA] [--output report.html]")
def report(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="sdvae report", exit_on_error=False)
    parser.add_argument(
        "vae",
        type=str,
        nargs="?",
        default=None,
        help="whatever `sdvae export` takes as SOURCE, or a run folder of `sdvae train`; default: the packaged VAE",
    )
    parser.add_argument("--subfolder", type=str, default=None, help="folder inside the source that holds the VAE")
    parser.add_argument(
        "--data",
        type=str,
        default=None,
        help="whatever data.source takes; default: the photographs in scikit-image, and of a run those it held out",
    )
    parser.add_argument("--count", type=int, default=24, help="of images, the first ones")
    parser.add_argument(
        "--resolution",
        type=int,
        default=None,
        help="pixels a side of the square that is cropped; default: 256, and of a run that of its validation",
    )
    parser.add_argument("--output", type=str, default="report.html")
    parser.add_argument(
        "--lpips",
        choices=["vgg", "alex", "squeeze", "none"],
        default="vgg",
        help="LPIPS's trunk; where it can be neither read nor downloaded, LPIPS is left out",
    )
    parser.add_argument(
        "--lpips_weights", type=str, default=None, help="local file of the trunk in torchvision's names"
    )
    parser.add_argument(
        "--lpips_heads", choices=["lpips", "uniform"], default="lpips", help="«uniform» counts all features the same"
    )
    arguments = parse(parser, argv)
    from sdvae.studio.report import write_report

    write_report(
        arguments.vae,
        output=Path(arguments.output),
        data=arguments.data,
        count=arguments.count,
        resolution=arguments.resolution,
        subfolder=arguments.subfolder,
        lpips=arguments.lpips,
        lpips_weights=arguments.lpips_weights,
        lpips_heads=arguments.lpips_heads,
    )
