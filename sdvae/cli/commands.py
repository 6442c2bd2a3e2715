"""The commands and their options: each field of an options class is an option, and the string below it is its help.

A command imports its part of the package only when it runs, because nearly every part imports torch. The options of
`train`, `encode`, `evaluate`, `demo` and `report` are defined beside the code that uses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sdvae.errors import InputError, require
from sdvae.evaluation.config import EvaluateConfig
from sdvae.latents.config import EncodeConfig
from sdvae.studio.settings import ColorOption, DemoOptions, ReportOptions, Settings
from sdvae.training.config import TrainConfig

SDXL_CHANNELS = 4  # of latents whose latents_mean and latents_std diffusers' SDXL pipelines can read


def train(options: TrainConfig) -> None:
    """Train a VAE from a recipe: --config FILE [--dotted.key=value …]"""
    from sdvae.training.loop import train

    train(options)


def distil(options: TrainConfig) -> None:
    """Train a small, fast student of a VAE: VAE --config FILE [--dotted.key=value …]"""
    if options.distil.teacher is None:
        raise InputError("got no VAE; need the one to learn from; sdvae distil VAE --config configs/tiny.yaml")
    train(options)


def encode(options: EncodeConfig) -> None:
    """Encode a data set of images to latents: --source DATA --output FOLDER [--vae SOURCE] [--mirror true …]"""
    from sdvae.latents.encode import encode

    encode(options)


@dataclass(frozen=True)
class ConvertOptions:
    """Options of `sdvae convert`."""

    folder: str
    """A finished data set that `sdvae encode` wrote."""
    target: str
    """A new or empty folder."""
    to: Literal["safetensors", "webdataset", "kohya"]
    """The format to write."""


def convert(options: ConvertOptions) -> None:
    """Write encoded latents in another format: FOLDER TARGET --to safetensors|webdataset|kohya"""
    from sdvae.latents.convert import export_latents

    written = export_latents(options.folder, options.target, options.to)
    print(f"wrote {written[0]}" if len(written) == 1 else f"wrote {len(written)} files to {options.target}")


@dataclass(frozen=True)
class ExportOptions(ColorOption):
    """Options of `sdvae export`."""

    source: str
    """The VAE to read: a diffusers folder, an id on the Hugging Face hub, or a .safetensors or .ckpt file."""
    target: str
    """FILE.safetensors (or .sft) for ComfyUI, A1111 and kohya, or a folder for diffusers. A student becomes the pair
    NAME_encoder and NAME_decoder: give the path of either, such as taesd_decoder.safetensors for ComfyUI's previews, or
    taesd_decoder.pth for A1111's."""
    subfolder: str | None = None
    """Folder inside the source that holds the VAE."""
    config: str | None = None
    """A JSON file with keys of config.json, such as {"scaling_factor": 0.13025}, that a single file does not tell."""
    dtype: Literal["file", "fp32", "fp16", "bf16"] = "file"
    """Dtype of the written weights. `file` keeps that of the source."""
    latents: str | None = None
    """A folder that `sdvae encode` wrote. The scaling_factor measured there is written with the VAE, and the
    shift_factor as well if the VAE has one; or the statistics of its batch norm, for a VAE of FLUX.2's kind."""
    by_channel: bool = False
    """With `latents`: write latents_mean and latents_std, the mean and standard deviation of each channel measured
    there, and 1 as scaling_factor. SDXL's pipelines and `LatentDataset` then scale each channel to mean 0 and standard
    deviation 1. Other pipelines do not read these keys; SDXL's take 4 latent channels."""
    onnx: bool = False
    """Write vae_encoder/model.onnx and vae_decoder/model.onnx into the folder TARGET, as optimum's pipelines for ONNX
    Runtime read them, and compare both with the VAE if onnxruntime is installed. Needs the extra onnx. Computes in the
    dtype of the weights, fp32 or fp16."""
    data: str | None = None
    """Images, whatever `data.source` takes in training: fit «latent RGB factors» to them, the linear map that previews
    latents without a decoder, and write latent_rgb_factors.json into the folder or beside the file."""
    count: int = 64
    """With `data`: number of images, the first ones."""
    resolution: int = 256
    """With `data`: side in pixels of the square that is cropped from the centre of each image."""

    def __post_init__(self) -> None:
        if self.by_channel and self.latents is None:
            raise InputError("got by_channel without latents; need the folder they were measured on; add --latents")
        if self.data is None and (self.count, self.resolution) != (64, 256):
            raise InputError("got count or resolution without data; they are for fitting RGB factors; add --data")
        name = self.target.lower()
        if name.endswith(".onnx") or (self.onnx and Path(name).suffix in (".safetensors", ".sft", ".pth")):
            raise InputError(
                f"got target {self.target}; ONNX takes two files, an encoder and a decoder; need the name of a folder, "
                "and --onnx true"
            )
        if self.onnx and self.data is not None:
            raise InputError("got data with onnx; RGB factors are written beside a VAE that sdvae reads; leave it out")
        if name.endswith((".ckpt", ".pt", ".pth", ".bin")) and not name.endswith(("_encoder.pth", "_decoder.pth")):
            raise InputError(
                f"got target {self.target}; need FILE.safetensors or a folder: pickles are not written, except a "
                "student's NAME_decoder.pth"
            )


