"""A PyTorch archive, read by a machine that knows the few things that a checkpoint needs.

It is the standard library's reader in Python with most of its instructions taken out. The one in C
has memory for as many values as the largest number in the file says.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ..utils import shortened
from .content import Refused, check_size

MAX_PICKLE = 2**21  # bytes; a released checkpoint has 10**5
MAX_ENTRIES = 50_000  # of an archive, one for each tensor
MAX_TERM = 10**18  # of a fraction
MAX_SIZE = 2**62  # of one dimension
MAX_DIMS = 8  # of a tensor; the product of a million sizes takes hours

# The classes that may be named; which of them are models, `states` knows.
CLASS_NAME = re.compile(r"(demucs|demucs_infer|diffq)(\.\w+)+")

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

# What the reader in Python does for these instructions is safe, whatever their operands.
PLAIN_INSTRUCTIONS = [
    getattr(pickle, name)[0]
    for name in (
        "PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1"
        " BINFLOAT BINUNICODE SHORT_BINUNICODE BINBYTES SHORT_BINBYTES EMPTY_TUPLE TUPLE TUPLE1"
        " TUPLE2 TUPLE3 EMPTY_LIST EMPTY_DICT BINGET LONG_BINGET BINPUT LONG_BINPUT MEMOIZE"
        " BINPERSID GLOBAL STACK_GLOBAL"
    ).split()
]


@dataclass(frozen=True)
class ClassName:
    """A class that a checkpoint names: it can be neither called nor built."""

    dotted: str


@dataclass(frozen=True)
class Skipped:
    """An object that is no part of a model's weights, left out; nothing can be done with it."""


SKIPPED = Skipped()


def make_fraction(*args: Any) -> Fraction:
    """A fraction of plain integers (as text, an exponent could make it arbitrarily large)."""
    if len(args) == 1 and isinstance(args[0], str):
        found = re.fullmatch(r"(-?\d{1,18})(?:/(\d{1,18}))?", args[0])
        args = tuple(int(term) for term in found.groups("1")) if found else ()
    whole = all(isinstance(term, int) and abs(term) <= MAX_TERM for term in args)
    if 1 <= len(args) <= 2 and whole and args[1:] != (0,):
        return Fraction(*args)
    raise Refused(f"a fraction of {shortened(args)}")


def _make_dict(*args: Any) -> OrderedDict[Any, Any]:
    if args:
        raise Refused("a dictionary that is made of something")
    return OrderedDict()


def _make_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """A view of `storage` that stays within it; stands in for `torch._utils._rebuild_tensor_v2`."""
    sizes = isinstance(size, tuple) and isinstance(stride, tuple)
    if not (
        sizes
        and len(size) == len(stride) <= MAX_DIMS
        and all(isinstance(n, int) and 0 <= n <= MAX_SIZE for n in (offset, *size, *stride))
    ):
        raise Refused(f"a tensor of shape {shortened(size)}, stride {shortened(stride)}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    if math.prod(size) and (last >= storage.numel() or math.prod(size) > storage.numel()):
        raise Refused(
            f"a tensor of shape {shortened(size)} in a storage of {storage.numel()} values"
        )
    return storage.as_strided(size, stride, offset)


def _make_parameter(data: Tensor, *_: Any) -> Tensor:
    return data


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _make_dict,
    "fractions.Fraction": make_fraction,
    "torch._utils._rebuild_tensor_v2": _make_tensor,
    "torch._utils._rebuild_parameter": _make_parameter,
}


class _Instructions(dict[int, Callable[[Any], None]]):
    def __missing__(self, key: int) -> Callable[[Any], None]:
        raise Refused(f"the pickle instruction {key}")


class _Machine(pickle._Unpickler):
    """Reads `data.pkl` of an archive; with `skip`, objects of unknown classes are left out."""

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
        if dotted in STORAGE_DTYPES:
            return STORAGE_DTYPES[dotted]
        if CLASS_NAME.fullmatch(dotted):
            return ClassName(dotted)
        if self.skip:
            return SKIPPED
        raise Refused(shortened(dotted))

    def persistent_load(self, pid: Any) -> Tensor:
        kind, dtype, key, _, numel = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str):
            raise Refused(f"a persistent {shortened(kind)}")
        if key not in self.storages:
            content = self.archive.read(f"{self.root}/data/{key}")
            if len(content) != numel * dtype.itemsize:
                raise Refused(
                    f"a storage of {len(content)} bytes for {shortened(numel)} values of {dtype}"
                )
            empty = torch.empty(0, dtype=dtype, device="cpu")
            self.storages[key] = (
                torch.frombuffer(bytearray(content), dtype=dtype) if numel else empty
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
            raise Refused(f"a call of {shortened(function)}")

    def build(self) -> None:
        """Leave out the attributes of a dictionary of weights: their versions."""
        self.stack.pop()
        if not isinstance(self.stack[-1], (OrderedDict, Skipped)):
            raise Refused(f"attributes of {shortened(self.stack[-1])}")

    def append_one(self) -> None:
        self._extend([self.stack.pop()])

    def append_many(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif target is not SKIPPED:
            raise Refused(f"items of {shortened(target)}")

    def set_one(self) -> None:
        value = self.stack.pop()
        self._set([self.stack.pop(), value])

    def set_many(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if target is SKIPPED:
            return
        # The hash of a tuple that holds itself twice, and so on, takes forever.
        if not isinstance(target, dict) or not all(isinstance(k, (str, int)) for k in items[::2]):
            raise Refused(f"keys of {shortened(target)}")
        target.update(zip(items[::2], items[1::2]))

    dispatch = _Instructions(
        {
            **{code: pickle._Unpickler.dispatch[code] for code in PLAIN_INSTRUCTIONS},
            pickle.REDUCE[0]: call,
            pickle.NEWOBJ[0]: call,
            pickle.BUILD[0]: build,
            pickle.APPEND[0]: append_one,
            pickle.APPENDS[0]: append_many,
            pickle.SETITEM[0]: set_one,
            pickle.SETITEMS[0]: set_many,
        }
    )


def read_pickled(data: bytes, skip: bool = False) -> Any:
    """What the archive `data` holds. Raises `Refused`, or what the damage brings about.

    With `skip`, objects that are no part of a model's weights are `SKIPPED`.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        root = _check_archive(archive, len(data))
        value = _Machine(archive, root, skip).load()
    check_size(value)
    return value


def _check_archive(archive: zipfile.ZipFile, size: int) -> str:
    """The folder of an archive of `size` bytes that its entries are in."""
    entries = archive.infolist()
    # What PyTorch writes is not compressed: no entry can be larger than the file.
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > size or len(entries) > MAX_ENTRIES:
        raise Refused("compressed, overlapping or too many entries")
    if len({entry.filename for entry in entries}) < len(entries):
        raise Refused("entries of one name")  # of which each reader takes another
    roots = [e.filename[: -len("/data.pkl")] for e in entries if e.filename.endswith("/data.pkl")]
    if len(roots) != 1:
        raise Refused("an archive that PyTorch did not write")
    order = f"{roots[0]}/byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise Refused("numbers in big-endian order")
    return roots[0]
