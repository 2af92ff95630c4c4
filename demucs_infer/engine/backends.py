"""What runs a model's network: PyTorch in some precision, compiled or not, or OpenVINO.

The transforms around the network (see `hdemucs`) always stay in PyTorch's float32.

    model = on_engine(model, EngineOptions(engine="openvino", precision="bfloat16"))
"""

from __future__ import annotations

import copy
import io
import platform
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import HDecLayer, MultiDecoder
from ..choices import ENGINES, PRECISIONS
from ..errors import MissingDependencyError, OptionError
from ..log import logger
from ..utils import appearing
from .bag import BagOfModels

HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # OpenVINO's names of them

Network = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class EngineOptions:
    """What runs the networks.

    Args:
        engine: "torch", or "openvino" (extra `openvino`), which is faster on a CPU.
        precision: "float32", "bfloat16" (for CPUs and GPUs that have it) or "float16" (for GPUs).
        compile: run the network through `torch.compile`, which takes minutes the first time.
        device: PyTorch's kind of device, "cpu", "cuda" or "mps".
        openvino_device: OpenVINO's own, such as "CPU" or "GPU".
        cache: the folder for what OpenVINO compiled (default: it is not kept).

    Raises `OptionError` for what is unknown, and what does not go together.
    """

    engine: str = "torch"
    precision: str = "float32"
    compile: bool = False
    device: str = "cpu"
    openvino_device: str = "CPU"
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name, known in (("engine", ENGINES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name}={getattr(self, name)!r}: choose from {', '.join(known)}")
        for wrong, reason in self._conflicts():
            if wrong:
                raise OptionError(reason)

    def _conflicts(self) -> list[tuple[bool, str]]:
        openvino, half = self.engine == "openvino", self.precision == "float16"
        on_cpu = self.openvino_device == "CPU" if openvino else self.device == "cpu"
        return [
            (half and on_cpu, "precision='float16' is for GPUs: a CPU takes 'bfloat16'"),
            (
                self.device == "mps" and self.precision != "float32",
                f"precision={self.precision!r} is not supported on MPS: leave it at 'float32'",
            ),
            (
                openvino and self.compile,
                "compile=True is for engine='torch': OpenVINO compiles by itself",
            ),
            (
                openvino and self.device != "cpu",
                f"engine='openvino' does not run on PyTorch's device {self.device!r}: give"
                " 'openvino:GPU' or another device of OpenVINO's",
            ),
            (
                self.compile and not hasattr(torch.compiler, "is_compiling"),
                "compile=True needs PyTorch 2.3 or newer",
            ),
        ]


def on_engine(model: nn.Module, options: EngineOptions) -> nn.Module:
    """`model`, or each model of a bag, with its network run as `options` say.

    `model` itself is not changed; the result may share its weights. Raises
    `MissingDependencyError` without the engine's package.
    """
    if options == EngineOptions(device=options.device, cache=options.cache):
        return model
    if isinstance(model, BagOfModels):
        models = [on_engine(member, options) for member in model.models]
        return BagOfModels(models, model.weights)
    if options.engine == "openvino":
        return EngineModel(model, OpenVINO(model, options))
    if options.precision != "float32" and options.device == "cpu":
        model = _cast(model, getattr(torch, options.precision))
    network: Network = model.network  # type: ignore[assignment]
    if options.compile:
        network = torch.compile(network)
    if options.precision != "float32" and options.device != "cpu":
        network = _autocast(network, options)
    return EngineModel(model, network)


class EngineModel(nn.Module):
    """A model of which something else runs the network; it has the attributes of the model."""

    def __init__(self, model: nn.Module, network: Network) -> None:
        super().__init__()
        self.model = model
        self._network = network

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, mix: Tensor, stems: Sequence[int] | None = None) -> Tensor:
        return self.model(mix, stems, network=self._network)


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of `model` with its network in `dtype`.

    Less the residual branch and the output of the outermost decoders: they take little time there,
    and their rounding is not averaged by any layer (47 instead of 45 dB of noise).
    """
    half: Any = copy.deepcopy(model).to(dtype)
    decoders = [half.decoder, half.tdecoder] if hasattr(half, "tdecoder") else [half.decoder]
    for last in (decoder[-1] for decoder in decoders):
        for part in last.layers if isinstance(last, MultiDecoder) else [last]:
            exact = [part.dconv, part.conv_tr] if isinstance(part, HDecLayer) else [part[-1]]
            for layer in filter(None, exact):
                layer.float().register_forward_pre_hook(_widened)
    return half


def _widened(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].float(),)


def _autocast(network: Network, options: EngineOptions) -> Network:
    """`network` with its products in half precision; PyTorch keeps norms in float32."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(options.device, getattr(torch, options.precision)):
            return network(*inputs)

    return run


