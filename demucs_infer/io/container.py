"""Files that hold more than one stream: all stems of a track, or a picture and its sound.

    stem.mp4   the mix, then up to four stems, as AAC or ALAC; JSON in moov/udta/stem says which
    mka        the mix, then any number of stems, as FLAC in Matroska
    mp4        the picture of a video, copied packet by packet, and one stem as its sound

Shapes: `[C, n]` samples between -1 and 1, a block for each stream.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import av
import torch
from av.stream import Disposition
from torch import Tensor

from ..errors import SaveAudioError
from ..log import decoded
from ..read.decode import AudioFile
from ..read.packets import AV_ERRORS
from ..read.quirks import PICTURES
from ..read.tags import clean_tags
from .boxes import add_to_user_data, read_moov, replace_moov, skip_priming
from .encode import BLOCK, PLANAR, SAMPLE_FORMATS, _quantized
from .formats import LAYOUTS, Encoding

LONGEST_NAME = 32  # characters of a stem's name in it
COLOURS = ("#009E73", "#D55E00", "#CC79A7", "#56B4E9")
MASTERING = {  # of the player that mixes the stems: switched off, with the values of a new file
    "compressor": {
        "enabled": False,
        "ratio": 3,
        "output_gain": 0.5,
        "input_gain": 0.5,
        "release": 0.3,
        "attack": 0.003,
        "threshold": 0,
        "hp_cutoff": 300,
        "dry_wet": 50,
    },
    "limiter": {"enabled": False, "release": 0.05, "threshold": 0, "ceiling": -0.35},
}
# A cover by the first bytes of its file: its media type, and FFmpeg's names of its reader, its
# codec, and the pixels of a picture of that kind.
COVERS = {
    b"\x89PNG": ("image/png", "png_pipe", "png", "rgb24"),
    b"\xff\xd8\xff": ("image/jpeg", "jpeg_pipe", "mjpeg", "yuvj420p"),
}
LARGEST_COVER = 2**24  # bytes
MOST_EARLY = 32  # packets of a picture without a time to decode them


def stem_json(names: Sequence[str]) -> bytes:
    """What `moov/udta/stem` holds for stems of these names."""
    stems = [{"name": name[:LONGEST_NAME], "color": colour} for name, colour in zip(names, COLOURS)]
    content = {"mastering_dsp": MASTERING, "version": 1, "stems": stems}
    return json.dumps(content, ensure_ascii=False).encode()


@dataclass(frozen=True)
class Request:
    """A file that is to be written.

    `samplerate` (hertz) is one that the format has; `titles` names the streams of sound, `tags`
    are title, artist and the like, `cover` is a picture's file.
    """

    file: IO[bytes]
    encoding: Encoding
    samplerate: int
    channels: int
    titles: Sequence[str]
    tags: Mapping[str, str]
    cover: bytes | None = None


class _Muxer:
    """A file of FFmpeg's with as many streams of sound as there are titles."""

    def __init__(self, request: Request) -> None:
        self.request = request
        kind = request.encoding.kind
        if request.channels not in LAYOUTS or request.channels > kind.channels:
            raise SaveAudioError(
                f"{request.encoding.format.upper()}: cannot hold {request.channels} channels"
            )
        options = {key: text.format(rate=request.samplerate) for key, text in kind.options.items()}
        self.file: Any = av.open(request.file, "w", format=kind.container, options=options)
        self.file.metadata.update(clean_tags(request.tags))
        self.position = 0

    def add_sound(self, title: str, *, enabled: bool) -> Any:
        """A stream of sound; a file has one that is enabled, which players play."""
        encoding = self.request.encoding
        stream = self.file.add_stream(encoding.codec, rate=self.request.samplerate)
        stream.layout = LAYOUTS[self.request.channels]
        stream.format = PLANAR.get((encoding.codec, encoding.depth), SAMPLE_FORMATS[encoding.depth])
        if encoding.kind.bitrate:
            stream.bit_rate = 1000 * (encoding.bitrate or encoding.kind.bitrate)
        stream.metadata.update({"title": title, "handler_name": title})
        stream.disposition = Disposition.default if enabled else Disposition(0)
        return stream

    def encode(self, stream: Any, wav: Tensor) -> list[Any]:
        """The packets of a block `[C, n]` that begins at the position of this file."""
        encoding = self.request.encoding
        samples = _quantized(wav.t().reshape(1, -1), encoding.depth)
        layout = LAYOUTS[self.request.channels]
        frame = av.AudioFrame.from_ndarray(samples, SAMPLE_FORMATS[encoding.depth], layout)
        frame.sample_rate = self.request.samplerate
        frame.pts = self.position
        return stream.encode(frame)


class MultitrackEncoder:
    """Writes a file whose streams of sound start together and are equally long."""

    def __init__(self, request: Request) -> None:
        self._muxer = _Muxer(request)
        self._streams = [
            self._muxer.add_sound(title, enabled=not index)
            for index, title in enumerate(request.titles)
        ]
        if request.cover is not None:
            _add_cover(self._muxer.file, request.cover)

    def write(self, blocks: Sequence[Tensor]) -> None:
        """Encode a block `[C, n]` for each stream."""
        muxer = self._muxer
        for parts in zip(*(block.split(BLOCK, dim=-1) for block in blocks)):
            if parts[0].shape[-1]:
                for stream, part in zip(self._streams, parts):
                    muxer.file.mux(muxer.encode(stream, part))
                muxer.position += parts[0].shape[-1]

    def close(self) -> None:
        """Write what is left; the file is whole then."""
        for stream in self._streams:
            self._muxer.file.mux(stream.encode(None))
        self._muxer.file.close()
        request = self._muxer.request
        if request.encoding.format == "stem.mp4":
            start, moov = read_moov(request.file)
            stems = stem_json(request.titles[1:])
            replace_moov(request.file, start, add_to_user_data(moov, b"stem", stems))


