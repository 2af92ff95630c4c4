"""What runs the networks of models: a row in `ENGINES`, and a module that has its `Backend`.

    model = on_engine(model, EngineOptions(engine="openvino", precision="bfloat16"))

The transforms around a network always stay in PyTorch's float32. Importing this needs no PyTorch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import OptionError
from ...log import logger

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .base import Backend

# The module here that has the `Backend` of each engine.
ENGINES: Mapping[str, str] = {
    "torch": "pytorch",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
}
PRECISIONS = ("float32", "bfloat16", "float16")
GRAPH_PRECISIONS = ("float32", "float16")  # that a network can have in ONNX


@dataclass(frozen=True)
class EngineOptions:
    """What runs the networks.

    Args:
        engine: a key of `ENGINES`.
        precision: of the network, one of `PRECISIONS`.
        compile: run the network through `torch.compile`, which takes minutes the first time.
        device: the engine's own, or PyTorch's, such as "cuda:1"; "ENGINE:DEVICE" names the engine,
            too; None and "auto" mean the best that there is.
        cache: the folder for what an engine compiled (default: it is not kept).

    Raises `OptionError` for an unknown engine or precision.
    """

    engine: str = "torch"
    precision: str = "float32"
    compile: bool = False
    device: str | torch.device | None = None
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name, known in (("engine", tuple(ENGINES)), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name}={getattr(self, name)!r}: choose from {', '.join(known)}")


def backend_of(options: EngineOptions) -> Backend:
    """The backend that `options` ask for. Importing it imports PyTorch.

    Where bfloat16 would be no faster, a warning says why, and the backend has float32.

    Raises `OptionError` for what does not go together, and for a device that cannot be used;
    `MissingDependencyError` without the engine's package.
    """
    engine, device = options.engine, None if options.device is None else str(options.device)
    kind, _, rest = (device or "").partition(":")
    if kind in ENGINES:
        engine, device = kind, rest or None
    if device == "auto":
        device = None
    module: Any = importlib.import_module(f".{ENGINES[engine]}", __name__)
    backend: Backend = module.Backend(options, device)
    reason = backend.why_no_bfloat16() if options.precision == "bfloat16" else None
    if reason is not None:
        logger.warning("precision='bfloat16' would be slow: %s; float32 is used instead", reason)
        backend = module.Backend(replace(options, precision="float32"), device)
    return backend


def on_engine(model: nn.Module, options: EngineOptions) -> nn.Module:
    """`model`, or each model of a bag, with its network run as `options` say.

    `model` itself is not changed; the result may share its weights. Raises what `backend_of` does.
    """
    return backend_of(options).run(model)
