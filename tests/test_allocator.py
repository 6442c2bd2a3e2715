"""Freed memory stays in a process that computes, and goes back where it should."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset

from sdvae import keep_freed_memory, speed_up
from sdvae.data import training_loader
from sdvae.training.build import lay_out
from sdvae.training.config import TrainConfig
from tests.conftest import tiny_vae

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator's memory")

BLOCK = 256 * 2**20  # bytes; glibc maps such a block on its own


@pytest.fixture(autouse=True)
def given_back() -> Iterator[None]:
    keep_freed_memory(False)
    yield
    keep_freed_memory(False)


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


def train_on_a_cpu() -> None:
    lay_out(tiny_vae(), TrainConfig(fast_convolutions=False), Accelerator(cpu=True))


@pytest.mark.parametrize("switch", [keep_freed_memory, lambda: speed_up(tiny_vae()), train_on_a_cpu])
def test_freed_memory_is_kept_and_given_back_on_request(switch: Callable[[], None]):
    assert left_by_a_block() < 0.1
    switch()
    assert left_by_a_block() > 0.9
    held = resident()
    keep_freed_memory(False)
    assert held - resident() > 0.9 * BLOCK
    assert left_by_a_block() < 0.1


def test_the_environment_decides(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "134217728")
    keep_freed_memory()
    assert left_by_a_block() < 0.1


def test_another_libc_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    keep_freed_memory()
    keep_freed_memory(False)
    monkeypatch.undo()
    assert left_by_a_block() < 0.1


class Blocks(Dataset[float]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> float:
        return left_by_a_block()


def test_workers_of_a_trainer_give_their_memory_back():
    keep_freed_memory()
    start_worker = training_loader(Blocks(), [[0]], num_workers=1).worker_init_fn
    (left,) = DataLoader(Blocks(), batch_size=None, num_workers=1, worker_init_fn=start_worker)
    assert left < 0.1
    assert left_by_a_block() > 0.9, "and their trainer does not"
