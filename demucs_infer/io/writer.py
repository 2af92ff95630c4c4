"""The stems of a track on their way into files, which appear together when all are whole.

    block of stems ──▶ resample ──▶ clip ──▶ encoder ──▶ temporary file ──rename──▶ stem
                           └──▶ spool ──rescale──▶ ┘

A stem that is to be rescaled, or that shares its file, waits in a spool until all peaks are known.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from torch import Tensor

from ..engine.machine import worker_pool
from ..errors import SaveAudioError
from ..read.pcm import RESCALING, prevent_clip, rescale_divisor
from ..resample import Resampler
from ..storage.locations import Location, Undo, publish, replaced_by
from ..storage.spool import Spool, Workspace
from .container import MultitrackEncoder, Picture, Request, VideoEncoder
from .encode import Encoder, encoder, encoding_errors
from .formats import Encoding
from .output import MIX, PIPE, Output
from .player import About, PlayerWriter

BLOCK = 2**16  # samples that are read from a spool at once


@dataclass(frozen=True)
class StemFile:
    """A stem that is there: `peak` is its magnitude before it was multiplied by `gain`."""

    path: Location
    peak: float | None = None
    gain: float | None = None


@dataclass(frozen=True)
class Extras:
    """A track's file has these besides the samples that are separated.

    `original` is its sound at its own rate, where stems are written at that.
    """

    cover: bytes | None = None
    picture: Picture | None = None
    original: Spool | None = None


@dataclass(frozen=True)
class Target:
    """The files of a track have this in common.

    `length` is the number of samples that each gets at `rate` hertz; None: what resampling gives.
    """

    output: Output
    encoding: Encoding
    space: Workspace
    samplerate: int  # of the model
    channels: int
    rate: int
    length: int | None
    tags: Mapping[str, str]
    model: str
    extras: Extras = field(default_factory=Extras)

    @property
    def about(self) -> About:
        """A page to listen with says this."""
        return About(self.tags["title"], self.tags.get("artist", ""), self.model)

    def request(self, file: IO[bytes], names: Sequence[str]) -> Request:
        """The request for a file with streams of these names."""
        tags, cover = dict(self.tags), self.extras.cover
        if not self.output.is_together:
            tags["title"] = f"{tags['title']} ({names[0]})"
        return Request(file, self.encoding, self.rate, self.channels, names, tags, cover)


class _Signal:
    """A stem on its way: resampled, measured, and kept until its gain is known.

    With a `sink`, which takes samples at the target's rate, it is handed on at once.
    """

    def __init__(self, target: Target, sink: Callable[[Tensor], None] | None) -> None:
        self.clip = target.output.clip_mode
        self.peak = 0.0
        self.divisor = 1.0
        self._sink = sink
        self._resampler = Resampler(target.samplerate, target.rate, target.length)
        self._spool = None if sink else target.space.spool(target.channels)

    def write(self, block: Tensor) -> None:
        """Take samples `[C, n]` at the model's rate."""
        self._take(self._resampler.push(block))

    def flush(self) -> None:
        """Take what is still in the resampler."""
        last = self._resampler.flush()
        if last is not None:
            self._take(last)

    def _take(self, block: Tensor) -> None:
        if not block.shape[-1]:
            return
        self.peak = max(self.peak, block.abs().max().item())
        if self._sink is not None:
            self._sink(prevent_clip(block, self.clip))
        elif self._spool is not None:
            self._spool.write(block)

    def blocks(self, check: Callable[[], None]) -> Iterator[Tensor]:
        """All samples with their gain, if they were kept; `check` may end that at a block."""
        for block in self._spool.blocks(BLOCK) if self._spool is not None else ():
            check()
            yield block / self.divisor

    def close(self) -> None:
        """Give back the room that the samples take."""
        if self._spool is not None:
            self._spool.close()


class _Original(_Signal):
    """The mix as it is in the track's file, at the same rate: it needs no resampling."""

    def __init__(self, target: Target, spool: Spool) -> None:
        super().__init__(target, None)
        self.close()
        self._spool = spool
        for block in spool.blocks(BLOCK):
            self.peak = max(self.peak, block.abs().max().item())

    def write(self, block: Tensor) -> None:
        """Take nothing: the samples are there."""

    def flush(self) -> None:
        """Take nothing."""


class _FileWriter:
    """A file on its way, with one stem in it or several."""

    def __init__(self, target: Target, names: Sequence[str]) -> None:
        self.target = target
        self.file = target.space.file()
        self._handle = self.file.open("w+b")
        self._encoder = _encoder(target.request(self._handle, names), target)
        waits = target.output.is_together or target.output.clip_mode in RESCALING
        sink = None if waits else self._write_one
        self.signals = {name: self._signal(name, sink) for name in names}

    def _signal(self, name: str, sink: Callable[[Tensor], None] | None) -> _Signal:
        original = self.target.extras.original
        if self.target.output.is_together and name == MIX and original is not None:
            return _Original(self.target, original)
        return _Signal(self.target, sink)

    def _write_one(self, block: Tensor) -> None:
        self._encoder.write([block])

    def encode(self, check: Callable[[], None]) -> None:
        """Encode what was kept, and make the file whole; `check` may end that at a block."""
        check()
        for blocks in zip(*(signal.blocks(check) for signal in self.signals.values())):
            self._encoder.write(blocks)
        self._encoder.close()
        self.close()

    def close(self) -> None:
        """Give everything back but the file, whole or not."""
        self._handle.close()
        for signal in self.signals.values():
            signal.close()


