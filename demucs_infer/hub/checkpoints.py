"""Files of models as plain values: checkpoints and bags, read without running code that they name.

A file is read once: the bytes that are hashed are the bytes that are parsed. A checkpoint is a
`.th`, a PyTorch zip archive of a pickled dictionary, or a `.safetensors` with the same as JSON in
its metadata. The dictionary, a package, has `klass`, `args`, `kwargs` and `state`, and a
`ClassName` for each class that the file names. A bag is a `.yaml`.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import ModelLoadingError
from .pickles import ClassName, Refused, check_size, make_fraction, read_pickled

if TYPE_CHECKING:
    from torch import Tensor

MAX_CHECKPOINT = 2**32  # bytes; the largest released one has 3.4e8
MAX_YAML = 2**16  # bytes of a bag or a registry
MAX_MODELS = 64  # of a bag
MAX_HEADER = 2**22  # bytes; the header of a released safetensors file has 1e5
LENGTH_BYTES = 8  # the length of a safetensors header
# Trainings store weights under these keys, and with this prefix if several GPUs trained.
WRAPPERS, PARALLEL = ("state_dict", "state", "model_state_dict"), "module."


@dataclass(frozen=True)
class Content:
    """All bytes of a file, as they were when it was read."""

    path: Path
    data: bytes = field(repr=False)

    @classmethod
    def read(
        cls, path: str | os.PathLike[str], kind: str = "checkpoint", limit: int = MAX_CHECKPOINT
    ) -> Content:
        """Read a regular file of at most `limit` bytes; messages call it a `kind`.

        Raises `ModelLoadingError`.
        """
        path = Path(path)
        try:
            # A named pipe would block when it is opened.
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ModelLoadingError(f"{path}: is not a file")
            with path.open("rb") as file:
                data = file.read(limit + 1) if status.st_size <= limit else None
        except FileNotFoundError as exc:
            raise ModelLoadingError(f"{path}: no such {kind}") from exc
        except (OSError, ValueError, MemoryError) as exc:
            reason = getattr(exc, "strerror", None) or str(exc) or "out of memory"
            raise ModelLoadingError(f"{path}: cannot be read ({reason})") from exc
        if data is None or len(data) > limit:
            size = max(status.st_size, limit + 1)
            raise ModelLoadingError(f"{path}: has {size} bytes, over the limit of {limit}")
        return cls(path, data)

    def yaml(self) -> Any:
        """Return the plain values of a YAML file. Raises `ModelLoadingError`."""
        try:
            values = yaml.load(self.data.decode("utf-8"), PlainLoader)
            check_size(values)
            return values
        except Exception as exc:
            # PyYAML's constructors raise many kinds of exceptions for malformed values.
            text = " ".join(str(exc).split()) or type(exc).__name__
            raise ModelLoadingError(f"{self.path}: is not valid YAML ({text[:300]})") from exc

    def checked(self, checksum: str, remedy: str = "Fetch it again") -> Content:
        """Return this. Raises `ModelLoadingError` unless the SHA-256 starts with `checksum`."""
        actual = sha256(self.data).hexdigest()[: len(checksum)] if checksum else ""
        if actual != checksum:
            text = f"{self.path}: is damaged: its checksum is {actual} and should be {checksum}"
            raise ModelLoadingError(". ".join(filter(None, (text, remedy))))
        return self


class PlainLoader(yaml.SafeLoader):
    """Makes plain values. Merge keys are ignored, as a few lines of them can fill the memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave merge keys alone."""

    def decimal(self, node: Any) -> int:
        """Make a whole number. Raises `ValueError` for other notations, which can be endless."""
        text = self.construct_scalar(node)
        if not re.fullmatch("[-+]?[0-9]{1,18}", str(text)):
            raise ValueError(f"{str(text)[:40]!r} is not a whole number of moderate size")
        return int(text)


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.decimal)


@dataclass(frozen=True)
class Bag:
    """The models of a bag by signature, a row of weights for each, and seconds of a window."""

    models: tuple[str, ...]
    weights: list[list[float]] | None = None
    segment: float | None = None

    @classmethod
    def read(cls, path: Path) -> Bag:
        """Read `NAME.yaml`. Raises `ModelLoadingError` if it is not a bag."""
        content = Content.read(path, "bag", MAX_YAML).yaml()
        try:
            signatures, weights, segment = map(content.get, ("models", "weights", "segment"))
            if not isinstance(signatures, list):
                raise TypeError("it does not list its models")
            if len(signatures) > MAX_MODELS:
                raise TypeError(f"it lists {len(signatures)} models, and the limit is {MAX_MODELS}")
            if not all(isinstance(signature, (str, int)) for signature in signatures):
                raise TypeError("it lists models that are not signatures")
            rows = None if weights is None else [list(map(_number, row)) for row in weights]
            seconds = None if segment is None else _number(segment)
        except (AttributeError, TypeError, ValueError, OverflowError) as exc:
            raise ModelLoadingError(f"{path}: is not a bag ({exc})") from exc
        return cls(tuple(map(str, signatures)), rows, seconds)


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{str(value)[:40]!r} is not a number")
    return float(value)


def read_package(file: str | os.PathLike[str] | Content) -> dict[str, Any]:
    """Read a checkpoint file as a dictionary, with `klass` as a name and not as a class.

    Raises `ModelLoadingError` if it is damaged or holds values that no checkpoint needs.
    """
    readers = {".th": read_pickled, ".safetensors": _read_safetensors}
    path = file.path if isinstance(file, Content) else Path(file)
    if path.suffix not in readers:
        raise ModelLoadingError(f"{path}: a checkpoint is a {' or '.join(readers)} file")
    return _read_with(readers[path.suffix], file)


def read_weights(file: str | os.PathLike[str] | Content) -> dict[str, Tensor]:
    """Read the weights of a file that a training saved, with or without the training's state.

    Objects that are not tensors are left out, and never run. Raises `ModelLoadingError` if there
    are other values among the weights, or if the file is damaged.
    """
    from torch import Tensor

    path = file.path if isinstance(file, Content) else Path(file)
    if path.suffix == ".safetensors":
        state: Any = _read_with(lambda data: _load_safetensors(data)[0], file)
    else:
        state = _read_with(partial(read_pickled, skip=True), file)
    while wrapped := [state[name] for name in WRAPPERS if isinstance(state.get(name), dict)]:
        state = wrapped[0]
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others or not state:
        found = repr(others[0])[:200] if others else "nothing"
        raise ModelLoadingError(f"{path}: holds {found} where the weights of a model should be")
    return {str(name).removeprefix(PARALLEL): value for name, value in state.items()}


def _read_with(
    reader: Callable[[bytes], Any], file: str | os.PathLike[str] | Content
) -> dict[str, Any]:
    """Return the dictionary that `reader` makes of a file. Raises `ModelLoadingError`."""
    from ..utils import shortened

    content = file if isinstance(file, Content) else Content.read(file)
    path = content.path
    try:
        package = reader(content.data)
    except Refused as exc:
        text = f"refused, it holds {exc}, which is not part of a Demucs checkpoint"
        raise ModelLoadingError(f"{path}: {text}") from exc
    except Exception as exc:
        # Damaged and hostile files raise exceptions of all kinds.
        reason = shortened(exc)
        raise ModelLoadingError(f"{path}: cannot be read as a checkpoint ({reason})") from exc
    if not isinstance(package, dict):
        raise ModelLoadingError(f"{path}: holds a {type(package).__name__}, not a Demucs package")
    return package


def _load_safetensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file."""
    import safetensors.torch

    header = int.from_bytes(data[:LENGTH_BYTES], "little")
    if header > MAX_HEADER:
        raise Refused(f"a header of {header} bytes")
    tensors = safetensors.torch.load(data)
    facts = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + header])
    return tensors, facts.get("__metadata__") or {}


