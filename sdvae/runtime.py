"""The device and the precision of this process, and whether it keeps the memory that it frees."""

from __future__ import annotations

import ctypes
import logging
import os
import platform

import torch
from accelerate.utils import parse_flag_from_env

from sdvae.errors import InputError

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as the command line names them

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
KEEP = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1}
# glibc's defaults, with the thresholds that its own adjustment reaches when blocks of 32 MiB are freed
RETURN = {M_MMAP_MAX: 65536, M_MMAP_THRESHOLD: 32 * 2**20, M_TRIM_THRESHOLD: 64 * 2**20}


def dtype_named(word: str) -> torch.dtype | None:
    """The dtype for «fp16», «float16» or «torch.float16», and so for each of `DTYPES`; None for another word."""
    names = {str(dtype): dtype for dtype in DTYPES.values()}
    return DTYPES.get(word) or names.get(word) or names.get(f"torch.{word}")


def accelerator_type() -> str | None:
    """The kind of accelerator: «cuda», «mps», … None if there is none, or if ACCELERATE_USE_CPU is set."""
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    assert device is not None  # torch.accelerator.is_available() was true
    return device.type


def resolve_precision(requested: str, device_type: str) -> str:
    """Choose accelerate's `mixed_precision`. Weights, optimizer and EMA stay in fp32 in every case.

    Args:
        requested: "auto" (bf16 if the hardware computes in it, else fp32), "no" (fp32), "bf16" or "fp16".
        device_type: such as "cpu" or "cuda".

    Returns:
        "no", "bf16" or "fp16".

    Raises:
        InputError: for fp16 on a CPU.
    """
    native = _computes_in_bf16(device_type)
    if requested == "auto":
        return "bf16" if native else "no"
    if requested == "fp16" and device_type == "cpu":
        raise InputError("got mixed_precision=fp16 on a CPU; need a GPU for fp16; set mixed_precision=auto")
    if requested == "bf16" and not native:
        # measured: a training step took ten times as long as in fp32 on a CPU without AVX512-bf16
        logger.warning("this %s does not compute in bf16 natively: expect it to be slower than fp32", device_type)
    return requested


def _computes_in_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type == "cpu" and hasattr(torch.cpu, "get_capabilities"):
        features = torch.cpu.get_capabilities()
        return bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return False


def keep_freed_memory(keep: bool = True) -> None:
    """Let this process keep the memory that it frees, as torch does on a GPU. This saves time on a CPU.

    The process then holds as much memory as its largest computation took, or somewhat more if sizes vary. Results do
    not change. This works with glibc, which most Linux systems have. It has no effect on other systems, or if one of
    glibc's own environment variables for this is set (MALLOC_TRIM_THRESHOLD_, …).

    Args:
        keep: False undoes it, and returns the memory that is free now to the system.
    """
    libc = _glibc()
    if libc is None or any(name in os.environ for name in VARIABLES):
        return
    for parameter, value in (KEEP if keep else RETURN).items():
        libc.mallopt(parameter, value)
    if not keep:
        give_back()


def give_back() -> None:
    """Return all free memory to the system, including gaps between blocks in use, which glibc normally keeps."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