def export(options: ExportOptions) -> None:
    """Write a VAE in another format: SOURCE TARGET [--dtype fp16] [--onnx true] [--data DATA]"""
    from sdvae.weights import export_targets, load_vae, save_as

    source = partial(load_vae, options.source, subfolder=options.subfolder, config=options.config)
    vae = source(dtype=options.dtype)
    if options.latents is not None:
        from sdvae.latents.encoder import encoder_sha256
        from sdvae.latents.folder import LatentFolder

        sha256 = encoder_sha256(source(dtype="file"))
        print(LatentFolder(options.latents).write_scaling(vae, sha256, by_channel=options.by_channel))
        if options.by_channel and vae.config.latent_channels != SDXL_CHANNELS:
            print(
                f"SDXL's pipelines, which read latents_mean and latents_std, take {SDXL_CHANNELS} latent channels; "
                f"this VAE has {vae.config.latent_channels}, and LatentDataset scales by them"
            )
    if options.onnx:
        from sdvae.weights.onnx import save_onnx

        print(f"wrote {' and '.join(map(str, save_onnx(vae, options.target)))}")
        return
    preview = None
    if options.data is not None:
        from sdvae.previews import fit_preview

        preview = fit_preview(vae, options.data, options.count, options.resolution, options.color)
    written = save_as(vae, options.target)
    print(f"wrote {' and '.join(map(str, written))}")
    if preview is not None:
        print(f"wrote {preview.write_beside(written[-1])}: {preview}")
    for program, reason in export_targets(vae).items():
        print(f"  {program:10} {'loads it' if reason is None else 'cannot use it as it is: ' + reason}")


@dataclass(frozen=True)
class WidenOptions:
    """Options of `sdvae widen`."""

    source: str
    """The VAE to read: whatever `sdvae export` takes as its source."""
    target: Path
    """The diffusers folder to write, for `fine_tune.source` of a recipe."""
    subfolder: str | None = None
    """Folder inside the source that holds the VAE."""
    config: str | None = None
    """A JSON file with keys of config.json that a single file does not tell."""
    latent_channels: int | None = None
    """Channels of the latents; by default as many as the VAE has."""
    image_channels: int | None = None
    """4 adds alpha to a VAE of RGB images; by default as many as the VAE has."""
    block_out_channels: tuple[int, ...] | None = None
    """Width of each level, all of them larger by the same factor; by default those of the VAE."""
    seed: int = 0
    """Seed of the new weights."""


