"""The public names, and what importing them loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sdvae

HEAVY = {"gradio", "lpips", "matplotlib", "pandas", "skimage", "tensorboard", "torch_fidelity", "torchmetrics"}
OF_OURS = {"cli", "evaluation", "metrics", "pictures", "studio", "training", "tutorial"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement", ["from sdvae import LatentDataset", "from sdvae import AutoencoderKL, load_vae; load_vae()"]
)
def test_reading_vaes_and_latents_imports_nothing_that_only_training_and_reports_need(statement):
    modules = imported_by(statement)
    assert "torch" in modules
    assert not HEAVY & modules
    assert not {f"sdvae.{name}" for name in OF_OURS} & modules


def test_importing_the_package_alone_imports_no_library():
    assert not {"torch", "numpy", "diffusers", "sdvae.errors"} & imported_by("import sdvae")


def imported_by(statement: str) -> set[str]:
    """All modules of a fresh interpreter after a statement."""
    command = [sys.executable, "-c", f"{statement}\nimport sys; print(*sys.modules)"]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())


def test_every_public_name_is_there_and_type_checkers_see_the_same_ones():
    for name in sdvae.__all__:
        assert getattr(sdvae, name).__name__ == name
    imports = ast.walk(ast.parse(Path(sdvae.__file__).read_text()))
    typed = {
        alias.name: node.module
        for node in imports
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("sdvae.")
        for alias in node.names
    }
    assert typed == sdvae._MODULE_OF
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sdvae.nothing
