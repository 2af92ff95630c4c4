"""Packets of a file to samples: what is damaged is skipped, and what comes after keeps its time.

    container ──demux──▶ packets ──decode──▶ frames ──convert──▶ samples, and silence for gaps

Shapes: `[C, n]` samples as float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import av
import torch
from av.audio.resampler import AudioResampler
from torch import Tensor

from .mending import late_samples

AV_ERRORS = (av.FFmpegError, OSError, ValueError)
# Formats with a clock. Of others FFmpeg counts packets or bytes, which tell nothing of a gap.
CLOCKED = frozenset(
    "ape asf flv gxf iamf ivr kux live_flv lxf matroska mov mpeg mpegts mxf nsv nut nuv ogg rm tta"
    " ty wtv wv".split()
)
# Readers that get the length of a stream from its header and not from the bytes that are there.
DECLARING = frozenset("avi caf mov rm".split())
EXACT = frozenset("aiff ape dsf flac tta w64 wav".split())
MIN_GAP = 0.01  # seconds: less is how a file's clock trembles
SURE_GAP = 0.9  # of the longest frame
MIN_LOSS = 0.002  # seconds, where packets are known to be lost
ROUNDING = 0.002  # seconds that times are rounded to
MAX_BREAK = 10  # seconds: more is another clock, in formats whose clock may jump
MAX_SILENCE = 60  # seconds of silence more than there is sound: times are a stranger's, too
END_MARGIN = 0.25  # seconds that a header may say too much, for what an encoder pads
EXACT_MARGIN = 0.01  # seconds, where it does not
MAX_CHANNELS = 24
SAMPLE_RATES = range(1000, 1_000_001)  # hertz: others are damage, or would fill the disk
RETRIES = 8  # for packets that cannot be found, before the rest is given up
SILENCE_BLOCK = 2**16  # samples


@dataclass
class Damage:
    """What of a track could not be read: at how many places, how many seconds, and the end.

    `end_missing` is also set where the header says that there is more.
    """

    places: int = 0
    seconds: float = 0.0
    end_missing: bool = False

    def __bool__(self) -> bool:
        return bool(self.places or self.end_missing)

    def __str__(self) -> str:
        places = f"{self.places} place{'s' * (self.places != 1)}"
        parts = [f"damaged at {places}"] if self.places else []
        parts += ["cut off at the end"] if self.end_missing else []
        return f"{' and '.join(parts)}, {self.seconds:.2f} s of sound lost"

    def as_json(self) -> dict[str, Any]:
        """The damage as plain values."""
        return vars(self).copy()


@dataclass
class Converter:
    """Converts frames to float32 at the rate and with the channels of the first one.

    Samples before the one with the number `first` are left out.
    """

    first: int = 0
    rate: int = 0
    samples: int = 0  # how many there have been, with those that are left out
    _layout: Any = None
    _source: Any = None
    _resampler: Any = None

    def adapt(self, frame: Any) -> Iterator[Tensor]:
        """Get ready for `frame`; the samples are what the last rate's conversion kept back."""
        source = (frame.format.name, frame.layout.name, frame.rate)
        if source != self._source:
            yield from self.flush()
            if self._layout is None:
                self._layout, self.rate = frame.layout, frame.rate
            # Interleaved: PyAV crashes on 8 planes.
            self._resampler = AudioResampler("flt", self._layout, self.rate)
            self._source = source

    def convert(self, frame: Any) -> Iterator[Tensor]:
        """The samples of `frame`, or with `None` the last ones."""
        if frame is not None and frame.rate == self.rate and not self.wants(frame.samples):
            self.samples += frame.samples
            return
        for converted in self._resampler.resample(frame):
            if converted.samples:
                samples = converted.to_ndarray().reshape(converted.samples, -1)
                yield from self._kept(torch.from_numpy(samples.T.copy()))

    def wants(self, samples: int) -> bool:
        """Whether any of so many samples that come next is not left out."""
        return self.samples + samples > self.first

    def _kept(self, block: Tensor) -> Iterator[Tensor]:
        skipped = max(0, self.first - self.samples)
        self.samples += block.shape[-1]
        if skipped < block.shape[-1]:
            yield block[:, skipped:]

    def flush(self) -> Iterator[Tensor]:
        """What has been kept back."""
        if self._resampler is not None:
            yield from self.convert(None)
            self._resampler = self._source = None

    def silence(self, seconds: float) -> Iterator[Tensor]:
        """So much silence."""
        left = round(seconds * self.rate)
        while left > 0:
            length = min(left, SILENCE_BLOCK)
            yield from self._kept(torch.zeros(self._layout.nb_channels, length))
            left -= length


@dataclass
class Tally:
    """Counts packets over all parts of a file, and what was wrong with them."""

    damage: Damage
    good: int = 0
    bad: int = 0
    lost: list[float] = field(default_factory=list)  # seconds of bad packets since a good one

    def lose(self, seconds: float) -> None:
        """A packet cannot be decoded."""
        self.bad += 1
        self.lost.append(seconds)

    def taken(self) -> list[float]:
        """The packets that are lost before the frame that comes now."""
        lost, self.lost = self.lost, []
        return lost

    def settle(self, lost: list[float], gap: float | None) -> None:
        """A frame is placed behind a gap of so many seconds; `None` if there is no clock."""
        seconds = sum(lost) if gap is None else gap
        if lost or seconds:
            self.damage.places += 1
            self.damage.seconds += seconds

    def miss(self, seconds: float) -> None:
        """The header says that there are so many more."""
        self.damage.seconds = max(seconds, self.damage.seconds)
        if seconds > END_MARGIN:
            self.damage.end_missing = True
        else:
            self.damage.places = max(1, self.damage.places)

    def finish(self) -> None:
        """There is no further frame."""
        if self.lost:
            self.settle(self.taken(), None)
            self.damage.end_missing = True


