"""PyTorch, in some precision, compiled or not."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from ...compat import cuda_has_bfloat16
from ...errors import DeviceError, OptionError
from ..machine import why_no_bfloat16
from ..model import Model, Network, cast
from ..options import SeparationOptions
from . import Backend as Base
from . import EngineModel


class Backend(Base):
    """Runs networks in PyTorch, on its device `device` (default: the first GPU, else the CPU)."""

    name = "torch"

    def __init__(self, options: SeparationOptions, device: str | None, cache: Path | None) -> None:
        super().__init__(options, device, cache)
        if device is None:
            device = "mps" if torch.backends.mps.is_available() else "cpu"
            device = "cuda" if torch.cuda.is_available() else device
        precision = options.precision
        if precision == "float16" and device == "cpu":
            raise OptionError("precision='float16' is for GPUs: a CPU takes 'bfloat16'")
        if precision != "float32" and device == "mps":
            raise OptionError(
                f"precision={precision!r} is not supported on MPS: leave it at 'float32'"
            )
        if options.compile and not hasattr(torch.compiler, "is_compiling"):
            raise OptionError("compile=True needs PyTorch 2.3 or newer")
        self.device = _usable(device)

    @property
    def is_plain(self) -> bool:
        return self.options.precision == "float32" and not self.options.compile

    def why_no_bfloat16(self) -> str | None:
        if self.device.type == "cuda" and not cuda_has_bfloat16(self.device):
            return "this GPU has no instructions for it"
        return why_no_bfloat16() if self.device.type == "cpu" else None

    def converted(self, model: Model) -> nn.Module:
        dtype = getattr(torch, self.options.precision)
        half = dtype != torch.float32
        if half and self.device.type == "cpu":
            model = cast(model, dtype)
            if not self.options.compile:
                return model
        network: Network = model.network
        if self.options.compile:
            network = torch.compile(network)
        if half and self.device.type != "cpu":
            network = _autocast(network, self.device.type, dtype)
        return EngineModel(model, network)


def _usable(device: str) -> torch.device:
    """Return a device of PyTorch. Raises `DeviceError` if it cannot be used."""
    try:
        return torch.empty(0, dtype=torch.float32, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        # PyTorch lists all kinds of devices that it knows, which does not help.
        reason = re.sub(r"^Expected one of .*", "unknown", str(exc).splitlines()[0])[:100]
        here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise DeviceError(
            f"the device {device!r} cannot be used ({reason}). This machine has {', '.join(here)}"
        ) from exc


def _autocast(network: Network, device: str, dtype: torch.dtype) -> Network:
    """Return `network` with its products in half precision; PyTorch keeps norms in float32."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device, dtype):
            return network(*inputs)

    return run
