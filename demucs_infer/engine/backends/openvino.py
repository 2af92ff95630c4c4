"""OpenVINO, which is faster than PyTorch on many CPUs, and runs on further devices."""

from __future__ import annotations

import io
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import DeviceError, MissingDependencyError, OptionError
from ...log import logger
from ..machine import ONEDNN, limit_on_bfloat16
from ..model import Model, Network
from ..options import SeparationOptions
from . import NetworkModule
from .compiled import CompilingBackend, cache_name

HINTS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # OpenVINO's precisions


class Backend(CompilingBackend):
    """Runs networks in OpenVINO, on its device `device` (default: "CPU")."""

    name, title = "openvino", "OpenVINO"

    def __init__(self, options: SeparationOptions, device: str | None, cache: Path | None) -> None:
        super().__init__(options, device, cache)
        if (device or "").partition(":")[0] in ("cuda", "mps"):
            raise OptionError(
                f"engine='openvino' does not run on PyTorch's device {device!r}: give"
                " 'openvino:GPU' or another device of OpenVINO's"
            )
        self.target = (device or "CPU").upper()
        if options.precision == "float16" and self.target == "CPU":
            raise OptionError("precision='float16' is for GPUs: a CPU takes 'bfloat16'")
        try:
            import openvino
        except ImportError as exc:
            raise MissingDependencyError("openvino", "engine='openvino'") from exc
        self.openvino: Any = openvino
        devices = self.openvino.Core().available_devices
        if self.target.split(".")[0] not in {name.split(".")[0] for name in devices}:
            raise DeviceError(
                f"OpenVINO has no device {self.target!r} here, but {', '.join(devices)}"
            )

    def why_no_bfloat16(self) -> str | None:
        core = self.openvino.Core()
        if "BF16" not in core.get_property(self.target, "OPTIMIZATION_CAPABILITIES"):
            return f"OpenVINO has no instructions for it on {self.target}"
        return limit_on_bfloat16(*ONEDNN) if self.target == "CPU" else None

    def compiled(self, model: Model, inputs: Sequence[Tensor]) -> Network:
        compiled = self._compile(model, inputs)

        def run(*inputs: Tensor) -> tuple[Tensor, ...]:
            request = compiled.create_infer_request()
            request.infer([x.contiguous().numpy() for x in inputs])
            outputs = (request.get_output_tensor(i).data for i in range(len(compiled.outputs)))
            return tuple(torch.from_numpy(y.copy()) for y in outputs)

        return run

    def _compile(self, model: Model, inputs: Sequence[Tensor]) -> Any:
        """Return the compiled network, from the cache if it is there and fits this machine."""
        core, threads = self.openvino.Core(), torch.get_num_threads()
        precision, hints = self.options.precision, {"PERFORMANCE_HINT": "LATENCY"}
        hints["INFERENCE_PRECISION_HINT"] = HINTS[precision]
        if self.target == "CPU":
            hints["INFERENCE_NUM_THREADS"] = str(threads)
        device = core.get_property(self.target, "FULL_DEVICE_NAME")
        machine = (self.target, device, platform.machine(), threads)
        facts = (precision, machine, self.openvino.get_version())
        name = f"{cache_name(model, inputs, *facts)}-{precision}.blob"
        kept = self.cache.load(name)
        if kept is not None:
            try:
                return core.import_model(kept, self.target, hints)
            except (RuntimeError, OSError) as exc:
                logger.info("the cached network of OpenVINO is not used: %s", exc)
        logger.info("OpenVINO compiles the network; this takes up to a minute")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that the trace takes for constant
            try:
                converted = self.openvino.convert_model(
                    NetworkModule(model),
                    example_input=tuple(inputs),
                    input=[tuple(x.shape) for x in inputs],
                )
            except Exception as exc:  # the kind depends on the part of OpenVINO
                raise OptionError(
                    "OpenVINO cannot convert this model: leave engine at 'torch'"
                ) from exc
        compiled = core.compile_model(converted, self.target, hints)
        try:
            exported = compiled.export_model()
        except RuntimeError as exc:  # not each device allows it
            logger.info("the network that OpenVINO compiled is not kept: %s", exc)
        else:
            is_stream = isinstance(exported, io.BytesIO)
            self.cache.store(name, exported.getvalue() if is_stream else bytes(exported))
        return compiled
