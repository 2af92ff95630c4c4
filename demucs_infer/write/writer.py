"""Write the stems of a track into files, which appear together when all are whole.

    block of stems ──▶ resample ──▶ spool ──▶ rescale or clip ──▶ encoder ──▶ file ──rename──▶ stem

The stems wait in spools until their peaks are known. The sounds of a page to listen with are stems
in MP3.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

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
from .video import Video, VideoEncoder

BLOCK = 2**16  # samples that are read from a spool at once
PAGE_MIX = ""  # the name of the mix on a page, which no stem has


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
        length: the number of samples that each file gets (default: as many as resampling gives).
        cover: the file of a picture.
        video: the video whose picture goes with the stem.
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
    video: Video | None = None
    original: Spool | None = None

    @property
    def sounds(self) -> Target:
        """The target of the sounds of a page to listen with."""
        channels = min(self.channels, PAGE_FORMAT.most_channels)
        rate = PAGE_FORMAT.samplerate(self.samplerate)
        space, old_rate = self.space, self.samplerate
        return Target(PAGE_FORMAT, "rescale-all", space, old_rate, rate, channels, self.model, {})


class _Signal:
    """A stem on its way: resampled, measured, and kept in `spool` until its gain is known."""

    def __init__(self, target: Target, name: str) -> None:
        self.channels = target.channels
        self.peak, self.divisor = 0.0, 1.0
        self._resampler: Resampler | None = None
        if name == MIX and target.original is not None:
            self.spool = target.original
            peaks = (block.abs().max().item() for block in self.spool.blocks(BLOCK))
            self.peak = max(peaks, default=0.0)
        else:
            self.spool = target.space.spool(target.channels)
            self._resampler = Resampler(target.samplerate, target.rate, target.length)

    def write(self, block: Tensor | None) -> None:
        """Take samples `[C, n]` at the model's rate, or None for the end."""
        if self._resampler is None:
            return
        if block is None:
            block = self._resampler.flush()
        else:
            block = self._resampler.push(block[: self.channels])
        if block is not None and block.shape[-1]:
            self.peak = max(self.peak, block.abs().max().item())
            self.spool.write(block)


class _File:
    """An unfinished file `path` of one stem, or of all stems of a track, by name."""

    def __init__(self, target: Target, names: Sequence[str]) -> None:
        self.target, self.path = target, target.space.file()
        self.signals = {name: _Signal(target, name) for name in names}

    def encode(self, advance: Callable[[int], None]) -> None:
        """Encode the stems from their spools. `advance` counts the samples."""
        target, names, signals = self.target, list(self.signals), self.signals.values()
        tags = dict(target.tags)
        if tags and not target.format.is_together:
            tags["title"] = f"{tags['title']} ({names[0]})"
        with self.path.open("w+b") as handle:
            # Players show the names of streams.
            of_streams = target.format, target.rate, target.channels, names, tags, target.cover
            if target.video is not None:
                sink: Encoder = VideoEncoder(target.video, handle, *of_streams)
            else:
                sink = encoder(handle, *of_streams)
            clip = None if target.clip in RESCALING else target.clip
            try:
                for blocks in zip(*(signal.spool.blocks(BLOCK) for signal in signals)):
                    scaled = (block / signal.divisor for block, signal in zip(blocks, signals))
                    sink.write([prevent_clip(block, clip) for block in scaled])
                    advance(sum(block.shape[-1] for block in blocks))
                sink.close()
            finally:
                sink.abandon()


