"""Every code sample of docs/vae.md runs, in its order, and every file that the page names is there."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from sdvae import noise
from sdvae.training import objective
from sdvae.tutorial import likelihood

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
    assert "`posterior_generators`" in PAGE
    assert callable(noise.posterior_generators)
    for name in ("loss_terms", "kl_weight_at", "free_bits_kl"):
        assert f"`{name}`" in PAGE
        assert callable(getattr(objective, name))
