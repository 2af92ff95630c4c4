"""Sources that the engine reads window by window."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..errors import OptionError


class Source(Protocol):
    """Samples that the engine reads window by window, from the start to the end."""

    length: int

    def read(self, start: int, stop: int) -> Tensor:
        """Return samples `[B, C, stop - start]`, with zeros before 0 and from `length` on."""


class TensorChunk:
    """A range of a tensor `[..., T]` that knows its surroundings."""

    def __init__(
        self, tensor: Tensor | TensorChunk, offset: int = 0, length: int | None = None
    ) -> None:
        total = tensor.shape[-1]
        if not 0 <= offset <= total:
            raise OptionError(f"offset={offset} is not within the {total} samples of the tensor")
        self.length = total - offset if length is None else min(total - offset, length)
        self.offset = offset
        self.tensor: Tensor
        if isinstance(tensor, TensorChunk):
            self.tensor = tensor.tensor
            self.offset += tensor.offset
        else:
            self.tensor = tensor

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.tensor.shape[:-1], self.length])

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def read(self, start: int, stop: int) -> Tensor:
        """Return samples `[..., stop - start]`, counted from the chunk's start.

        They are zero outside of the tensor.
        """
        start, stop = start + self.offset, stop + self.offset
        total = self.tensor.shape[-1]
        inside = self.tensor[..., min(max(start, 0), total) : min(max(stop, 0), total)]
        return nn.functional.pad(
            inside, (min(max(-start, 0), stop - start), max(stop - max(total, start), 0))
        )

    def padded(self, target_length: int) -> Tensor:
        """Return the chunk centred in `target_length` samples, with its surroundings."""
        start = -((target_length - self.length) // 2)
        if target_length < self.length:
            raise OptionError(f"cannot pad {self.length} samples to {target_length}")
        return self.read(start, start + target_length)


def tensor_chunk(tensor_or_chunk: Tensor | TensorChunk) -> TensorChunk:
    """Return the chunk itself, or the whole tensor as one."""
    if isinstance(tensor_or_chunk, TensorChunk):
        return tensor_or_chunk
    return TensorChunk(tensor_or_chunk)
