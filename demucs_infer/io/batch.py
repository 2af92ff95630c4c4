"""Files in, files out: many tracks go through the pipe, one behind the other.

    next track      decode, measure              (a thread)
    this track      separate                     (the caller's thread)
    last track      rescale, encode, rename      (a thread)

What goes wrong with a track is reported, and the others go on.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from .. import __version__
from ..engine.machine import kept_memory, worker_pool
from ..engine.plan import Pass
from ..errors import DemucsInferError, LoadAudioError, OptionError
from ..log import logger
from ..read.decode import AudioFile
from ..read.mixture import Decoder, Excerpt, Limits, Mixture, Moments
from ..read.packets import Damage
from ..storage.locations import Location, full_text, local_copy
from ..storage.spool import Spool, Workspace
from .console import standard_input
from .container import Picture, read_cover
from .encode import encoding_errors
from .output import PIPE, PIPE_NAME, Output
from .player import check_length
from .tracks import TrackJob, plan_jobs
from .writer import Extras, StemFile, Target, TrackWriter


class StemSource(Protocol):
    """A `Separator` as a batch sees it."""

    @property
    def name(self) -> str: ...

    @property
    def samplerate(self) -> int: ...

    @property
    def audio_channels(self) -> int: ...

    @property
    def model(self) -> Any:
        """The model, with its `sources`."""

    @property
    def stems(self) -> list[str]: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def excerpt(self) -> Excerpt:
        """The time range of a file that is separated."""

    def plan(self, length: int) -> list[Pass]: ...

    def blocks(
        self, mixture: Mixture, passes: Sequence[Pass], title: str | None = None
    ) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class TrackResult:
    """What became of a track.

    `seconds` are those of the audio, `elapsed` those that it took, and `offsets` the samples that
    were drawn for the shifts, model by model. `damaged` is what of the track could not be read, and
    `error` what went wrong, if anything did; `player` is the page to listen with.
    """

    input: Location
    model: str
    stems: Mapping[str, StemFile] = field(default_factory=dict)
    seconds: float | None = None
    elapsed: float | None = None
    offsets: Sequence[int] = ()
    skipped: bool = False
    damaged: Damage | None = None
    error: Exception | None = None
    player: Location | None = None
    version: str = __version__

    @property
    def message(self) -> str:
        """One line about the error."""
        if self.error is None or isinstance(self.error, DemucsInferError):
            return str(self.error or "")
        return f"{self.input}: {type(self.error).__name__}: {self.error}"

    def as_json(self) -> dict[str, Any]:
        """The result as plain values."""
        stems = {
            name: {"path": full_text(stem.path), "peak": stem.peak, "gain": stem.gain}
            for name, stem in self.stems.items()
        }
        changed = {
            "input": full_text(self.input),
            "stems": stems,
            "offsets": list(self.offsets),
            "damaged": None if self.damaged is None else self.damaged.as_json(),
            "error": self.message or None,
            "player": None if self.player is None else full_text(self.player),
        }
        return {**vars(self), **changed}


class _Stopped(Exception):
    """The batch ends before its time."""


@dataclass
class _Decoded:
    """A track that has been read."""

    mixture: Mixture
    spool: Spool
    rate: int  # of the file, hertz
    length: int  # of what is separated of the file, samples
    bits: int  # of the file's samples, 32 for float; 0 if they are lossy
    damage: Damage
    tags: dict[str, str]
    extras: Extras
    files: contextlib.ExitStack  # gives back the rest when the stems are there


class Batch:
    """Separates tracks one by one, with one read ahead and one written behind.

    `announce` is called before a track is separated, and gives a title for its progress bar;
    `report` is called with what became of it, from any
    thread, but for one track at a time. `call` calls a function with arguments where the model may
    be run: batches that share a model share a thread for it.
    """

    def __init__(
        self,
        separator: StemSource,
        output: Output,
        space: Workspace,
        *,
        announce: Callable[[Location], str | None] = lambda track: None,
        report: Callable[[TrackResult], None] = lambda result: None,
        call: Callable[..., Any] = lambda function, *arguments: function(*arguments),
    ) -> None:
        self.separator = separator
        self.output = output
        self.space = space
        self._announce, self._report = announce, report
        self._call = call
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self, jobs: Sequence[TrackJob], *, skip_existing: bool = False) -> None:
        """Separate every track. Raises nothing for a track that fails: it is reported.

        With `skip_existing`, tracks whose stems are all there are reported as skipped.
        """
        if any(job.track == PIPE for job in jobs):
            self._keep_standard_input()
        left = (job for job in jobs if not (skip_existing and self._skipped(job)))
        wanted = (job for job in left if not self._is_missing(job))
        with kept_memory(), worker_pool(1) as reader, worker_pool(1) as writer:
            behind: Future[None] | None = None
            try:
                for job, decoded in self._read_ahead(reader, wanted):
                    finish = self._separated(job, decoded, self._announce(job.track))
                    if behind is not None:
                        behind.result()
                    behind = None if finish is None else writer.submit(finish)
                if behind is not None:
                    behind.result()
            finally:
                self._stop.set()

    def _skipped(self, job: TrackJob) -> bool:
        try:
            if not job.is_done:
                return False
        except DemucsInferError as exc:  # of a store
            self._fail(job, exc)
        else:
            stems = {name: StemFile(path) for name, path in job.paths.items()}
            name = self.separator.name
            self._tell(TrackResult(job.track, name, stems, skipped=True, player=job.page))
        return True

    def _is_missing(self, job: TrackJob) -> bool:
        """Return True, and report it at once, if there is no such file."""
        missing = (
            isinstance(job.track, Path) and job.track != PIPE and not os.path.lexists(job.track)
        )
        if missing:
            self._fail(job, LoadAudioError(f"{job.track}: no such file"))
        return missing

    def _read_ahead(
        self, reader: Executor, jobs: Iterable[TrackJob]
    ) -> Iterator[tuple[TrackJob, Future[_Decoded]]]:
        ahead: deque[tuple[TrackJob, Future[_Decoded]]] = deque()
        for job in jobs:
            ahead.append((job, reader.submit(self._decode_job, job)))
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead

    def _keep_standard_input(self) -> None:
        """Most formats have to be sought in, and a pipe cannot be."""
        self._input = self.space.file()
        with encoding_errors(self._input), self._input.open("wb") as file:
            shutil.copyfileobj(standard_input(), file)

    def _decode_job(self, job: TrackJob) -> _Decoded:
        job.check_targets()
        return self._decode(job.track)

    def _decode(self, track: Location) -> _Decoded:
        if track == PIPE:
            with contextlib.ExitStack() as stack:
                return self._decode_file(track, AudioFile(self._input, name=PIPE_NAME), stack)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(local_copy(track, self.space.path))
            return self._decode_file(track, AudioFile(file, name=str(track)), stack)

    def _decode_file(
        self, track: Location, file: AudioFile, stack: contextlib.ExitStack
    ) -> _Decoded:
        separator = self.separator
        decoder = Decoder(
            file,
            separator.samplerate,
            separator.audio_channels,
            separator.limits,
            separator.excerpt,
        )
        extras = self._extras(file, decoder, stack)
        spool, moments = self._spool(stack), Moments()
        for block in decoder.chunks(None if extras.original is None else extras.original.write):
            self._check_stop()
            moments.add(block)
            spool.write(block)
        if not moments.count:
            raise LoadAudioError(f"{file.name}: is too short to be separated")
        if self.output.player:
            check_length(file.name, decoder.length / decoder.rate)
        return _Decoded(
            Mixture(spool.read, moments),
            spool,
            decoder.rate,
            decoder.length,
            file.bits,
            decoder.damage,
            {"title": self.output.track_name(track), **file.tags},
            extras,
            stack.pop_all(),
        )

    def _spool(self, stack: contextlib.ExitStack) -> Spool:
        spool = self.space.spool(self.separator.audio_channels)
        stack.callback(spool.close)
        return spool

    def _extras(self, file: AudioFile, decoder: Decoder, stack: contextlib.ExitStack) -> Extras:
        """What the output needs of the file besides its samples."""
        output = self.output
        if output.format == "mp4":
            return Extras(picture=Picture(file, *decoder.samples))
        if not output.is_together:
            return Extras()
        rate = decoder.rate
        differs = output.keep_rate and rate != self.separator.samplerate
        own = differs and output.encoding.samplerate(rate) == rate
        return Extras(read_cover(file), original=self._spool(stack) if own else None)

    def _separated(
        self, job: TrackJob, decoded: Future[_Decoded], title: str | None
    ) -> Callable[[], None] | None:
        """Separate a track; returns what is left to do, or None if it has failed."""
        begin = time.monotonic()
        try:
            track = decoded.result()
            with track.files as files, contextlib.closing(track.spool):
                finish = self._call(self._separate, job, track, begin, title)
                return partial(self._after, files.pop_all(), finish)
        except Exception as exc:
            self._fail(job, exc)
            return None

    def _after(self, files: contextlib.ExitStack, finish: Callable[[], None]) -> None:
        with files:
            finish()

    def _separate(
        self, job: TrackJob, track: _Decoded, begin: float, title: str | None
    ) -> Callable[[], None]:
        writer = TrackWriter(job.paths, self._target(track), job.page)
        passes = self.separator.plan(track.mixture.length)
        names, position = self.separator.stems, 0
        try:
            for stems in self.separator.blocks(track.mixture, passes, title):
                start, position = position, position + stems.shape[-1]
                mixture = partial(track.mixture.samples, start, position)
                writer.write(self.output.pick(mixture, dict(zip(names, stems[0]))))
                del stems  # the next window needs the room
        except BaseException:
            writer.discard()
            raise
        result = TrackResult(
            job.track,
            self.separator.name,
            seconds=track.length / track.rate,
            offsets=[task.offset for task in passes if task.offset is not None],
            damaged=track.damage or None,
        )
        return partial(self._finish, job, writer, result, begin)

    def _target(self, track: _Decoded) -> Target:
        model_rate = self.separator.samplerate
        rate = self.output.encoding.samplerate(track.rate if self.output.keep_rate else model_rate)
        return Target(
            self.output,
            self.output.encoding_for(track.bits),
            self.space,
            model_rate,
            self.separator.audio_channels,
            rate,
            track.length if rate == track.rate and rate != model_rate else None,
            track.tags,
            self.separator.name,
            track.extras,
        )

    def _finish(
        self, job: TrackJob, writer: TrackWriter, result: TrackResult, begin: float
    ) -> None:
        try:
            stems = writer.finish(self._check_stop)
        except Exception as exc:
            self._fail(job, exc)
        else:
            took = time.monotonic() - begin
            self._tell(replace(result, stems=stems, player=job.page, elapsed=took))

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _fail(self, job: TrackJob, exc: Exception) -> None:
        if isinstance(exc, _Stopped):
            return
        logger.debug("", exc_info=exc)
        self._tell(TrackResult(job.track, self.separator.name, error=exc))

    def _tell(self, result: TrackResult) -> None:
        with self._lock:
            self._report(result)


def separate_file(separator: StemSource, track: Location, output: Output) -> TrackResult:
    """Separate one track, and raise what goes wrong with it."""
    (job,) = plan_jobs([track], output, separator.name, checked_stems(separator, output))
    results: list[TrackResult] = []
    with output.workspace() as space:
        Batch(separator, output, space, report=results.append).run([job])
    if results[0].error is not None:
        raise results[0].error
    return results[0]


def checked_stems(separator: StemSource, output: Output) -> list[str]:
    """The stems of `separator`. Raises `OptionError` if `output` wants others of them."""
    sources: Any = separator.model.sources
    stem, separated = output.two_stems, separator.stems
    if stem is None:
        output.warn(separated)
        return separated
    if stem not in sources:
        raise OptionError(f"there is no stem {stem!r}: the model has {', '.join(sources)}")
    needed = output.needed or sources
    missing = [name for name in needed if name not in separated]
    if missing:
        raise OptionError(f"two stems need {', '.join(missing)}, too: choose no stems for that")
    return separated
