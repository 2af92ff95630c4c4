"""Videos: the picture of one, copied packet by packet, and a stem as its sound.

    picture ───copy────────────────────────▶ ┐
    stem ──────encode──────────────────────▶ │ a file whose clock begins with the
    sound, subtitles ──copy, convert text──▶ │ first sample or the first picture
    chapters ──shift───────────────────────▶ ┘

Shapes: `[C, n]` samples between -1 and 1.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import torch
from torch import Tensor

from ..errors import SaveAudioError
from ..log import logger
from ..read.decode import AudioFile
from ..read.packets import AV_ERRORS
from ..read.quirks import PICTURES
from ..tags import clean_stream_tags
from .encode import Encoder
from .formats import ALL_FORMATS, Format
from .metadata import ATTACHED_PICTURE, disposition

STILL = ATTACHED_PICTURE | 0x800 | 0x100000  # thumbnails and still images, flags of FFmpeg's
DEFAULT = 1  # another flag, of streams that players play
MOST_EARLY = 32  # packets of a picture without a time to decode them
MOST_CHAPTERS = 1000
LONGEST = Fraction(10**6)  # seconds: later ends of chapters are damaged
# Words of the warning, by FFmpeg's type of a stream.
KINDS = {
    "audio": "sound",
    "video": "picture",
    "subtitle": "subtitles",
    "attachment": "attachment",
    "data": "data",
}
VIDEOS = [each for each in ALL_FORMATS.values() if each.is_video]
# Codecs of subtitles that are text. A container that lacks one gets the text in its own codec.
TEXTS = frozenset("ass mov_text srt ssa subrip text webvtt".split())


class Video:
    """The streams of a video that go with a stem, and the times at which they do.

    `first` and `last` are the samples of the file's sound between which the stem lies. With
    `keep_audio` the sounds of the video go with the stem, too. `start` is the time of the first
    picture that is shown, and `sound` that of the stem, both in seconds on the clock of the file.
    A warning names the streams that are left out. Raises `SaveAudioError` without a picture, or if
    the format cannot hold it.
    """

    def __init__(
        self,
        audio: AudioFile,
        format: Format,
        first: int = 0,
        last: int | None = None,
        keep_audio: bool = False,
    ) -> None:
        self.audio, self.format = audio, format
        rate = audio.samplerate()
        with self._container() as container:
            self._chosen = self._choose(container, keep_audio)
            picture, sound = container.streams[self._chosen[0]], container.streams.audio[0]
            self.start = Fraction(picture.start_time or 0) * picture.time_base
            self.tags = clean_stream_tags(sound.metadata)
            begin = _first_sound(container)
        self.sound = begin + Fraction(first, rate)
        self.stop = None if last is None else begin + Fraction(last, rate)
        self.is_cut = bool(first)
        self._skipped = 0  # packets before the key frame from which on the picture is copied
        if self.is_cut:
            self._find_start()

    def _container(self) -> contextlib.AbstractContextManager[Any]:
        return self.audio._open(PICTURES)

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[Any, list[Any]]]:
        """Open the file, and yield it with the streams to copy, the picture first."""
        with self._container() as container:
            yield container, [container.streams[index] for index in self._chosen]

    def _choose(self, container: Any, keep_audio: bool) -> list[int]:
        """Return the numbers of the streams to copy, and warn of those that are left out."""
        sound = container.streams.audio[0]
        pictures = [
            stream
            for stream in container.streams.video
            if not disposition(stream) & STILL and stream.codec_context is not None
        ]
        if not pictures:
            raise SaveAudioError(f"{self.audio.name}: has no picture: use --format m4a")
        picture = pictures[0]
        # Of the codecs with several tags, such as ProRes, FFmpeg's muxers take the first.
        self.tag = _tag(picture) if self._holds(self.format, picture, tag=_tag(picture)) else None
        if not picture.width or (self.tag is None and not self._holds(self.format, picture)):
            others = [each.name for each in VIDEOS if self._holds(each, picture)]
            raise SaveAudioError(
                f"{self.audio.name}: its picture ({picture.name}) cannot be in"
                f" {self.format.name.upper()}: use --format {' or '.join([*others, 'm4a'])}"
            )
        chosen, left_out, chapters = [picture], list[str](), container.chapters()
        kept = {"subtitle", "attachment"} | ({"audio"} if keep_audio else set())
        for stream in container.streams:
            is_cover = stream.metadata.get("mimetype", "").startswith("image/")
            is_chapters = stream.type == "data" and stream.name == "bin_data" and chapters
            if stream is picture or is_cover or is_chapters or disposition(stream) & STILL:
                continue
            if stream.type in kept and self._holds(self.format, picture, stream):
                chosen.append(stream)
            elif stream.type in KINDS and (keep_audio or stream is not sound):
                language = clean_stream_tags(stream.metadata).get("language", "")
                codec = getattr(stream.codec_context, "name", "")
                left_out.append(" ".join(filter(None, (KINDS[stream.type], language, codec))))
        if left_out:
            logger.warning(
                "%s: %s leaves out %s. Try %s",
                self.audio.name,
                self.format.name.upper(),
                ", ".join(left_out),
                "--format mkv" if keep_audio else "--keep-audio or --format mkv",
            )
        return [stream.index for stream in chosen]

    def _holds(self, format: Format, *streams: Any, tag: str | None = None) -> bool:
        """Return True if a file of the format can have these streams, the first one with `tag`."""
        trial = av.open(io.BytesIO(), "w", format=format.container)
        with contextlib.suppress(*AV_ERRORS), trial:
            for number, stream in enumerate(streams):
                _add_copy(trial, stream, format.subtitles, None if number else tag)
            trial.start_encoding()
            return True
        return False

    def _find_start(self) -> None:
        """Find the picture that is shown when the sound begins, and the key frame before it.

        All packets are read up to there, since seeking in MPEG-TS and MPEG-PS does not lead to key
        frames.
        """
        key, shown = None, None
        with self.open() as (container, (picture, *_)):
            for number, packet in enumerate(_in_order(container.demux(picture))):
                time = packet.pts * packet.time_base
                if packet.is_keyframe and (key is None or time <= self.sound):
                    key, self._skipped = time, number
                if time <= self.sound and key is not None and time >= key:
                    shown = time if shown is None else max(shown, time)
                if packet.dts * packet.time_base > self.sound and key is not None:
                    break
        start = self.sound if shown is None else shown
        self.start = start if key is None or self.format.has_edits else key

    def packets(self, container: Any, streams: Sequence[Any]) -> Iterator[Any]:
        """Yield the packets of `streams`, of which the first is the picture.

        The picture of an excerpt begins with a key frame, which may be hidden.
        """
        picture, skipped = streams[0].index, self._skipped
        streams = [stream for stream in streams if stream.type != "attachment"]
        running = {stream.index for stream in streams if stream.type != "subtitle"}
        begin = None  # the time of the key frame
        behind: list[Any] = []  # shown after the end; kept if an earlier picture may need them
        for packet in _in_order(container.demux(*streams)):
            time, index = packet.pts * packet.time_base, packet.stream.index
            is_behind = self.stop is not None and time >= self.stop
            if self.stop is not None and packet.dts * packet.time_base >= self.stop:
                running.discard(index)
                if not running:
                    return
            elif index != picture:
                early = round(self.sound / packet.time_base) - packet.pts if self.is_cut else 0
                if early > 0 and packet.stream.type == "subtitle":
                    # It may be shown until after the start.
                    packet.pts = packet.dts = packet.pts + early
                    packet.duration = max(0, (packet.duration or 0) - early)
                    early = 0 if packet.duration else early
                if early <= 0 and not is_behind:
                    yield packet
            elif skipped:
                skipped -= 1
            else:
                begin = time if begin is None else begin
                # Pictures before the key frame may need the previous ones.
                if self.is_cut and time < begin:
                    continue
                behind.append(packet)
                if not is_behind:
                    yield from behind
                    behind = []

    def chapters(self, container: Any, shift: Fraction) -> list[dict[str, Any]]:
        """Return the chapters between the first sample and the last, `shift` seconds earlier."""
        chapters = []
        for chapter in container.chapters()[:MOST_CHAPTERS]:
            base = chapter["time_base"]
            start = max(chapter["start"] * base, self.sound if self.is_cut else shift)
            end = min(chapter["end"] * base, LONGEST if self.stop is None else self.stop)
            if start < end:
                times = {"start": round((start - shift) / base), "end": round((end - shift) / base)}
                tags = clean_stream_tags(chapter["metadata"])
                chapters.append({**chapter, **times, "metadata": tags})
        return chapters


def _first_sound(container: Any) -> Fraction:
    """Return the time in seconds of the first sample that is decoded."""
    for packet in container.demux(audio=0):
        with contextlib.suppress(*AV_ERRORS):  # of a packet that is damaged
            for frame in packet.decode():
                return Fraction(frame.pts or 0) * frame.time_base
    return Fraction(0)


def _in_order(packets: Iterator[Any]) -> Iterator[Any]:
    """Yield packets with all of their times, of which decoding times increase, as muxers demand."""
    clocks: defaultdict[int, _Clock] = defaultdict(_Clock)
    for packet in packets:
        yield from clocks[packet.stream.index].push(packet)


class _Clock:
    """Completes the times of the packets of a stream.

    Some files do not state when the first packets are decoded. In MPEG-PS not every packet has
    times, and FFmpeg guesses some that lie before the previous ones.
    """

    def __init__(self) -> None:
        self._early: list[Any] = []
        self._last: int | None = None
        self._delay = 0

    def push(self, packet: Any) -> Iterator[Any]:
        """Take the next packet, and yield those whose times are known."""
        is_end = not packet.size and packet.dts is None
        if is_end and self._last is None:
            for number, first in enumerate(self._early):
                first.dts = number if first.pts is None else first.pts
                yield _with_pts(first)
        if is_end:
            return
        if packet.dts is None and self._last is None and len(self._early) < MOST_EARLY:
            self._early.append(packet)
            return
        if packet.stream.type == "subtitle":
            # Several may be shown at once.
            times = (self._last, packet.pts, packet.dts)
            packet.dts = packet.pts = max(time for time in (*times, 0) if time is not None)
        elif self._last is None:
            last = (packet.pts or 0) if packet.dts is None else packet.dts
            for number, first in enumerate(self._early):
                first.dts = last - sum(other.duration or 1 for other in self._early[number:])
                yield _with_pts(first)
            packet.dts = last
        elif packet.dts is None:
            packet.dts = self._last + (packet.duration or 1)
        elif packet.dts <= self._last:
            late = self._last + (packet.duration or 1) - packet.dts
            packet.dts += late
            if packet.pts is not None and packet.pts + late - packet.dts <= self._delay:
                packet.pts += late
        self._last = packet.dts
        self._delay = max(self._delay, _with_pts(packet).pts - packet.dts)
        yield packet


def _with_pts(packet: Any) -> Any:
    """Give a packet a time at which it is shown, not before the time at which it is decoded."""
    packet.pts = packet.dts if packet.pts is None else max(packet.pts, packet.dts)
    return packet


def _tag(stream: Any) -> str | None:
    """Return the codec's four letters in containers that have them."""
    with contextlib.suppress(ValueError):
        return str(stream.codec_context.codec_tag)
    return None


