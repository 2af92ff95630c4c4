"""The stems of a track on their way into files, which appear together when all are whole.

    block of stems ──▶ resample ──▶ clip ──▶ encoder ──▶ temporary file ──rename──▶ stem
                           └──▶ spool ──rescale──▶ ┘

A stem that is to be rescaled, or that shares its file, waits in a spool until all peaks are known.
So do the sounds of a page to listen with, which are stems in MP3.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

from torch import Tensor

from ..engine.machine import worker_pool
from ..errors import SaveAudioError
from ..read.pcm import RESCALING, prevent_clip, rescale_divisor
from ..resample import Resampler
from ..storage.locations import Location, Undo, publish, replaced_by
from ..storage.spool import Spool, Workspace
from .encode import Encoder, encoder, encoding_errors
from .formats import MIX, Encoding
from .output import PAGE_ENCODING, PIPE, Output
from .player import Page, write_page
from .video import Picture, VideoEncoder

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
    def sounds(self) -> Target:
        """The target of a page's sounds."""
        return replace(
            self,
            encoding=PAGE_ENCODING,
            channels=min(self.channels, PAGE_ENCODING.kind.channels),
            rate=PAGE_ENCODING.samplerate(self.samplerate),
            length=None,
            tags={},
            extras=Extras(),
        )


class _Signal:
    """A stem on its way: resampled, measured, and kept until its gain is known.

    With a `sink`, which takes samples at the target's rate, it is handed on at once. An `original`
    is there already, at that rate.
    """

    def __init__(
        self,
        target: Target,
        clip: str | None,
        sink: Callable[[Tensor], None] | None = None,
        original: Spool | None = None,
    ) -> None:
        self.clip, self.channels = clip, target.channels
        self.peak = 0.0
        self.divisor = 1.0
        self.spool = original
        self._sink = sink
        self._resampler: Resampler | None = None
        if original is None:
            self._resampler = Resampler(target.samplerate, target.rate, target.length)
            self.spool = None if sink else target.space.spool(target.channels)
        else:
            for block in original.blocks(BLOCK):
                self.peak = max(self.peak, block.abs().max().item())

    def write(self, block: Tensor | None) -> None:
        """Take samples `[C, n]` at the model's rate, or None for the end."""
        if self._resampler is None:
            return
        if block is None:
            block = self._resampler.flush()
        else:
            block = self._resampler.push(block[: self.channels])
        if block is None or not block.shape[-1]:
            return
        self.peak = max(self.peak, block.abs().max().item())
        if self._sink is not None:
            self._sink(prevent_clip(block, self.clip))
        elif self.spool is not None:
            self.spool.write(block)

    def blocks(self, advance: Callable[[int], None]) -> Iterator[Tensor]:
        """Yield the samples that were kept with their gain; `advance` counts them."""
        for block in self.spool.blocks(BLOCK) if self.spool is not None else ():
            advance(block.shape[-1])
            yield block / self.divisor


