"""The command line: one module-level function a command, and one place where bad input becomes an exit code.

Exit codes: 0 done, 1 a fault of the program or the machine, 2 bad input, 130 and 143 stopped by SIGINT and SIGTERM.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from sdvae.errors import InputError, Stopped
from sdvae.latents.config import EncodeConfig
from sdvae.training.config import TrainConfig

set_parsing_settings(docstring_parse_attribute_docstrings=True)  # each field's docstring is its help text

Config = TypeVar("Config", TrainConfig, EncodeConfig)

COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], None]]] = {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Bad input is one line on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    _log_to_stderr()
    try:
        if name not in COMMANDS:
            raise InputError(f"unknown command {name!r}; {_suggest(name, COMMANDS) or 'see sdvae --help'}")
        COMMANDS[name][1](rest)
    except InputError as error:
        print(f"sdvae: error: {_innermost(error)}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"sdvae: error: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        print(f"sdvae: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("sdvae: interrupted", file=sys.stderr)
        return 130
    return 0


def command(summary: str) -> Callable:
    """Register a function of the remaining arguments under its own name."""

    def register(function: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
        COMMANDS[function.__name__] = (summary, function)
        return function

    return register


@command("train a VAE from a recipe: --config FILE [--dotted.key=value …]")
def train(argv: Sequence[str]) -> None:
    config = parse_train_config(argv)
    from sdvae.training.loop import train as run  # here, so that a misspelt key needs no torch

    run(config)


@command("encode a data set of images to latents: --source DATA --output FOLDER [--vae SOURCE] [--mirror true …]")
def encode(argv: Sequence[str]) -> None:
    config = _parse_fields(EncodeConfig, argv, "sdvae encode")
    from sdvae.latents.encode import encode as run

    run(config)


@command("write encoded latents in another format: FOLDER TARGET --to safetensors|webdataset|kohya")
def convert(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="sdvae convert", exit_on_error=False)
    parser.add_argument("folder", type=str, help="a finished data set that `sdvae encode` wrote")
    parser.add_argument("target", type=str, help="a new or empty folder")
    parser.add_argument("--to", choices=["safetensors", "webdataset", "kohya"], required=True)
    arguments = _parse(parser, argv)
    from sdvae.latents.export import export_latents

    written = export_latents(arguments.folder, arguments.target, arguments.to)
    print(f"wrote {written[0]}" if len(written) == 1 else f"wrote {len(written)} files to {arguments.target}")


@command("write a VAE in another format: SOURCE TARGET [--dtype fp16]")
def export(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="sdvae export", exit_on_error=False)
    parser.add_argument("source", type=str, help="diffusers folder, hub id, or a .safetensors or .ckpt file")
    parser.add_argument(
        "target", type=str, help="FILE.safetensors for ComfyUI, A1111 and kohya, or a folder for diffusers"
    )
    parser.add_argument("--subfolder", type=str, default=None, help="folder inside SOURCE that holds the VAE")
    parser.add_argument("--config", type=str, default=None, help="config.json for a SOURCE that is a single file")
    parser.add_argument("--dtype", choices=["fp32", "fp16", "bf16"], default=None, help="default: as in SOURCE")
    parser.add_argument(
        "--latents",
        type=str,
        default=None,
        help="folder that `sdvae encode` wrote: take the scaling_factor (and shift_factor, for a VAE that has one) "
        "measured there",
    )
    arguments = _parse(parser, argv)

    from sdvae.model.precision import DTYPES
    from sdvae.weights import export_targets, load_vae, save_ldm, save_vae

    dtype = None if arguments.dtype is None else DTYPES[arguments.dtype]
    if arguments.target.endswith((".ckpt", ".pt", ".pth", ".bin")):
        raise InputError(f"got target {arguments.target}; need FILE.safetensors or a folder: pickles are not written")
    vae = load_vae(arguments.source, subfolder=arguments.subfolder, config=arguments.config, dtype=dtype)
    if arguments.latents is not None:
        from sdvae.latents.encoder import encoder_sha256
        from sdvae.latents.store import LatentFolder

        factors = LatentFolder(arguments.latents).factors(vae.config, encoder_sha256(vae))
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
    arguments = _parse(parser, argv)
    if (arguments.action == "fix") != (arguments.target is not None):
        raise InputError(f"got fp16 {arguments.action} with target {arguments.target}; need one for fix and none else")
    from sdvae.half import audit_vae, fix_vae

    images = (arguments.images, arguments.count, arguments.resolution)
    if arguments.action == "audit":
        audit_vae(arguments.vae, arguments.subfolder, *images, layers=arguments.layers)
    else:
        fix_vae(arguments.vae, arguments.subfolder, Path(arguments.target), *images)


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
    arguments = _parse(parser, argv)
    from sdvae.reconstruct import reconstruct_files

    reconstruct_files(
        arguments.files,
        vae=arguments.vae,
        subfolder=arguments.subfolder,
        output=Path(arguments.output),
        max_side=arguments.max_side,
    )


def parse_train_config(argv: Sequence[str]) -> TrainConfig:
    """YAML files and dotted overrides to a recipe; later ones win.

    Raises: InputError for an unknown key, with the nearest known one, or for a value of the wrong type.
    """
    return _parse_fields(TrainConfig, argv, "sdvae train")


def _parse_fields(config_class: type[Config], argv: Sequence[str], program: str) -> Config:
    parser = ArgumentParser(prog=program, exit_on_error=False)
    parser.add_argument("--config", action="config", help="options in YAML; may be given more than once")
    parser.add_class_arguments(config_class)
    known = set(_keys(config_class))
    for key, origin in _given_keys(argv, known):
        if key not in known and key not in ("config", "print_config", "help"):
            hint = _suggest(key, known) or f"see {program} --help"
            raise InputError(f"unknown key {key!r} in {origin}; {hint}")
    arguments = _parse(parser, argv)
    instance = parser.instantiate(arguments)
    return config_class(**{field.name: getattr(instance, field.name) for field in dataclasses.fields(config_class)})


def _parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    try:
        return parser.parse_args(list(argv))
    except ArgumentError as error:
        raise InputError(f"{' '.join(str(error).split())} (see {parser.prog} --help)") from error


def _keys(config_class: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields: «loss», «loss.kl_weight», …"""
    for field in dataclasses.fields(config_class):
        yield prefix + field.name
        if dataclasses.is_dataclass(field.default_factory):
            yield from _keys(field.default_factory, f"{prefix}{field.name}.")