def _add_copy(container: Any, source: Any, texts: str, tag: str | None = None) -> Any:
    """Return a new stream like `source`, with the codec's `tag`.

    Text that cannot be copied becomes of the codec `texts`. Raises `ValueError` or an error of
    FFmpeg's if the container cannot hold the stream.
    """
    context = source.codec_context
    if context is None and source.type != "attachment":
        raise ValueError("FFmpeg does not know its codec")
    try:
        stream = container.add_stream_from_template(source, opaque=True)
    except ValueError:
        if context.name not in TEXTS:
            raise
        stream = container.add_stream(texts)
        context.open(strict=False)
        stream.codec_context.subtitle_header = context.subtitle_header
    if tag is not None:
        stream.codec_context.codec_tag = tag
    stream.metadata.clear()
    stream.metadata.update(clean_stream_tags(source.metadata))
    stream.disposition = disposition(source)
    return stream


class VideoEncoder(Encoder):
    """Writes the picture of a video with a stem as its sound, in step with each other."""

    def __init__(self, video: Video, *arguments: Any, **options: Any) -> None:
        self._video = video
        self._stack = contextlib.ExitStack()
        super().__init__(*arguments, **options)

    def _open(self, titles: Sequence[str]) -> None:
        video = self._video
        container, sources = self._stack.enter_context(video.open())
        super()._open(())
        # All streams are set back by the start of picture or sound, whichever is first.
        first = min(video.start, video.sound)
        self._begin = round((video.sound - first) * self.rate)
        self.container.set_chapters(video.chapters(container, first))
        self._shift = first
        texts, (picture, *others) = self.format.subtitles, sources
        self._copies = {picture.index: _add_copy(self.container, picture, texts, video.tag)}
        self._streams = [self._add_stream(title) for title in titles]
        for stream in self._streams:
            stream.metadata.update({n: t for n, t in video.tags.items() if n == "language"})
        for source in others:
            self._copies[source.index] = copy = _add_copy(self.container, source, texts)
            if source.type == "audio":
                copy.disposition = disposition(source) & ~DEFAULT
        streams = self.container.streams
        self.metadata.languages = [stream.metadata.get("language", "") for stream in streams]
        self._packets = video.packets(container, sources)
        self._waiting: Any = next(self._packets, None)
        if video.is_cut and self._begin:  # less than a picture, which players had to skip to
            shape = self.channels, self._begin
            self.write([torch.zeros(shape, dtype=torch.float32, device="cpu")])
        self.position = self._begin

    def _encode(self, blocks: Sequence[Tensor]) -> None:
        self._copy(Fraction(self.position, self.rate))
        super()._encode(blocks)

    def _mux(self, packets: Sequence[Any]) -> None:
        if packets and not self.metadata.priming and packets[0].pts is not None:
            self.metadata.priming = max(0, self._begin - packets[0].pts)
        super()._mux(packets)

    def _copy(self, until: Fraction | None) -> None:
        """Copy the packets up to a time of the new file, or all."""
        while (packet := self._waiting) is not None:
            shift = round(self._shift / packet.time_base)
            if until is not None and (packet.dts - shift) * packet.time_base > until:
                return
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            copy = self._copies[packet.stream.index]
            if copy.type == "subtitle" and copy.name != packet.stream.name:
                packet = _convert_text(packet, copy)
            if packet is not None:
                packet.stream = copy
                self.container.mux(packet)
            self._waiting = next(self._packets, None)

    def _finish(self) -> None:
        with self._stack:
            for stream in self._streams:
                self._mux(stream.encode(None))
            self._copy(None)
            self._close()

    def abandon(self) -> None:
        """Close the video, too."""
        super().abandon()
        self._stack.close()


def _convert_text(packet: Any, stream: Any) -> Any:
    """Return a subtitle's packet in the codec of another stream; None for one without text."""
    with contextlib.suppress(*AV_ERRORS):  # of a packet that is damaged
        cues = packet.stream.codec_context.decode2(packet)
        if cues and cues.rects:
            text = stream.codec_context.encode_subtitle(cues)
            text.pts, text.dts, text.duration = packet.pts, packet.dts, packet.duration
            text.time_base = packet.time_base
            return text
    return None
