"""Resampling block by block, with the reference's filter (that of julius).

    input   ··───┬─────────────────┬───··      a frame of `old` samples with `width` at either side
                 │ width│ old │width│
    output            [ new ]                   gives `new` samples

where `old` and `new` are the two rates divided by their greatest common divisor. Before the start
and after the end the first and the last sample are repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from julius.resample import ResampleFrac
from torch import Tensor
from torch.nn import functional as F


@functools.lru_cache(maxsize=4)
def _filters(from_samplerate: int, to_samplerate: int) -> ResampleFrac:
    return ResampleFrac(from_samplerate, to_samplerate)


def resampled_length(length: int, from_samplerate: int, to_samplerate: int) -> int:
    """Samples that `length` samples become: rounded down, as in the reference."""
    return length * to_samplerate // from_samplerate


class Resampler:
    """Resample a stream of blocks `[*, n]`; together they give what resampling the whole gives.

    `length` is the number of samples to return in all (default: `resampled_length` of the input).
    """

    def __init__(self, from_samplerate: int, to_samplerate: int, length: int | None = None) -> None:
        self._rates = int(from_samplerate), int(to_samplerate)
        self._length = length
        self._taken = self._given = 0
        self._rest: Tensor | None = None  # samples that later output needs
        if self._rates[0] != self._rates[1]:
            filters: Any = _filters(*self._rates)
            self._old, self._new = filters.old_sr, filters.new_sr
            self._kernel: Any = filters.kernel  # [new, 1, width + old + width]
            self._width = (self._kernel.shape[-1] - self._old) // 2

    def push(self, block: Tensor) -> Tensor:
        """Take samples `[*, n]` and return those `[*, m]` that are complete."""
        self._taken += block.shape[-1]
        if not block.shape[-1] or self._rates[0] == self._rates[1]:
            return self._limited(block)
        if self._rest is None:
            block = torch.cat([_repeated(block[..., :1], self._width), block], dim=-1)
        else:
            block = torch.cat([self._rest, block], dim=-1)
        return self._limited(self._convolved(block))

    def flush(self) -> Tensor | None:
        """The samples `[*, m]` that are still due after the last block, if there was a block."""
        if self._length is None:
            self._length = resampled_length(self._taken, *self._rates)
        due = self._length - self._given
        if self._rest is None:
            return None
        frames = -(-due // self._new)
        missing = frames * self._old + 2 * self._width - self._rest.shape[-1]
        end = _repeated(self._rest[..., -1:], max(0, missing))
        return self._limited(self._convolved(torch.cat([self._rest, end], dim=-1)))

    def _convolved(self, x: Tensor) -> Tensor:
        frames = max(0, (x.shape[-1] - 2 * self._width) // self._old)
        self._rest = x[..., frames * self._old :].clone()
        if not frames:
            return x[..., :0]
        inside = x[..., : frames * self._old + 2 * self._width]
        kernel = self._kernel.to(x)
        y = F.conv1d(inside.reshape(-1, 1, inside.shape[-1]), kernel, stride=self._old)
        return y.transpose(1, 2).reshape(*x.shape[:-1], -1)

    def _limited(self, y: Tensor) -> Tensor:
        """`y` without what is beyond the length that is wanted."""
        if self._length is not None:
            y = y[..., : max(0, self._length - self._given)]
        self._given += y.shape[-1]
        return y

    def stream(self, blocks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Resample all of `blocks`."""
        for block in blocks:
            yield self.push(block)
        last = self.flush()
        if last is not None:
            yield last


def resample(wav: Tensor, from_samplerate: int, to_samplerate: int) -> Tensor:
    """Resample `wav` `[*, T]`, as floating point, to `resampled_length` samples."""
    if from_samplerate == to_samplerate or not wav.shape[-1]:
        return wav
    return torch.cat(list(Resampler(from_samplerate, to_samplerate).stream([wav])), dim=-1)


def _repeated(sample: Tensor, count: int) -> Tensor:
    return sample.expand(*sample.shape[:-1], count)
