"""A checkpoint becomes a model, and a model a checkpoint.

Classes that a checkpoint names are looked up in `MODEL_CLASSES`; `packages` reads the files.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .demucs import Demucs
from .errors import MissingDependencyError, ModelLoadingError, OptionError
from .hdemucs import HDemucs
from .htdemucs import HTDemucs
from .log import logger
from .packages import ClassName, read_package, write_safetensors
from .utils import capture_init

__all__ = [
    "capture_init",
    "get_state",
    "load_model",
    "save_model",
    "save_with_checksum",
    "set_state",
]

QUANTIZED = "__quantized"  # the key that marks a state of diffq's
CHECKSUM_DIGITS = 8

MODEL_CLASSES: dict[str, type[nn.Module]] = {
    "demucs.demucs.Demucs": Demucs,
    "demucs.hdemucs.HDemucs": HDemucs,
    "demucs.htdemucs.HTDemucs": HTDemucs,
    "demucs.wdemucs.WDemucs": HDemucs,
    "demucs_infer.demucs.Demucs": Demucs,
    "demucs_infer.hdemucs.HDemucs": HDemucs,
    "demucs_infer.htdemucs.HTDemucs": HTDemucs,
}

# Names that a quantized state has for the class of diffq that unpacks it.
QUANTIZERS = {
    "diffq.uniform.UniformQuantizer": "UniformQuantizer",
    "diffq.diffq.DiffQuantizer": "DiffQuantizer",
}

# Options of other releases that act in training only.
TRAINING_OPTIONS = frozenset(
    ("dropout", "weight_decay", "lr", "rescale", "dconv_init", "end_iters", "emb_smooth")
)


def load_model(
    path_or_package: str | os.PathLike[str] | Mapping[str, Any], strict: bool = False
) -> nn.Module:
    """Build the model of a checkpoint file, or of a package that was read before.

    Weights become float32. Options that this release does not know are dropped with a warning if
    they cannot change the result (they act in training only, or are `None` or `False`); with
    `strict` they never are. Raises `ModelLoadingError` otherwise, and for a file or state that
    does not fit; `MissingDependencyError` for a quantized state without diffq.
    """
    if isinstance(path_or_package, Mapping):
        package, label = path_or_package, "the package"
    else:
        package, label = read_package(path_or_package), str(path_or_package)
    try:
        model_class = _model_class(package["klass"])
        args, state = tuple(package.get("args", ())), package["state"]
        kwargs = _known_options(model_class, dict(package.get("kwargs", {})), strict)
        quantized = bool(state.get(QUANTIZED))
        if quantized:
            _import_diffq()
        # Without memory for weights that are about to be replaced, and whatever size is asked for.
        with torch.device("cpu" if quantized else "meta"):
            model = model_class(*args, **kwargs)
        if quantized:
            set_state(model, state)
        else:
            _assign_state(model, state)
    except MissingDependencyError:
        raise
    except ModelLoadingError as exc:
        raise ModelLoadingError(f"{label}: {exc}") from exc
    except OptionError as exc:
        raise ModelLoadingError(f"{label}: has an option that is not supported: {exc}") from exc
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        ZeroDivisionError,
    ) as exc:
        raise ModelLoadingError(f"{label}: does not describe a model ({exc!r})") from exc
    return model.eval()


def _model_class(klass: Any) -> type[nn.Module]:
    """Our class for the one that a package names, or has (a package need not be from a file)."""
    dotted = _dotted_name(klass)
    if dotted not in MODEL_CLASSES:
        raise ModelLoadingError(f"{dotted} is no model class of Demucs")
    return MODEL_CLASSES[dotted]


def _dotted_name(klass: Any) -> str:
    if isinstance(klass, ClassName):
        return klass.dotted
    return f"{klass.__module__}.{klass.__qualname__}" if isinstance(klass, type) else repr(klass)


def _known_options(model_class: Any, kwargs: dict[str, Any], strict: bool) -> dict[str, Any]:
    unknown = [name for name in kwargs if name not in model_class.__signature__.parameters]
    for name in unknown:
        value = kwargs.pop(name)
        harmless = name in TRAINING_OPTIONS or value is None or value is False
        if strict or not harmless:
            raise ModelLoadingError(
                f"{model_class.__name__} has no option {name} ({name}={value!r})"
            )
        logger.warning("%s has no option %s: %r is ignored", model_class.__name__, name, value)
    return kwargs


def _assign_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `model`, which may be without memory, the tensors of `state` as float32."""
    if isinstance(model, Demucs):
        state = model.current_names(state)
    expected = model.state_dict()
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in expected]
    problems += [
        f"{name} has the shape {list(state[name].shape)} and not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if problems:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ModelLoadingError(f"the weights do not fit: {'; '.join(problems[:3])}{more}")
    model.load_state_dict({name: state[name].float() for name in expected}, assign=True)
    model.requires_grad_(True)


def get_state(model: nn.Module, quantizer: Any = None, half: bool = False) -> dict[str, Any]:
    """The weights of `model` on the CPU, as float16 if `half`, or packed by diffq's `quantizer`."""
    if quantizer is not None:
        return {**quantizer.get_quantized_state(), QUANTIZED: True}
    dtype = torch.float16 if half else None
    return {name: tensor.detach().to("cpu", dtype) for name, tensor in model.state_dict().items()}


def set_state(
    model: nn.Module, state: Mapping[str, Any], quantizer: Any = None
) -> Mapping[str, Any]:
    """Put `state`, quantized or not, into `model`, and return it.

    Raises `MissingDependencyError` for a quantized state without diffq.
    """
    if not state.get(QUANTIZED):
        model.load_state_dict(state)
    elif quantizer is not None:
        quantizer.restore_quantized_state(state)
    else:
        quantizer = _quantizer_of(model, state["meta"])
        quantizer.restore_quantized_state(state)
        quantizer.detach()
    return state


def _import_diffq() -> Any:
    try:
        import diffq
    except ImportError as exc:
        raise MissingDependencyError("diffq", "a quantized model", "quantized") from exc
    return diffq


def _quantizer_of(model: nn.Module, meta: Mapping[str, Any]) -> Any:
    """The quantizer of diffq that packed a state."""
    diffq = _import_diffq()
    dotted = _dotted_name(meta["klass"])
    if dotted not in QUANTIZERS:
        raise ModelLoadingError(f"{dotted} is no quantizer of diffq")
    return getattr(diffq, QUANTIZERS[dotted])(model, **meta["init_kwargs"])


def save_with_checksum(content: Any, path: str | os.PathLike[str]) -> Path:
    """Save `content` as `NAME-CHECKSUM.SUFFIX` beside `path`, and return the file's path.

    The checksum is the first 8 hex digits of the file's SHA-256.
    """
    path = Path(path)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    digest = sha256(buffer.getvalue()).hexdigest()[:CHECKSUM_DIGITS]
    path = path.with_name(f"{path.stem}-{digest}{path.suffix}")
    path.write_bytes(buffer.getvalue())
    return path


def save_model(model: nn.Module, path: str | os.PathLike[str], half: bool = False) -> Path:
    """Save `model` as a `.safetensors` checkpoint, which demucs 4.1 reads too.

    Weights are float16 if `half`. Raises `ModelLoadingError` for another module than our models,
    `OSError` if the file cannot be written.
    """
    names = {kind: name for name, kind in reversed(MODEL_CLASSES.items()) if "infer" not in name}
    if type(model) not in names:
        raise ModelLoadingError(f"{type(model).__name__} is no model class of Demucs")
    args, kwargs = model._init_args_kwargs  # type: ignore[misc]
    package = {"klass": ClassName(names[type(model)]), "args": args, "kwargs": kwargs}
    return write_safetensors({**package, "state": get_state(model, half=half)}, path)