class TrackWriter:
    """Takes the stems of a track block by block, and makes them appear together.

    `page` is that of its page to listen with, if there is to be one. Raises `SaveAudioError` if
    something cannot be written. `discard` removes the temporary files.
    """

    def __init__(
        self, paths: Mapping[str, Location], target: Target, page: Location | None
    ) -> None:
        target.format.check_channels(target.channels)
        self.paths, self.target, self.page = paths, target, page
        self._stems, self._sounds = dict[Location, _File](), list[_File]()
        for path in dict.fromkeys(paths.values()):
            self._stems[path] = _File(target, [name for name in paths if paths[name] == path])
        self._names = list(paths)
        if page is not None:
            self._page = target.space.file()
            original = MIX if target.format.is_together else PAGE_MIX
            self._names = list(dict.fromkeys([original, *paths]))
            # The page shows the mix below the stems.
            names = [*self._names[1:], original]
            self._sounds = [_File(target.sounds, [name]) for name in names]
        sounds = ((page, file) for file in self._sounds)
        self._files: list[tuple[Any, _File]] = [*self._stems.items(), *sounds]

    def write(self, stems: Sequence[Tensor]) -> None:
        """Take a block of every stem, each `[C, n]`, in the order of the paths.

        With a page, the mix comes first.
        """
        self._write(dict(zip(self._names, stems)))

    def _write(self, blocks: Mapping[str, Tensor | None]) -> None:
        for path, file in self._files:
            with encoding_errors(path):
                for name, signal in file.signals.items():
                    signal.write(blocks[name])

    def finish(self, progress: Callable[[float], None]) -> dict[str, StemFile]:
        """Encode the stems and let their files appear.

        `progress` is called with the fraction of the samples that are encoded, in one thread at a
        time. An exception that it raises ends the work.
        """
        self._write(dict.fromkeys(self._names))
        stems = {name: s for file in self._stems.values() for name, s in file.signals.items()}
        sounds = [signal for file in self._sounds for signal in file.signals.values()]
        for signals, mode in ((stems.values(), self.target.clip), (sounds, "rescale-all")):
            loudest = max((signal.peak for signal in signals), default=0.0)
            for signal in signals if mode in RESCALING else ():
                signal.divisor = rescale_divisor(loudest if mode == "rescale-all" else signal.peak)
        self._encode(progress, sum(signal.spool.length for signal in [*stems.values(), *sounds]))
        files: dict[Location, Path] = {path: file.path for path, file in self._stems.items()}
        if self.page is not None:
            files[self.page] = self._page
            tags, length = self.target.tags, max(signal.spool.length for signal in sounds)
            about = tags["title"], tags.get("artist", ""), self.target.model
            names = [name for file in self._sounds for name in file.signals]
            page = Page(*about, self._sounds[0].target.rate, length, names[:-1])
            with encoding_errors(self.page), self._page.open("wb") as target:
                write_page(target, page, (file.path for file in self._sounds))
        self._publish(files)
        self.discard()
        return {
            name: StemFile(self.paths[name], signal.peak, 1 / signal.divisor)
            for name, signal in stems.items()
        }

    def _encode(self, progress: Callable[[float], None], whole: int) -> None:
        lock, encoded = threading.Lock(), 0

        def advance(samples: int) -> None:
            nonlocal encoded
            with lock:
                encoded += samples
                progress(encoded / whole)

        with worker_pool(min(len(self._files), os.cpu_count() or 1)) as pool:
            futures = [(path, pool.submit(file.encode, advance)) for path, file in self._files]
        for path, future in futures:
            with encoding_errors(path):
                future.result()

    def _publish(self, files: Mapping[Location, Path]) -> None:
        """Let all files appear, or none: one that fails takes back those before it."""
        published: list[Undo] = []
        try:
            for path, file in files.items():
                with encoding_errors(path):
                    if path == PIPE:
                        with file.open("rb") as source, standard_output() as sink:
                            shutil.copyfileobj(source, sink)
                    else:
                        published.append(publish(file, path))
        except BaseException:
            for undo in reversed(published):
                with contextlib.suppress(OSError, SaveAudioError):
                    undo()
            raise
        for file in files.values():
            replaced_by(file).unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the temporary files."""
        for _, file in self._files:
            file.path.unlink(missing_ok=True)
            for signal in file.signals.values():
                signal.spool.close()
        if self.page is not None:
            self._page.unlink(missing_ok=True)


def standard_output() -> contextlib.AbstractContextManager[IO[bytes]]:
    """Open standard output for bytes.

    Its object is not used, as it would keep the bytes of a failed write and repeat them at exit.
    """
    sys.stdout.flush()
    try:
        return open(sys.stdout.fileno(), "wb", closefd=False)
    except (AttributeError, OSError):  # an object with a buffer
        return contextlib.nullcontext(sys.stdout.buffer)
