"""Differences between the supported PyTorch releases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

# Returns True if the processor multiplies tiles of bfloat16 (AMX); PyTorch 2.4 and later.
has_tiles: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def has_bfloat16_instructions() -> bool:
    """Return True if an x86 processor multiplies bfloat16: asks PyTorch (2.5 on), then Linux."""
    if getattr(torch.cpu, "_is_avx512_bf16_supported", has_tiles)() or has_tiles():
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def cuda_has_bfloat16(device: torch.device) -> bool:
    """Return True if a GPU multiplies bfloat16 itself, instead of converting it."""
    with torch.cuda.device(device):
        try:
            return torch.cuda.is_bf16_supported(including_emulation=False)
        except TypeError:  # before 2.4, which knew no emulation
            return torch.cuda.is_bf16_supported()


def autocast_on_cpu() -> bool:
    """Return True if operations on a CPU choose their own precision."""
    if hasattr(torch, "get_autocast_dtype"):  # from 2.4 on
        return torch.is_autocast_enabled("cpu")
    return torch.is_autocast_cpu_enabled()