class _FileWriter:
    """A file on its way, with one stem in it or several."""

    def __init__(self, target: Target, names: Sequence[str], clip: str | None) -> None:
        self.file = target.space.file()
        self._handle = self.file.open("w+b")
        extras, together = target.extras, target.encoding.kind.is_together
        tags = dict(target.tags)
        if tags and not together:
            tags["title"] = f"{tags['title']} ({names[0]})"
        # Players show the names of streams.
        arguments = (self._handle, target.encoding, target.rate, target.channels, names, tags)
        if extras.picture is not None:
            self._encoder: Encoder = VideoEncoder(extras.picture, *arguments)
        else:
            self._encoder = encoder(*arguments, extras.cover)
        sink = None if together or clip in RESCALING else lambda block: self._encoder.write([block])
        self.signals = {
            name: _Signal(target, clip, sink, extras.original if name == MIX else None)
            for name in names
        }

    def encode(self, advance: Callable[[int], None]) -> None:
        """Encode the samples that were kept, and make the file whole."""
        advance(0)
        for blocks in zip(*(signal.blocks(advance) for signal in self.signals.values())):
            self._encoder.write(blocks)
        self._encoder.close()
        self.close()

    def close(self) -> None:
        """Give everything back but the file, whole or not."""
        self._encoder.abandon()
        self._handle.close()
        for signal in self.signals.values():
            if signal.spool is not None:
                signal.spool.close()


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
        self._writers: list[tuple[Location, _FileWriter]] = []
        self._sounds: dict[str, _Signal] = {}
        self._finished: dict[Location, Path] = {}  # the file that becomes each path
        self._signals: dict[str, _Signal] = {}
        for path in dict.fromkeys(paths.values()):
            names = [name for name, other in paths.items() if other == path]
            writer = self._add(path, target, names, target.output.clip_mode)
            self._signals |= writer.signals
            self._finished[path] = writer.file
        if page is not None:
            with self._writing(page):
                self._finished[page] = target.space.file()
            for name in paths:
                if not (target.output.is_together and name == MIX):
                    writer = self._add(page, target.sounds, [name], "rescale-all")
                    self._sounds |= writer.signals

    def _add(
        self, path: Location, target: Target, names: Sequence[str], clip: str | None
    ) -> _FileWriter:
        with self._writing(path):
            writer = _FileWriter(target, names, clip)
            self._writers.append((path, writer))
        return writer

    @contextlib.contextmanager
    def _writing(self, path: Location) -> Iterator[None]:
        try:
            with encoding_errors(path):
                yield
        except BaseException:
            self.discard()
            raise

    def write(self, stems: Sequence[Tensor]) -> None:
        """Take a block of every stem, each `[C, n]`, in the order of the paths."""
        self._write(dict(zip(self.paths, stems)))

    def _write(self, blocks: Mapping[str, Tensor | None]) -> None:
        for path, writer in self._writers:
            with self._writing(path):
                for name, signal in writer.signals.items():
                    signal.write(blocks[name])

    def finish(
        self,
        check: Callable[[], None],
        progress: Callable[[float], None] = lambda fraction: None,
    ) -> dict[str, StemFile]:
        """Encode what is left and let the files appear; what `check` raises ends that.

        `progress` is told the fraction of the samples that are encoded, from one thread at a time.
        """
        self._write(dict.fromkeys(self.paths))
        clip = self.target.output.clip_mode
        for signals, mode in ((self._signals, clip), (self._sounds, "rescale-all")):
            loudest = max((signal.peak for signal in signals.values()), default=0.0)
            for signal in signals.values() if mode in RESCALING else ():
                signal.divisor = rescale_divisor(loudest if mode == "rescale-all" else signal.peak)
        self._encode(check, progress)
        if self.page is not None:
            with self._writing(self.page):
                self._write_page(self._finished[self.page])
        self._publish()
        return {
            name: StemFile(self.paths[name], signal.peak, 1 / signal.divisor)
            for name, signal in self._signals.items()
        }

    def _encode(self, check: Callable[[], None], progress: Callable[[float], None]) -> None:
        waiting = [
            signal.spool.length
            for _, writer in self._writers
            for signal in writer.signals.values()
            if signal.spool is not None
        ]
        lock, encoded, whole = threading.Lock(), 0, sum(waiting)

        def advance(samples: int) -> None:
            nonlocal encoded
            check()
            with lock:
                encoded += samples
                if samples:
                    progress(encoded / whole)

        with worker_pool(min(len(self._writers), os.cpu_count() or 1)) as pool:
            futures = [(path, pool.submit(w.encode, advance)) for path, w in self._writers]
        for path, future in futures:
            with self._writing(path):
                future.result()

    def _write_page(self, file: Path) -> None:
        target = self.target
        lengths = [signal.spool.length for signal in self._sounds.values() if signal.spool]
        page = Page(
            target.tags["title"],
            target.tags.get("artist", ""),
            target.model,
            target.sounds.rate,
            max(lengths),
            list(self._sounds),
        )
        sounds = [w.file for path, w in self._writers if path == self.page]
        with file.open("wb") as whole:
            write_page(whole, page, sounds)
        for sound in sounds:
            sound.unlink()

    def _publish(self) -> None:
        """Let all files appear, or none: one that fails takes back those before it."""
        with contextlib.ExitStack() as published:
            for path, file in self._finished.items():
                with self._writing(path):
                    published.callback(_taking_back, _publish(file, path))
            published.pop_all()
        for file in self._finished.values():
            replaced_by(file).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove what has been written of the track."""
        for _, writer in self._writers:
            with contextlib.suppress(OSError):  # of a full disk, when the rest is written out
                writer.close()
            writer.file.unlink(missing_ok=True)
        for file in self._finished.values():
            file.unlink(missing_ok=True)


def _publish(file: Path, path: Location) -> Undo:
    """Give `file`, which is whole, its name, or copy it to a store or to standard output.

    Return a function that takes that back.
    """
    if path == PIPE:
        with file.open("rb") as source, standard_output() as sink:
            shutil.copyfileobj(source, sink)
        return lambda: None
    undo = publish(file, path)
    file.unlink(missing_ok=True)
    return undo


@contextlib.contextmanager
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
