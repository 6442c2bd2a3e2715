"""How much memory a computation takes: of the device, or of this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from sdvae.runtime import give_back

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # of Linux


Result = TypeVar("Result")


def with_peak_memory(compute: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """The result, and the bytes that computing it takes at its peak above what was held before; the result included.

    On a CPU it is the resident set's, after what the allocator had kept was given back. None: on a system that does
    not tell.
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
    CLEAR.write_text("5")  # forgets the peak: proc(5)
    result = compute()
    return result, _resident("VmHWM") - before


def _resident(key: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024
