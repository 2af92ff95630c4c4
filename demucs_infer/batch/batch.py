"""Separate many tracks, one after the other, while neighbours are read and written.

    next track      decode, measure              (a thread)
    this track      separate                     (the caller's thread)
    last track      rescale, encode, rename      (a thread)

An error with one track is reported, and the others go on.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..engine.machine import kept_memory, worker_pool
from ..errors import DemucsInferError, LoadAudioError
from ..log import logger
from ..read.decode import AudioFile
from ..read.mixture import Decoder, Mixture, Moments
from ..read.packets import Damage
from ..storage.locations import Location, check_target, local_copy
from ..storage.spool import Spool, Workspace
from ..utils import DummyPoolExecutor
from ..write.encode import encoding_errors
from ..write.metadata import read_cover
from ..write.output import PAGE_FORMAT, PIPE, PIPE_NAME, Output
from ..write.player import check_length
from ..write.video import Video
from ..write.writer import StemFile, Target, TrackWriter
from .console import standard_input
from .folders import Folders
from .tracks import TrackJob, TrackResult, plan_jobs

MEASURED = 20  # tracks whose headers are read
CLEAN_UP = 2  # seconds that an interrupted writer has to remove its files
HERE = DummyPoolExecutor()  # runs the model in the caller's thread


class _Stopped(Exception):
    """The batch ends early."""


@dataclass
class _Track:
    """A track that is decoded, then separated, then written.

    `files` removes its temporary files. `title` is that of a progress bar, and `encoded` the
    fraction of the stems' samples.
    """

    job: TrackJob
    mixture: Mixture
    spool: Spool
    writer: TrackWriter
    seconds: float
    damage: Damage
    files: contextlib.ExitStack
    begin: float = 0.0
    title: str | None = None
    offsets: Sequence[int] = ()
    encoded: float = 0.0
    written: Future[None] | None = None


class Batch:
    """Separates tracks one by one, with one read ahead and one written behind.

    `separator` is a `Separator`, or has its `name`, `samplerate`, `audio_channels`, `stems`,
    `options`, `plan` and `blocks`. `announce` is called before a track is separated. It
    returns a title for the progress bar, or None if standard error is not a terminal. `report` is
    called with each result, one at a time, from any thread. The model runs in `model_pool`: batches
    that share a model share a thread for it.
    """

    def __init__(
        self,
        separator: Any,
        output: Output,
        space: Workspace,
        *,
        announce: Callable[[Location], str | None] = lambda track: None,
        report: Callable[[TrackResult], None] = lambda result: None,
        model_pool: Executor = HERE,
    ) -> None:
        self.separator, self.output, self.space = separator, output, space
        self._announce, self._report, self._model_pool = announce, report, model_pool
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def run(self, jobs: Sequence[TrackJob], *, skip_existing: bool = False) -> None:
        """Separate every track. Errors with a track are reported, not raised.

        With `skip_existing`, tracks whose files all exist are reported as skipped.
        """
        wanted = (job for job in jobs if not (skip_existing and self._skipped(job)))
        reader, writer = worker_pool(1), worker_pool(1)
        behind: _Track | None = None
        try:
            with kept_memory():
                for job, decoded in self._read_ahead(reader, wanted):
                    track, title, begin = None, self._announce(job.track), time.monotonic()
                    try:
                        # Python does not notice a signal that arrives just before a wait without
                        # a timeout.
                        while not wait([decoded], 1).done:
                            pass
                        track = decoded.result()
                        track.title, track.begin = title, begin
                        self._model_pool.submit(self._separate, track).result()
                    except Exception as exc:
                        track = None
                        self._fail(job.track, exc)
                    self._await_stems(behind)
                    behind = track
                    if track is not None:
                        track.written = writer.submit(self._finish, track)
                self._await_stems(behind)
        finally:
            self._stop.set()
            # A server or a pipe may block these threads for ever.
            for pool in (reader, writer):
                pool.shutdown(wait=False, cancel_futures=True)
            if behind is not None and behind.written is not None:
                wait([behind.written], CLEAN_UP)

    def _skipped(self, job: TrackJob) -> bool:
        try:
            if not job.is_done:
                return False
        except DemucsInferError as exc:  # of a store
            self._fail(job.track, exc)
        else:
            self.output.mention_leftovers(job.files)
            stems = {name: StemFile(path) for name, path in job.paths.items()}
            name = self.separator.name
            self._tell(TrackResult(job.track, name, stems, skipped=True, player=job.page))
        return True

    def _read_ahead(
        self, reader: Executor, jobs: Iterable[TrackJob]
    ) -> Iterator[tuple[TrackJob, Future[_Track]]]:
        ahead: deque[tuple[TrackJob, Future[_Track]]] = deque()
        for job in jobs:
            ahead.append((job, reader.submit(self._decode, job)))
            if len(ahead) > 1:
                yield ahead.popleft()
        yield from ahead

    def _decode(self, job: TrackJob) -> _Track:
        separator, output, form = self.separator, self.output, self.output.file_format
        channels, model_rate = separator.audio_channels, separator.samplerate
        for path in job.files:
            if path != PIPE:
                check_target(path)
        output.mention_leftovers(job.files)
        with contextlib.ExitStack() as stack:
            if job.track == PIPE:
                # Most formats need seeking, which a pipe does not have.
                copy = self.space.file()
                with encoding_errors(copy), copy.open("wb") as content:
                    shutil.copyfileobj(standard_input(), content)
            else:
                copy = stack.enter_context(local_copy(job.track, self.space.path))
            file = AudioFile(copy, name=PIPE_NAME if job.track == PIPE else str(job.track))
            decoder = Decoder(file, model_rate, channels, separator.options)
            rate = form.samplerate(decoder.rate if output.keep_rate else model_rate)
            keeps_rate = rate == decoder.rate != model_rate
            spool = stack.enter_context(contextlib.closing(self.space.spool(channels)))
            # The mix in a file of all stems then needs no resampling.
            original = self.space.spool(channels) if form.is_together and keeps_rate else None
            if original is not None:
                stack.enter_context(contextlib.closing(original))
            cover = read_cover(file, form.covers)
            video = None
            if form.is_video:
                video = Video(file, form, *decoder.samples, keep_audio=output.keep_audio)
            moments = Moments()
            for block in decoder.chunks(None if original is None else original.write):
                self._check_stop()
                moments.add(block)
                spool.write(block)
            if not moments.count:
                raise LoadAudioError(f"{file.name}: is too short to be separated")
            seconds = decoder.length / decoder.rate
            if output.player:
                check_length(file.name, seconds)
            target = Target(
                form.for_depth(file.bits) if output.depth else form,
                output.clip_mode,
                self.space,
                model_rate,
                rate,
                channels,
                separator.name,
                {"title": output.track_name(job.track), **file.tags},
                decoder.length if keeps_rate else None,
                cover,
                video,
                original,
            )
            writer = TrackWriter(job.paths, target, job.page)
            stack.callback(writer.discard)
            mixture, files = Mixture(spool.read, moments), stack.pop_all()
            return _Track(job, mixture, spool, writer, seconds, decoder.damage, files)

    def _separate(self, track: _Track) -> None:
        separator, position = self.separator, 0
        with track.files as files, contextlib.closing(track.spool):
            passes, names = separator.plan(track.mixture.length), separator.stems
            track.offsets = [task.offset for task in passes if task.offset is not None]
            for stems in separator.blocks(track.mixture, passes, track.title):
                start, position = position, position + stems.shape[-1]
                mixture = partial(track.mixture.samples, start, position)
                track.writer.write(self.output.pick(mixture, dict(zip(names, stems[0]))))
                del stems  # The next window needs the memory.
            track.files = files.pop_all()

    def _finish(self, track: _Track) -> None:
        """Encode the stems of a track and report it."""

        def progress(fraction: float) -> None:
            self._check_stop()
            track.encoded = fraction

        try:
            with track.files:
                stems = track.writer.finish(progress)
        except Exception as exc:
            self._fail(track.job.track, exc)
            return
        result = TrackResult(
            track.job.track,
            self.separator.name,
            stems,
            track.seconds,
            time.monotonic() - track.begin,
            track.offsets,
            damaged=track.damage or None,
            player=track.job.page,
        )
        self._tell(result)

    def _await_stems(self, track: _Track | None) -> None:
        """Wait until the stems of a track are there. On a terminal, show how far they are."""
        if track is None or track.written is None:
            return
        form = "Encoding stems {percentage:3.0f} % {bar} {desc}"
        options = {"dynamic_ncols": True, "leave": False, "disable": track.title is None}
        with tqdm(total=1.0, desc=track.title, bar_format=form, **options) as bar:
            while not wait([track.written], 0.2).done:
                bar.n = track.encoded
                bar.refresh()
        track.written.result()

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise _Stopped

    def _fail(self, track: Location, exc: Exception) -> None:
        if not isinstance(exc, _Stopped):
            logger.debug("", exc_info=exc)
            self._tell(TrackResult(track, self.separator.name, error=exc))

    def _tell(self, result: TrackResult) -> None:
        with self._lock:
            self._report(result)


def separate_track(
    separator: Any,
    track: Location,
    output: Output,
    space: Workspace | None = None,
    *,
    folders: Folders | None = None,
    skip_existing: bool = False,
    model_pool: Executor = HERE,
) -> TrackResult:
    """Separate one track, and return its result or its error. `space` is a workspace in use.

    Raises `OptionError` if the stems would replace the track or cannot be had.
    """
    jobs = plan_jobs([track], output, separator.name, separator.stems, folders)
    results: list[TrackResult] = []
    with output.workspace() if space is None else contextlib.nullcontext(space) as opened:
        batch = Batch(separator, output, opened, report=results.append, model_pool=model_pool)
        batch.run(jobs, skip_existing=skip_existing)
    return results[0]


def warn_of_full_disk(
    separator: Any, output: Output, space: Workspace, jobs: Sequence[TrackJob]
) -> None:
    """Warn if the disk of the output folder clearly has too little space for the stems of `jobs`.

    The headers of the first `MEASURED` tracks tell the length of all.
    """
    lengths = [0.0]
    for job in jobs[:MEASURED]:
        with contextlib.suppress(DemucsInferError, OSError):  # They are raised again later.
            if isinstance(job.track, Path) and job.track.is_file() and not job.is_done:
                seconds = AudioFile(job.track).duration
                lengths.append(min(seconds, separator.options.duration or seconds))
    rate, channels = separator.samplerate, separator.audio_channels
    stems = len(output.stems(separator.stems))
    size = stems * output.file_format.bytes_per_second(rate, channels)
    if output.player:
        # Its sounds and that of the mix, in base64.
        size += (stems + 1) * PAGE_FORMAT.bytes_per_second(rate, channels) * 4 / 3
    files = sum(lengths) * max(1, len(jobs) / MEASURED) * size
    # The track, and stems that wait until their peaks are known, are kept as float32.
    needed = max(files, max(lengths) * rate * channels * 4 * (1 + stems))
    free = shutil.disk_usage(space.path).free
    if needed > free:
        logger.warning(
            "%s: has %d MB free, and the stems take about %d MB. Free some, or choose another -o",
            *(output.folder, free // 10**6, needed // 10**6),
        )
