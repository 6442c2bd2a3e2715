"""`sdvae train`."""

from __future__ import annotations

from collections.abc import Sequence

from sdvae.cli.parsing import parse_train_config
from sdvae.cli.registry import command


@command("train a VAE from a recipe: --config FILE [--dotted.key=value …]")
def train(argv: Sequence[str]) -> None:
    config = parse_train_config(argv)
    from sdvae.training.loop import train as run  # here, so that a misspelt key needs no torch

    run(config)