def widen(options: WidenOptions) -> None:
    """Add channels to a VAE, which starts as it was: SOURCE TARGET [--latent_channels 16] [--image_channels 4] …"""
    from sdvae.training.widen import widened
    from sdvae.weights import load_kl, save_vae

    vae = load_kl(options.source, subfolder=options.subfolder, config=options.config, dtype="fp32")
    wide = widened(
        vae,
        latent_channels=options.latent_channels,
        image_channels=options.image_channels,
        block_out_channels=options.block_out_channels,
        seed=options.seed,
    )
    save_vae(wide, options.target)
    before, after = (sum(p.numel() for p in model.parameters()) / 1e6 for model in (vae, wide))
    print(f"wrote {options.target}: {after:.2f} M parameters of {before:.2f} M; train it with fine_tune.source")


@dataclass(frozen=True)
class Fp16Options(ColorOption):
    """Options of `sdvae fp16`."""

    action: Literal["audit", "fix"]
    """`audit` prints the largest value of each layer; `fix` rescales the VAE."""
    vae: str
    """The VAE: whatever `sdvae export` takes as its source."""
    target: Path | None = None
    """For `fix`: the diffusers folder to write."""
    subfolder: str | None = None
    """Folder inside `vae` that holds the VAE."""
    images: str = "skimage"
    """Photographs to run through the VAE: whatever `data.source` takes in training."""
    count: int = 8
    """Number of photographs."""
    resolution: int = 512
    """Side in pixels of the square that is cropped from the centre of each photograph."""
    layers: int = 12
    """For `audit`: number of layers to print, those with the largest values first."""

    def __post_init__(self) -> None:
        if (self.action == "fix") != (self.target is not None):
            raise InputError(f"got fp16 {self.action} with target {self.target}; need a target for fix, none for audit")


def fp16(options: Fp16Options) -> None:
    """Make a VAE safe in fp16: audit VAE, or fix VAE TARGET [--images DATA] …"""
    from sdvae.fp16 import audit_vae, fix_vae

    images = (options.images, options.count, options.resolution, options.color)
    if options.target is None:
        audit_vae(options.vae, options.subfolder, *images, layers=options.layers)
    else:
        fix_vae(options.vae, options.subfolder, options.target, *images)


@dataclass(frozen=True)
class ReconstructOptions(ColorOption):
    """Options of `sdvae reconstruct`."""

    files: tuple[str, ...]
    """Image files."""
    vae: str | None = None
    """The VAE: whatever `sdvae export` takes as its source, or a folder or hub id of another autoencoder of diffusers,
    such as AutoencoderDC or AutoencoderKLWan. By default the one inside this package."""
    subfolder: str | None = None
    """Folder inside `vae` that holds the VAE."""
    output: Path = Path("reconstructions")
    """Folder for the reconstructions, NAME.png for each file."""
    max_side: int = 2048
    """Images with a longer side than this are shrunk to it, in pixels. Memory grows with its square."""


def reconstruct(options: ReconstructOptions) -> None:
    """Encode and decode photographs: FILE … [--vae SOURCE] [--output FOLDER]"""
    from sdvae.reconstruct import reconstruct_files

    reconstruct_files(**vars(options))


def evaluate(options: EvaluateConfig) -> None:
    """Measure VAEs side by side: VAE … --data DATA [--preset coco_val_5k_256] [--fid true] …"""
    from sdvae.evaluation.evaluate import evaluate

    evaluate(options)


@dataclass(frozen=True, kw_only=True)
class ExploreOptions(Settings):
    """Options of `sdvae explore`."""

    what: Literal["interpolate", "traverse", "pca", "prior", "arithmetic", "anomaly", "denoise", "all"]
    """The experiment. Each writes a picture and its numbers."""
    vae: str | None = None
    """The VAE: whatever `sdvae export` takes as its source. By default the one inside this package."""
    subfolder: str | None = None
    """Folder inside `vae` that holds the VAE."""
    output: Path = Path("explorations")
    """Folder for EXPERIMENT.png and EXPERIMENT.json."""


