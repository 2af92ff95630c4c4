"""A reader of PyTorch archives that knows the few instructions that a checkpoint needs.

It is the standard library's unpickler in Python with most instructions taken out. The one in C
allocates memory for as many values as the largest number in the file. `torch.load` with
`weights_only` refuses the model's class, and PyTorch before 2.5 cannot be told otherwise.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

MAX_PICKLE = 2**21  # bytes; a released checkpoint has 1e5
MAX_ENTRIES = 50_000  # of an archive, one for each tensor
MAX_SIZE = 2**62  # of one dimension of a tensor
MAX_DIMS = 8  # of a tensor; the product of a million sizes would take hours
MAX_VALUES = 10**6  # in containers, counted as often as they are reached
MAX_DEPTH = 32  # of containers

# The classes that may be named. `states` knows which of them are models.
CLASS_NAME = re.compile(r"(demucs|demucs_infer|diffq)(\.\w+)+")
DTYPES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
# The unpickler's code for these instructions is safe, whatever their operands are.
PLAIN_INSTRUCTIONS = [
    getattr(pickle, name)[0]
    for name in (
        "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1"
        " BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1"
        " TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE"
        " BINPERSID GLOBAL STACK_GLOBAL"
    ).split()
]


class Refused(Exception):
    """A file holds something that no checkpoint needs."""


@dataclass(frozen=True)
class ClassName:
    """A class that a checkpoint names: it can be neither called nor built."""

    dotted: str


SKIPPED = ClassName("an object that is not part of a model's weights")


def _short(value: Any) -> str:
    from ..utils import shortened

    return shortened(value)


def check_size(value: Any, known: dict[int, int] | None = None, depth: int = 0) -> int:
    """Count the values in nested containers, each as often as it is reached.

    Raises `Refused` for containers that hold themselves, or each other too often to be walked.
    `known` has the counts of those that were reached before.
    """
    known = {} if known is None else known
    if not isinstance(value, (Mapping, list, tuple)):
        return 1
    if depth > MAX_DEPTH:
        raise Refused(f"containers nested more than {MAX_DEPTH} deep")
    if id(value) not in known:
        items = value.values() if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(check_size(item, known, depth + 1) for item in items)
    if known[id(value)] > MAX_VALUES:
        raise Refused(f"more than {MAX_VALUES} values")
    return known[id(value)]


def make_fraction(*terms: Any) -> Fraction:
    """Make a fraction of whole numbers. In a text, an exponent could make it arbitrarily large."""
    if len(terms) == 1 and isinstance(terms[0], str):
        found = re.fullmatch(r"(-?[0-9]{1,18})(?:/([0-9]{1,18}))?", terms[0])
        terms = tuple(int(term) for term in found.groups("1")) if found else ()
    whole = all(isinstance(term, int) and abs(term) <= 10**18 for term in terms)
    if 1 <= len(terms) <= 2 and whole and terms[1:] != (0,):
        return Fraction(*terms)
    raise Refused(f"a fraction of {_short(terms)}")


def _make_dict(*args: Any) -> OrderedDict[Any, Any]:
    if args:
        raise Refused("a dictionary with initial values")
    return OrderedDict()


def _make_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """Return a view within `storage`, as `torch._utils._rebuild_tensor_v2` does without checks."""
    tuples = isinstance(size, tuple) and isinstance(stride, tuple)
    if (
        not tuples
        or not len(size) == len(stride) <= MAX_DIMS
        or not all(isinstance(n, int) and 0 <= n <= MAX_SIZE for n in (offset, *size, *stride))
    ):
        raise Refused(f"a tensor of shape {_short(size)}, stride {_short(stride)}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) and (last >= storage.numel() or math.prod(size) > storage.numel()):
        raise Refused(f"a tensor of shape {_short(size)} in a storage of {storage.numel()} values")
    return storage.as_strided(size, stride, offset)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _make_dict,
    "fractions.Fraction": make_fraction,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
}


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, key: int) -> Callable[[Any], None]:
        raise Refused(f"the pickle instruction {key}")


class _Unpickler(pickle._Unpickler):
    """Reads `data.pkl` of an archive. With `skip`, objects of unknown classes are left out."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, archive: zipfile.ZipFile, root: str, skip: bool) -> None:
        content = archive.read(f"{root}/data.pkl")
        if len(content) > MAX_PICKLE:
            raise Refused(f"a pickle of {len(content)} bytes")
        super().__init__(io.BytesIO(content))
        self.archive, self.root, self.skip = archive, root, skip
        self.storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        dotted = f"{module}.{name}"
        if dotted in FUNCTIONS:
            return FUNCTIONS[dotted]
        if dotted in DTYPES or CLASS_NAME.fullmatch(dotted):
            return ClassName(dotted)
        if self.skip:
            return SKIPPED
        raise Refused(_short(dotted))

    def persistent_load(self, pid: Any) -> Tensor:
        import torch

        kind, storage, key, _, numel = pid
        name = DTYPES.get(storage.dotted) if isinstance(storage, ClassName) else None
        if kind != "storage" or name is None or not isinstance(key, str):
            raise Refused(f"a persistent {_short(kind)}")
        if key not in self.storages:
            content, dtype = self.archive.read(f"{self.root}/data/{key}"), getattr(torch, name)
            if len(content) != numel * dtype.itemsize:
                raise Refused(
                    f"a storage of {len(content)} bytes for {_short(numel)} values of {dtype}"
                )
            # `frombuffer` refuses an empty buffer.
            self.storages[key] = (
                torch.frombuffer(bytearray(content), dtype=dtype)
                if numel
                else torch.empty(0, dtype=dtype, device="cpu")
            )
        return self.storages[key]

    def call(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if function is SKIPPED:
            self.stack.append(SKIPPED)
        elif any(function is known for known in FUNCTIONS.values()):
            self.stack.append(function(*arguments))
        else:
            raise Refused(f"a call of {_short(function)}")

    def build(self) -> None:
        # The attributes of a dictionary of weights, which are versions, are left out.
        self.stack.pop()
        if not (isinstance(self.stack[-1], OrderedDict) or self.stack[-1] is SKIPPED):
            raise Refused(f"attributes of {_short(self.stack[-1])}")

    def extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif target is not SKIPPED:
            raise Refused(f"items of {_short(target)}")

    def pop_pair(self) -> list[Any]:
        value = self.stack.pop()
        return [self.stack.pop(), value]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target is SKIPPED:
            return
        # The hash of a tuple that holds itself twice, and so on, would never be done.
        if not isinstance(target, dict) or not all(isinstance(k, (str, int)) for k in items[::2]):
            raise Refused(f"keys of {_short(target)}")
        target.update(zip(items[::2], items[1::2]))

    dispatch = _Instructions(
        {
            **{code: pickle._Unpickler.dispatch[code] for code in PLAIN_INSTRUCTIONS},
            pickle.REDUCE[0]: call,
            pickle.NEWOBJ[0]: call,
            pickle.BUILD[0]: build,
            pickle.APPEND[0]: lambda self: self.extend([self.stack.pop()]),
            pickle.APPENDS[0]: lambda self: self.extend(self.pop_mark()),
            pickle.SETITEM[0]: lambda self: self.set_items(self.pop_pair()),
            pickle.SETITEMS[0]: lambda self: self.set_items(self.pop_mark()),
        }
    )


def read_pickled(data: bytes, skip: bool = False) -> Any:
    """Return the object in the archive `data`. Raises `Refused`, or another error for damage.

    With `skip`, objects that are not part of a model's weights are `SKIPPED`.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        # PyTorch does not compress: no entry can be larger than the file.
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        total = sum(entry.file_size for entry in entries)
        if packed or total > len(data) or len(entries) > MAX_ENTRIES:
            raise Refused("compressed, overlapping or too many entries")
        names = {entry.filename for entry in entries}
        # Of two entries of one name, each reader would take another.
        if len(names) < len(entries):
            raise Refused("two entries of one name")
        roots = [name[: -len("/data.pkl")] for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Refused("an archive that PyTorch did not write")
        order = f"{roots[0]}/byteorder"
        if order in names and archive.read(order) != b"little":
            raise Refused("numbers in big-endian order")
        value = _Unpickler(archive, roots[0], skip).load()
    check_size(value)
    return value
