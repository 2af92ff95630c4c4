"""The part that engines beside PyTorch have in common: they compile networks, for fixed shapes."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import ClassVar

import torch
from torch import Tensor, nn

from ... import __version__
from ...errors import OptionError
from ..model import Model
from . import EngineOptions
from .base import Backend, EngineModel
from .cache import CompiledCache

Compiled = Callable[..., tuple[Tensor, ...]]


class CompilingBackend(Backend):
    """An engine that is not PyTorch. It takes PyTorch's tensors on the CPU, wherever it runs.

    `title` is the engine's name for people.
    """

    title: ClassVar[str]
    device = torch.device("cpu")

    def __init__(self, options: EngineOptions, device: str | None) -> None:
        super().__init__(options, device)
        if options.compile:
            raise OptionError(
                f"compile=True is for engine='torch': {self.title} compiles by itself"
            )
        folder = None if options.cache is None else options.cache / self.name
        self.cache = CompiledCache(folder)

    @abstractmethod
    def compiled(self, model: Model, inputs: Sequence[Tensor]) -> Compiled:
        """The network of `model`, for tensors of the shapes of `inputs`; threads may share it.

        Raises `OptionError` for a network that the engine cannot run.
        """

    def converted(self, model: Model) -> nn.Module:
        return EngineModel(model, _Network(self, model))


class _Network:
    """Runs the network of `model`, which is compiled once, for the first shape of a window.

    A model whose windows have any length runs other lengths (those at a track's end) in PyTorch.
    """

    def __init__(self, backend: CompilingBackend, model: Model) -> None:
        self._backend, self._model = backend, model
        self._lock = threading.Lock()
        self._compiled: Compiled | None = None
        self._shapes: tuple[torch.Size, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(x.shape for x in inputs)
        with self._lock:
            if self._compiled is None:
                self._compiled = self._backend.compiled(self._model, inputs)
                self._shapes = shapes
        run = self._compiled if shapes == self._shapes else self._model.network
        return run(*inputs)


def cache_name(model: Model, inputs: Sequence[Tensor], *facts: object) -> str:
    """A name for a compiled network, of all that it depends on: `facts` are those of the engine."""
    shapes = [tuple(x.shape) for x in inputs]
    known = (type(model).__qualname__, model.options, shapes, __version__, torch.__version__)
    digest = sha256(repr((*known, *facts)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]