class StreamDecoder:
    """One audio stream of an open container; `tally` and `converter` go on to the next part."""

    def __init__(self, container: Any, stream: Any, tally: Tally, converter: Converter) -> None:
        self.container, self.stream = container, stream
        self.tally, self.converter = tally, converter
        self._names = frozenset(container.format.name.split(","))
        self._end: float | None = None  # seconds: where the last frame ended, by the file's clock
        self._silent = self._sounding = self._longest = 0.0  # seconds
        self._begun = False

    def begin_at(self, time: int, sample: int) -> None:
        """Seek to `time`, in the stream's unit, where the sample of that number lies."""
        self.container.seek(time, stream=self.stream)
        self.converter.samples = sample
        self._sounding = sample / self.stream.rate
        self._begun = True

    def blocks(self) -> Iterator[Tensor]:
        """Samples `[C, n]`."""
        held: tuple[Any, list[float]] | None = None
        for packet in self._packets():
            for frame in self._decoded(packet):
                lost = self.tally.taken()
                if held is not None:
                    yield from self._placed(*held, frame)
                held = frame, lost
        if held is not None:
            yield from self._placed(*held, None)
        self._check_end()

    def _packets(self) -> Iterator[Any]:
        """Packets, and at last `None`, which lets the decoder give what it has kept back."""
        failures = 0
        while failures < RETRIES:
            try:
                for packet in self.container.demux(self.stream):
                    if packet.size:
                        failures = 0
                        yield packet
                break
            except AV_ERRORS:
                failures += 1
        if failures:
            self.tally.lose(0.0)
        yield None

    def _decoded(self, packet: Any) -> list[Any]:
        try:
            frames: list[Any] = self.stream.codec_context.decode(packet)
            for frame in frames:
                if not _is_of_music(frame):
                    raise ValueError("no frame of music")
        except AV_ERRORS:
            if packet is not None:
                self.tally.lose(float((packet.duration or 0) * (packet.time_base or 0)))
            return []
        self.tally.good += packet is not None
        return frames

    def _placed(self, frame: Any, lost: list[float], following: Any) -> Iterator[Tensor]:
        """The samples of `frame`, after the silence of what is missing before it."""
        gap = self._gap(frame, lost, following)
        yield from self.converter.adapt(frame)
        if self.converter.wants(round((gap or 0) * frame.rate) + frame.samples):
            self.tally.settle(lost, gap)
        if gap:
            self._silent += gap
            yield from self.converter.silence(gap)
        if not self._begun:
            self._begun = True
            self.converter.first += late_samples(self.container, frame)
        yield from self.converter.convert(frame)

    def _gap(self, frame: Any, lost: list[float], following: Any) -> float | None:
        """Seconds that are missing before `frame`; `None` if there is no clock to tell."""
        self._sounding += frame.samples / frame.rate
        if frame.pts is None or not self._names & CLOCKED:
            return None
        expected, self._end = self._expected(lost), _end(frame)
        if expected is None:
            return 0.0
        gap = _in_frames(_time(frame) - expected, frame)
        if following is not None and following.pts is not None:
            taken_back = self._end - _time(following)
            # Clocks tremble so in MPEG-PS, and where Vorbis' blocks change.
            gap -= taken_back if taken_back > ROUNDING else 0.0
        return self._bounded(gap, frame, lost)

    def _expected(self, lost: list[float]) -> float | None:
        if self._end is None and lost and self.stream.start_time is not None:
            return float(self.stream.start_time * self.stream.time_base)
        return self._end

    def _bounded(self, gap: float, frame: Any, lost: list[float]) -> float:
        self._longest = max(self._longest, frame.samples / frame.rate)
        least = MIN_LOSS if lost else max(MIN_GAP, SURE_GAP * self._longest)
        most = MAX_SILENCE + self._sounding - self._silent
        if self.container.format.flags & av.format.Flags.ts_discont.value:
            most = min(most, MAX_BREAK)
        return gap if least < gap < most else 0.0

    def _check_end(self) -> None:
        missing = self._declared() - self.converter.samples / (self.converter.rate or 1)
        self.tally.finish()
        if missing > (EXACT_MARGIN if self._names & EXACT else END_MARGIN):
            self.tally.miss(missing)

    def _declared(self) -> float:
        """Seconds that the header says there are."""
        if not self.stream.duration:
            return self._matroska_length()
        declares = bool(self._names & (EXACT | DECLARING))
        if "mp3" in self._names:  # by LAME's header, which also says where the music starts
            declares = bool(self.stream.start_time)
        return float(self.stream.duration * self.stream.time_base) if declares else 0.0

    def _matroska_length(self) -> float:
        """Of a Matroska file with nothing but this stream, which has no length of its own."""
        alone = len(self.container.streams) == 1 and "matroska" in self._names
        return float((self.container.duration or 0) / av.time_base) if alone else 0.0


def _is_of_music(frame: Any) -> bool:
    return 0 < frame.layout.nb_channels <= MAX_CHANNELS and frame.rate in SAMPLE_RATES


def _time(frame: Any) -> float:
    return float(frame.pts * frame.time_base)


def _end(frame: Any) -> float:
    return _time(frame) + frame.samples / frame.rate


def _in_frames(gap: float, frame: Any) -> float:
    """`gap` in whole frames, if it is about that: clocks are coarser than samples."""
    length = frame.samples / frame.rate
    whole = round(gap / length) * length
    return whole if abs(gap - whole) <= min(ROUNDING, length / 4) else gap
