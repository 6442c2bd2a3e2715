"""Which kind of device this process computes on."""

from __future__ import annotations

import torch
from accelerate.utils import parse_flag_from_env


def accelerator_type() -> str | None:
    """«cuda», «mps», …; None for the CPU: where there is nothing else, or accelerate is told so."""
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    assert device is not None  # torch.accelerator.is_available() was true
    return device.type
