"""PyTorch, in some precision, compiled or not."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ..model import Model, Network
from . import EngineOptions
from .base import Backend as Base


class Backend(Base):
    """Runs networks in PyTorch, on its device `device` (default: the first GPU, else the CPU)."""

    name = "torch"

    def __init__(self, options: EngineOptions, device: str | None) -> None:
        super().__init__(options, device)
        device, precision = device or _best_device(), options.precision
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

    def network(self, model: Model) -> tuple[Model, Network]:
        dtype = getattr(torch, self.options.precision)
        is_half = dtype != torch.float32
        if is_half and self.device.type == "cpu":
            model = _cast(model, dtype)
        network: Network = model.network
        if self.options.compile:
            network = torch.compile(network)
        if is_half and self.device.type != "cpu":
            network = _autocast(network, self.device.type, dtype)
        return model, network


def _best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _usable(device: str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as exc:
        reason = str(exc).splitlines()[0]
        raise OptionError(f"the device {device!r} cannot be used: {reason}") from exc


def _cast(model: Model, dtype: torch.dtype) -> Model:
    """A copy of `model` with its network in `dtype`, but for what the model names as exact."""
    half: Any = copy.deepcopy(model)
    half.to(dtype)
    for layer in half.exact_layers():
        layer.float().register_forward_pre_hook(_widened)
    return half


def _widened(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].float(),)


def _autocast(network: Network, device: str, dtype: torch.dtype) -> Network:
    """`network` with its products in half precision; PyTorch keeps norms in float32."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device, dtype):
            return network(*inputs)

    return run
