"""ONNX Runtime, with the providers of the user's package: GPUs on Windows, Apple's processors, ….

A provider has its name in ONNX Runtime, in any case and with or without "ExecutionProvider".
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DemucsInferError, MissingDependencyError, OptionError
from ...log import logger
from ..model import Model, Network, cast
from ..options import GRAPH_PRECISIONS, SeparationOptions
from . import NetworkModule
from .compiled import CompilingBackend, cache_name

PACKAGES = ("onnxruntime", "onnx", "onnxscript")
SUFFIX = "ExecutionProvider"
CPU = f"CPU{SUFFIX}"
ALIASES = {"directml": "dml"}
UNFIT = (f"Azure{SUFFIX}",)  # does not run networks, but calls a service
# They compile for minutes, each time.
ONLY_BY_NAME = (f"Tensorrt{SUFFIX}", f"NvTensorRTRTX{SUFFIX}")
# By default, CUDA multiplies float32 in 19 bits, and Core ML in 16.
EXACT = {f"CUDA{SUFFIX}": {"use_tf32": "0"}, f"CoreML{SUFFIX}": {"ModelFormat": "MLProgram"}}
SILENT = 4  # the log level at which ONNX Runtime prints nothing: exceptions hold the same text

OPSET = 18
LARGEST = 2**31 - 2**24  # bytes of weights, so that the rest of the graph fits into 2 GB, too
NORMS = (nn.GroupNorm, nn.LayerNorm)  # their sums exceed the range of float16


class Backend(CompilingBackend):
    """Runs networks in ONNX Runtime, on a provider (default: its first that works here).

    `device` is PROVIDER, or PROVIDER:NUMBER of several GPUs.
    """

    name, title = "onnxruntime", "ONNX Runtime"

    def __init__(self, options: SeparationOptions, device: str | None, cache: Path | None) -> None:
        super().__init__(options, device, cache)
        # Another build of a package may be installed, so only the missing ones are named.
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingDependencyError(" ".join(missing), "engine='onnxruntime'")
        self.onnxruntime: Any = importlib.import_module("onnxruntime")
        found = self.onnxruntime.get_available_providers()
        self._available = [name for name in found if name not in UNFIT]
        name, _, self._number = (device or "").partition(":")
        self.provider: str | None = None
        if name:
            wanted = name.lower().removesuffix(SUFFIX.lower())
            known = {_short(provider): provider for provider in self._available}
            self.provider = known.get(ALIASES.get(wanted, wanted))
            if self.provider is None:
                raise OptionError(
                    f"this ONNX Runtime has no provider {name!r}, but {', '.join(known)}: others"
                    " come with other packages of it"
                )
            if self._number and not self._number.isdecimal():
                raise OptionError(f"{name}:{self._number}: a number must follow the provider")
        if options.precision == "bfloat16":
            raise OptionError("precision='bfloat16' is not supported by ONNX Runtime")
        if options.precision == "float16" and next(self._candidates()) == CPU:
            raise OptionError(
                "precision='float16' is for GPUs: ONNX Runtime's CPU provider takes 'float32'"
            )

    def _candidates(self) -> Iterator[str]:
        """Yield the providers to try, best first."""
        if self.provider is not None:
            yield self.provider
            return
        yield from (name for name in self._available if name not in (CPU, *ONLY_BY_NAME))
        yield CPU

    def compiled(self, model: Model, inputs: Sequence[Tensor]) -> Network:
        precision = self.options.precision
        file = f"{cache_name(model, inputs, precision)}-{precision}.onnx"
        graph = self.cache.load(file)
        if graph is None:
            logger.info("the network is converted to ONNX; this takes up to a minute")
            graph = network_graph(model, inputs, precision).SerializeToString()
            self.cache.store(file, graph)
        session = self._session(graph)
        names = [node.name for node in session.get_inputs()]
        provider = session.get_providers()[0]
        # Some GPUs' providers take one run at a time; the CPU's takes any number.
        turn = nullcontext() if provider == CPU else threading.Lock()

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            feed = {name: x.contiguous().numpy() for name, x in zip(names, inputs)}
            try:
                with turn:
                    outputs = session.run(None, feed)
            except Exception as exc:  # the kind depends on the provider
                raise DemucsInferError(f"ONNX Runtime, {_reason(provider, exc)}") from exc
            return tuple(map(torch.from_numpy, outputs))

        return run

    def _session(self, graph: bytes) -> Any:
        """Return a session on the first provider that works. Raises `OptionError` without one."""
        reasons = []
        for provider in self._candidates():
            options = self.onnxruntime.SessionOptions()
            options.log_severity_level = SILENT
            options.intra_op_num_threads = torch.get_num_threads()
            # Between windows PyTorch needs the cores.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            options.enable_mem_pattern = provider != f"Dml{SUFFIX}"  # which does not support it
            own = dict(EXACT.get(provider, {}))
            if self._number:
                own["device_id"] = self._number
            try:
                session = self.onnxruntime.InferenceSession(
                    graph,
                    options,
                    providers=[provider] if provider == CPU else [(provider, own), CPU],
                    enable_fallback=0,  # it would print to standard output
                )
            except Exception as exc:  # the kind depends on the provider
                reasons.append(_reason(provider, exc))
                continue
            session._model_bytes = None  # kept for the fallback alone
            if session.get_providers()[0] == provider:
                logger.info("ONNX Runtime runs the network on %s", provider)
                return session
            reasons.append(f"{_short(provider)}: its libraries are not on this machine")
        raise OptionError(f"ONNX Runtime cannot run this network on {'; '.join(reasons)}")


def _short(provider: str) -> str:
    return provider.removesuffix(SUFFIX).lower()


def _reason(provider: str, exc: Exception) -> str:
    """Return the error of a provider in one line."""
    return f"{_short(provider)}: {next(iter(str(exc).splitlines()), type(exc).__name__)}"


def network_graph(
    model: Model, inputs: Sequence[Tensor], precision: str = "float32", any_batch: bool = False
) -> Any:
    """Return the network of `model` as an `onnx.ModelProto`, with its weights in it.

    It takes tensors of the shapes of `inputs`, which may have any batch if `any_batch`. Weights and
    network are in `precision`, inputs and outputs in float32.

    Raises `MissingDependencyError` without the extra `onnx`; `OptionError` for another precision, a
    PyTorch that is too old, and a model that ONNX cannot express, or that is too large for it.
    """
    if precision not in GRAPH_PRECISIONS:
        known = ", ".join(GRAPH_PRECISIONS)
        raise OptionError(f"precision={precision!r} in ONNX: choose from {known}")
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        raise OptionError("conversion to ONNX needs PyTorch 2.5 or newer")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError("onnx onnxscript", "conversion to ONNX") from exc
    if precision == "float16":
        model = cast(model, torch.float16, NORMS)
    if sum(x.numel() * x.element_size() for x in model.state_dict().values()) > LARGEST:
        raise OptionError("weights of 2 GB or more do not fit into a file of ONNX")
    names, shapes = ["x", "xt"][: len(inputs)], None
    if any_batch:
        shapes = (({0: torch.export.Dim("batch", min=1)},) * len(inputs),)
        # The exporter would take a batch of one for a constant.
        inputs = [x[:1].expand(2, *x.shape[1:]) for x in inputs]
    # PyTorch warns of packages that it does not need here.
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program: Any = torch.onnx.export(
                NetworkModule(model).eval(),
                tuple(inputs),
                input_names=names,
                output_names=[f"{name}_out" for name in names],
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        graph = program.model_proto
        # Nodes record in which file of this machine they were made.
        for node in graph.graph.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
    except Exception as exc:  # the kind depends on the part of PyTorch
        raise OptionError("this model cannot be converted to ONNX") from exc
    finally:
        exporter.setLevel(level)
    return graph
