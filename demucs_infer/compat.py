"""What differs between the supported PyTorch releases."""

from __future__ import annotations

from collections.abc import Callable

import torch


def _never() -> bool:
    return False


# Whether TorchScript records what is done, as converters have it do.
is_tracing: Callable[[], bool] = torch._C._is_tracing

# Whether a graph is being recorded by `torch.compile` or `torch.export`; from PyTorch 2.3 on.
is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", _never)


# Whether the processor multiplies tiles of bfloat16 (AMX); from PyTorch 2.4 on.
has_tiles: Callable[[], bool] = getattr(torch.cpu, "_is_amx_tile_supported", _never)


def autocast_on_cpu() -> bool:
    """Whether operations on a CPU choose their own precision."""
    if hasattr(torch, "get_autocast_dtype"):  # from 2.4 on
        return torch.is_autocast_enabled("cpu")
    return torch.is_autocast_cpu_enabled()
