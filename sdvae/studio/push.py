"""`sdvae push`: upload a VAE to the Hugging Face hub, with a model card and weights for other programs."""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from torch import nn

from sdvae.data import BadImages, EvaluationImages, ReadOptions, evaluation_loader, open_source
from sdvae.data.reading import Color
from sdvae.errors import InputError, one_line
from sdvae.io import HUB_ID, replacing, version, with_section
from sdvae.metrics import SMALLEST_SIDE
from sdvae.model import ConvolutionalVAE
from sdvae.previews import PREVIEWS, Preview, fit_preview
from sdvae.runtime import accelerator_type
from sdvae.training.model_card import (
    FIGURES,
    GRID_NAME,
    LDM_NAME,
    LOADING,
    RECIPE,
    base_model,
    card_head,
    figures_text,
    ldm_programs,
    loading_text,
    title,
)
from sdvae.training.run_folder import RunFolder
from sdvae.training.save import grid_of
from sdvae.training.validation import ValidationResult, validate
from sdvae.weights import load_kl, save_ldm, save_vae
from sdvae.weights.save import RGB_FACTORS

GRID_IMAGES = 4  # rows in the grid
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TAGS = ["vae", "autoencoder-kl", "sdvae"]
WANT_TOKEN = "need one that may write; create it at https://huggingface.co/settings/tokens, then run `hf auth login`"


