"""Faults in a given step of a training run. Tests use `fault` in their own process, or this script under torchrun:

python tests/faults.py KIND STEP RANK [sdvae train arguments …]
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from sdvae.cli import main
from sdvae.training import save
from sdvae.training.step import TrainStep

SIGNALS = {"sigterm": signal.SIGTERM, "sigint": signal.SIGINT, "sigkill": signal.SIGKILL}


class Crash(Exception):
    """An exception that the program does not expect, so that it ends the process like a bug."""


@contextmanager
def fault(kind: str, step: int, rank: int = 0, until: int | None = None) -> Iterator[None]:
    """A context in which a fault happens in a training run.

    Args:
        kind: a key of SIGNALS, "crash", "nan" (images of NaN) or "none".
        step: the first step in which the fault happens, counted from 0.
        rank: the rank of the process in which it happens.
        until: the last step in which it happens; by default `step`.
    """
    real = TrainStep.__call__
    mine = int(os.environ.get("RANK", "0")) == rank

    def faulty(self, at, batches, *args, **kwargs):
        if mine and step <= at <= (step if until is None else until):
            if kind in SIGNALS:
                os.kill(os.getpid(), SIGNALS[kind])
            elif kind == "crash":
                raise Crash
            elif kind == "nan":
                batches = spoilt(batches)
        return real(self, at, batches, *args, **kwargs)

    TrainStep.__call__ = faulty
    try:
        yield
    finally:
        TrainStep.__call__ = real


def spoilt(batches):
    for batch in batches:
        yield {**batch, "image": batch["image"] * float("nan")}


def blank(*_) -> Image.Image:
    """Replaces `save.draw`, which takes most of a tiny run's time and has its own tests."""
    return Image.new("RGB", (8, 8))


def run_with_fault(argv: list[str]) -> None:
    """Run `sdvae train` with a fault in this process. The arguments are KIND STEP RANK [sdvae train arguments …]."""
    save.draw = blank
    with fault(argv[0], int(argv[1]), int(argv[2])):
        sys.exit(main(["train", *argv[3:]]))


if __name__ == "__main__":
    run_with_fault(sys.argv[1:])
