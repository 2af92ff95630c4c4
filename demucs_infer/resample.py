"""Resampling block by block, with the reference's filter (that of julius).

    input   ··───┬─────────────────┬───··      a frame of `old` samples with `width` at either side
                 │ width│ old │width│
    output            [ new ]                   gives `new` samples

where `old` and `new` are the two rates divided by their greatest common divisor. Before the start
and after the end the first and the last sample are repeated.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from julius.resample import ResampleFrac
from torch import Tensor
from torch.nn import functional as F

ZEROS, ROLLOFF = 24, 0.945  # of julius: zero crossings of the filter's sinc, and its cutoff
LARGEST_KERNEL = 2**20  # coefficients: julius makes a million of them a second
AT_ONCE = 16  # samples that a kernel gives, at least
TAPS_AT_ONCE = 2**20


class _Filters:
    """The filters of julius for two rates: one for each of the `new` samples of a frame.

    Those of two rates with a small divisor, such as 44100 and 44099, would fill gigabytes with
    zeros. Of them only the taps around each sample are kept.
    """

    def __init__(self, from_samplerate: int, to_samplerate: int) -> None:
        divisor = math.gcd(from_samplerate, to_samplerate)
        self.old, self.new = from_samplerate // divisor, to_samplerate // divisor
        self.cutoff = min(self.old, self.new) * ROLLOFF
        self.width = math.ceil(ZEROS * self.old / self.cutoff)
        self.frames = -(-AT_ONCE // self.new)  # in a kernel
        self.kernel: Tensor | None = None  # [frames * new, 1, width + frames * old + width]
        if self.new * (self.old + 2 * self.width) <= LARGEST_KERNEL:
            # julius makes its tensors on the default device.
            with torch.device("cpu"):
                filters: Any = ResampleFrac(self.old, self.new, ZEROS, ROLLOFF)
            self.kernel = self._side_by_side(filters.kernel)
        else:
            self.taps = self._taps()  # [new, 2 width + 1]

    def _side_by_side(self, kernel: Tensor) -> Tensor:
        """The filters of several frames at once, from those of one.

        A convolution with them is a product of matrices: three times as fast for factors of 2.
        """
        return torch.cat(
            [
                F.pad(kernel, (index * self.old, (self.frames - 1 - index) * self.old))
                for index in range(self.frames)
            ]
        )

    def _taps(self) -> Tensor:
        """Taps `[new, 2 width + 1]` of each filter around the sample that it falls on.

        Output `j` of a frame lies at `j old / new` input samples. Band-limited interpolation sums
        the inputs `x[k]` by a sinc, low-passed at `cutoff` (in units of 1 / `old` samples, with a
        little less than the smaller Nyquist frequency) and faded out after `ZEROS` of its zeros:

            y[j] = sum_k x[k] h(t) / sum_k h(t),   t = (k / old - j / new) cutoff
            h(t) = sinc(t) cos^2(pi t / (2 ZEROS))   for |t| < ZEROS, else 0

        `h` is 0 further than `width` = ZEROS old / cutoff samples away, so the sum runs over the
        `width` neighbours on each side of `k = floor(j old / new)`. The division makes a constant
        signal keep its level.
        """
        taps = torch.empty(self.new, 2 * self.width + 1, dtype=torch.float32, device="cpu")
        for outputs in torch.arange(self.new, dtype=torch.int64, device="cpu").split(self._rows):
            taps[outputs] = self._taps_of(outputs)
        return taps

    def _taps_of(self, outputs: Tensor) -> Tensor:
        around = torch.arange(-self.width, self.width + 1, dtype=torch.int64, device="cpu")
        positions = self._positions[outputs, None] + around
        phases = outputs.double()[:, None] / self.new
        t = ((positions.float() / self.old - phases) * self.cutoff).clamp(-ZEROS, ZEROS)
        taps = torch.sinc(t) * torch.cos(t * math.pi / ZEROS / 2) ** 2
        return (taps / taps.sum(1, keepdim=True)).float()

    @property
    def _rows(self) -> int:
        """Return how many filters are computed at once, to limit the memory of their taps."""
        return max(1, TAPS_AT_ONCE // (2 * self.width + 1))

    @property
    def _positions(self) -> Tensor:
        """Input sample at or before each output sample of a frame."""
        return torch.arange(self.new, dtype=torch.int64, device="cpu") * self.old // self.new

    def __call__(self, x: Tensor) -> Tensor:
        """The frames in `x` `[N, width + frames * old + width]`, as `[N, frames * new]`."""
        if self.kernel is not None:
            frames = (x.shape[-1] - 2 * self.width) // self.old
            x = F.pad(x, (0, -frames % self.frames * self.old))
            y = F.conv1d(x[:, None], self.kernel.to(x), stride=self.frames * self.old)
            return y.transpose(1, 2).flatten(1)[:, : frames * self.new]
        windows = x.unfold(-1, self.taps.shape[1], 1)
        starts = range(0, x.shape[-1] - 2 * self.width, self.old)
        at, taps = self._positions.to(x.device), self.taps.to(x)
        parts = list(zip(at.split(self._rows), taps.split(self._rows)))
        outputs = [(windows[:, s + part] * rows).sum(-1) for s in starts for part, rows in parts]
        return torch.cat(outputs, dim=-1)


@functools.lru_cache(maxsize=4)
def _filters(from_samplerate: int, to_samplerate: int) -> _Filters:
    return _Filters(from_samplerate, to_samplerate)


def resampled_length(length: int, from_samplerate: int, to_samplerate: int) -> int:
    """Return the number of samples after resampling, rounded down as in the reference."""
    return length * to_samplerate // from_samplerate


class Resampler:
    """Resample a stream of blocks `[*, n]`; their outputs join to that of the whole stream.

    `length` is the number of samples to return in all (default: `resampled_length` of the input).
    """

    def __init__(self, from_samplerate: int, to_samplerate: int, length: int | None = None) -> None:
        self._rates = int(from_samplerate), int(to_samplerate)
        self._length = length
        self._taken = self._given = 0
        self._rest: Tensor | None = None  # samples that later output needs
        if self._rates[0] != self._rates[1]:
            self._filters = _filters(*self._rates)
            self._old, self._new = self._filters.old, self._filters.new
            self._width = self._filters.width

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
        return self._filters(inside.reshape(-1, inside.shape[-1])).reshape(*x.shape[:-1], -1)

    def _limited(self, y: Tensor) -> Tensor:
        """Cut `y` to the length that is wanted."""
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
