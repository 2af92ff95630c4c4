"""A track on its way into the engine: decoded, converted, measured and normalized.

    file ──decode──▶ blocks ──convert──▶ blocks at the model's rate ──▶ spool, mean and deviation

Both are known after this first pass; the engine then reads normalized windows from the spool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import LoadAudioError, OptionError
from ..resample import Resampler
from .decode import AudioFile
from .packets import Damage
from .parts import Part
from .pcm import convert_audio_channels, strange_samples

NORMALIZATION_EPSILON = 1e-8  # added to the deviation of a track
BLOCK = 2**16  # samples that are converted at once


class Moments:
    """Mean and deviation of a track's downmix, and its peak, from blocks `[C, n]`.

    In double precision, and by differences from the mean so far, so that hours of samples lose
    nothing (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance").
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.peak = 0.0
        self._squares = 0.0  # sum of squared differences from the mean

    def add(self, block: Tensor) -> None:
        """Take `block` `[C, n]` into account."""
        count = block.shape[-1]
        if not count:
            return
        downmix = block.mean(0).double()
        mean = downmix.mean().item()
        step = mean - self.mean
        total = self.count + count
        self._squares += (downmix - mean).square().sum().item()
        self._squares += step * step * self.count * count / total
        self.mean += step * count / total
        self.count = total
        self.peak = max(self.peak, block.abs().max().item())

    @property
    def std(self) -> float:
        """The unbiased deviation, zero for a single sample."""
        return math.sqrt(self._squares / max(1, self.count - 1))


class Mixture:
    """Samples at the model's rate as a source for the engine, and what they were before.

    `samples(start, stop)` gives `[C, stop - start]` of them. The engine reads them normalized, as
    a batch of one; `restored` takes a block of stems back.
    """

    def __init__(self, samples: Callable[[int, int], Tensor], moments: Moments) -> None:
        self.samples = samples
        self.moments = moments
        self.length = moments.count
        self._std = moments.std + NORMALIZATION_EPSILON

    @classmethod
    def of(cls, wav: Tensor) -> Mixture:
        """A mixture `[C, T]` in memory."""
        moments = Moments()
        for block in wav.split(BLOCK, dim=-1):
            moments.add(block)
        return cls(lambda start, stop: wav[:, start:stop], moments)

    def read(self, start: int, stop: int) -> Tensor:
        """Normalized samples `[1, C, stop - start]`, with zeros outside of the track."""
        first, last = (min(max(at, 0), self.length) for at in (start, stop))
        inside = (self.samples(first, last) - self.moments.mean) / self._std
        return F.pad(inside, (max(0, first - start), max(0, stop - max(last, start))))[None]

    def restored(self, stems: Tensor) -> Tensor:
        """`stems` at the level of the mixture, on the CPU like it.

        What a network makes of silence is tiny after scaling, but it is not silence.
        """
        stems = stems.cpu()
        if not self.moments.peak:
            return stems.zero_()
        return stems.mul_(self._std).add_(self.moments.mean)


@dataclass(frozen=True)
class Limits:
    """What a track may be: at most `max_duration` seconds long, and if `strict` not damaged."""

    max_duration: float | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.max_duration is not None and not self.max_duration > 0:
            raise OptionError(f"max_duration={self.max_duration} must be more than 0 seconds")


NO_LIMITS = Limits()


class Decoder:
    """Decodes a file, or a part of it, to `channels` channels at `samplerate` hertz.

    `rate` (hertz) is the file's own; `length` counts its samples, and `damage` what is wrong with
    it, while `blocks` is read.
    """

    def __init__(
        self,
        file: AudioFile,
        samplerate: int,
        channels: int,
        limits: Limits = NO_LIMITS,
        part: Part | None = None,
    ) -> None:
        self.file = file
        self.samplerate = samplerate
        self.channels = channels
        self.limits = limits
        self.rate = file.samplerate()
        self.samples = (part or Part()).samples(self.rate)  # the first, and that behind the last
        self.length = 0
        self.damage = Damage()

    def blocks(self, tap: Callable[[Tensor], None] | None = None) -> Iterator[Tensor]:
        """Samples `[C, n]`. Raises `LoadAudioError`, also for values that no music has.

        `tap` is called with them as they are before, at the file's rate.
        """
        return Resampler(self.rate, self.samplerate).stream(self._decoded(tap))

    def _decoded(self, tap: Callable[[Tensor], None] | None) -> Iterator[Tensor]:
        for block in _gathered(self.file.part(*self.samples, damage=self.damage)):
            self.length += block.shape[-1]
            self._check(block)
            converted = convert_audio_channels(block, self.channels)
            if tap is not None:
                tap(converted)
            yield converted
        if self.damage and self.limits.strict:
            raise LoadAudioError(f"{self.file.name}: is {self.damage}")

    def _check(self, block: Tensor) -> None:
        reason = strange_samples(block)
        if reason:
            raise LoadAudioError(f"{self.file.name}: has samples that are {reason}")
        longest = self.limits.max_duration
        if longest is not None and self.length > longest * self.rate:
            raise LoadAudioError(f"{self.file.name}: is longer than {longest:g} s, the limit here")


def _gathered(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """`blocks` joined to larger ones, which take fewer calls."""
    waiting: list[Tensor] = []
    length = 0
    for block in blocks:
        waiting.append(block)
        length += block.shape[-1]
        if length >= BLOCK:
            yield torch.cat(waiting, dim=-1)
            waiting, length = [], 0
    if waiting:
        yield torch.cat(waiting, dim=-1)
