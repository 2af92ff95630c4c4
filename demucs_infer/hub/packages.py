"""Checkpoint files as dictionaries, read without running or importing anything that they name.

There are two kinds: `.th`, a PyTorch zip archive of a pickled dictionary, and `.safetensors`, with
the same as JSON in its metadata. The dictionary (a package) has `klass`, `args`, `kwargs` and
`state`; wherever a file names a class, it holds a `ClassName` instead.

`torch.load(weights_only=True)` is no way to read the first kind: it refuses the class, and PyTorch
before 2.5 cannot be told otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from ..errors import ModelLoadingError
from ..utils import appearing, shortened
from .content import Content, Refused
from .pickles import ClassName, make_fraction, read_pickled

LENGTH_BYTES = 8  # that tell the length of a safetensors file's header
MAX_HEADER = 2**22  # bytes: JSON takes many times that; a released checkpoint has 10**5


def _load_safetensors(data: bytes) -> dict[str, Tensor]:
    header = int.from_bytes(data[:LENGTH_BYTES], "little")
    if header > MAX_HEADER:
        raise Refused(f"a header of {header} bytes")
    return safetensors.torch.load(data)


def _read_safetensors(data: bytes) -> dict[str, Any]:
    tensors = _load_safetensors(data)
    header = int.from_bytes(data[:LENGTH_BYTES], "little")
    metadata = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + header]).get("__metadata__") or {}
    if "klass" not in metadata:
        raise Refused("no klass in the metadata")
    state: Any = tensors
    if "structure" in metadata:
        state = _unfold_structure(json.loads(metadata["structure"]), tensors)
    return {
        "klass": ClassName(metadata["klass"]),
        "args": _from_json(json.loads(metadata.get("args", "[]"))),
        "kwargs": _from_json(json.loads(metadata.get("kwargs", "{}"))),
        "state": state,
    }


def _from_json(value: Any) -> Any:
    """Plain values, with fractions where the metadata spells them out."""
    if isinstance(value, dict) and value.get("_type") == "fraction":
        return make_fraction(value["numerator"], value["denominator"])
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
        return ClassName(value)
    if kind in ("_list", "_tuple"):
        items = [_unfold_structure(item, tensors) for item in value]
        return items if kind == "_list" else tuple(items)
    raise Refused(f"the structure node {shortened(kind)}")


WRAPPERS = ("state_dict", "state", "model_state_dict")  # that trainings put weights under
PARALLEL = "module."  # before the names of weights that several GPUs trained

READERS = {".th": read_pickled, ".safetensors": _read_safetensors}


def read_package(file: str | os.PathLike[str] | Content) -> dict[str, Any]:
    """Read a checkpoint file as a dictionary, with `klass` as a name and not as a class.

    Raises `ModelLoadingError` if it is damaged or holds what no checkpoint needs.
    """
    path = file.path if isinstance(file, Content) else Path(file)
    if path.suffix not in READERS:
        raise ModelLoadingError(f"{path}: a checkpoint is a {' or '.join(READERS)} file")
    return _read_with(READERS[path.suffix], file)


def read_state(file: str | os.PathLike[str] | Content) -> dict[str, Any]:
    """Read a PyTorch file that holds a model's weights and nothing else, whatever its suffix.

    Raises `ModelLoadingError` if it is damaged or holds what no checkpoint needs.
    """
    return _read_with(read_pickled, file)


def read_weights(file: str | os.PathLike[str] | Content) -> dict[str, Tensor]:
    """Read the weights of a file that a training saved, with or without what else it keeps.

    What is no tensor is left out, and never run. Raises `ModelLoadingError` if weights are not all
    that is there, or if the file is damaged.
    """
    path = file.path if isinstance(file, Content) else Path(file)
    tensors_only = path.suffix == ".safetensors"
    reader = _load_safetensors if tensors_only else partial(read_pickled, skip=True)
    state: Any = _read_with(reader, file)
    while wrapped := [state[name] for name in WRAPPERS if isinstance(state.get(name), dict)]:
        state = wrapped[0]
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        found = shortened(others[0]) if others else "nothing"
        raise ModelLoadingError(f"{path}: holds {found} where the weights of a model should be")
    return {str(name).removeprefix(PARALLEL): value for name, value in state.items()}


def _read_with(
    reader: Callable[[bytes], Any], file: str | os.PathLike[str] | Content
) -> dict[str, Any]:
    """The dictionary that `reader` makes of a file's bytes, or one kind of error."""
    content = file if isinstance(file, Content) else Content.read(file)
    path = content.path
    try:
        package = reader(content.data)
    except Refused as exc:
        raise ModelLoadingError(
            f"{path}: refused, it holds {exc}, which is no part of a Demucs checkpoint"
        ) from exc
    except Exception as exc:  # whatever a damaged or hostile file brings about
        reason = shortened(exc)
        raise ModelLoadingError(f"{path}: cannot be read as a checkpoint ({reason})") from exc
    if not isinstance(package, dict):
        raise ModelLoadingError(f"{path}: holds a {type(package).__name__}, not a Demucs package")
    return package


def write_safetensors(package: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a package as a `.safetensors` file that this one and demucs 4.1 read.

    `klass` is a `ClassName`. The file appears when it is whole. Raises `ModelLoadingError` if the
    package holds what the format cannot, `OSError` if the file cannot be written.
    """
    path = Path(path)
    metadata = {
        "klass": package["klass"].dotted,
        "args": json.dumps(_to_json(package.get("args", ()))),
        "kwargs": json.dumps(_to_json(package.get("kwargs", {}))),
    }
    state = package["state"]
    tensors: dict[str, Tensor] = {}
    if all(isinstance(value, Tensor) for value in state.values()):
        tensors.update(state)
    else:
        metadata["structure"] = json.dumps(_fold_structure(state, tensors, "state"))
    copies = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    with appearing(path) as temporary:
        safetensors.torch.save_file(copies, temporary, metadata)
    return path


def _to_json(value: Any) -> Any:
    """What `_from_json` undoes. Raises `ModelLoadingError` for what JSON cannot hold."""
    if isinstance(value, Fraction):
        numbers = {"numerator": value.numerator, "denominator": value.denominator}
        return {"_type": "fraction", **numbers}
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ModelLoadingError(f"{value!r} cannot be written as JSON")


def _fold_structure(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """What `_unfold_structure` undoes; the tensors are collected under names of their place."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"_tensor": name}
    if isinstance(value, ClassName):
        return {"_class": value.dotted}
    if isinstance(value, Mapping):
        items = value.items()
        return {"_dict": [[k, _fold_structure(v, tensors, f"{name}.{k}")] for k, v in items]}
    if isinstance(value, (list, tuple)):
        kind = "_list" if isinstance(value, list) else "_tuple"
        return {kind: [_fold_structure(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    return _to_json(value)
