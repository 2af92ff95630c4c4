"""A checkpoint file becomes a model, without running or importing anything that the file names.

Two kinds of files are read: `.th`, a PyTorch zip archive of a pickled dictionary (`klass`, `args`,
`kwargs`, `state`), and `.safetensors`, with the same in its metadata as JSON. In both, a class is a
name that is looked up in `MODEL_CLASSES`. `torch.load(weights_only=True)` is no way to read the
first kind: it refuses the class, and PyTorch before 2.5 cannot be told otherwise.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from fractions import Fraction
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
from .utils import capture_init

__all__ = [
    "capture_init",
    "get_state",
    "load_model",
    "read_package",
    "save_with_checksum",
    "set_state",
]

QUANTIZED = "__quantized"  # the key that marks a state of diffq's
CHECKSUM_DIGITS = 8

MODEL_CLASSES: dict[str, type[nn.Module]] = {
    f"{package}.{name}": model
    for package in ("demucs", "demucs_infer")
    for name, model in {
        "demucs.Demucs": Demucs,
        "htdemucs.HTDemucs": HTDemucs,
        "hdemucs.HDemucs": HDemucs,
        "wdemucs.WDemucs": HDemucs,
    }.items()
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

STORAGE_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


class _Refused(Exception):
    """A file holds something that no checkpoint needs."""


@dataclasses.dataclass(frozen=True)
class _ClassName:
    """A class that a checkpoint names: it can be neither called nor built."""

    dotted: str


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """A view of `storage` that stays within it; stands in for `torch._utils._rebuild_tensor_v2`."""
    numbers = (offset, *size, *stride)
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(size) != len(stride):
        raise _Refused(f"a tensor of shape {size}, stride {stride} and offset {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) and (last >= storage.numel() or math.prod(size) > storage.numel()):
        raise _Refused(f"a tensor of shape {size} in a storage of {storage.numel()} values")
    return storage.as_strided(size, stride, offset)


def _rebuild_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


def _rebuild_fraction(*args: Any) -> Fraction:
    """A fraction of plain integers (as text, an exponent could make it arbitrarily large)."""
    if (
        len(args) == 1
        and isinstance(args[0], str)
        and re.fullmatch(r"-?\d{1,18}(/\d{1,18})?", args[0])
    ):
        return Fraction(args[0])
    if 1 <= len(args) <= 2 and all(isinstance(arg, int) for arg in args):
        return Fraction(*args)
    raise _Refused(f"a fraction of {args!r}")


PICKLE_GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "fractions.Fraction": _rebuild_fraction,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    **STORAGE_DTYPES,
    **{name: _ClassName(name) for name in [*MODEL_CLASSES, *QUANTIZERS]},
}


class _PackageUnpickler(pickle.Unpickler):
    """Reads `data.pkl` of a PyTorch archive; names are looked up in `PICKLE_GLOBALS` only."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.archive, self.root = archive, root
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        if dotted not in PICKLE_GLOBALS:
            raise _Refused(dotted)
        return PICKLE_GLOBALS[dotted]

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise _Refused(f"a persistent {kind!r}")
        if key not in self.storages:
            content = self.archive.read(f"{self.root}/data/{key}")
            if len(content) != numel * dtype.itemsize:
                raise _Refused(f"a storage of {len(content)} bytes for {numel} values of {dtype}")
            empty = torch.empty(0, dtype=dtype)
            self.storages[key] = (
                torch.frombuffer(bytearray(content), dtype=dtype) if numel else empty
            )
        return self.storages[key]


def _read_pickled(path: Path) -> Any:
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # What PyTorch writes is not compressed: no entry can be larger than the file.
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise _Refused("compressed or overlapping entries")
        roots = [
            e.filename[: -len("/data.pkl")] for e in entries if e.filename.endswith("/data.pkl")
        ]
        if len(roots) != 1:
            raise _Refused("an archive that PyTorch did not write")
        order = f"{roots[0]}/byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise _Refused("numbers in big-endian order")
        return _PackageUnpickler(archive, roots[0]).load()


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
    if "klass" not in metadata:
        raise _Refused("no klass in the metadata")
    state: Any = tensors
    if "structure" in metadata:
        state = _unfold_structure(json.loads(metadata["structure"]), tensors)
    return {
        "klass": _ClassName(metadata["klass"]),
        "args": _from_json(json.loads(metadata.get("args", "[]"))),
        "kwargs": _from_json(json.loads(metadata.get("kwargs", "{}"))),
        "state": state,
    }


def _from_json(value: Any) -> Any:
    """Plain values, with fractions where the metadata spells them out."""
    if isinstance(value, dict) and value.get("_type") == "fraction":
        return _rebuild_fraction(value["numerator"], value["denominator"])
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value


def _unfold_structure(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nested state that the metadata's `structure` describes, filled with `tensors`."""
    if not isinstance(node, dict):
        return _from_json(node)
    if len(node) != 1:
        return _from_json(node)
    ((kind, value),) = node.items()
    if kind == "_tensor":
        return tensors[value]
    if kind == "_dict":
        return {key: _unfold_structure(item, tensors) for key, item in value}
    if kind == "_class":
        return _ClassName(value)
    if kind in ("_list", "_tuple"):
        items = [_unfold_structure(item, tensors) for item in value]
        return items if kind == "_list" else tuple(items)
    raise _Refused(f"the structure node {kind!r}: {value!r}")


READERS = {".th": _read_pickled, ".safetensors": _read_safetensors}


def read_package(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint file as a dictionary, with `klass` as a name and not as a class.

    Raises `ModelLoadingError` if it is damaged or holds what no checkpoint needs.
    """
    path = Path(path)
    if path.suffix not in READERS:
        raise ModelLoadingError(f"{path}: a checkpoint is a {' or '.join(READERS)} file")
    try:
        package = READERS[path.suffix](path)
    except FileNotFoundError as exc:
        raise ModelLoadingError(f"{path}: no such checkpoint") from exc
    except _Refused as exc:
        raise ModelLoadingError(
            f"{path}: refused, it holds {exc}, which is no part of a Demucs checkpoint"
        ) from exc
    except Exception as exc:  # whatever a damaged or hostile file brings about
        raise ModelLoadingError(f"{path}: cannot be read as a checkpoint ({exc!r})") from exc
    if not isinstance(package, dict):
        raise ModelLoadingError(f"{path}: holds a {type(package).__name__}, not a Demucs package")
    return package


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
    if isinstance(klass, _ClassName):
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
