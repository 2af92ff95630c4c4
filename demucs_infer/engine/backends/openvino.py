"""OpenVINO, which is faster than PyTorch on many CPUs, and has devices of its own."""

from __future__ import annotations

import io
import platform
import threading
import warnings
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ...errors import MissingDependencyError, OptionError
from ...log import logger
from ..model import Model, Network
from . import EngineOptions
from .base import Backend as Base
from .base import NetworkModule
from .cache import CompiledCache

HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # OpenVINO's names of them
PYTORCH_DEVICES = ("cuda", "mps")


class Backend(Base):
    """Runs networks in OpenVINO, on its device `device` (default: "CPU")."""

    name = "openvino"
    device = torch.device("cpu")

    def __init__(self, options: EngineOptions, device: str | None) -> None:
        super().__init__(options, device)
        if (device or "").partition(":")[0] in PYTORCH_DEVICES:
            raise OptionError(
                f"engine='openvino' does not run on PyTorch's device {device!r}: give"
                " 'openvino:GPU' or another device of OpenVINO's"
            )
        self.target = (device or "CPU").upper()
        if options.precision == "float16" and self.target == "CPU":
            raise OptionError("precision='float16' is for GPUs: a CPU takes 'bfloat16'")
        if options.compile:
            raise OptionError("compile=True is for engine='torch': OpenVINO compiles by itself")
        self.openvino = _import_openvino()
        devices = self.openvino.Core().available_devices
        if self.target.split(".")[0] not in {name.split(".")[0] for name in devices}:
            raise OptionError(
                f"OpenVINO has no device {self.target!r} here, but {', '.join(devices)}"
            )
        folder = None if options.cache is None else options.cache / self.name
        self.cache = CompiledCache(folder)

    def network(self, model: Model) -> tuple[Model, Network]:
        return model, _Network(self, model)


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as exc:
        raise MissingDependencyError("openvino", "engine='openvino'") from exc
    return openvino


class _Network:
    """Runs the network of `model`, which is compiled once, for the first shape of a window.

    A model whose windows have any length runs other lengths (those at a track's end) in PyTorch.
    """

    def __init__(self, backend: Backend, model: Model) -> None:
        self._backend, self._model = backend, model
        self._lock = threading.Lock()
        self._compiled: Any = None
        self._shapes: tuple[torch.Size, ...] = ()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(x.shape for x in inputs)
        with self._lock:
            if self._compiled is None:
                self._compiled, self._shapes = self._compile(inputs), shapes
        if shapes != self._shapes:
            return self._model.network(*inputs)
        request = self._compiled.create_infer_request()
        request.infer([x.contiguous().numpy() for x in inputs])
        outputs = (request.get_output_tensor(i).data for i in range(len(self._compiled.outputs)))
        return tuple(torch.from_numpy(y.copy()) for y in outputs)

    def _compile(self, inputs: Sequence[Tensor]) -> Any:
        backend = self._backend
        core, precision = backend.openvino.Core(), backend.options.precision
        hints: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if backend.target == "CPU":
            hints["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        name = self._cached_name(core, inputs)
        kept = backend.cache.load(name)
        if kept is not None:
            try:
                return core.import_model(kept, backend.target, hints)
            except (RuntimeError, OSError) as exc:
                logger.info("what OpenVINO compiled before is not used: %s", exc)
        logger.info("OpenVINO compiles the network; this takes up to a minute")
        compiled = core.compile_model(self._converted(inputs), backend.target, hints)
        self._keep(compiled, name)
        return compiled

    def _converted(self, inputs: Sequence[Tensor]) -> Any:
        shapes = [tuple(x.shape) for x in inputs]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shapes are fixed, and how is OpenVINO's choice
            try:
                return self._backend.openvino.convert_model(
                    NetworkModule(self._model), example_input=tuple(inputs), input=shapes
                )
            except Exception as exc:  # OpenVINO has a tree of its own for each of its parts
                raise OptionError(
                    "OpenVINO cannot convert this model: leave engine at 'torch'"
                ) from exc

    def _cached_name(self, core: Any, inputs: Sequence[Tensor]) -> str:
        """A name for all that the compiled network depends on."""
        backend = self._backend
        digest = sha256(repr(self._model.options).encode())
        for name, tensor in self._model.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        device = core.get_property(backend.target, "FULL_DEVICE_NAME")
        precision = backend.options.precision
        for fact in (
            [tuple(x.shape) for x in inputs],
            (precision, backend.target, device, platform.machine()),
            (torch.get_num_threads(), backend.openvino.get_version()),
        ):
            digest.update(repr(fact).encode())
        return f"{digest.hexdigest()[:32]}-{precision}.blob"

    def _keep(self, compiled: Any, name: str) -> None:
        """Store what was compiled, if the device allows it."""
        try:
            exported = compiled.export_model()
        except RuntimeError as exc:
            logger.info("what OpenVINO compiled is not kept: %s", exc)
            return
        is_stream = isinstance(exported, io.BytesIO)
        self._backend.cache.store(name, exported.getvalue() if is_stream else bytes(exported))
