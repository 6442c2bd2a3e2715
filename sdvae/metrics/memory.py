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

    On a CPU it is the process's resident memory; before the computation, free memory is returned to the system.

    Args:
        compute: runs on `device`.
        device: whose memory counts.

    Returns:
        The result, and the peak during the computation above what was held before, in bytes, including the result;
        None where the system does not report it.
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
    """Bytes, of a line in /proc/self/status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
