"""A model run on shapes alone: what would fail in its first window fails when it is loaded.

PyTorch's device for that, `meta`, imports its compiler, which takes a second and a temporary
folder, and runs an LSTM step by step. Here every result is an outline, one zero that is expanded
to its shape: views of it are views, and the rules below know the shapes of what is no view. What
has no rule is computed on the outlines, and its result becomes one. What does not depend on the
window is computed as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import ModelLoadingError

# What a window's largest tensor may take: a small file should not ask for a large machine.
FREE_BYTES = 10**8
BYTES_PER_WEIGHT = 16
STEP_BYTES = 1024  # that a step of an LSTM counts for: they are taken one after the other
# The device of outlines, so that no path is taken for the sake of a processor.
HERE, NOWHERE = torch.device("cpu"), torch.device("meta")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64)
ZEROS = {dtype: torch.zeros((), dtype=dtype, device=HERE) for dtype in DTYPES}
PLACES = frozenset(zero.data_ptr() for zero in ZEROS.values())


def check_window(model: nn.Module) -> None:
    """Raise `ModelLoadingError` unless `model` can run a window of its segment."""
    checked: Any = model
    if getattr(checked.options, "wiener_iters", 0) > 0:  # iterates on values
        return
    length = int(checked.segment * checked.samplerate)
    shape = (1, len(checked.sources), checked.audio_channels, length)
    limit = FREE_BYTES + BYTES_PER_WEIGHT * sum(p.numel() for p in model.parameters())
    try:
        with torch.no_grad(), _Outlines(limit):
            result = model(outline((1, checked.audio_channels, length)))
    except ModelLoadingError:
        raise
    except Exception as exc:
        raise ModelLoadingError(f"cannot run a window of {length} samples ({exc!r})") from exc
    if result.shape != shape:
        raise ModelLoadingError(f"makes {list(result.shape)} of a window instead of {list(shape)}")


def outline(shape: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of zeros without memory."""
    return ZEROS[dtype].expand(tuple(shape))


def _is_nowhere(value: Any) -> bool:
    return isinstance(value, torch.device) and value == NOWHERE


def _has_outlines(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_has_outlines, value))
    return isinstance(value, Tensor) and value.data_ptr() in PLACES


class _Outlines(TorchFunctionMode):
    """Makes an outline of every result, none of which may be larger than `limit` bytes."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        args = tuple(HERE if _is_nowhere(value) else value for value in args)
        kwargs = {k: HERE if _is_nowhere(v) else v for k, v in (kwargs or {}).items()}
        # What does not depend on the window is real: it may be kept, as resampling filters are.
        if not _has_outlines((*args, *kwargs.values())):
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return NOWHERE
        name = func.__name__
        if name == "lstm":
            self._check(args[0].shape[0] * STEP_BYTES)
        if name == "scaled_dot_product_attention":
            self._check(4 * args[0].shape[-2] * args[1].shape[-2])
        if name.endswith("_") and not name.endswith("__"):
            return _written(*args)
        return self._outlined(
            RULES[name](*args, **kwargs) if name in RULES else func(*args, **kwargs)
        )

    def _outlined(self, result: Any) -> Any:
        if isinstance(result, (tuple, list)) and not isinstance(result, torch.Size):
            return type(result)(self._outlined(item) for item in result)
        if not isinstance(result, Tensor):
            return result
        self._check(result.numel() * result.element_size())
        return outline(result.shape, result.dtype) if result.dtype in ZEROS else result

    def _check(self, size: int) -> None:
        if size > self.limit:
            raise ModelLoadingError(
                f"a window takes a tensor of {size} bytes, more than the {self.limit} that"
                " a model of its size may take: its segment is too long"
            )


def _require(condition: bool, *facts: Any) -> None:
    if not condition:
        raise ValueError("shapes that do not fit: " + ", ".join(map(str, facts)))


def _written(target: Tensor, *values: Any, **_: Any) -> Tensor:
    """The target of an operation in place."""
    result = _elementwise(target, *values)
    _require(result.shape == target.shape, list(target.shape), list(result.shape))
    return target


def _elementwise(*values: Any, **_: Any) -> Tensor:
    tensors = [value for value in values if isinstance(value, Tensor)]
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return outline(_broadcast(*(tensor.shape for tensor in tensors)), dtype)


def _broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """What PyTorch's function says, which imports the compiler for that."""
    longest = max(map(len, shapes))
    sizes = zip(*((1,) * (longest - len(shape)) + tuple(shape) for shape in shapes))
    result = tuple(next((size for size in column if size != 1), 1) for column in sizes)
    for shape in shapes:
        fits = all(size in (1, most) for size, most in zip(shape[::-1], result[::-1]))
        _require(fits, *map(list, shapes))
    return result