def _read_safetensors(data: bytes) -> dict[str, Any]:
    tensors, metadata = _load_safetensors(data)
    if "klass" not in metadata:
        raise Refused("no klass in the metadata")

    def parsed(field: str, default: str) -> Any:
        return json.loads(metadata.get(field, default), object_hook=partial(_from_node, tensors))

    return {
        "klass": ClassName(metadata["klass"]),
        "args": parsed("args", "[]"),
        "kwargs": parsed("kwargs", "{}"),
        "state": parsed("structure", "null") if "structure" in metadata else tensors,
    }


def _from_node(tensors: Mapping[str, Tensor], node: dict[str, Any]) -> Any:
    """Undo `_to_json` for one object of JSON, whose values are done already."""
    if node.get("_type") == "fraction":
        return make_fraction(node["numerator"], node["denominator"])
    kind: str = next(iter(node)) if len(node) == 1 else ""
    value: Any = node.get(kind)
    if kind == "_tensor":
        return tensors[value]
    if kind == "_dict":
        return dict(value)
    if kind == "_class":
        return ClassName(value)
    if kind in ("_list", "_tuple"):
        return list(value) if kind == "_list" else tuple(value)
    if kind.startswith("_"):
        raise Refused(f"the structure node {kind[:40]!r}")
    return node


def _to_json(value: Any, tensors: dict[str, Tensor] | None = None, name: str = "state") -> Any:
    """Return a value as JSON, with `tensors` for a nested state: it collects those of the state.

    Raises `ModelLoadingError` for a value that the format cannot hold.
    """
    from torch import Tensor

    if isinstance(value, Fraction):
        return {"_type": "fraction", "numerator": value.numerator, "denominator": value.denominator}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    nested = tensors is not None
    if isinstance(value, Mapping):
        items = [[key, _to_json(item, tensors, f"{name}.{key}")] for key, item in value.items()]
        return {"_dict": items} if nested else {str(key): item for key, item in items}
    if isinstance(value, (list, tuple)):
        items = [_to_json(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
        return {"_list" if isinstance(value, list) else "_tuple": items} if nested else items
    if tensors is not None and isinstance(value, Tensor):
        tensors[name] = value
        return {"_tensor": name}
    if nested and isinstance(value, ClassName):
        return {"_class": value.dotted}
    raise ModelLoadingError(f"{value!r} cannot be written as JSON")


def write_safetensors(package: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Write a package as a `.safetensors` file that demucs 4.1 reads, too.

    `klass` is a `ClassName`. The file appears when it is whole. Raises `ModelLoadingError` if the
    package holds values that the format cannot, `OSError` if the file cannot be written.
    """
    import safetensors.torch
    import torch
    from torch import Tensor

    from ..utils import atomic_write

    metadata = {
        "klass": package["klass"].dotted,
        "args": json.dumps(_to_json(package.get("args", ()))),
        "kwargs": json.dumps(_to_json(package.get("kwargs", {}))),
    }
    tensors: dict[str, Tensor] = dict(package["state"])
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        tensors = {}
        metadata["structure"] = json.dumps(_to_json(package["state"], tensors))
    copies = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    with atomic_write(Path(path)) as temporary:
        safetensors.torch.save_file(copies, temporary, metadata)
    return Path(path)
