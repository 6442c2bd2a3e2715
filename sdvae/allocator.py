"""Memory that is freed: kept in the process for the next tensors, or given back to the system.

glibc takes every block of 32 MiB and more from the system, and gives it back when it is freed; so it does with the
free end of its heap (mallopt(3)). A map of a large image is such a block, and the next layer's is mapped and cleared
anew, page by page: up to a third of the time of a pass, and of a training step.
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")

KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
# glibc's defaults, with the thresholds at which its own adjustment arrives when blocks of 32 MiB are freed
RETURN = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 * 2**20, M_TRIM_THRESHOLD: 64 * 2**20}


def keep_freed_memory(keep: bool = True) -> None:
    """Let this process keep the memory that it frees, as torch does on a GPU; or, with False, no longer.

    It then holds what its largest computation took, and somewhat more where sizes vary. False also gives back what
    is free. Results do not change. For glibc, that is Linux mostly; without effect elsewhere, and where the
    environment has one of glibc's own variables for it (MALLOC_TRIM_THRESHOLD_, …), which decides then.
    """
    libc = _glibc()
    if libc is None or any(name in os.environ for name in VARIABLES):
        return
    for parameter, value in (KEEP if keep else RETURN).items():
        libc.mallopt(parameter, value)
    if not keep:
        give_back()


def give_back() -> None:
    """Return what is free now to the system, the gaps between blocks in use too, which glibc keeps by itself."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
