"""A VAE to the Hugging Face hub: weights for each program that can load them, figures, and a model card."""

from __future__ import annotations

import copy
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from torch import nn

import sdvae
from sdvae.data import BadImages, EvaluationImages, evaluation_loader, open_source
from sdvae.errors import InputError, one_line
from sdvae.io import HUB_ID, replacing
from sdvae.model import AutoencoderKL
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
    section,
    title,
)
from sdvae.training.run_folder import RunFolder
from sdvae.training.save import grid_of
from sdvae.training.validation import ValidationResult, validate
from sdvae.weights import load_vae, save_ldm, save_vae

GRID_IMAGES = 4  # rows of the grid
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
TAGS = ["vae", "autoencoder-kl", "sdvae"]
WANT_TOKEN = "need one that may write; make it at https://huggingface.co/settings/tokens, then run `hf auth login`"


def push_to_hub(
    vae: AutoencoderKL | str | Path,
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
    token: str | None = None,
    dry_run: str | Path | None = None,
) -> str:
    """Upload a VAE in one commit: a diffusers folder, LDM_NAME where a program loads that, a card and its grid.

    The card is that of the VAE's folder, if it has one, with figures and ways to load it brought up to date, and
    absolute paths in its recipe cut to their last part; else it is new. What else is in the repository stays.

    Args:
        vae: the model, whatever `load_vae` reads, or a run folder of the trainer (its model/, or its best_model/ if
            that is named).
        repo_id: «owner/name»; made if there is none.
        subfolder: folder inside `vae` that holds the VAE.
        private: of a new repository; by default what the owner's settings say.
        license: for the card's head, an id that the hub knows, such as "apache-2.0"; by default what the card has.
        revision: branch, made if there is none; by default main.
        message: of the commit.
        data: whatever data.source takes: measure, and draw the grid, on the first `count` images of it, cropped to
            `resolution` pixels a side. By default figures and grid are those of the VAE's folder, if it has some.
        token: of the hub; by default that of `hf auth login`, or HF_TOKEN.
        dry_run: a new or empty folder: write what would be uploaded there, and upload nothing.

    Returns: the address of the commit, or the folder.
    Raises: InputError for a VAE or data that cannot be read, or when the hub refuses; ConnectionError when the hub
        cannot be reached, or fails.
    """
    if not HUB_ID.fullmatch(repo_id):
        raise InputError(f"got repo_id {repo_id!r}; need owner/name; put your name on the hub before it")
    target = None if dry_run is None else Path(dry_run).expanduser()
    if target is not None and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"got dry_run={target}, which is there already; need a new or empty folder; choose another")
    if target is None and (token or get_token()) is None:
        raise InputError(f"got no token of the hub; {WANT_TOKEN}, or set HF_TOKEN")

    model, folder, origin = _open(vae, subfolder)
    measured = None if data is None else measure(model, data, count, resolution)
    figures = None
    if data is not None and measured is not None:
        figures = figures_text(measured, "Means over", data, resolution)
    card = hub_card(model, repo_id, folder, base=origin, license=license, figures=figures)
    with tempfile.TemporaryDirectory() as temporary:
        written = target or Path(temporary) / "vae"
        with replacing(written) as beside:
            _write(model, card, folder, measured, beside)
        if target is not None:
            return str(target)
        return _upload(written, repo_id, private, revision, message or f"Upload {model.__class__.__name__}", token)


