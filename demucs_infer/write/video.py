"""Videos: the picture of one, copied packet by packet, and a stem as its sound.

Shapes: `[C, n]` samples between -1 and 1.
"""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import torch
from torch import Tensor

from ..boxes import skip_priming
from ..errors import SaveAudioError
from ..log import decoded
from ..read.decode import AudioFile
from ..read.packets import AV_ERRORS
from ..read.quirks import PICTURES
from .encode import Encoder
from .metadata import ATTACHED_PICTURE, disposition

STILL = ATTACHED_PICTURE | 0x800 | 0x100000  # thumbnails and still images, flags of FFmpeg's
MOST_EARLY = 32  # packets of a picture without a time to decode them


class Picture:
    """The moving picture of a file, and the times at which it goes with a stem.

    `first` and `last` are the samples of the file's sound between which the stem lies. `start` is
    the time of the first picture that is shown, and `sound` that of the stem, both in seconds on
    the clock of the file. Raises `SaveAudioError` without a picture, or if MP4 cannot hold it.
    """

    def __init__(self, audio: AudioFile, first: int = 0, last: int | None = None) -> None:
        self.audio = audio
        rate = audio.samplerate()
        with self.open() as (container, stream):
            self._check(stream)
            self.start = Fraction(stream.start_time or 0) * stream.time_base
            sound = _first_sound(container)
        self.sound = sound + Fraction(first, rate)
        self.stop = None if last is None else sound + Fraction(last, rate)
        self.is_cut = bool(first)
        self._skipped = 0  # packets before the key frame from which on the picture is copied
        if self.is_cut:
            self._find_start()

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[Any, Any]]:
        """Open the container, and yield it with its first stream that moves."""
        with self.audio._open(PICTURES) as container:
            streams = [
                stream
                for stream in container.streams.video
                if not disposition(stream) & STILL and stream.codec_context is not None
            ]
            if not streams:
                raise SaveAudioError(f"{self.audio.name}: has no picture: use --format m4a")
            yield container, streams[0]

    def _find_start(self) -> None:
        """Find the picture that is shown when the sound begins, and the key frame before it.

        All packets are read up to there, since seeking in MPEG-TS and MPEG-PS does not lead to key
        frames.
        """
        key, shown = None, None
        with self.open() as (container, stream):
            for number, packet in enumerate(_in_order(container.demux(stream))):
                time = packet.pts * packet.time_base
                if packet.is_keyframe and (key is None or time <= self.sound):
                    key, self._skipped = time, number
                if time <= self.sound and key is not None and time >= key:
                    shown = time if shown is None else max(shown, time)
                if packet.dts * packet.time_base > self.sound and key is not None:
                    break
        self.start = self.sound if shown is None else shown

    def packets(self, container: Any, stream: Any) -> Iterator[Any]:
        """Yield the packets of the picture, of a cut one from a key frame on."""
        packets = itertools.islice(_in_order(container.demux(stream)), self._skipped, None)
        begin = None  # the time of the key frame
        behind: list[Any] = []  # shown after the end; kept if an earlier picture may need them
        for packet in packets:
            time = packet.pts * packet.time_base
            begin = time if begin is None else begin
            # Pictures before the key frame may need the previous ones.
            if self.is_cut and time < begin:
                continue
            if self.stop is not None and time >= self.stop:
                if packet.dts * packet.time_base >= self.stop:
                    return
                behind.append(packet)
                continue
            yield from [*behind, packet]
            behind = []

    def _check(self, stream: Any) -> None:
        with av.open(io.BytesIO(), "w", format="mp4") as trial:
            try:
                trial.add_stream_from_template(stream, opaque=True)
                if not stream.width:
                    raise ValueError("its size is not known")
            except ValueError as exc:
                raise SaveAudioError(
                    f"{self.audio.name}: its picture ({stream.codec_context.name}) cannot be in"
                    " MP4: use --format m4a"
                ) from exc


def _first_sound(container: Any) -> Fraction:
    """The time in seconds of the first sample that is decoded."""
    for packet in container.demux(audio=0):
        with contextlib.suppress(*AV_ERRORS):  # of a packet that is damaged
            for frame in packet.decode():
                return Fraction(frame.pts or 0) * frame.time_base
    return Fraction(0)


