"""Every code sample of docs/vae.md runs, in its order, and every file that the page names is there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from sdvae.evaluation import likelihood
from sdvae.training import objective

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "vae.md").read_text(encoding="utf-8")


def test_every_sample_runs_and_its_claims_hold():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == PAGE.count("```python") >= 9
    names: dict = {}
    torch.manual_seed(0)
    for block in blocks:
        exec(block, names)
    assert names["pictures"].shape == names["anything"].shape == (5, 1, 28, 28)


def test_every_file_and_function_that_the_page_names_exists():
    for path in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / path).is_file(), path
    for path in re.findall(r"(?:configs|scripts)/[\w.]+\.(?:yaml|py)", PAGE):
        assert (ROOT / path).is_file(), path
    for name in ("elbo", "bernoulli_nll", "log_likelihood", "pictures"):
        assert f"`{name}`" in PAGE
        assert callable(getattr(likelihood, name))
    for name in ("loss_terms", "kl_weight_at", "free_bits_kl", "posterior_generators"):
        assert f"`{name}`" in PAGE
        assert callable(getattr(objective, name))
