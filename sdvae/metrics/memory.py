"""How much memory a computation takes, on the device or in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from sdvae.runtime import give_back

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux only

Result = TypeVar("Result")


def with_peak_memory(compute: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """Run a computation and measure its memory.

    On a CPU this is the resident memory of the process. Before the computation, the process returns its free memory to
    the system.

    Args:
        compute: the computation, which runs on `device`.
        device: the device whose memory is measured.

    Returns:
        The result of the computation, and by how many bytes the peak during it exceeds the memory that was held
        before. The result's own memory is included. The number is None if the system does not report it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = compute()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not os.access(CLEAR, os.W_OK):
        return compute(), None
    give_back()
    before = _resident("VmRSS")
    CLEAR.write_text("5")  # resets the peak, VmHWM: proc(5)
    result = compute()
    return result, _resident("VmHWM") - before


def _resident(key: str) -> int:
    """The value of a line in /proc/self/status, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
