"""Faults that strike a training run in a given step; in a process's own tests, or as a script under torchrun:

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
    """Stands for whatever ends a process without a message."""


@contextmanager
def fault(kind: str, step: int, rank: int = 0, until: int | None = None) -> Iterator[None]:
    """A context in which a training run meets a fault.

    Args:
        kind: a signal, a crash, images of NaN, or "none".
        step: in which it happens, counted from 0.
        rank: of the process that it happens to.
        until: the last step in which it happens; the same as `step` when not given.
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
    """In place of `save.draw`: pictures have their own tests, and take most of a tiny run's time."""
    return Image.new("RGB", (8, 8))


def run_with_fault(argv: list[str]) -> None:
    """KIND STEP RANK [sdvae train arguments …], in a process of its own."""
    save.draw = blank
    with fault(argv[0], int(argv[1]), int(argv[2])):
        sys.exit(main(["train", *argv[3:]]))


if __name__ == "__main__":
    run_with_fault(sys.argv[1:])