def _first(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _assigned(target: Tensor, index: Any, value: Any) -> None:
    part = target[index]
    if isinstance(value, Tensor):
        _require(_broadcast(part.shape, value.shape) == part.shape, *part.shape)


def _numbers(value: Any, count: int) -> tuple[int, ...]:
    return (value,) * count if isinstance(value, int) else tuple(value)


def _convolved(
    x: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    chout, chin, *kernel = weight.shape
    per_dim = (_numbers(value, len(kernel)) for value in (stride, padding, dilation))
    sizes = [
        (size + 2 * pad - gap * (width - 1) - 1) // step + 1
        for size, width, step, pad, gap in zip(x.shape[2:], kernel, *per_dim)
    ]
    _require(
        x.shape[1] == chin * groups and min(chout, *sizes) > 0, list(x.shape), list(weight.shape)
    )
    return outline((x.shape[0], chout, *sizes))


def _transposed(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, *_: Any
) -> Tensor:
    chin, chout, *kernel = weight.shape
    per_dim = (_numbers(value, len(kernel)) for value in (stride, padding))
    sizes = [
        (size - 1) * step + width - 2 * pad
        for size, width, step, pad in zip(x.shape[2:], kernel, *per_dim)
    ]
    _require(x.shape[1] == chin and min(chin, chout, *sizes) > 0, list(x.shape), list(weight.shape))
    return outline((x.shape[0], chout, *sizes))


def _linear(x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    _require(x.shape[-1] == weight.shape[1], list(x.shape), list(weight.shape))
    return outline((*x.shape[:-1], weight.shape[0]))


def _product(x: Tensor, y: Tensor) -> Tensor:
    _require(x.shape[-1] == y.shape[-2], list(x.shape), list(y.shape))
    return outline((*_broadcast(x.shape[:-2], y.shape[:-2]), x.shape[-2], y.shape[-1]))


def _attended(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    _require(query.shape[-1] == key.shape[-1], list(query.shape), list(key.shape))
    return outline((*query.shape[:-1], value.shape[-1]))


def _group_norm(x: Tensor, groups: int, weight: Any = None, *_: Any, **__: Any) -> Tensor:
    _require(x.shape[1] % groups == 0 and x.numel() > groups, list(x.shape), groups)
    _require(weight is None or weight.shape == (x.shape[1],), list(x.shape))
    return x


def _layer_norm(x: Tensor, shape: Sequence[int], *_: Any, **__: Any) -> Tensor:
    _require(tuple(x.shape[-len(shape) :]) == tuple(shape), list(x.shape), shape)
    return x


def _gated(x: Tensor, dim: int = -1) -> Tensor:
    _require(x.shape[dim] % 2 == 0, list(x.shape))
    return x.narrow(dim, 0, x.shape[dim] // 2)


def _padded(x: Tensor, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Tensor:
    shape = list(x.shape)
    for dim, (left, right) in enumerate(zip(pad[::2], pad[1::2]), start=1):
        _require(mode == "constant" or max(left, right) < shape[-dim], list(x.shape), pad)
        shape[-dim] += left + right
    _require(min(shape) > 0, list(x.shape), pad)
    return outline(shape, x.dtype)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
    return outline(shape, tensors[0].dtype)


def _stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return _joined([tensor.unsqueeze(dim) for tensor in tensors], dim)


def _reduced(x: Tensor, dim: Any, keepdim: bool = False, **_: Any) -> Tensor:
    dims = {index % x.dim() for index in _numbers(dim, 1)}
    sizes = [1 if index in dims else size for index, size in enumerate(x.shape)]
    return outline(size for index, size in enumerate(sizes) if keepdim or index not in dims)


def _new(x: Tensor, *sizes: Any, **_: Any) -> Tensor:
    return outline(sizes if isinstance(sizes[0], int) else sizes[0], x.dtype)


def _spectrum(x: Tensor, n_fft: int, hop_length: int, **_: Any) -> Tensor:
    _require(n_fft // 2 < x.shape[-1], list(x.shape), n_fft)
    return outline((x.shape[0], n_fft // 2 + 1, x.shape[-1] // hop_length + 1), torch.complex64)


def _waves(spectrum: Tensor, n: int, *_: Any, **__: Any) -> Tensor:
    return outline((*spectrum.shape[:-1], n))


def _as_complex(x: Tensor) -> Tensor:
    _require(x.shape[-1] == 2, list(x.shape))
    return outline(x.shape[:-1], torch.complex64)


def _magnitude(x: Tensor) -> Tensor:
    return outline(x.shape)


def _recurred(x: Tensor, state: Any, weights: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
    _require(x.shape[-1] == weights[0].shape[1], list(x.shape), list(weights[0].shape))
    return outline((*x.shape[:-1], 2 * (weights[0].shape[0] // 4))), *state


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("add", "sub", "mul", "div", "pow", "__pow__", "__rpow__", "rsub", "masked_fill"),
        _elementwise,
    ),
    **dict.fromkeys(
        ("clone", "contiguous", "zeros_like", "gelu", "relu", "sigmoid", "softmax", "sin", "cos"),
        _first,
    ),
    **dict.fromkeys(("mean", "std"), _reduced),
    "new_zeros": _new,
    "stack": _stacked,
    **dict.fromkeys(("conv1d", "conv2d"), _convolved),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d"), _transposed),
    **dict.fromkeys(("abs", "angle"), _magnitude),
    "__setitem__": _assigned,
    "linear": _linear,
    "matmul": _product,
    "scaled_dot_product_attention": _attended,
    "group_norm": _group_norm,
    "layer_norm": _layer_norm,
    "glu": _gated,
    "pad": _padded,
    "cat": _joined,
    "stft": _spectrum,
    "fft_irfft": _waves,
    "view_as_complex": _as_complex,
    "lstm": _recurred,
}
