"""Prepare a track for the engine: decode, convert, measure and normalize it.

    file ──decode──▶ chunks ──convert──▶ chunks at the model's rate ──▶ spool, mean and deviation

The mean and the deviation are known after this first pass. The engine then reads normalized windows
from the spool.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from ..engine.options import SeparationOptions
from ..errors import LoadAudioError
from ..resample import Resampler
from .decode import AudioFile
from .packets import Damage
from .pcm import convert_audio_channels, strange_samples

NORMALIZATION_EPSILON = 1e-8  # added to the deviation of a track
CHUNK = 2**16  # samples that are converted at once, which takes fewer calls than packets


class Moments:
    """Mean, deviation and peak of a track's downmix, from chunks `[C, n]`.

    Sums are kept in double precision, as differences from the mean so far, so that hours of samples
    lose no digits (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance").
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = 0.0
        self.peak = 0.0
        self._squares = 0.0  # sum of squared differences from the mean

    def add(self, chunk: Tensor) -> None:
        """Take `chunk` `[C, n]` into account."""
        count = chunk.shape[-1]
        if not count:
            return
        downmix = chunk.mean(0).double()
        mean = downmix.mean().item()
        step = mean - self.mean
        total = self.count + count
        self._squares += (downmix - mean).square().sum().item()
        self._squares += step * step * self.count * count / total
        self.mean += step * count / total
        self.count = total
        self.peak = max(self.peak, chunk.abs().max().item())

    @property
    def std(self) -> float:
        """The unbiased standard deviation, 0 for a single sample."""
        return math.sqrt(self._squares / max(1, self.count - 1))


class Mixture:
    """A track at the model's rate, as a source of the engine.

    `samples(start, stop)` returns `[C, stop - start]` of it. The engine reads them normalized, as a
    batch of one, and `restored` undoes the normalization of stems.
    """

    def __init__(self, samples: Callable[[int, int], Tensor], moments: Moments) -> None:
        self.samples = samples
        self.moments = moments
        self.length = moments.count
        self._std = moments.std + NORMALIZATION_EPSILON

    @classmethod
    def of(cls, wav: Tensor) -> Mixture:
        """Return the mixture of `wav` `[C, T]` in memory."""
        moments = Moments()
        for chunk in wav.split(CHUNK, dim=-1):
            moments.add(chunk)
        return cls(lambda start, stop: wav[:, start:stop], moments)

    def read(self, start: int, stop: int) -> Tensor:
        """Return normalized samples `[1, C, stop - start]`, with zeros outside of the track."""
        first, last = (min(max(at, 0), self.length) for at in (start, stop))
        inside = (self.samples(first, last) - self.moments.mean) / self._std
        return F.pad(inside, (max(0, first - start), max(0, stop - max(last, start))))[None]

    def restored(self, stems: Tensor) -> Tensor:
        """Return `stems` at the level of the mixture, on the CPU.

        Stems of silence are silent: the network's output is tiny then, but not zero.
        """
        stems = stems.cpu()
        if not self.moments.peak:
            return stems.zero_()
        return stems.mul_(self._std).add_(self.moments.mean)


DEFAULTS = SeparationOptions()


class Decoder:
    """Decodes an excerpt of a file to `channels` channels at `samplerate` hertz.

    Of `options`, it uses `start` and `duration`, and the limits `max_duration` and `strict`. `rate`
    (hertz) is the file's own. While `chunks` is read, `length` counts the file's samples, and
    `damage` is updated.
    """

    def __init__(
        self,
        file: AudioFile,
        samplerate: int,
        channels: int,
        options: SeparationOptions = DEFAULTS,
    ) -> None:
        self.file = file
        self.samplerate = samplerate
        self.channels = channels
        self.options = options
        self.rate = file.samplerate()
        self.samples = options.excerpt(self.rate)
        self.length = 0
        self.damage = Damage()

    def chunks(self, tap: Callable[[Tensor], None] | None = None) -> Iterator[Tensor]:
        """Yield samples `[C, n]`; `tap` gets them before their rate is converted.

        Raises `LoadAudioError` for a track that cannot be read, exceeds the limits, or has
        implausible samples.
        """
        return Resampler(self.rate, self.samplerate).stream(self._at_file_rate(tap))

    def _at_file_rate(self, tap: Callable[[Tensor], None] | None) -> Iterator[Tensor]:
        name, longest = self.file.name, self.options.max_duration
        for chunk in self._packets():
            self.length += chunk.shape[-1]
            reason = strange_samples(chunk)
            if reason:
                raise LoadAudioError(f"{name}: has samples that are {reason}")
            if longest is not None and self.length > longest * self.rate:
                raise LoadAudioError(f"{name}: is longer than the limit of {longest:g} s")
            converted = convert_audio_channels(chunk, self.channels)
            if tap is not None:
                tap(converted)
            yield converted
        if self.damage and self.options.strict:
            raise LoadAudioError(f"{name}: is {self.damage}")

    def _packets(self) -> Iterator[Tensor]:
        """Join the samples of packets to chunks."""
        first, last = self.samples
        waiting: list[Tensor] = []
        length = 0
        for samples in self.file.chunks(first=first, last=last, damage=self.damage):
            waiting.append(samples)
            length += samples.shape[-1]
            if length >= CHUNK:
                yield torch.cat(waiting, dim=-1)
                waiting, length = [], 0
        if waiting:
            yield torch.cat(waiting, dim=-1)