class NetworkModule(nn.Module):
    """The network of `model` as a module of its own, which is what converters take."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self.model.network(*inputs)  # type: ignore[operator]


class OpenVINO:
    """Runs the network of `model` in OpenVINO, which compiles it once for each shape of a window.

    What was compiled is kept in the cache's folder. A model whose windows have any length runs the
    first length in OpenVINO, and others (those at a track's end) in PyTorch.
    """

    def __init__(self, model: nn.Module, options: EngineOptions) -> None:
        self._openvino = _import_openvino()
        self._model, self._options = model, options
        self._lock = threading.Lock()
        self._compiled: Any = None
        self._shapes: tuple[torch.Size, ...] = ()
        devices = self._openvino.Core().available_devices
        if options.openvino_device.split(".")[0] not in {d.split(".")[0] for d in devices}:
            raise OptionError(
                f"OpenVINO has no device {options.openvino_device!r} here, but {', '.join(devices)}"
            )

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(x.shape for x in inputs)
        with self._lock:
            if self._compiled is None:
                self._compiled, self._shapes = self._compile(inputs), shapes
        if shapes != self._shapes:
            return self._model.network(*inputs)  # type: ignore[operator]
        request = self._compiled.create_infer_request()
        request.infer([x.contiguous().numpy() for x in inputs])
        outputs = (request.get_output_tensor(i).data for i in range(len(self._compiled.outputs)))
        return tuple(torch.from_numpy(y.copy()) for y in outputs)

    def _compile(self, inputs: Sequence[Tensor]) -> Any:
        options, core = self._options, self._openvino.Core()
        hints: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[options.precision],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if options.openvino_device == "CPU":
            hints["INFERENCE_NUM_THREADS"] = torch.get_num_threads()
        path = self._cached_file(core, inputs)
        if path is not None and path.exists():
            with suppress(RuntimeError, OSError):  # of another version, or damaged: made anew
                return core.import_model(path.read_bytes(), options.openvino_device, hints)
        logger.info("OpenVINO compiles the network; this takes up to a minute")
        compiled = core.compile_model(self._converted(inputs), options.openvino_device, hints)
        if path is not None:
            _keep(compiled, path)
        return compiled

    def _converted(self, inputs: Sequence[Tensor]) -> Any:
        shapes = [tuple(x.shape) for x in inputs]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # shapes are fixed, and how is OpenVINO's choice
            try:
                return self._openvino.convert_model(
                    NetworkModule(self._model), example_input=tuple(inputs), input=shapes
                )
            except Exception as exc:  # OpenVINO has a tree of its own for each of its parts
                raise OptionError(
                    "OpenVINO cannot convert this model: leave engine at 'torch'"
                ) from exc

    def _cached_file(self, core: Any, inputs: Sequence[Tensor]) -> Path | None:
        """Where the compiled network is kept: a name for all that it depends on."""
        options = self._options
        if options.cache is None:
            return None
        digest = sha256(repr(self._model.options).encode())
        for name, tensor in self._model.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        device = core.get_property(options.openvino_device, "FULL_DEVICE_NAME")
        for fact in (
            [tuple(x.shape) for x in inputs],
            (options.precision, options.openvino_device, device, platform.machine()),
            (torch.get_num_threads(), self._openvino.get_version()),
        ):
            digest.update(repr(fact).encode())
        return options.cache / "openvino" / f"{digest.hexdigest()[:32]}-{options.precision}.blob"


def _import_openvino() -> Any:
    try:
        import openvino
    except ImportError as exc:
        raise MissingDependencyError("openvino", "engine='openvino'", "openvino") from exc
    return openvino


def _keep(compiled: Any, path: Path) -> None:
    """Write what was compiled to `path`, if the folder and the device allow it."""
    try:
        exported = compiled.export_model()
        content = exported.getvalue() if isinstance(exported, io.BytesIO) else bytes(exported)
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as temporary:
            temporary.write_bytes(content)
    except (OSError, RuntimeError) as exc:
        logger.info("what OpenVINO compiled is not kept: %s", exc)
