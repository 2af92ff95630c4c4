"""Backends run the networks of models: one module with a `Backend` for each of `ENGINES`.

    model = on_engine(model, SeparationOptions(engine="openvino", precision="bfloat16"))

The transforms around a network always stay in PyTorch's float32.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...log import logger
from ...utils import run_network
from ..bag import BagOfModels
from ..model import Model, Network
from ..options import ENGINES, SeparationOptions


def backend_of(options: SeparationOptions, cache: Path | None = None) -> Backend:
    """Return the backend that `options` ask for.

    A device "ENGINE:DEVICE" names the engine, too; None and "auto" mean the best device. `cache`
    is the folder for compiled networks. Where bfloat16 would be slower, the backend has float32,
    and a warning says why.

    Raises `OptionError` for options that exclude each other and for a device that cannot be used;
    `MissingDependencyError` without the engine's package.
    """
    engine, device = options.engine, None if options.device is None else str(options.device)
    kind, _, rest = (device or "").partition(":")
    if kind in ENGINES:
        engine, device = kind, rest or None
    if device == "auto":
        device = None
    module: Any = importlib.import_module(f".{ENGINES[engine]}", __name__)
    backend: Backend = module.Backend(options, device, cache)
    reason = backend.why_no_bfloat16() if options.precision == "bfloat16" else None
    if reason is not None:
        logger.warning("precision='bfloat16' would be slow: %s; float32 is used instead", reason)
        backend = module.Backend(replace(options, precision="float32"), device, cache)
    return backend


def on_engine(model: nn.Module, options: SeparationOptions, cache: Path | None = None) -> nn.Module:
    """Return `model`, or each model of a bag, with its network run as `options` say.

    `model` itself is not changed; the result may share its weights. Raises the errors of
    `backend_of`.
    """
    return backend_of(options, cache).run(model)


class Backend(ABC):
    """An engine with its options, on one of its devices.

    PyTorch's tensors that the network takes and returns are on `device`. Raises `OptionError` for
    an option that the engine does not have.
    """

    name: ClassVar[str]
    device: torch.device

    def __init__(self, options: SeparationOptions, device: str | None, cache: Path | None) -> None:
        self.options = options

    @property
    def is_plain(self) -> bool:
        """True if the backend runs a model as it is."""
        return False

    def why_no_bfloat16(self) -> str | None:
        """Return why bfloat16 would be slower than float32 on this device; None if it is faster."""
        return None

    @abstractmethod
    def converted(self, model: Model) -> nn.Module:
        """Return `model` with its network run by this engine."""

    def run(self, model: nn.Module) -> nn.Module:
        """Return `model`, or each model of a bag, with its network run by this engine."""
        if self.is_plain:
            return model
        if isinstance(model, BagOfModels):
            return BagOfModels([self.run(member) for member in model.models], model.weights)
        ours: Any = model
        if not hasattr(ours, "network"):
            raise OptionError(
                f"{type(ours).__name__} has no network that an engine could run: leave engine,"
                " precision and compile as they are"
            )
        return self.converted(ours)


class EngineModel(nn.Module):
    """A model whose network another engine runs; it has the attributes of the model."""

    def __init__(self, model: Model, network: Network) -> None:
        super().__init__()
        self.model = model
        self._network = network

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, mix: Tensor, *, stems: Sequence[int] | None = None) -> Tensor:
        return self.model(mix, stems=stems, network=self._network)


class NetworkModule(nn.Module):
    """The network of `model` as a module for converters.

    Its inputs and outputs are float32, whatever the precision of the network.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return run_network(self.model.network, self.model, *inputs)