def _given_keys(argv: Sequence[str], known: Set[str]) -> Iterator[tuple[str, str]]:
    """(dotted key, where it stands) of every override and of every key in the YAML files."""
    for i, argument in enumerate(argv):
        if not argument.startswith("--"):
            continue
        key, _, value = argument[2:].partition("=")
        yield key, "the command line"
        if key == "config":
            path = Path(value or (argv[i + 1] if i + 1 < len(argv) else ""))
            if path.is_file():  # what is no file, the parser reports
                yield from ((name, str(path)) for name in _yaml_keys(path, known))


def _yaml_keys(path: Path, known: Set[str]) -> Iterator[str]:
    sections = {key.rsplit(".", 1)[0] for key in known if "." in key}

    def walk(node: dict[str, Any], prefix: str) -> Iterator[str]:
        for key, value in node.items():
            if f"{prefix}{key}" in sections and not isinstance(value, dict):
                raise InputError(f"{path}: {prefix}{key} is a section; need «key: value» lines below it, got {value!r}")
            yield f"{prefix}{key}"
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}; need «key: value» lines")
    yield from walk(content, "")


def _suggest(name: str, known) -> str:
    """«did you mean …?» for the known name nearest to `name`, or nothing."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if not nearest:  # the right field under the wrong section
        leaf = name.rsplit(".", 1)[-1]
        nearest = [key for key in known if key.rsplit(".", 1)[-1] == leaf][:1]
    return f"did you mean {nearest[0]!r}?" if nearest else ""


def _innermost(error: InputError) -> str:
    """The message itself: torch's DataLoader wraps a worker's error in a traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1].removeprefix("sdvae.errors.InputError: ").removeprefix("sdvae.data.images.ImageError: ")


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (summary, _) in COMMANDS.items()]
    return "\n".join(["usage: sdvae COMMAND …; sdvae COMMAND --help tells more", "", *lines])


def _log_to_stderr() -> None:
    """Log lines of the main process only, plain; other processes speak when something is wrong."""
    is_main = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sdvae").setLevel(logging.INFO if is_main else logging.ERROR)
