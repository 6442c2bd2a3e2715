"""What a statement imports, asked of a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {"gradio", "lpips", "matplotlib", "pandas", "skimage", "tensorboard", "torch_fidelity", "torchmetrics"}
OF_OURS = {"cli", "cpu", "evaluation", "metrics", "pictures", "studio", "training", "tutorial"}


def assert_light(statement: str) -> None:
    """`statement` imports neither the libraries of training and reports nor the parts of this package that use them."""
    found = subprocess.run(
        [sys.executable, "-c", f"{statement}\nimport sys; print(*sys.modules)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    assert "sdvae" in found
    assert not HEAVY.intersection(found)
    assert not {f"sdvae.{name}" for name in OF_OURS}.intersection(found)
