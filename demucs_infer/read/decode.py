"""Read audio files.

Shapes: `[C, T]` samples between -1 and 1, as float32. FFmpeg's libraries, which PyAV brings along,
decode the files.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import av
import torch
from torch import Tensor

from ..boxes import read_tempo
from ..errors import LoadAudioError
from ..log import decoded, logger
from ..tags import clean_tags
from .packets import AV_ERRORS, MAX_CHANNELS, SAMPLE_RATES, Damage, TrackDecoder
from .pcm import convert_audio
from .quirks import Link, find_links, open_container

# Bits by FFmpeg's sample format, of codecs that lose none: more than 24 are written as 24.
SAMPLE_BITS = {"u8": 16, "s16": 16, "s32": 24, "s64": 24, "flt": 32, "dbl": 32}

AudioInput = str | bytes | os.PathLike[str] | BinaryIO


class AudioFile:
    """The audio streams of a file: a path, or a binary file object that can seek.

    A file object is read from its beginning, and stays open. `name` stands for the file in
    messages. Methods raise `LoadAudioError` if the file cannot be read or has no audio.
    """

    def __init__(self, path: AudioInput, *, name: str | None = None) -> None:
        self._file: BinaryIO | None = None
        if isinstance(path, (str, bytes, os.PathLike)):
            self.path = Path(os.fsdecode(path))
        else:
            self._file = path
            known = getattr(path, "name", None)
            self.path = Path(known if isinstance(known, str) and known else "<file object>")
        self.name = name or str(self.path)

    def __repr__(self) -> str:
        return f"AudioFile({str(self.path)!r})"

    @property
    def info(self) -> dict[str, Any]:
        """The file's `format` (with `duration`) and `streams`, as ffprobe names them."""
        with self._links() as links:
            durations = []
            # The first link is the last one to be opened: it describes the file.
            for link in reversed(links):
                with self._container(link) as container:
                    durations.append(container.duration)
                    streams = [
                        {
                            "index": stream.index,
                            "codec_type": stream.type,
                            "codec_name": getattr(stream.codec_context, "name", None),
                            "sample_rate": getattr(stream, "rate", None),
                            "channels": getattr(stream, "channels", None),
                        }
                        for stream in container.streams
                    ]
                    about = {
                        "filename": str(self.path),
                        "format_name": container.format.name,
                        "tags": {k: decoded(v, "replace") for k, v in container.metadata.items()},
                    }
        seconds = None if None in durations else sum(durations) / av.time_base
        return {"format": {**about, "duration": seconds}, "streams": streams}

    @property
    def tags(self) -> dict[str, str]:
        """The tags that describe the music, such as `title` and `artist`, under FFmpeg's names."""
        with self._links() as links, self._container(links[0]) as container:
            # Ogg keeps tags in its streams.
            streams = container.streams.audio[:1]
            metadata = [stream.metadata for stream in streams] + [container.metadata]
            tags = {name: text for tags in metadata for name, text in tags.items()}
            tempo = (
                read_tempo(cast(IO[bytes], links[0])) if "mp4" in container.format.name else None
            )
            return clean_tags(tags if tempo is None else {**tags, "tmpo": str(tempo)})

    @property
    def bits(self) -> int:
        """Bits of a sample in lossless formats: 16, 24, or 32 for float. 0 in lossy formats."""
        with self._open() as container:
            if not container.streams.audio:
                return 0
            context = container.streams.audio[0].codec_context
            kind = context.format.name.removesuffix("p") if context.codec.lossless else ""
        return SAMPLE_BITS.get(kind, 0)

    @property
    def duration(self) -> float:
        """Length in seconds that the file states."""
        return float(self.info["format"]["duration"] or 0.0)

    def __len__(self) -> int:
        """Return the number of audio streams."""
        return sum(stream["codec_type"] == "audio" for stream in self.info["streams"])

    def channels(self, stream: int = 0) -> int:
        """Return the number of channels of an audio stream."""
        return int(self._stream_info(stream)["channels"])

    def samplerate(self, stream: int = 0) -> int:
        """Return the sample rate of an audio stream, in hertz."""
        return int(self._stream_info(stream)["sample_rate"])

    def _stream_info(self, stream: int) -> dict[str, Any]:
        streams = [about for about in self.info["streams"] if about["codec_type"] == "audio"]
        if not 0 <= stream < len(streams):
            missing = f"audio stream {stream}" if streams else "sound (no audio stream)"
            raise LoadAudioError(f"{self.name}: has no {missing}")
        rate = streams[stream]["sample_rate"]
        if rate not in SAMPLE_RATES:
            raise LoadAudioError(f"{self.name}: its sample rate of {rate} Hz is not supported")
        return streams[stream]

    def read(
        self,
        seek_time: float | None = None,
        duration: float | None = None,
        streams: int | slice | Sequence[int] = slice(None),
        samplerate: int | None = None,
        channels: int | None = None,
    ) -> Tensor:
        """Decode audio, as `[C, T]` for a stream given by its number, else `[S, C, T]`.

        Args:
            seek_time: start here, in seconds.
            duration: stop after this many seconds.
            streams: number of one audio stream, several numbers, or a slice (default: all).
            samplerate: convert to this rate, in hertz.
            channels: convert to this many channels (see `convert_audio_channels`).

        Damaged and truncated files are read as far as possible, with a warning.
        """
        if isinstance(streams, int):
            rate = self.samplerate(streams)
            first = round((seek_time or 0.0) * rate)
            last = None if duration is None else first + round(duration * rate)
            wav = torch.cat(list(self.chunks(streams, first, last)), dim=-1)
            if not wav.shape[-1]:
                raise LoadAudioError(f"{self.name}: has no samples in this time range")
            return convert_audio(wav, rate, samplerate or rate, channels or wav.shape[0])
        numbers = range(len(self))[streams] if isinstance(streams, slice) else streams
        waves = [self.read(seek_time, duration, n, samplerate, channels) for n in numbers]
        if not waves:
            raise LoadAudioError(f"{self.name}: has no sound (no audio stream)")
        shortest = min(wave.shape[-1] for wave in waves)
        return torch.stack([wave[..., :shortest] for wave in waves])

    def chunks(
        self,
        stream: int = 0,
        first: int = 0,
        last: int | None = None,
        damage: Damage | None = None,
    ) -> Iterator[Tensor]:
        """Decode an audio stream packet by packet, as float32 `[C, n]`.

        Yields the samples from number `first` on, up to `last` if given. Decoding starts at the
        beginning of the file, so that they are those of the whole file to the bit. Damaged packets
        are skipped, and replaced by silence if the file has timestamps. If the rate or the channels
        change, they are converted to the first ones. Damage in this range is added to `damage`.

        Raises `LoadAudioError` if less than half of the packets can be decoded.
        """
        decoder = TrackDecoder(max(0, first), Damage() if damage is None else damage)
        position = first
        try:
            with closing(self._decode(decoder, stream)) as chunks:
                for chunk in chunks:
                    yield chunk if last is None else chunk[:, : last - position]
                    position += chunk.shape[-1]
                    if last is not None and position >= last:
                        break
        except AV_ERRORS as exc:
            raise self._undecodable(exc) from exc

        converter, packets = decoder.converter, decoder.good + decoder.bad
        if decoder.good < decoder.bad:
            problem = ValueError(f"{decoder.bad} of its {packets} packets are damaged")
            raise self._undecodable(problem)
        if not converter.samples:
            raise LoadAudioError(f"{self.name}: has no audio samples")
        if not converter.reaches(0):
            seconds = converter.samples / converter.rate
            raise LoadAudioError(f"{self.name}: ends after {seconds:.2f} s, before the start")
        if decoder.damage:
            logger.warning("%s: is %s", self.name, decoder.damage)

    def _decode(self, decoder: TrackDecoder, number: int) -> Generator[Tensor, None, None]:
        with self._links() as links:
            for link in links:
                with self._container(link) as container:
                    if not 0 <= number < len(container.streams.audio):
                        raise LoadAudioError(f"{self.name}: has no sound (no audio stream)")
                    stream = container.streams.audio[number]
                    yield from decoder.chunks(container, stream)
                    if link.missing and stream.codec_context.bit_rate:
                        seconds = 8 * link.missing / stream.codec_context.bit_rate
                        decoder.damage.add_missing(seconds)
        yield from decoder.converter.flush()

    def _undecodable(self, exc: Exception) -> LoadAudioError:
        if isinstance(exc, OSError) and not isinstance(exc, av.FFmpegError):
            return LoadAudioError(f"{self.name}: cannot be read ({reason(exc)})")
        message = f"{self.name}: cannot be decoded as audio ({reason(exc)})"
        return LoadAudioError(f"{message}. Convert it to WAV, or name an audio file")

    @contextmanager
    def _open(self, pictures: Sequence[str] = ()) -> Iterator[Any]:
        """Open the container, of a chained stream the first one."""
        with self._links() as links, self._container(links[0], pictures) as container:
            yield container

    @contextmanager
    def _links(self) -> Iterator[list[Link]]:
        """Open the file, or the file object."""
        with ExitStack() as stack:
            # A file object may raise anything: it is closed, holds text, or cannot seek.
            try:
                file = self._file
                if file is None:
                    if not self.path.exists():
                        raise LoadAudioError(f"{self.name}: no such file")
                    if not self.path.is_file():
                        kind = "a folder" if self.path.is_dir() else "not a regular file"
                        raise LoadAudioError(f"{self.name}: is {kind}. Name an audio file")
                    file = stack.enter_context(self.path.open("rb"))
                if not isinstance(file.read(0), bytes):
                    raise TypeError("it is not open in binary mode")
                if not file.seek(0, os.SEEK_END):
                    raise LoadAudioError(f"{self.name}: the file is empty")
                links = find_links(file, self.path.name)
            except LoadAudioError:
                raise
            except Exception as exc:
                raise LoadAudioError(f"{self.name}: cannot be read ({reason(exc)})") from exc
            yield links

    @contextmanager
    def _container(self, link: Link, pictures: Sequence[str] = ()) -> Iterator[Any]:
        try:
            container = open_container(link, pictures)
        except AV_ERRORS as exc:
            raise self._undecodable(exc) from exc
        with container:
            channels = max((getattr(s, "channels", 0) for s in container.streams.audio), default=0)
            if channels > MAX_CHANNELS:
                raise LoadAudioError(
                    f"{self.name}: has {channels} channels. At most {MAX_CHANNELS} are supported"
                )
            yield container


def reason(exc: BaseException) -> str:
    """Return the message of FFmpeg or the system, without the error number and the path."""
    return str(getattr(exc, "strerror", None) or exc)
