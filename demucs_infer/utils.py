"""Small pure helpers that every floor above may use."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

Init = TypeVar("Init", bound=Callable[..., None])


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
    """Frames of `a` `[*, T]`, as `[*, F, kernel_size]` with `F = ceil(T / stride)`.

    The end is padded with zeros so that every sample is the start of no frame that is cut.
    """
    *_, length = a.shape
    frames = -(-length // stride)
    padded = F.pad(a, (0, (frames - 1) * stride + kernel_size - length))
    return padded.unfold(-1, kernel_size, stride)


def standardize(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`x` `[B, ...]` with zero mean and unit deviation per item, then that mean and deviation.

    The deviation is the unbiased one, and zero for a single value (where that has no meaning).
    """
    dims = tuple(range(1, x.dim()))
    mean = x.mean(dim=dims, keepdim=True)
    std = x.std(dim=dims, keepdim=True, correction=min(1, x[0].numel() - 1))
    return (x - mean) / (eps + std), mean, std


def capture_init(init: Init) -> Init:
    """Decorate an `__init__` to keep its arguments in `_init_args_kwargs`, for checkpoints."""

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        self._init_args_kwargs = (args, kwargs)
        init(self, *args, **kwargs)

    return wrapped  # type: ignore[return-value]


def signature_of(options: type) -> inspect.Signature:
    """The signature of a class that takes what the dataclass `options` takes."""
    return inspect.signature(options)


def device_of(module: torch.nn.Module) -> torch.device:
    """The device of the first parameter of `module`, or the CPU if it has none."""
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
