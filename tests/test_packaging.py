"""The package as others get it: who imports whom, what a wheel holds, what an installation needs."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from sdvae.cli import main
from sdvae.weights.load import PACKAGED_VAE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def imported_distributions(files: list[Path]) -> dict[str, set[str]]:
    """The distributions that files import, each with the files that import it."""
    found: dict[str, set[str]] = {}
    distributions = packages_distributions()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for module in (
                {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"sdvae", "_typeshed"}
            ):
                distribution = distributions.get(module, [module])[0].lower().replace("_", "-")
                found.setdefault(distribution, set()).add(str(file.relative_to(ROOT)))
    return found


def test_no_module_imports_from_a_layer_above_it():
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    assert "3 kept, 0 broken" in checked.stdout


def test_the_core_imports_what_an_installation_without_extras_brings_and_nothing_else():
    core = [file for file in (ROOT / "sdvae").rglob("*.py") if "studio" not in file.parts]
    imported = imported_distributions(core)
    # imported by the one option that needs it, or where torch brought it
    lazily = {"bitsandbytes", "onnxruntime", "ray", "torch-fidelity", "transformers", "triton"}
    assert imported.keys() - lazily == requirement_names(PROJECT["dependencies"]), imported


def test_the_studio_imports_what_its_extra_brings():
    imported = imported_distributions(list((ROOT / "sdvae" / "studio").rglob("*.py")))
    extra = requirement_names(PROJECT["optional-dependencies"]["studio"])
    assert extra <= imported.keys() <= extra | requirement_names(PROJECT["dependencies"]), imported


@pytest.mark.parametrize(
    ("module", "extra", "arguments"),
    [
        ("gradio", "studio", ["demo"]),
        ("jinja2", "studio", ["report", "--output={folder}/report.html"]),
        ("torch_fidelity", "fid", ["evaluate", "--fid=true", "--lpips=none", "--count=1", "--output={folder}/table"]),
        ("onnxscript", "onnx", ["export", str(PACKAGED_VAE), "{folder}/onnx", "--onnx=true"]),
        ("skimage", "quickstart", ["evaluate", "--lpips=none", "--output={folder}/table"]),
    ],
)
def test_a_command_whose_extra_is_missing_says_how_to_install_it(
    monkeypatch, capsys, tmp_path, module, extra, arguments
):
    import sdvae.metrics.fid  # noqa: F401 - torchmetrics decides at its import what is installed

    monkeypatch.setitem(sys.modules, module, None)
    assert main([argument.format(folder=tmp_path) for argument in arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("sdvae: error: ")
    assert line.endswith(f'pip install "sdvae[{extra}]"')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    """Beside the modules: the packaged VAE, the report's templates and the marker of typed packages."""
    package = tmp_path / "source" / "sdvae"
    shutil.copytree(ROOT / "sdvae", package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, package.parent)
    files = {path.relative_to(package.parent).as_posix() for path in package.rglob("*") if path.is_file()}
    build = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, package.parent]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True)
    (wheel,) = tmp_path.glob("sdvae-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.startswith("sdvae/")} == files