def push_to_hub(
    vae: ConvolutionalVAE | str | Path,
    repo_id: str,
    *,
    subfolder: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    data: str | None = None,
    count: int = 50,
    resolution: int = 256,
    color: Color = "srgb",
    token: str | None = None,
    dry_run: str | Path | None = None,
) -> str:
    """Upload a VAE in one commit, with a model card and a grid of images.

    The commit has a diffusers folder and, if any program can load it, the file LDM_NAME. If the VAE's folder has a
    card, that card is used: its figures and its section on loading are updated, and absolute paths in it are cut to
    their last part. Other files in the repository stay.

    Args:
        vae: the model, a source for `load_vae`, or a run folder of the trainer, whose model/ is used. (To upload
            best_model/, give its path.)
        repo_id: «owner/name» of the repository, which is created if it does not exist.
        subfolder: folder inside `vae` that holds the VAE.
        private: whether a new repository is private; by default as in the owner's settings.
        license: an id that the hub accepts, such as "apache-2.0"; by default that of the card.
        revision: branch, which is created if it does not exist; by default main.
        message: the message of the commit.
        data: a source for `open_source`, with images for the figures, the grid and the latent RGB factors. By default
            those of the VAE's folder are used, if it has any.
        count: number of those images, at most.
        resolution: side of their centre crops in pixels.
        color: as in `ReadOptions`.
        token: access token of the hub; by default that of `hf auth login`, or HF_TOKEN.
        dry_run: a new or empty folder; everything is written there, and nothing is uploaded.

    Returns:
        The address of the commit, or the folder of a dry run.

    Raises:
        InputError: for a VAE or data that cannot be read, or when the hub refuses the upload.
        ConnectionError: when the hub cannot be reached, or answers with an error of its own.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise InputError(f"got repo_id {repo_id!r}; need owner/name; put your name on the hub before it")
    target = None if dry_run is None else Path(dry_run).expanduser()
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"got dry_run={target}, which exists already; need a new or empty folder; choose another")
    if target is None and (token or get_token()) is None:
        raise InputError(f"got no token for the hub; {WANT_TOKEN}, or set HF_TOKEN")

    model, folder, origin = _open(vae, subfolder)
    measured = None if data is None else measure_on(model, data, count, resolution, color)
    preview = None if data is None else fit_preview(model, data, count, resolution, color)
    sections = {}
    if data is not None and measured is not None and preview is not None:
        sections = {FIGURES: figures_text(measured, "Means over", data, resolution), PREVIEWS: preview.markdown()}
    card = hub_card(model, repo_id, folder, base=origin, license=license, sections=sections)
    with tempfile.TemporaryDirectory() as temporary:
        written = target or Path(temporary) / "vae"
        with replacing(written) as beside:
            _write(model, card, folder, measured, preview, beside)
        if target is not None:
            return str(target)
        return _upload(written, repo_id, private, revision, message or f"Upload {model.__class__.__name__}", token)


def hub_card(
    vae: ConvolutionalVAE,
    repo_id: str,
    folder: Path | None,
    *,
    base: str | None,
    license: str | None,
    sections: Mapping[str, str],
) -> ModelCard:
    """The model card.

    Args:
        vae: the VAE.
        repo_id: «owner/name» of the repository.
        folder: the VAE's folder. If it has a README.md, the card is made from it.
        base: the hub id of the VAE that this one was made from; only a new card needs it.
        license: an id that the hub accepts; None keeps that of the card.
        sections: heading -> content of sections that are replaced or added; the card's others stay.

    Raises:
        InputError: when the head of the card in the folder is not YAML.
    """
    readme = None if folder is None else folder / "README.md"
    if readme is not None and readme.is_file():
        try:
            card = ModelCard(readme.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(f"{readme} has a head that is not YAML ({_short(error)}); correct it") from error
    else:
        card = ModelCard(card_head(vae, title(repo_id.split("/")[1], vae), base_model=base))
    card.data["library_name"] = "diffusers"
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *TAGS]))
    if license is not None:
        card.data["license"] = license
    loading = loading_text(vae, repo_id, what="this repository", programs=ldm_programs(vae))
    text = card.text
    for heading, content in {LOADING: loading, **sections}.items():
        text = with_section(text, heading, content)
    card.text = without_local_paths(text)
    return card


def without_local_paths(text: str) -> str:
    """The text of a card, with absolute paths in the recipe and between backquotes cut to their last part.

    Whole paths would publish the folders of this machine, and are of no use to other people.
    """
    block = re.search(rf"^## {RECIPE}\n+```yaml\n(.*?)```", text, re.MULTILINE | re.DOTALL)
    if block is not None:
        recipe = yaml.safe_dump(_without_paths(yaml.safe_load(block[1])), sort_keys=False, allow_unicode=True)
        text = text[: block.start(1)] + recipe + text[block.end(1) :]
    return re.sub(r"`([^`\n]+)`", lambda quoted: f"`{last_part(quoted[1])}`", text)


def _without_paths(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _without_paths(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_without_paths(value) for value in node]
    return last_part(node) if isinstance(node, str) else node


def last_part(value: str) -> str:
    """The last part of a path: «photos» for /home/me/photos, ~/photos/, C:\\photos and data:/home/me/photos.

    Other strings are returned unchanged.
    """
    path = re.fullmatch(r"(?:[A-Za-z]\w*:)?(?:[/~\\]|[A-Za-z]:[\\/]).*", value)
    if path is None or "://" in value:
        return value
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1]


@torch.no_grad()
def measure_on(
    vae: ConvolutionalVAE, data: str, count: int, resolution: int, color: Color = "srgb"
) -> ValidationResult:
    """Reconstruct images from the posterior's mode, in fp32.

    Args:
        vae: the VAE, which is not changed.
        data: a source for `open_source`.
        count: number of images, at most.
        resolution: side of the centre crops in pixels.
        color: as in `ReadOptions`.

    Raises:
        InputError: when no image can be read, or for a count or resolution that is too small.
    """
    if count < 1 or resolution < SMALLEST_SIDE:
        raise InputError(
            f"got count={count}, resolution={resolution}; need at least 1 image, and {SMALLEST_SIDE} pixels for SSIM"
        )
    source = open_source(data)
    images = EvaluationImages(source, resolution, ReadOptions(channels=vae.config.in_channels, min_side=1, color=color))
    loader = evaluation_loader(images, range(min(count, len(source))), batch_size=1, num_workers=0)
    accelerator = Accelerator(cpu=accelerator_type() is None)
    copied = copy.deepcopy(vae)
    nn.Module.to(copied, accelerator.device, torch.float32)  # diffusers' own method logs a warning about the dtype
    return validate(copied, loader, accelerator, None, BadImages(), keep=GRID_IMAGES, full_precision=True)


def _open(
    vae: ConvolutionalVAE | str | Path, subfolder: str | None
) -> tuple[ConvolutionalVAE, Path | None, str | None]:
    """The model, its folder if it was read from one, and its id if it was read from the hub."""
    if isinstance(vae, ConvolutionalVAE):
        return vae, None, None
    path = Path(vae).expanduser()
    run = RunFolder(path)
    if run.config.is_file() and run.model.is_dir():
        path = run.model
    model = load_kl(path, subfolder=subfolder, dtype="file")  # uploaded as it is
    folder = path / (subfolder or "")
    return model, folder if (folder / "config.json").is_file() else None, base_model(str(vae))


def _write(
    vae: ConvolutionalVAE,
    card: ModelCard,
    source: Path | None,
    measured: ValidationResult | None,
    preview: Preview | None,
    folder: Path,
) -> None:
    """Write all files into the new folder `folder`. Pictures that the card shows are copied from `source`."""
    save_vae(vae, folder)
    if ldm_programs(vae):
        save_ldm(vae, folder / LDM_NAME)
    for picture in [] if source is None else sorted(source.iterdir()):
        if picture.suffix in PICTURES and f"]({picture.name})" in card.text:
            shutil.copy2(picture, folder)
    if measured is not None:
        grid_of(measured).save(folder / GRID_NAME)
    if preview is not None:
        preview.write_beside(folder)
    elif source is not None and (source / RGB_FACTORS).is_file():
        shutil.copy2(source / RGB_FACTORS, folder)
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def _upload(
    folder: Path, repo_id: str, private: bool | None, revision: str | None, message: str, token: str | None
) -> str:
    with _refusals(repo_id):
        api = HfApi(token=token, library_name="sdvae", library_version=version())
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision
        ).commit_url


@contextmanager
def _refusals(repo_id: str) -> Iterator[None]:
    """Turn refusals by the hub into InputError, and failures of hub or network into ConnectionError, one line each."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = _short(error.server_message or error)
        refusals = {
            401: f"got a token that the hub does not know (401); {WANT_TOKEN}",
            403: f"got a token that may not write to {repo_id.split('/')[0]}'s {repo_id} (403: {said}); {WANT_TOKEN}",
            404: f"the hub has no {repo_id} that this token may see (404: {said}); check the name",
        }
        if status < 500 and status != 429:
            other = f"the hub refuses {repo_id} ({status}: {said}); correct that"
            raise InputError(refusals.get(status, other)) from error
        raise ConnectionError(f"the hub failed ({status}: {said}); try again later") from error
    except ValueError as error:  # raised when the card's head or the repository's name is not valid
        raise InputError(f"the hub refuses this card or name: {_short(error)}") from error
    except (HTTPError, OSError, RuntimeError) as error:  # RuntimeError: from hf_xet, which uploads large files
        raise ConnectionError(
            f"the hub cannot be reached, or the upload broke off ({type(error).__name__}: {_short(error)}); "
            "check the network, then try again"
        ) from error


def _short(error: object) -> str:
    return one_line(error)[:300]
