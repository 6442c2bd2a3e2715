"""What README.md, CONTRIBUTING.md and docs/ show: links lead somewhere, Python samples run, command lines parse."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import jsonargparse
import numpy as np
import pytest
import torch
from PIL import Image

import sdvae
from sdvae import LatentDataset, save_vae
from sdvae.cli import main, parse_train_config
from sdvae.training.build import build_vae

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGE_NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
OTHER_PROGRAMS = ("git", "grep", "cmp", "pre-commit", ".venv/bin/python")  # not looked at


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text_of(page), re.DOTALL)


def commands(page: str) -> list[str]:
    whole = [re.sub(r"\\\n\s*", "", block) for block in blocks(page, "bash")]  # lines that a backslash continues
    return [line for block in whole for line in block.splitlines() if line.strip()]


def anchors(markdown: str) -> set[str]:
    """Of the headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", markdown, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_every_relative_link_leads_to_a_file_and_a_heading_in_it(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", PAGE_NAMES)
def test_every_file_and_module_that_a_page_names_exists(page):
    for path in re.findall(r"`((?:sdvae|configs|scripts|tests|docs)/[^`\s]*)`", text_of(page)):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"(?:configs|scripts)/\w+\.(?:yaml|py)", text_of(page)):
        assert (ROOT / path).is_file(), path
    for module in re.findall(r"^::: (\S+)$", text_of(page), re.MULTILINE):
        file = ROOT / Path(*module.split("."))
        name = ""
        if not (file.with_suffix(".py").is_file() or file.is_dir()):
            file, name = file.parent, file.name
        source = file.with_suffix(".py").read_text(encoding="utf-8")
        assert re.search(rf"^(?:class|def) {name}", source, re.MULTILINE), module


def test_every_page_is_reached_from_the_readme_and_is_in_the_site():
    linked, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        linked.add(page)
        for link in re.findall(r"\]\(([^)\s#]+\.md)", text_of(page)):
            target = ((ROOT / page).parent / link).resolve().relative_to(ROOT).as_posix()
            if target not in linked:
                waiting.append(target)
    documented = {name for name in PAGE_NAMES if name.startswith("docs/")}
    assert documented - linked <= {"docs/index.md", *(n for n in documented if n.startswith("docs/reference/"))}
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {f"docs/{name}" for name in re.findall(r"([\w/]+\.md)$", site, re.MULTILINE)} == documented


def test_the_reference_lists_every_public_name():
    page = text_of("docs/reference/index.md")
    assert [name for name in sdvae.__all__ if f"`{name}`" not in page] == []


# Python samples


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder in which the pages' samples find what they name: runs/quickstart, images, latents, configs."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "configs").symlink_to(ROOT / "configs")
    torch.manual_seed(0)
    vae = build_vae(parse_train_config(["--config", str(ROOT / "configs" / "quickstart.yaml")]).model)
    save_vae(vae, desk / "runs" / "quickstart" / "model")
    images = desk / "path" / "to" / "images"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(10):
        coarse = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((160, 144), Image.Resampling.BICUBIC).save(images / f"{i:02}.png")
    shutil.copy(images / "00.png", desk / "photo.jpg")  # a file is named by its content
    (desk / "reflect.json").write_text('{"padding_mode": "reflect"}')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        encode = next(line for line in commands("docs/latents.md") if line.startswith("sdvae encode"))
        assert main(words_of(encode)[1:]) == 0
    return desk


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in PAGE_NAMES if blocks(name, "python")])
def test_a_pages_python_runs_and_its_claims_hold(page, desk, monkeypatch):
    monkeypatch.chdir(desk)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", desk / "cache")
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(block, names)
    claims = {
        "README.md": readme,
        "docs/inference.md": inference,
        "docs/latents.md": latents,
        "docs/scale.md": scale,
        "docs/speed.md": speed,
        "docs/vae.md": tutorial,
    }
    if page in claims:
        claims[page](names)