def explore(options: ExploreOptions) -> None:
    """Draw the latent space: interpolate|traverse|pca|prior|arithmetic|anomaly|denoise|all [--images A B] …"""
    from sdvae.studio.explore.run import explore

    explore(options.what, options, vae=options.vae, subfolder=options.subfolder, output=options.output)


def demo(options: DemoOptions) -> None:
    """Serve a page to reconstruct photographs and edit latents: [VAE] [--compare VAE] [--port P]"""
    require("gradio", "sdvae demo", "studio")
    from sdvae.studio.demo.page import serve

    serve(options)


def report(options: ReportOptions) -> None:
    """Write one HTML file about a VAE or a run: [VAE or RUN FOLDER] [--data DATA] [--output report.html]"""
    require("jinja2", "sdvae report", "studio")
    from sdvae.studio.report.run import write_report

    write_report(options)


@dataclass(frozen=True)
class PushOptions(ColorOption):
    """Options of `sdvae push`."""

    vae: str
    """The VAE: a run folder of `sdvae train`, or whatever `sdvae export` takes as its source."""
    repo_id: str
    """OWNER/NAME on the hub. The repository is created if it does not exist."""
    subfolder: str | None = None
    """Folder inside `vae` that holds the VAE."""
    private: bool | None = None
    """Whether a new repository is private. By default as the owner's settings say."""
    license: str | None = None
    """License for the model card, such as apache-2.0. By default the card keeps its license."""
    revision: str | None = None
    """Branch, created if it does not exist. By default main."""
    message: str | None = None
    """Message of the commit."""
    data: str | None = None
    """Images for the figures, the picture and the latent RGB factors of the card: whatever `data.source` takes in
    training. By default the card keeps its own."""
    count: int = 50
    """Largest number of those images."""
    resolution: int = 256
    """Side in pixels of the square that is cropped from the centre of each image."""
    dry_run: str | None = None
    """A new folder: write everything there and upload nothing."""


def push(options: PushOptions) -> None:
    """Upload a VAE with its model card to the Hugging Face hub: VAE OWNER/NAME [--private true] …"""
    from sdvae.studio.push import push_to_hub

    done = push_to_hub(**vars(options))
    print(f"wrote {done}" if options.dry_run else f"uploaded: {done}")


class Command(NamedTuple):
    """A function of one dataclass, whose fields are the command's options. Its docstring is its line in the help."""

    run: Callable[[Any], None]
    positional: tuple[str, ...] = ()  # `parse_options` explains this and `urls`
    urls: tuple[str, ...] = ()  # the options that may hold a URL; the others refuse it
    first: str = ""  # the option that the first argument gives, if it stands without a name


COMMANDS = {
    "train": Command(train, urls=("data.source", "data.validation_source", "distil.latents_folder")),
    "distil": Command(
        distil, urls=("data.source", "data.validation_source", "distil.latents_folder"), first="distil.teacher"
    ),
    "encode": Command(encode, urls=("source", "output", "ray_address")),
    "convert": Command(convert, positional=("folder", "target"), urls=("folder",)),
    "export": Command(export, positional=("source", "target"), urls=("latents", "data")),
    "widen": Command(widen, positional=("source", "target")),
    "fp16": Command(fp16, positional=("action", "vae", "target"), urls=("images",)),
    "reconstruct": Command(reconstruct, positional=("files",)),
    "evaluate": Command(evaluate, positional=("vaes",), urls=("data",)),
    "explore": Command(explore, positional=("what",), urls=("data", "anomalies")),
    "demo": Command(demo, positional=("vae",)),
    "report": Command(report, positional=("vae",), urls=("data",)),
    "push": Command(push, positional=("vae", "repo_id"), urls=("message", "data")),
}