def cover_type(cover: bytes) -> str | None:
    """The media type of a cover, if it is one that files can hold."""
    return next((row[0] for magic, row in COVERS.items() if cover.startswith(magic)), None)


def _add_cover(file: Any, cover: bytes) -> None:
    """Put `cover` into the file: as an attachment of Matroska, else as its picture."""
    kind = cover_type(cover)
    if kind is None:
        return
    if file.format.name == "matroska":
        if hasattr(file, "add_attachment"):
            file.add_attachment(f"cover.{kind.rpartition('/')[2]}", kind, cover)
        return
    (row,) = (row for row in COVERS.values() if row[0] == kind)
    # A stranger's picture is not decoded: some kilobytes may be gigapixels. All that the file's
    # header needs is known of any picture of its kind.
    with av.open(io.BytesIO(_any_picture(*row[2:])), "r", format=row[1]) as picture:
        stream = file.add_stream_from_template(picture.streams.video[0], opaque=True)
        stream.disposition = Disposition.attached_pic
        packet = av.Packet(cover)
        packet.stream, packet.pts, packet.dts = stream, 0, 0
        packet.is_keyframe = True
        file.mux(packet)


def _any_picture(codec: str, pixels: str) -> bytes:
    encoder: Any = av.CodecContext.create(codec, "w")
    encoder.width = encoder.height = 16
    encoder.pix_fmt, encoder.time_base = pixels, Fraction(1)
    frame = av.VideoFrame(16, 16, pixels)
    return b"".join(map(bytes, [*encoder.encode(frame), *encoder.encode(None)]))


def read_cover(audio: AudioFile) -> bytes | None:
    """The picture of a record that a file carries, if it is of a kind that files here can hold."""
    with audio._open() as container:
        for stream in container.streams.video:
            if stream.disposition & Disposition.attached_pic:
                packet = next(container.demux(stream), None)
                cover = b"" if packet is None else bytes(packet)
                if len(cover) <= LARGEST_COVER and cover_type(cover) is not None:
                    return cover
    return None


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
            stream = next(filter(_moves, container.streams.video), None)
            if stream is None:
                raise SaveAudioError(f"{self.audio.name}: has no picture: use --format m4a")
            yield container, stream

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


def _moves(stream: Any) -> bool:
    still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    return not stream.disposition & still and stream.codec_context is not None


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


class VideoEncoder:
    """Writes the picture of a video with a stem as its sound, in step with each other."""

    def __init__(self, request: Request, picture: Picture) -> None:
        self._muxer = muxer = _Muxer(request)
        self._stack = contextlib.ExitStack()
        container, source = self._stack.enter_context(picture.open())
        # Both are set back by the start of the one that is first.
        first = min(picture.start, picture.sound)
        muxer.position = self._begin = round((picture.sound - first) * request.samplerate)
        self._priming = 0
        self._shift = first / source.time_base
        self._picture = muxer.file.add_stream_from_template(source, opaque=True)
        tags = {name: decoded(text, "replace") for name, text in source.metadata.items()}
        self._picture.metadata.update(tags)
        self._sound = muxer.add_sound(request.titles[0], enabled=True)
        self._packets = picture.packets(container, source)
        self._waiting: Any = next(self._packets, None)
        if picture.is_cut and self._begin:  # less than a picture, which players had to skip to
            muxer.position = 0
            shape = request.channels, self._begin
            self.write(torch.zeros(shape, dtype=torch.float32, device="cpu"))

    def write(self, wav: Tensor) -> None:
        """Encode `wav` `[C, n]`, and copy the picture to the same time."""
        muxer = self._muxer
        for block in wav.split(BLOCK, dim=-1):
            if block.shape[-1]:
                self._copy_picture(Fraction(muxer.position, muxer.request.samplerate))
                self._mux_sound(muxer.encode(self._sound, block))
                muxer.position += block.shape[-1]

    def _mux_sound(self, packets: Sequence[Any]) -> None:
        if packets and self._priming == 0 and packets[0].pts is not None:
            self._priming = max(0, self._begin - packets[0].pts)
        self._muxer.file.mux(packets)

    def _copy_picture(self, until: Fraction | None) -> None:
        """Copy the packets up to a time of the new file, or all."""
        while self._waiting is not None:
            packet, shift = self._waiting, round(self._shift)
            if until is not None and (packet.dts - shift) * packet.time_base > until:
                return
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = self._picture
            self._muxer.file.mux(packet)
            self._waiting = next(self._packets, None)

    def close(self) -> None:
        """Copy the rest of the picture; the file is whole then."""
        with self._stack:
            self._mux_sound(self._sound.encode(None))
            self._copy_picture(None)
            self._muxer.file.close()
        file = self._muxer.request.file
        start, moov = read_moov(file)
        replace_moov(file, start, skip_priming(moov, self._priming))
