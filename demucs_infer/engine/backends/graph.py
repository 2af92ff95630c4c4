"""A network as a graph of ONNX, which other engines run."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import MissingDependencyError, OptionError
from ..model import Model, cast
from . import GRAPH_PRECISIONS
from .base import NetworkModule

OPSET = 18
LARGEST = 2**31 - 2**24  # bytes of weights, beside which the rest of one file of ONNX has room
NORMS = (nn.GroupNorm, nn.LayerNorm)  # whose sums are beyond what float16 can hold


def network_graph(
    model: Model, inputs: Sequence[Tensor], precision: str = "float32", any_batch: bool = False
) -> Any:
    """The network of `model` as an `onnx.ModelProto`, with its weights in it.

    It takes tensors of the shapes of `inputs`, which may have any batch if `any_batch`. Weights and
    network are in `precision`, inputs and outputs in float32.

    Raises `MissingDependencyError` without the extra `onnx`; `OptionError` for another precision, a
    PyTorch that is too old, and a model that ONNX cannot express, or is too large for it.
    """
    if precision not in GRAPH_PRECISIONS:
        known = ", ".join(GRAPH_PRECISIONS)
        raise OptionError(f"precision={precision!r} in ONNX: choose from {known}")
    _check_packages()
    if precision == "float16":
        model = cast(model, torch.float16, NORMS)
    if sum(x.numel() * x.element_size() for x in model.state_dict().values()) > LARGEST:
        raise OptionError("weights of 2 GB or more do not fit into a file of ONNX")
    names = ["x", "xt"][: len(inputs)]
    with warnings.catch_warnings(), _Quiet():
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                NetworkModule(model).eval(),
                # A batch of one would be taken for a constant.
                tuple(x[:1].expand(2, *x.shape[1:]) if any_batch else x for x in inputs),
                input_names=names,
                output_names=[f"{name}_out" for name in names],
                dynamic_shapes=_any_batch(len(inputs)) if any_batch else None,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            return _without_traces(program.model_proto)
        except Exception as exc:  # PyTorch has a tree of its own for each of its parts
            raise OptionError("this model cannot be converted to ONNX") from exc


def _without_traces(graph: Any) -> Any:
    """`graph` without where in which file of this machine each of its nodes comes from."""
    for node in graph.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return graph


def _check_packages() -> None:
    if "dynamo" not in inspect.signature(torch.onnx.export).parameters:
        raise OptionError("conversion to ONNX needs PyTorch 2.5 or newer")
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as exc:
        raise MissingDependencyError("onnx onnxscript", "conversion to ONNX") from exc


def _any_batch(count: int) -> Any:
    """The dimension of each of `count` inputs that may vary."""
    return (({0: torch.export.Dim("batch", min=1)},) * count,)


class _Quiet:
    """Keeps PyTorch from warning of packages that it can do without."""

    def __enter__(self) -> None:
        self._logger = logging.getLogger("torch.onnx")
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *exc_info: object) -> None:
        self._logger.setLevel(self._level)
