"""Small helpers for all other modules."""

from __future__ import annotations

import functools
import inspect
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from fractions import Fraction
from numbers import Integral, Real
from pathlib import Path
from reprlib import Repr
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .errors import OptionError
from .log import fatal as fatal

Init = TypeVar("Init", bound=Callable[..., None])

DRAWING = frozenset(("normal_", "uniform_", "trunc_normal_", "bernoulli_", "random_"))
_shorten = Repr()
_shorten.maxother = _shorten.maxstring = 200  # characters
_shorten.maxlevel = 3  # of containers: each may have six in it
MAX_WORDS = 400  # characters of a value in a message

LARGEST = 2**63  # of the numbers in options: PyTorch's integers end there
MAX_LAYERS = 64  # repetitions of one kind of layer
# Options that a model may have or not.
POSITIVE = ("samplerate", "segment", "audio_channels", "nfft", "dconv_comp", "t_max_period")
LIMITS = {"samplerate": 10**6, "nfft": 2**16, "wiener_iters": 16}
FILE_NAME = r"""(?!\.)[^\x00-\x1f/\\:*?"<>|]+"""  # may be part of a file's name on every system


def center_trim(tensor: Tensor, reference: Tensor | int) -> Tensor:
    """Cut `tensor` `[..., T]` to the length of `reference`, as much at either end.

    `reference` is a length in samples, or a tensor whose last dimension has it. An odd
    sample is cut at the end. Raises `ValueError` if `tensor` is the shorter one.
    """
    length = reference if isinstance(reference, int) else reference.shape[-1]
    excess = tensor.shape[-1] - length
    if excess < 0:
        raise ValueError(f"cannot trim {tensor.shape[-1]} samples to {length}")
    return tensor.narrow(-1, excess // 2, length)


def unfold(a: Tensor, kernel_size: int, stride: int) -> Tensor:
    """Return frames of `a` `[*, T]`, as `[*, F, kernel_size]` with `F = ceil(T / stride)`.

    The end is padded with zeros, so that no frame is cut.
    """
    *_, length = a.shape
    frames = -(-length // stride)
    padded = F.pad(a, (0, (frames - 1) * stride + kernel_size - length))
    starts = torch.arange(frames, dtype=torch.int64, device=a.device) * stride
    # By indices, as OpenVINO does not convert `Tensor.unfold` here.
    return padded[
        ..., starts[:, None] + torch.arange(kernel_size, dtype=torch.int64, device=a.device)
    ]


def standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`x` `[B, ...]` with zero mean and unit deviation per item, then that mean and deviation.

    The deviation is the unbiased one, and zero for a single value (where that has no meaning).
    """
    dims = tuple(range(1, x.dim()))
    mean = x.mean(dim=dims, keepdim=True)
    std = x.std(dim=dims, keepdim=True, correction=min(1, x[0].numel() - 1))
    return (x - mean).div_(eps + std), mean, std


def pick_sources(x: Tensor, indices: Sequence[int] | None) -> Tensor:
    """Return the sources `indices` of `x` `[B, S, ...]`; if those are all, `x` without a copy."""
    return x if indices is None or list(indices) == list(range(x.shape[1])) else x[:, list(indices)]


def run_network(network: Any, model: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Run `network` on `inputs` in the dtype of `model`'s parameters; return their own dtype."""
    outer, inner = inputs[0].dtype, next(model.parameters()).dtype
    return tuple(y.to(outer) for y in network(*(x.to(inner) for x in inputs)))


def capture_init(init: Init) -> Init:
    """Decorate an `__init__` to keep its arguments in `_init_args_kwargs`, for checkpoints."""

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        self._init_args_kwargs = (args, kwargs)
        init(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


class Uninitialized(TorchFunctionMode):
    """Skip the drawing of initial weights while a model is built that then gets others.

    On PyTorch's device `meta`, drawing would import its compiler, which takes a second and a folder
    for temporary files.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == nn.init.__name__ or func.__name__ in DRAWING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def signature_of(options: type) -> inspect.Signature:
    """Return the signature of the dataclass `options`, for a class with the same parameters."""
    return inspect.signature(options)


def check_architecture(options: Any, *counts: str) -> None:
    """Raise `OptionError` for options that no model can have, since checkpoints are not trusted.

    Values must have the types that the dataclass declares. `counts` are the options that are
    numbers of layers (of either sign).
    """
    # Annotations are text here, and must be evaluated.
    for name, kind in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if get_origin(kind) is ClassVar:
            continue
        if not _fits(value, kind) and not (name == "segment" and _fits(value, Fraction)):
            wanted = options.__annotations__[name]
            raise OptionError(f"{name}={shortened(value)} must be {wanted}, and finite")
    sources = list(options.sources)
    are_names = all(re.fullmatch(FILE_NAME, source) for source in sources)
    if len(set(sources)) != len(sources) or not are_names or not sources:
        raise OptionError(f"sources={shortened(sources)} cannot be names of files")
    for name in POSITIVE:
        value = getattr(options, name, 1)
        if value <= 0:
            raise OptionError(f"{name}={shortened(value)} must be more than 0")
    limits = {**LIMITS, **dict.fromkeys(counts, MAX_LAYERS)}
    for name, limit in limits.items():
        value = getattr(options, name, 0)
        if abs(value) > limit:
            raise OptionError(f"{name}={shortened(value)} is more than {limit}")


def _fits(value: Any, kind: Any) -> bool:
    """Return True if `value` has the type `kind`. Integers pass as floats, and 0 and 1 as bool."""
    parts = get_args(kind)
    if get_origin(kind) is Sequence:
        listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
        return listed and all(_fits(item, parts[0]) for item in value)
    if parts:
        return any(_fits(value, part) for part in parts)
    if kind is bool:
        return isinstance(value, bool) or (isinstance(value, Integral) and value in (0, 1))
    if kind is int:
        return isinstance(value, Integral) and abs(int(value)) < LARGEST
    if kind is float:
        real = isinstance(value, Real) and not isinstance(value, Fraction)
        return real and -LARGEST < value < LARGEST
    return isinstance(value, kind)


def shortened(value: Any) -> str:
    """Return a value as text for a message, in one line of moderate length."""
    words = " ".join(_shorten.repr(value).split())
    return words if len(words) <= MAX_WORDS else f"{words[:MAX_WORDS]}..."


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Lend a temporary file that is renamed to `path` if the block succeeds, and removed if not.

    Raises `OSError` if the file cannot be created.
    """
    # `open` gives the file the usual permissions, which `tempfile` would not.
    temporary = path.with_name(f".{path.stem[:100]}-{secrets.token_hex(4)}.part")
    temporary.open("xb").close()
    rights = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        temporary.chmod(rights)  # safetensors replaces the file by a private one
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class DummyPoolExecutor(Executor):
    """An executor that runs each call at once, in the caller's thread."""

    def __init__(self, workers: int = 0) -> None:
        """Take the number of workers, as other executors do, and ignore it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future