class _OneStem:
    """An encoder of one stem that is called like one of several."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.close = encoder.close

    def write(self, blocks: Sequence[Tensor]) -> None:
        """Encode the one block `[C, n]`."""
        (block,) = blocks
        self._encoder.write(block)


def _encoder(request: Request, target: Target) -> MultitrackEncoder | _OneStem:
    if target.output.is_together:
        return MultitrackEncoder(request)
    if target.extras.picture is not None:
        return _OneStem(VideoEncoder(request, target.extras.picture))
    return _OneStem(
        encoder(request.file, request.encoding, request.samplerate, request.channels, request.tags)
    )


class TrackWriter:
    """Takes the stems of a track block by block, and makes them appear together.

    `page` is that of its page to listen with, if there is to be one. Raises `SaveAudioError` if
    something cannot be written; nothing of the track is left then.
    """

    def __init__(
        self, paths: Mapping[str, Location], target: Target, page: Location | None
    ) -> None:
        self.paths = paths
        self.target = target
        self.page = page
        self._files: dict[Location, _FileWriter] = {}
        self._player: PlayerWriter | None = None
        for path in dict.fromkeys(paths.values()):
            with self._writing(path):
                names = [name for name, other in paths.items() if other == path]
                self._files[path] = _FileWriter(target, names)
        self._signals = {
            name: signal for file in self._files.values() for name, signal in file.signals.items()
        }
        if page is not None:
            with self._writing(page):
                self._player = self._make_player()

    def _make_player(self) -> PlayerWriter:
        target, names = self.target, list(self.paths)
        stems = names[1:] if target.output.is_together else names  # not the mix
        return PlayerWriter(target.space, target.about, stems, target.samplerate, target.channels)

    @property
    def _writers(self) -> dict[Location, _FileWriter | PlayerWriter]:
        """All files of the track."""
        page = {} if self._player is None or self.page is None else {self.page: self._player}
        return {**self._files, **page}

    @contextmanager
    def _writing(self, path: Location) -> Iterator[None]:
        try:
            with encoding_errors(path):
                yield
        except BaseException:
            self.discard()
            raise

    def write(self, stems: Sequence[Tensor]) -> None:
        """Take a block of every stem, each `[C, n]`, in the order of the paths."""
        for block, name in zip(stems, self.paths):
            with self._writing(self.paths[name]):
                self._signals[name].write(block)
        if self._player is not None and self.page is not None:
            with self._writing(self.page):
                self._player.write(stems[1:] if self.target.output.is_together else stems)

    def finish(self, check: Callable[[], None]) -> dict[str, StemFile]:
        """Encode what is left and let the files appear; what `check` raises ends that."""
        for name, signal in self._signals.items():
            with self._writing(self.paths[name]):
                signal.flush()
        self._choose_divisors()
        with worker_pool(min(len(self._writers), os.cpu_count() or 1)) as pool:
            encoded = {
                path: pool.submit(writer.encode, check) for path, writer in self._writers.items()
            }
        for path, future in encoded.items():
            with self._writing(path):
                future.result()
        self._publish()
        return {
            name: StemFile(self.paths[name], signal.peak, 1 / signal.divisor)
            for name, signal in self._signals.items()
        }

    def _publish(self) -> None:
        """Let all files appear, or none: one that fails takes back those before it."""
        with contextlib.ExitStack() as published:
            for path, writer in self._writers.items():
                with self._writing(path):
                    published.callback(_taking_back, _publish(writer.file, path))
            published.pop_all()
        for writer in self._writers.values():
            replaced_by(writer.file).unlink(missing_ok=True)

    def _choose_divisors(self) -> None:
        clip, signals = self.target.output.clip_mode, self._signals.values()
        if clip in RESCALING:
            loudest = max(signal.peak for signal in signals)
            for signal in signals:
                signal.divisor = rescale_divisor(loudest if clip == "rescale-all" else signal.peak)

    def discard(self) -> None:
        """Remove what has been written of the track."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):  # of a full disk, when the rest is written out
                writer.close()
            writer.file.unlink(missing_ok=True)


def _publish(file: Path, path: Location) -> Undo:
    """Give `file`, which is whole, its name, or copy it to a store or to standard output.

    Returns what takes that back.
    """
    if path == PIPE:
        with file.open("rb") as source, standard_output() as sink:
            shutil.copyfileobj(source, sink)
        return lambda: None
    undo = publish(file, path)
    file.unlink(missing_ok=True)
    return undo


@contextmanager
def standard_output() -> Iterator[IO[bytes]]:
    """Lend standard output for bytes, unbuffered, so that a failed write raises at once."""
    sys.stdout.flush()
    try:
        copy = os.dup(sys.stdout.fileno())
    except (AttributeError, OSError):  # an object with a buffer
        yield sys.stdout.buffer
        return
    with open(copy, "wb") as file:  # noqa: PTH123
        yield file


def _taking_back(undo: Undo) -> None:
    with contextlib.suppress(OSError, SaveAudioError):  # the first error is the one to tell
        undo()
