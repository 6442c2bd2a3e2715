"""Which dtype the forward pass is computed in."""

from __future__ import annotations

import logging

import torch

from sdvae.errors import InputError

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # as the command line names them


def resolve_precision(requested: str, device_type: str) -> str:
    """ "auto", "no", "bf16" or "fp16" -> what accelerate's `mixed_precision` gets for this device.

    Weights, optimizer and EMA stay in fp32 in every case.

    Raises: InputError for fp16 on a CPU.
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
