"""Write the stems of a track into files, which appear together when all are whole.

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
from dataclasses import dataclass
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
from .formats import MIX, Format
from .output import PAGE_FORMAT, PIPE
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
class Target:
    """The facts that the files of a track share.

    Args:
        format: the format, with its options.
        clip: the clip mode.
        space: the workspace of unfinished files.
        samplerate: hertz, of the samples that are written to it.
        rate: hertz, of the files.
        channels: of the stems.
        model: the name of the model.
        tags: of the track; `title` at least, unless there are none.
        length: the number of samples that each file gets (default: what resampling gives).
        cover: the file of a picture.
        picture: the picture of a video that goes with the stem.
        original: the mix at `rate`, if that is not made from the samples that are written.
    """

    format: Format
    clip: str | None
    space: Workspace
    samplerate: int
    rate: int
    channels: int
    model: str
    tags: Mapping[str, str]
    length: int | None = None
    cover: bytes | None = None
    picture: Picture | None = None
    original: Spool | None = None

    @property
    def sounds(self) -> Target:
        """The target of the sounds of a page to listen with."""
        channels = min(self.channels, PAGE_FORMAT.most_channels)
        rate = PAGE_FORMAT.samplerate(self.samplerate)
        space, old_rate = self.space, self.samplerate
        return Target(PAGE_FORMAT, "rescale-all", space, old_rate, rate, channels, self.model, {})


class _Signal:
    """A stem on its way: resampled, measured, and kept in `spool` until its gain is known.

    With a `sink`, which takes samples at the target's rate, it is handed on at once.
    """

    def __init__(self, target: Target, name: str, sink: Callable[[Tensor], None] | None) -> None:
        self.clip, self.channels = target.clip, target.channels
        self.peak, self.divisor = 0.0, 1.0
        self._sink = sink
        self._resampler: Resampler | None = None
        if name == MIX and target.original is not None:
            self.spool: Spool | None = target.original
            peaks = (block.abs().max().item() for block in target.original.blocks(BLOCK))
            self.peak = max(peaks, default=0.0)
        else:
            self.spool = None if sink else target.space.spool(target.channels)
            self._resampler = Resampler(target.samplerate, target.rate, target.length)

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


class _FileWriter:
    """A file on its way, with one stem in it or several."""

    def __init__(self, target: Target, names: Sequence[str]) -> None:
        self.file = target.space.file()
        self._handle = self.file.open("w+b")
        together = target.format.is_together
        tags = dict(target.tags)
        if tags and not together:
            tags["title"] = f"{tags['title']} ({names[0]})"
        # Players show the names of streams.
        arguments = (self._handle, target.format, target.rate, target.channels, names, tags)
        if target.picture is not None:
            self._encoder: Encoder = VideoEncoder(target.picture, *arguments)
        else:
            self._encoder = encoder(*arguments, target.cover)
        waits = together or target.clip in RESCALING
        sink = None if waits else lambda block: self._encoder.write([block])
        self.signals = {name: _Signal(target, name, sink) for name in names}

    def encode(self, advance: Callable[[int], None]) -> None:
        """Encode the samples that were kept, and make the file whole. `advance` counts them."""
        advance(0)
        spools = [s.spool.blocks(BLOCK) for s in self.signals.values() if s.spool is not None]
        for blocks in zip(*spools):
            self._encoder.write([b / s.divisor for b, s in zip(blocks, self.signals.values())])
            advance(sum(block.shape[-1] for block in blocks))
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
        self.paths, self.target, self.page = paths, target, page
        self._writers: list[tuple[Location, _FileWriter]] = []
        self._finished: dict[Location, Path] = {}  # the file that becomes each path
        self._signals: dict[str, _Signal] = {}
        self._sounds: dict[str, _Signal] = {}
        for path in dict.fromkeys(paths.values()):
            names = [name for name, other in paths.items() if other == path]
            writer = self._add(path, target, names)
            self._signals |= writer.signals
            self._finished[path] = writer.file
        if page is not None:
            with self._writing(page):
                self._finished[page] = target.space.file()
            for name in paths:
                if not (target.format.is_together and name == MIX):
                    self._sounds |= self._add(page, target.sounds, [name]).signals

    def _add(self, path: Location, target: Target, names: Sequence[str]) -> _FileWriter:
        with self._writing(path):
            writer = _FileWriter(target, names)
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

    def finish(self, progress: Callable[[float], None]) -> dict[str, StemFile]:
        """Encode what is left and let the files appear.

        `progress` is called with the fraction of the samples that are encoded, in one thread at a
        time. An exception that it raises ends the work.
        """
        self._write(dict.fromkeys(self.paths))
        for signals, mode in ((self._signals, self.target.clip), (self._sounds, "rescale-all")):
            loudest = max((signal.peak for signal in signals.values()), default=0.0)
            for signal in signals.values() if mode in RESCALING else ():
                signal.divisor = rescale_divisor(loudest if mode == "rescale-all" else signal.peak)
        self._encode(progress)
        if self.page is not None:
            with self._writing(self.page):
                self._write_page(self._finished[self.page])
        self._publish()
        return {
            name: StemFile(self.paths[name], signal.peak, 1 / signal.divisor)
            for name, signal in self._signals.items()
        }

    def _encode(self, progress: Callable[[float], None]) -> None:
        signals = [s for _, writer in self._writers for s in writer.signals.values()]
        whole = sum(signal.spool.length for signal in signals if signal.spool is not None)
        lock, encoded = threading.Lock(), 0

        def advance(samples: int) -> None:
            nonlocal encoded
            with lock:
                encoded += samples
                progress(encoded / max(1, whole))

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
        published: list[Undo] = []
        try:
            for path, file in self._finished.items():
                with self._writing(path):
                    published.append(_publish(file, path))
        except BaseException:
            for undo in reversed(published):
                with contextlib.suppress(OSError, SaveAudioError):
                    undo()
            raise
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