def _in_order(packets: Iterator[Any]) -> Iterator[Any]:
    """Yield packets with all of their times, of which decoding times increase, as muxers demand.

    Some files do not state when the first packets are decoded. In MPEG-PS not every packet has
    times, and FFmpeg guesses some that lie before the previous ones.
    """
    early: list[Any] = []
    last, delay = None, 0
    for packet in packets:
        if not packet.size:  # the end
            continue
        if packet.dts is None and last is None and len(early) < MOST_EARLY:
            early.append(packet)
            continue
        if last is None:
            last = (packet.pts or 0) if packet.dts is None else packet.dts
            for number, first in enumerate(early):
                first.dts = last - sum(other.duration or 1 for other in early[number:])
                yield _with_pts(first)
            packet.dts = last
        elif packet.dts is None:
            packet.dts = last + (packet.duration or 1)
        elif packet.dts <= last:
            late = last + (packet.duration or 1) - packet.dts
            packet.dts += late
            if packet.pts is not None and packet.pts + late - packet.dts <= delay:
                packet.pts += late
        last = packet.dts
        delay = max(delay, _with_pts(packet).pts - last)
        yield packet
    if last is None:
        for number, packet in enumerate(early):
            packet.dts = number if packet.pts is None else packet.pts
            yield _with_pts(packet)


def _with_pts(packet: Any) -> Any:
    """Give a packet a time at which it is shown, not before the time at which it is decoded."""
    packet.pts = packet.dts if packet.pts is None else max(packet.pts, packet.dts)
    return packet


class VideoEncoder(Encoder):
    """Writes the picture of a video with a stem as its sound, in step with each other."""

    def __init__(self, picture: Picture, *arguments: Any, **options: Any) -> None:
        self._source = picture
        self._stack = contextlib.ExitStack()
        super().__init__(*arguments, **options)

    def _open(self, titles: Sequence[str]) -> None:
        picture = self._source
        container, source = self._stack.enter_context(picture.open())
        super()._open(())
        # Both are set back by the start of the one that is first.
        first = min(picture.start, picture.sound)
        self._begin = round((picture.sound - first) * self.rate)
        self._priming = 0
        self._shift = round(first / source.time_base)
        self._picture = self.container.add_stream_from_template(source, opaque=True)
        tags = {name: decoded(text, "replace") for name, text in source.metadata.items()}
        self._picture.metadata.update(tags)
        self._streams = [self._add_stream(title) for title in titles]
        self._packets = picture.packets(container, source)
        self._waiting: Any = next(self._packets, None)
        if picture.is_cut and self._begin:  # less than a picture, which players had to skip to
            shape = self.channels, self._begin
            self.write([torch.zeros(shape, dtype=torch.float32, device="cpu")])
        self.position = self._begin

    def _encode(self, blocks: Sequence[Tensor]) -> None:
        self._copy_picture(Fraction(self.position, self.rate))
        super()._encode(blocks)

    def _mux(self, packets: Sequence[Any]) -> None:
        if packets and self._priming == 0 and packets[0].pts is not None:
            self._priming = max(0, self._begin - packets[0].pts)
        super()._mux(packets)

    def _copy_picture(self, until: Fraction | None) -> None:
        """Copy the packets up to a time of the new file, or all."""
        while self._waiting is not None:
            packet = self._waiting
            if until is not None and (packet.dts - self._shift) * packet.time_base > until:
                return
            packet.pts, packet.dts = packet.pts - self._shift, packet.dts - self._shift
            packet.stream = self._picture
            self.container.mux(packet)
            self._waiting = next(self._packets, None)

    def _finish(self) -> None:
        with self._stack:
            for stream in self._streams:
                self._mux(stream.encode(None))
            self._copy_picture(None)
            self._close()

    def close(self) -> None:
        """Copy the rest of the picture; the file is whole then."""
        super().close()
        skip_priming(self.file, self._priming)

    def abandon(self) -> None:
        """Close the video, too."""
        super().abandon()
        self._stack.close()
