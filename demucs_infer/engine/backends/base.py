"""The part that all backends have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import OptionError
from ...utils import run_network
from ..bag import BagOfModels
from ..model import Model, Network
from . import EngineOptions


class Backend(ABC):
    """An engine with its options, on one of its devices.

    `device` is where PyTorch's tensors are, those that the network takes and gives. Raises
    `OptionError` for what the engine does not have.
    """

    name: ClassVar[str]
    device: torch.device

    def __init__(self, options: EngineOptions, device: str | None) -> None:
        self.options = options

    @property
    def is_plain(self) -> bool:
        """Whether a model already runs like that by itself."""
        return False

    def why_no_bfloat16(self) -> str | None:
        """Say why bfloat16 would not be faster here than float32; None where it is."""
        return None

    @abstractmethod
    def converted(self, model: Model) -> nn.Module:
        """Return `model` with its network run by this engine."""

    def run(self, model: nn.Module) -> nn.Module:
        """`model`, or each model of a bag, with its network run by this engine."""
        if self.is_plain:
            return model
        if isinstance(model, BagOfModels):
            return BagOfModels([self.run(member) for member in model.models], model.weights)
        if not hasattr(model, "network"):
            raise OptionError(
                f"{type(model).__name__} has no network that could be run otherwise: leave engine,"
                " precision and compile as they are"
            )
        ours: Any = model
        return self.converted(ours)


class EngineModel(nn.Module):
    """A model of which something else runs the network; it has the attributes of the model."""

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
    """The network of `model` as a module of its own, which is what converters take.

    Its inputs and outputs are float32, whatever the network is in.
    """

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return run_network(self.model.network, self.model, *inputs)