def readme(names: dict[str, Any]) -> None:
    assert names["reconstruction"].shape == names["images"].shape == (1, 3, 65, 71)
    assert names["z"].shape == (8, 4, 32, 32)


def inference(names: dict[str, Any]) -> None:
    assert names["reconstruction"].shape == names["x"].shape == (1, 3, 65, 71)
    assert names["image"].shape == (1, 3, 72, 72), "65 x 71 pixels, padded"
    assert names["result"].latents.shape == (1, 4, 9, 9)
    assert names["result"].reconstruction.shape == (1, 3, 65, 71)
    assert Path("runs/quickstart/vae.safetensors").is_file()


def latents(names: dict[str, Any]) -> None:
    assert names["z"].shape == (8, 4, 32, 32)
    assert names["images"].shape == (8, 3, 256, 256)
    unscaled = LatentDataset("latents", sample=False, mirror=0, scaling="none")
    assert np.array_equal(names["mean"], unscaled[0]["latents"])
    torch.testing.assert_close(names["scaled"], names["by_hand"])
    assert names["decoded"].shape == (1, 3, 64, 64)


def scale(names: dict[str, Any]) -> None:
    assert names["batch"]["mean"].shape == names["batch"]["logvar"].shape == (2, 4, 32, 32)
    assert names["batch"]["mean"].dtype == np.float16
    assert names["batch"]["caption"] == ["a", "b"]


def speed(names: dict[str, Any]) -> None:
    assert names["forms"].layout in ("contiguous", "channels_last")


def tutorial(names: dict[str, Any]) -> None:
    assert names["pictures"].shape == names["anything"].shape == (5, 1, 28, 28)


def test_the_pages_that_hold_python_are_all_run():
    assert {name for name in PAGE_NAMES if "```python" in text_of(name)} == {
        "README.md",
        "docs/inference.md",
        "docs/latents.md",
        "docs/scale.md",
        "docs/speed.md",
        "docs/training.md",
        "docs/vae.md",
    }
    assert text_of("docs/vae.md").count("```python") >= 9


def test_every_function_that_the_tutorial_names_exists():
    from sdvae import noise
    from sdvae.training import objective
    from sdvae.tutorial import likelihood

    homes = {
        likelihood: ("elbo", "bernoulli_nll", "log_likelihood"),
        noise: ("posterior_generators",),
        objective: ("loss_terms", "kl_weight_at", "free_bits_kl"),
    }
    for home, functions in homes.items():
        for name in functions:
            assert f"`{name}`" in text_of("docs/vae.md")
            assert callable(getattr(home, name))


# Command lines


class Parsed(BaseException):
    """A program's parser has taken its arguments, and left these. No Exception, so that no program catches it."""

    def __init__(self, left: list[str]):
        self.left = left


@contextmanager
def stopping_after_parsing() -> Iterator[None]:
    """`sdvae` commands and scripts raise `Parsed` as soon as their arguments are parsed."""
    take_all, take_known = jsonargparse.ArgumentParser.parse_args, argparse.ArgumentParser.parse_known_args

    def of_command(self, *given: Any, **options: Any) -> None:
        take_all(self, *given, **options)
        raise Parsed([])

    def of_script(self, *given: Any, **options: Any) -> Any:
        known, left = take_known(self, *given, **options)
        if isinstance(self, jsonargparse.ArgumentParser):  # which calls this within its parse_args
            return known, left
        raise Parsed(left)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonargparse.ArgumentParser, "parse_args", of_command)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", of_script)
        yield


