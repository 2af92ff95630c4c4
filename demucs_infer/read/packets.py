"""Decode packets to samples, past damage, gaps and changes of format.

    container ──demux──▶ packets ──decode──▶ frames ──convert──▶ samples, and silence for gaps

A damaged packet is skipped. Where a file has timestamps, silence takes its place, so that
everything after it keeps its time. Shapes: `[C, n]` samples as float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import av
import torch
from av.audio.resampler import AudioResampler
from torch import Tensor

from .quirks import undropped_padding

# A plain `OSError` does not come from FFmpeg but from the file: its disk or server has failed.
DAMAGE_ERRORS = (av.FFmpegError, ValueError)
AV_ERRORS = (*DAMAGE_ERRORS, OSError)
MAX_CHANNELS = 24
SAMPLE_RATES = range(1000, 768_001)  # hertz
MAX_DEMUX_FAILURES = 8  # in a row, before the rest of a file is given up
SILENCE_CHUNK = 2**16  # samples

# Formats with timestamps. Of others FFmpeg counts packets or bytes, which hides gaps.
TIMESTAMPED = frozenset(
    "ape asf flv gxf iamf ivr kux live_flv lxf matroska mov mpeg mpegts mxf nsv nut nuv ogg rm tta"
    " ty wtv wv".split()
)
# Formats whose header states the length, which FFmpeg reports even if the file is shorter.
STATES_LENGTH = frozenset("avi caf mov rm".split())
STATES_EXACT_LENGTH = frozenset("aiff ape dsf flac tta w64 wav".split())
PADDING = 0.25  # seconds that a stated length may exceed the true one, as encoders pad
EXACT_PADDING = 0.01  # seconds

# Limits in seconds between which a step in timestamps is a gap.
MIN_GAP = 0.01
MIN_GAP_AFTER_LOSS = 0.002
MIN_GAP_IN_FRAMES = 0.9  # of the longest frame: timestamps jitter by less
ROUNDING = 0.002  # of coarse timestamps
MAX_DISCONTINUITY = 10  # in formats whose timestamps may start again, as MPEG-TS
MAX_SILENCE = 60  # more than there is sound: such timestamps are damaged


@dataclass
class Damage:
    """Parts of a track that cannot be decoded: the number of places, and their length together.

    `end_missing` is also set if the header states a greater length.
    """

    places: int = 0
    seconds: float = 0.0
    end_missing: bool = False

    def __bool__(self) -> bool:
        return bool(self.places or self.end_missing)

    def __str__(self) -> str:
        places = f"{self.places} place{'s' * (self.places != 1)}"
        kinds = [f"damaged at {places}"] if self.places else []
        kinds += ["cut off at the end"] if self.end_missing else []
        return f"{' and '.join(kinds)}, {self.seconds:.2f} s of sound lost"

    def add(self, seconds: float) -> None:
        """Count one more place."""
        self.places += 1
        self.seconds += seconds

    def add_missing(self, seconds: float) -> None:
        """Take into account that the header states so many more seconds."""
        self.seconds = max(seconds, self.seconds)
        if seconds > PADDING:
            self.end_missing = True
        else:
            self.places = max(1, self.places)


@dataclass
class Converter:
    """Converts frames to float32 with the rate and the channels of the first frame.

    Samples before number `first` are dropped.
    """

    first: int = 0
    rate: int = 0
    samples: int = 0  # so far, with those that were dropped
    _layout: Any = None
    _source: Any = None
    _resampler: Any = None

    def prepare(self, frame: Any) -> Iterator[Tensor]:
        """Get ready for a frame; if its format differs, yield the rest of the previous format."""
        source = (frame.format.name, frame.layout.name, frame.rate)
        if source != self._source:
            yield from self.flush()
            if self._layout is None:
                self._layout, self.rate = frame.layout, frame.rate
            # Interleaved samples: PyAV crashes on 8 planes.
            self._resampler = AudioResampler("flt", self._layout, self.rate)
            self._source = source

    def flush(self) -> Iterator[Tensor]:
        """Yield the samples that the resampler holds back."""
        if self._resampler is not None:
            yield from self.convert(None)
            self._resampler = self._source = None

    def silence(self, seconds: float) -> Iterator[Tensor]:
        """Yield zeros for a gap."""
        left = round(seconds * self.rate)
        while left > 0:
            length = min(left, SILENCE_CHUNK)
            shape = self._layout.nb_channels, length
            yield from self._keep(torch.zeros(shape, dtype=torch.float32, device="cpu"))
            left -= length

    def reaches(self, samples: int) -> bool:
        """Return True if any of the next `samples` is not dropped."""
        return self.samples + samples > self.first

    def convert(self, frame: Any) -> Iterator[Tensor]:
        """Yield the samples of `frame`, or with None those that the resampler holds back."""
        # Converting samples only to drop them doubles the time that it takes to reach a late start.
        if frame and frame.rate == self.rate and not self.reaches(frame.samples):
            self.samples += frame.samples
            return
        for converted in self._resampler.resample(frame):
            if converted.samples:
                samples = converted.to_ndarray().reshape(converted.samples, -1)
                yield from self._keep(torch.from_numpy(samples.T.copy()))

    def _keep(self, chunk: Tensor) -> Iterator[Tensor]:
        dropped = max(0, self.first - self.samples)
        self.samples += chunk.shape[-1]
        if dropped < chunk.shape[-1]:
            yield chunk[:, dropped:]


class Clock:
    """Finds gaps in the timestamps of one stream."""

    def __init__(self, container: Any, stream: Any) -> None:
        self._stream = stream
        self._is_kept = not TIMESTAMPED.isdisjoint(container.format.name.split(","))
        restarts = container.format.flags & av.format.Flags.ts_discont.value
        self._most = MAX_DISCONTINUITY if restarts else float("inf")
        # All in seconds: the end of the last frame, and the lengths that have been decoded.
        self._end: float | None = None
        self._silence = self._sound = self._longest_frame = 0.0

    def gap_before(self, frame: Any, following: Any, is_after_loss: bool) -> float | None:
        """Return the seconds that are missing before `frame`, or None without timestamps.

        `following` is the next frame, if there is one.
        """
        length = frame.samples / frame.rate
        self._sound += length
        if frame.pts is None or not self._is_kept:
            return None
        start, expected = self._time(frame), self._end
        self._end = start + length
        if expected is None and is_after_loss and self._stream.start_time is not None:
            expected = float(self._stream.start_time * self._stream.time_base)
        if expected is None:
            return 0.0

        gap = start - expected
        whole_frames = round(gap / length) * length
        if abs(gap - whole_frames) <= min(ROUNDING, length / 4):
            gap = whole_frames
        if following is not None and following.pts is not None:
            # MPEG-PS, and Vorbis when its block size changes, take back a step in the next frame.
            overlap = self._end - self._time(following)
            gap -= overlap if overlap > ROUNDING else 0.0

        self._longest_frame = max(self._longest_frame, length)
        jitter = max(MIN_GAP, MIN_GAP_IN_FRAMES * self._longest_frame)
        least = MIN_GAP_AFTER_LOSS if is_after_loss else jitter
        most = min(self._most, MAX_SILENCE + self._sound - self._silence)
        if not least < gap < most:
            return 0.0
        self._silence += gap
        return gap

    def _time(self, frame: Any) -> float:
        # Frames that a decoder returns when it is flushed may have no time base.
        return float(frame.pts * (frame.time_base or self._stream.time_base))


class TrackDecoder:
    """Decodes the streams of a track one after the other; most files have one.

    Samples before number `first` are dropped. `good` and `bad` count packets, and `damage`
    describes the bad ones that concern the samples from `first` on.
    """

    def __init__(self, first: int, damage: Damage) -> None:
        self.converter = Converter(first)
        self.damage = damage
        self.good = self.bad = 0
        self._lost: list[float] = []  # seconds of each bad packet since the last frame

    def chunks(self, container: Any, stream: Any) -> Iterator[Tensor]:
        """Yield the samples `[C, n]` of a stream."""
        clock = Clock(container, stream)
        # A frame waits for the one that follows it, whose timestamp says more about a gap.
        waiting: tuple[Any, list[float]] | None = None
        for packet in self._packets(container, stream):
            for frame in self._frames(stream, packet):
                lost, self._lost = self._lost, []
                if waiting is None:
                    self.converter.first += undropped_padding(container, stream, frame)
                else:
                    yield from self._samples(clock, *waiting, frame)
                waiting = frame, lost
        if waiting is not None:
            yield from self._samples(clock, *waiting, None)
        self._check_length(container, stream)

    def _packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield the stream's packets, then None to flush the decoder."""
        failures = 0
        while failures < MAX_DEMUX_FAILURES:
            try:
                for packet in container.demux(stream):
                    if packet.size:
                        failures = 0
                        yield packet
                break
            except DAMAGE_ERRORS:
                failures += 1
        if failures:
            self.bad += 1
            self._lost.append(0.0)
        yield None

    def _frames(self, stream: Any, packet: Any) -> list[Any]:
        """Decode a packet, and count it."""
        try:
            frames = [frame for frame in stream.codec_context.decode(packet) if frame.samples]
            for frame in frames:
                has_channels = 0 < frame.layout.nb_channels <= MAX_CHANNELS
                if not has_channels or frame.rate not in SAMPLE_RATES:
                    raise ValueError("not a frame of music")
        except DAMAGE_ERRORS:
            if packet is not None:
                self.bad += 1
                self._lost.append(float((packet.duration or 0) * (packet.time_base or 0)))
            return []
        self.good += packet is not None
        return frames

    def _samples(
        self, clock: Clock, frame: Any, lost: list[float], following: Any
    ) -> Iterator[Tensor]:
        """Yield the samples of `frame`, after silence for the gap before it."""
        gap = clock.gap_before(frame, following, bool(lost))
        yield from self.converter.prepare(frame)
        is_wanted = self.converter.reaches(round((gap or 0) * frame.rate) + frame.samples)
        if is_wanted and (lost or gap):
            self.damage.add(sum(lost) if gap is None else gap)
        if gap:
            yield from self.converter.silence(gap)
        yield from self.converter.convert(frame)

    def _check_length(self, container: Any, stream: Any) -> None:
        """Account for packets lost after the last frame, and for a greater length in the header."""
        if self._lost:
            self.damage.add(sum(self._lost))
            self.damage.end_missing = True
            self._lost = []
        names = frozenset(container.format.name.split(","))
        stated = 0.0
        if not stream.duration:
            # A stream of Matroska has no length, but the whole file has.
            if len(container.streams) == 1 and "matroska" in names:
                stated = float((container.duration or 0) / av.time_base)
        elif names & (STATES_LENGTH | STATES_EXACT_LENGTH) or (
            "mp3" in names and stream.start_time
        ):
            # In MP3 only LAME's header, which also states the start, has an exact length.
            stated = float(stream.duration * stream.time_base)
        missing = stated - self.converter.samples / (self.converter.rate or 1)
        if missing > (EXACT_PADDING if names & STATES_EXACT_LENGTH else PADDING):
            self.damage.add_missing(missing)