def hub_card(
    vae: AutoencoderKL, repo_id: str, folder: Path | None, *, base: str | None, license: str | None, figures: str | None
) -> ModelCard:
    """The model card.

    Args:
        folder: that of the VAE, whose README.md is taken, if it has one.
        base: id on the hub of the VAE that a new card is about.
        license: None keeps what the card has.
        figures: replaces the card's.

    Raises: InputError when the card in the folder has a head that is not YAML.
    """
    readme = None if folder is None else folder / "README.md"
    if readme is not None and readme.is_file():
        try:
            card = ModelCard(readme.read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise InputError(f"{readme} has a head that is not YAML ({one_line(error)[:300]}); mend it") from error
    else:
        name = repo_id.split("/")[1]
        head = card_head(vae, title(name, vae.spatial_compression_ratio, vae.config.latent_channels), base_model=base)
        card = ModelCard(head)
    card.data["library_name"] = "diffusers"
    card.data["tags"] = list(dict.fromkeys([*(card.data.get("tags") or []), *TAGS]))
    if license is not None:
        card.data["license"] = license
    loading = loading_text(repo_id, what="this repository", programs=ldm_programs(vae))
    text = with_section(card.text, LOADING, loading)
    text = text if figures is None else with_section(text, FIGURES, figures)
    card.text = without_local_paths(text)
    return card


def with_section(text: str, heading: str, content: str) -> str:
    """Markdown with a section of the second level replaced, or, where it has none, added at the end."""
    new = section(heading, content)
    pattern = re.compile(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if pattern.search(text):
        return pattern.sub(lambda _: f"{new}\n", text, count=1).rstrip("\n") + "\n"
    return f"{text.rstrip()}\n\n{new}"


def without_local_paths(text: str) -> str:
    """A card in which absolute paths are cut to their last part: in the recipe, and where they stand in back quotes.

    They would tell the world where things lie on one's disk, and nobody else can use them.
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
    """«photos» of /home/me/photos, ~/photos/, C:\\photos or data:/home/me/photos; anything else as it is."""
    path = re.fullmatch(r"(?:[A-Za-z]\w*:)?(?:[/~\\]|[A-Za-z]:[\\/]).*", value)
    if path is None or "://" in value:
        return value
    return re.split(r"[\\/]", value.rstrip("\\/"))[-1]


@torch.no_grad()
def measure(vae: AutoencoderKL, data: str, count: int, resolution: int) -> ValidationResult:
    """Reconstruct images from the posterior's mode, in fp32.

    Args: data, count, resolution: as of `push_to_hub`.

    Raises: InputError when none of the images can be read, or for a resolution that does not fit the VAE.
    """
    ratio = vae.spatial_compression_ratio
    if count < 1 or resolution < 1 or resolution % ratio:
        raise InputError(
            f"got count={count}, resolution={resolution}; need one image or more, and a multiple of {ratio}"
        )
    source = open_source(data)
    images = EvaluationImages(source, resolution, vae.config.in_channels, min_side=1)
    loader = evaluation_loader(images, range(min(count, len(source))), batch_size=1, num_workers=0)
    accelerator = Accelerator(cpu=accelerator_type() is None)
    copied = copy.deepcopy(vae)
    nn.Module.to(copied, accelerator.device, torch.float32)  # diffusers' own wants to speak of the dtype
    return validate(copied, loader, accelerator, None, BadImages(), keep=GRID_IMAGES, full_precision=True)


def _open(vae: AutoencoderKL | str | Path, subfolder: str | None) -> tuple[AutoencoderKL, Path | None, str | None]:
    """The model, its folder if it is one on this machine, and its id if it is one on the hub."""
    if isinstance(vae, AutoencoderKL):
        return vae, None, None
    path = Path(vae).expanduser()
    run = RunFolder(path)
    if run.config.is_file() and run.model.is_dir():
        path = run.model
    model = load_vae(path, subfolder=subfolder, dtype="file")  # uploaded as it is
    folder = path / (subfolder or "")
    return model, folder if (folder / "config.json").is_file() else None, base_model(str(vae))


def _write(
    vae: AutoencoderKL, card: ModelCard, source: Path | None, measured: ValidationResult | None, folder: Path
) -> None:
    """All files, into a folder that is not there yet. Pictures that the card shows come from the VAE's folder."""
    save_vae(vae, folder)
    if ldm_programs(vae):
        save_ldm(vae, folder / LDM_NAME)
    for picture in [] if source is None else sorted(source.iterdir()):
        if picture.suffix in PICTURES and f"]({picture.name})" in card.text:
            shutil.copy2(picture, folder)
    if measured is not None:
        grid_of(measured).save(folder / GRID_NAME)
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def _upload(
    folder: Path, repo_id: str, private: bool | None, revision: str | None, message: str, token: str | None
) -> str:
    with _refusals(repo_id):
        api = HfApi(token=token, library_name="sdvae", library_version=sdvae.__version__)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=message, revision=revision
        ).commit_url


@contextmanager
def _refusals(repo_id: str) -> Iterator[None]:
    """What the hub refuses, as InputError; what fails on the way, as ConnectionError; one line each."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = one_line(error.server_message or error)[:300]
        if status == 401:
            raise InputError(f"got a token that the hub does not know (401); {WANT_TOKEN}") from error
        if status == 403:
            owner = repo_id.split("/")[0]
            raise InputError(
                f"got a token that may not write to {owner}'s {repo_id} (403: {said}); {WANT_TOKEN}"
            ) from error
        if status == 404:
            raise InputError(
                f"the hub has no {repo_id} that this token may see (404: {said}); check the name"
            ) from error
        if status < 500 and status != 429:
            raise InputError(f"the hub refuses {repo_id} ({status}: {said}); change that") from error
        raise ConnectionError(f"the hub failed ({status}: {said}); try again later") from error
    except ValueError as error:  # the hub's check of the card's head, or of the repository's name
        raise InputError(f"the hub refuses this card or name: {one_line(error)[:300]}") from error
    except (HTTPError, OSError, RuntimeError) as error:  # hf_xet, which uploads large files, raises the last
        raise ConnectionError(
            f"the hub cannot be reached, or the upload broke off ({type(error).__name__}: {one_line(error)[:300]}); "
            "check the network, then try again"
        ) from error