def words_of(line: str) -> list[str]:
    """The words of a command, without its comment and without NAME=VALUE before it."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    return words


def check(line: str) -> None:
    """Raise where the program that the line names would refuse its arguments."""
    program, *arguments = words_of(line)
    if program in ("accelerate", "torchrun"):
        place = next(i for i, word in enumerate(arguments) if word in ("sdvae", "train_sdvae.py"))
        check_sdvae(arguments[place + 1 :] if arguments[place] == "sdvae" else ["train", *arguments[place + 1 :]])
    elif program == "sdvae":
        check_sdvae(arguments)
    elif program == "python":
        check_script(*arguments)
    elif program == "sbatch":
        wrapped = arguments[arguments.index("--wrap") + 1]
        check(wrapped.replace("$SLURM_ARRAY_TASK_ID", "0").replace("$SLURM_ARRAY_TASK_COUNT", "64"))
    elif program == "make":
        assert re.search(rf"^{arguments[0]}:", text_of("Makefile"), re.MULTILINE)
    elif program == "pip":
        assert arguments[0] == "install"
        for extra in re.findall(r"[\w]+", "".join(re.findall(r"\[(.*)\]", arguments[1]))):
            assert re.search(rf"^{extra} = \[", text_of("pyproject.toml"), re.MULTILINE), extra
    else:
        assert program in OTHER_PROGRAMS, program


def check_sdvae(arguments: list[str]) -> None:
    if arguments[0] == "train":  # parsed whole: its recipe must also make sense
        parse_train_config([argument for argument in arguments[1:] if argument != "--print_config"])
        return
    with stopping_after_parsing(), pytest.raises(Parsed):
        assert main(arguments) == 0, "refused; the reason is on standard error"


def check_script(path: str, *arguments: str) -> None:
    with stopping_after_parsing(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *arguments])
        patch.syspath_prepend(ROOT / "scripts")  # as for every program, its folder comes first
        with pytest.raises(Parsed) as parsed:
            runpy.run_path(str(ROOT / path), run_name="__main__")
    if parsed.value.left:  # overrides of a recipe
        parse_train_config(parsed.value.left)


@pytest.mark.parametrize("page", [name for name in PAGE_NAMES if blocks(name, "bash")])
def test_every_command_line_of_a_page_is_accepted_by_its_program(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for line in commands(page):
        check(line)


@pytest.mark.parametrize(
    "line",
    [
        "sdvae evaluate --dataset x",
        "sdvae encode --output x --source y --buckets sd",
        "sdvae reconstruct photo.jpg --vea x",
        "accelerate launch train_sdvae.py --config configs/quickstart.yaml --loss.kl_wieght 1",
        "python scripts/mnist.py --parts tabel",
        "python scripts/streaming.py --seizes 512",
        "make tets",
        "sbatch --wrap 'sdvae encode --source x --output y --prat 0/2'",
        "unknown --option",
    ],
)
def test_a_wrong_command_line_would_be_found(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ValueError, SystemExit, pytest.fail.Exception)):
        check(line)


def test_these_command_lines_of_the_pages_do_what_they_say(desk, monkeypatch, capsys):
    monkeypatch.chdir(desk)
    done = {
        "sdvae reconstruct photo.jpg": "reconstructions/photo.png",
        "sdvae export runs/quickstart/model vae.safetensors": "vae.safetensors",
        "sdvae export vae.safetensors folder": "folder/config.json",
        "sdvae export runs/quickstart/model rescaled": "rescaled/config.json",
        "sdvae convert latents for_webdataset": "for_webdataset/train-00000-of-00001.tar",
        "sdvae convert latents for_kohya": "for_kohya",
        "sdvae convert latents tensors": "tensors/stats.json",
    }
    lines = [line for page in ("README.md", "docs/inference.md", "docs/latents.md") for line in commands(page)]
    for beginning, written in done.items():
        line = next(line for line in lines if line.startswith(beginning))
        assert main(words_of(line)[1:]) == 0, capsys.readouterr().err
        assert (desk / written).exists(), line
    verify = next(line for line in lines if line.endswith("--verify true"))
    assert main(words_of(verify)[1:]) == 0
    bare = next(line for line in lines if line.startswith("sdvae encode") and "accelerate" not in line)
    assert main(words_of(bare)[1:]) == 0, "the same command again finds its work done"
