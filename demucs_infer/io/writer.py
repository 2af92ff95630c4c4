"""The stems of a track on their way into files, which appear together when all are whole.

    block of stems ──▶ resample ──▶ clip ──▶ encoder ──▶ temporary file ──rename──▶ stem
                           └──▶ spool ──rescale──▶ ┘

A stem that is to be rescaled waits in a spool until its peak is known.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..engine.threads import worker_pool
from ..errors import SaveAudioError
from ..resample import Resampler
from .console import standard_output
from .encode import encoder, encoding_errors
from .output import PIPE, Output
from .pcm import RESCALING, prevent_clip, rescale_divisor
from .spool import Spool, Workspace
from .storage import Place, Undo, replaced_by

BLOCK = 2**16  # samples that are read from a spool at once


@dataclass(frozen=True)
class StemFile:
    """A stem that is there: `peak` is its magnitude before it was multiplied by `gain`."""

    path: Place
    peak: float | None = None
    gain: float | None = None


@dataclass(frozen=True)
class Target:
    """What the files of a track have in common.

    `length` is the number of samples that each gets at `rate` hertz; None: what resampling gives.
    """

    output: Output
    space: Workspace
    samplerate: int  # of the model
    channels: int
    rate: int
    length: int | None
    tags: Mapping[str, str]


class _StemWriter:
    """One stem on its way into its file."""

    def __init__(self, target: Target, name: str) -> None:
        self.target = target
        self.peak = 0.0
        self.divisor = 1.0
        self.file = target.space.file()
        self._handle = self.file.open("w+b")
        self._encoder = encoder(
            self._handle,
            target.output.encoding,
            target.rate,
            target.channels,
            {**target.tags, "title": f"{target.tags['title']} ({name})"},
        )
        self._resampler = Resampler(target.samplerate, target.rate, target.length)
        rescales = target.output.clip in RESCALING
        self._spool: Spool | None = target.space.spool(target.channels) if rescales else None

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
        if self._spool is not None:
            self._spool.write(block)
        else:
            self._encoder.write(prevent_clip(block, self.target.output.clip))

    def encode(self, check: Callable[[], None]) -> None:
        """Encode what is in the spool, and make the file whole; `check` may end that at a block."""
        check()
        if self._spool is not None:
            for block in self._spool.blocks(BLOCK):
                check()
                self._encoder.write(block / self.divisor)
        self._encoder.close()
        self.close()

    def close(self) -> None:
        """Give everything back but the file, whole or not."""
        self._handle.close()
        if self._spool is not None:
            self._spool.close()


class TrackWriter:
    """Takes the stems of a track block by block, and makes them appear together.

    Raises `SaveAudioError` if something cannot be written; nothing of the track is left then.
    """

    def __init__(self, paths: Mapping[str, Place], target: Target) -> None:
        self.paths = paths
        self.target = target
        self._writers: dict[str, _StemWriter] = {}
        for name, path in paths.items():
            with self._writing(path):
                self._writers[name] = _StemWriter(target, name)

    @contextmanager
    def _writing(self, path: Place) -> Iterator[None]:
        try:
            with encoding_errors(path):
                yield
        except BaseException:
            self.discard()
            raise

    def write(self, stems: Sequence[Tensor]) -> None:
        """Take a block of every stem, each `[C, n]`, in the order of the paths."""
        for block, (name, writer) in zip(stems, self._writers.items()):
            with self._writing(self.paths[name]):
                writer.write(block)

    def finish(self, check: Callable[[], None]) -> dict[str, StemFile]:
        """Encode what is left and let the files appear; what `check` raises ends that."""
        for name, writer in self._writers.items():
            with self._writing(self.paths[name]):
                writer.flush()
        self._choose_divisors()
        with worker_pool(min(len(self._writers), os.cpu_count() or 1)) as pool:
            encoded = [pool.submit(writer.encode, check) for writer in self._writers.values()]
        for name, future in zip(self._writers, encoded):
            with self._writing(self.paths[name]):
                future.result()
        self._publish()
        return {
            name: StemFile(self.paths[name], writer.peak, 1 / writer.divisor)
            for name, writer in self._writers.items()
        }

    def _publish(self) -> None:
        """Let all files appear, or none: one that fails takes back those before it."""
        with contextlib.ExitStack() as published:
            for name, writer in self._writers.items():
                with self._writing(self.paths[name]):
                    published.callback(_taking_back, _publish(writer.file, self.paths[name]))
            published.pop_all()
        for writer in self._writers.values():
            replaced_by(writer.file).unlink(missing_ok=True)

    def _choose_divisors(self) -> None:
        clip, writers = self.target.output.clip, self._writers.values()
        if clip in RESCALING:
            loudest = max(writer.peak for writer in writers)
            for writer in writers:
                writer.divisor = rescale_divisor(loudest if clip == "rescale-all" else writer.peak)

    def discard(self) -> None:
        """Remove what has been written of the track."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):  # of a full disk, when the rest is written out
                writer.close()
            writer.file.unlink(missing_ok=True)


def _publish(file: Path, path: Place) -> Undo:
    """Give `file`, which is whole, its name, or copy it to a store or to standard output.

    Returns what takes that back.
    """
    if path == PIPE:
        with file.open("rb") as source, standard_output() as sink:
            shutil.copyfileobj(source, sink)
        return lambda: None
    undo = path.publish(file)
    file.unlink(missing_ok=True)
    return undo


def _taking_back(undo: Undo) -> None:
    with contextlib.suppress(OSError, SaveAudioError):  # the first error is the one to tell
        undo()
