"""Freed memory stays in a process that computes, and goes back where it should.

Each test has a process of its own: where blocks lie depends on all that was allocated before.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from sdvae import keep_freed_memory, speed_up
from sdvae.training.build import lay_out
from sdvae.training.config import TrainConfig
from tests.conftest import tiny_vae
from tests.processes import launch

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator's memory")

BLOCK = 256 * 2**20  # bytes; glibc maps such a block on its own


@pytest.fixture
def holds(tmp_path) -> Callable[..., None]:
    def run(check: Callable[[list[str]], None], *arguments: str) -> None:
        finished = launch(check, arguments, tmp_path)
        assert finished.codes == [0], finished.stderr[-3000:]

    return run


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def left_by_a_block() -> float:
    """How much of a block is still resident when it is freed."""
    before = resident()
    block = torch.ones(BLOCK, dtype=torch.uint8)
    assert resident() - before > 0.9 * BLOCK
    del block
    return (resident() - before) / BLOCK


SWITCHES = {
    "keep_freed_memory": keep_freed_memory,
    "speed_up": lambda: speed_up(tiny_vae()),
    "training on a CPU": lambda: lay_out(tiny_vae(), TrainConfig(fast_convolutions=False), Accelerator(cpu=True)),
}


def kept_and_given_back(arguments: list[str]) -> None:
    assert left_by_a_block() < 0.1
    SWITCHES[arguments[0]]()
    assert left_by_a_block() > 0.9
    held = resident()
    keep_freed_memory(False)
    assert held - resident() > 0.9 * BLOCK
    assert left_by_a_block() < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("switch", SWITCHES)
def test_freed_memory_is_kept_and_given_back_on_request(switch, holds):
    holds(kept_and_given_back, switch)


def the_environment_decides(arguments: list[str]) -> None:
    os.environ["MALLOC_TRIM_THRESHOLD_"] = "134217728"
    keep_freed_memory()
    assert left_by_a_block() < 0.1


def test_the_environment_decides(holds):
    holds(the_environment_decides)


def another_libc(arguments: list[str]) -> None:
    platform.libc_ver = lambda: ("", "")
    keep_freed_memory()
    keep_freed_memory(False)
    assert left_by_a_block() < 0.1


def test_another_libc_is_left_alone(holds):
    holds(another_libc)
