"""ONNX Runtime, with the providers of the user's package: GPUs on Windows, Apple's processors, ….

A provider goes by its name in ONNX Runtime, in any case and with or without "ExecutionProvider".
"""

from __future__ import annotations

import importlib
import importlib.util
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ...errors import DemucsInferError, MissingDependencyError, OptionError
from ...log import logger
from ..model import Model
from . import EngineOptions
from .compiled import Compiled, CompilingBackend, cache_name
from .graph import network_graph

PACKAGES = ("onnxruntime", "onnx", "onnxscript")
SUFFIX = "ExecutionProvider"
CPU = f"CPU{SUFFIX}"
ALIASES = {"directml": "dml"}
UNFIT = (f"Azure{SUFFIX}",)  # runs no network, but calls a service
# They compile for minutes, each time.
ONLY_BY_NAME = (f"Tensorrt{SUFFIX}", f"NvTensorRTRTX{SUFFIX}")
# Else CUDA multiplies float32 in 19 bits, and Core ML in 16.
EXACT = {f"CUDA{SUFFIX}": {"use_tf32": "0"}, f"CoreML{SUFFIX}": {"ModelFormat": "MLProgram"}}
SILENT = 4  # the level at which ONNX Runtime itself says nothing: exceptions have it, too


class Backend(CompilingBackend):
    """Runs networks in ONNX Runtime, on a provider (default: its first that works here).

    `device` is PROVIDER, or PROVIDER:NUMBER of several GPUs.
    """

    name, title = "onnxruntime", "ONNX Runtime"

    def __init__(self, options: EngineOptions, device: str | None) -> None:
        super().__init__(options, device)
        self.onnxruntime = _import_onnxruntime()
        found = self.onnxruntime.get_available_providers()
        self._available = [name for name in found if name not in UNFIT]
        name, _, self._number = (device or "").partition(":")
        self.provider = self._named(name) if name else None
        self._check_precision()

    def _named(self, name: str) -> str:
        wanted = name.lower().removesuffix(SUFFIX.lower())
        known = {_short(provider): provider for provider in self._available}
        provider = known.get(ALIASES.get(wanted, wanted))
        if provider is None:
            raise OptionError(
                f"this ONNX Runtime has no provider {name!r}, but {', '.join(known)}: others come"
                " with other packages of it"
            )
        if self._number and not self._number.isdecimal():
            raise OptionError(f"{name}:{self._number}: a number must follow the provider")
        return provider

    def _check_precision(self) -> None:
        precision = self.options.precision
        if precision == "bfloat16":
            raise OptionError("precision='bfloat16' is not supported by ONNX Runtime")
        if precision == "float16" and next(self._candidates()) == CPU:
            raise OptionError(
                "precision='float16' is for GPUs: ONNX Runtime's CPU provider takes 'float32'"
            )

    def _candidates(self) -> Iterator[str]:
        """The providers to try, best first."""
        if self.provider is not None:
            yield self.provider
            return
        yield from (name for name in self._available if name not in (CPU, *ONLY_BY_NAME))
        yield CPU

    def compiled(self, model: Model, inputs: Sequence[Tensor]) -> Compiled:
        session = self._session(self._graph(model, inputs))
        names = [node.name for node in session.get_inputs()]
        provider = session.get_providers()[0]
        # Some GPUs' providers take one run at a time; the CPU's takes any number.
        turn = nullcontext() if provider == CPU else threading.Lock()

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            feed = {name: x.contiguous().numpy() for name, x in zip(names, inputs)}
            try:
                with turn:
                    outputs = session.run(None, feed)
            except Exception as exc:  # each provider has errors of its own
                raise DemucsInferError(f"ONNX Runtime, {_reason(provider, exc)}") from exc
            return tuple(map(torch.from_numpy, outputs))

        return run

    def _graph(self, model: Model, inputs: Sequence[Tensor]) -> bytes:
        precision = self.options.precision
        name = f"{cache_name(model, inputs, precision)}-{precision}.onnx"
        graph = self.cache.load(name)
        if graph is None:
            logger.info("the network is converted to ONNX; this takes up to a minute")
            graph = network_graph(model, inputs, precision).SerializeToString()
            self.cache.store(name, graph)
        return graph

    def _session(self, graph: bytes) -> Any:
        """A session on the first provider that can be used.

        Raises `OptionError` if none can.
        """
        reasons = []
        for provider in self._candidates():
            try:
                session = self._on(provider, graph)
            except Exception as exc:  # each provider has errors of its own
                reasons.append(_reason(provider, exc))
                continue
            if session.get_providers()[0] == provider:
                logger.info("ONNX Runtime runs the network on %s", provider)
                return session
            reasons.append(f"{_short(provider)}: what it needs is not on this machine")
        raise OptionError(f"ONNX Runtime cannot run this network on {'; '.join(reasons)}")

    def _on(self, provider: str, graph: bytes) -> Any:
        runtime = self.onnxruntime
        options = runtime.SessionOptions()
        options.log_severity_level = SILENT
        options.intra_op_num_threads = torch.get_num_threads()
        # Between windows PyTorch needs the cores.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_mem_pattern = provider != f"Dml{SUFFIX}"  # which cannot
        own = {**EXACT.get(provider, {}), **({"device_id": self._number} if self._number else {})}
        session = runtime.InferenceSession(
            graph,
            options,
            providers=[provider] if provider == CPU else [(provider, own), CPU],
            enable_fallback=0,  # it would say so on standard output
        )
        session._model_bytes = None  # kept for the fallback alone
        return session


def _short(provider: str) -> str:
    return provider.removesuffix(SUFFIX).lower()


def _reason(provider: str, exc: Exception) -> str:
    """What went wrong with a provider, in one line."""
    return f"{_short(provider)}: {next(iter(str(exc).splitlines()), type(exc).__name__)}"


def _import_onnxruntime() -> Any:
    # Only what is missing: there may be another build of it.
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(" ".join(missing), "engine='onnxruntime'")
    return importlib.import_module("onnxruntime")
