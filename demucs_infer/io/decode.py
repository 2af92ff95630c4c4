"""Reading audio files.

Shapes: `[C, T]` samples between -1 and 1, as float32. FFmpeg's libraries, which PyAV brings along,
decode files.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import av
import torch
from torch import Tensor

from ..errors import LoadAudioError
from ..log import logger
from .demuxers import open_audio
from .mending import missing_bytes, parts
from .packets import (
    AV_ERRORS,
    MAX_CHANNELS,
    SAMPLE_RATES,
    Converter,
    Damage,
    StreamDecoder,
    Tally,
)
from .pcm import convert_audio
from .seeking import Landing, find_landing
from .tags import clean_tags

SAMPLE_BITS = {"u8": 16, "s16": 16, "s32": 24, "s64": 24, "flt": 32, "dbl": 32}


class AudioFile:
    """The audio streams of a file; `name` is what messages call it.

    Raises `LoadAudioError` if it cannot be read or has no audio, when that is first noticed.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str | None = None) -> None:
        self.path = Path(path)
        self.name = name or str(path)

    def __repr__(self) -> str:
        return f"AudioFile({str(self.path)!r})"

    @property
    def info(self) -> dict[str, Any]:
        """What the file says of itself: `format` (with `duration`) and `streams`."""
        with self._open() as container:
            duration = self._whole_duration(container)
            return {
                "format": {
                    "filename": str(self.path),
                    "format_name": container.format.name,
                    "duration": None if duration is None else duration / av.time_base,
                    "tags": dict(container.metadata),
                },
                "streams": [
                    {
                        "index": stream.index,
                        "codec_type": stream.type,
                        "codec_name": stream.codec_context.name if stream.codec_context else None,
                        "sample_rate": getattr(stream, "rate", None),
                        "channels": getattr(stream, "channels", None),
                    }
                    for stream in container.streams
                ],
            }

    def _whole_duration(self, first: Any) -> int | None:
        """Of all links of a chained stream, in FFmpeg's unit; `first` is the open one."""
        durations = [first.duration]
        with self._opened() as pieces:
            for piece in pieces[1:]:
                with self._container(piece) as container:
                    durations.append(container.duration)
        return None if None in durations else sum(durations)

    @property
    def tags(self) -> dict[str, str]:
        """Title, artist and what else the file says of its music, under FFmpeg's names."""
        with self._open() as container:
            streams: Mapping[str, str] = {}
            if container.streams.audio:
                streams = container.streams.audio[0].metadata  # where Ogg keeps them
            return clean_tags({**streams, **container.metadata})

    @property
    def duration(self) -> float:
        """Seconds, as the file states them."""
        return float(self.info["format"]["duration"] or 0.0)

    @property
    def _audio_streams(self) -> list[int]:
        return [s["index"] for s in self.info["streams"] if s["codec_type"] == "audio"]

    def __len__(self) -> int:
        """The number of audio streams."""
        return len(self._audio_streams)

    def channels(self, stream: int = 0) -> int:
        """Channels of an audio stream."""
        return int(self._stream_info(stream)["channels"])

    def samplerate(self, stream: int = 0) -> int:
        """Sample rate of an audio stream, in hertz."""
        return int(self._stream_info(stream)["sample_rate"])

    def _stream_info(self, stream: int) -> dict[str, Any]:
        audio = [s for s in self.info["streams"] if s["codec_type"] == "audio"]
        if not 0 <= stream < len(audio):
            raise LoadAudioError(f"{self.name}: there is no audio stream {stream}")
        rate = audio[stream]["sample_rate"]
        if rate not in SAMPLE_RATES:
            raise LoadAudioError(f"{self.name}: a sample rate of {rate} Hz is not one of music")
        return audio[stream]

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

        A file that breaks off gives what can be decoded, with a warning.
        """
        if isinstance(streams, int):
            return self._read_stream(streams, seek_time, duration, samplerate, channels)
        numbers = range(len(self))[streams] if isinstance(streams, slice) else streams
        waves = [
            self._read_stream(number, seek_time, duration, samplerate, channels)
            for number in numbers
        ]
        if not waves:
            raise LoadAudioError(f"{self.name}: there is no audio in this file")
        shortest = min(wave.shape[-1] for wave in waves)
        return torch.stack([wave[..., :shortest] for wave in waves])

    def _read_stream(
        self,
        stream: int,
        seek_time: float | None,
        duration: float | None,
        samplerate: int | None,
        channels: int | None,
    ) -> Tensor:
        rate = self.samplerate(stream)
        first = round((seek_time or 0.0) * rate)
        last = None if duration is None else first + round(duration * rate)
        blocks = list(self.part(first, last, stream=stream))
        wav = torch.cat(blocks, dim=-1)
        if not wav.shape[-1]:
            raise LoadAudioError(f"{self.name}: there are no samples in this part of the file")
        return convert_audio(wav, rate, samplerate or rate, channels or wav.shape[0])

    def blocks(self, stream: int = 0, damage: Damage | None = None) -> Iterator[Tensor]:
        """Decode an audio stream packet by packet, as float32 `[C, n]`.

        What cannot be decoded is skipped, with silence for it where the file has a clock; rates and
        channels that change are converted to the first. `damage` is told of it. Raises
        `LoadAudioError` if less than half of the packets can be decoded.
        """
        return self.part(0, None, damage, stream)

    def part(
        self, first: int, last: int | None, damage: Damage | None = None, stream: int = 0
    ) -> Iterator[Tensor]:
        """`blocks` from the sample `first` on, up to `last` if given.

        What lies before is decoded only where it has to be (see `seeking`), and damage there does
        not count.
        """
        tally, converter = Tally(Damage() if damage is None else damage), Converter(max(0, first))
        position = first
        try:
            with closing(self._decoded(stream, tally, converter)) as blocks:
                for block in blocks:
                    yield block if last is None else block[:, : last - position]
                    position += block.shape[-1]
                    if last is not None and position >= last:
                        break
        except AV_ERRORS as exc:
            raise LoadAudioError(f"{self.name}: cannot be decoded ({_reason(exc)})") from exc
        self._judge(tally, converter)

    def _decoded(
        self, stream: int, tally: Tally, converter: Converter
    ) -> Generator[Tensor, None, None]:
        with self._opened() as pieces:
            landing = self._landing(pieces, stream, converter.first)
            for piece in pieces:
                with self._container(piece) as container:
                    found = self._stream(container, stream)
                    decoder = StreamDecoder(container, found, tally, converter)
                    if landing is not None:
                        decoder.begin_at(*landing)
                    yield from decoder.blocks()
                    self._check_size(piece, found, tally)
        yield from converter.flush()

    def _landing(self, pieces: Sequence[BinaryIO], stream: int, first: int) -> Landing | None:
        """Where to begin; links of a chained stream are decoded from the first one on."""
        if first <= 0 or len(pieces) > 1:
            return None
        with self._container(pieces[0]) as container:
            return find_landing(container, self._stream(container, stream), first)

    @staticmethod
    def _check_size(piece: BinaryIO, stream: Any, tally: Tally) -> None:
        missing = missing_bytes(piece)
        if missing and stream.codec_context.bit_rate:
            tally.miss(8 * missing / stream.codec_context.bit_rate)

    def _judge(self, tally: Tally, converter: Converter) -> None:
        if tally.good < tally.bad:
            raise LoadAudioError(
                f"{self.name}: is no audio file that can be read: {tally.bad} of its"
                f" {tally.good + tally.bad} packets cannot be decoded"
            )
        if not converter.samples:
            raise LoadAudioError(f"{self.name}: there are no audio samples in this file")
        if not converter.wants(0):
            raise LoadAudioError(
                f"{self.name}: ends after {converter.samples / converter.rate:.2f} s, before the"
                " part that is wanted"
            )
        if tally.damage:
            logger.warning("%s: is %s", self.name, tally.damage)

    def _stream(self, container: Any, stream: int) -> Any:
        if not 0 <= stream < len(container.streams.audio):
            raise LoadAudioError(f"{self.name}: there is no audio in this file")
        return container.streams.audio[stream]

    @property
    def bits(self) -> int:
        """Bits of a sample where none is lost: 16 or 24, or 32 for float; 0 of lossy formats."""
        with self._open() as container:
            if not container.streams.audio:
                return 0
            context = container.streams.audio[0].codec_context
            kind = context.format.name.removesuffix("p") if context.codec.lossless else ""
        return SAMPLE_BITS.get(kind, 0)

    @contextmanager
    def _open(self, pictures: Sequence[str] = ()) -> Iterator[Any]:
        """The container, of a chained stream the first one."""
        with self._opened() as pieces, self._container(pieces[0], pictures) as container:
            yield container

    @contextmanager
    def _opened(self) -> Iterator[list[BinaryIO]]:
        if not self.path.exists():
            raise LoadAudioError(f"{self.name}: no such file")
        if self.path.is_dir():
            raise LoadAudioError(f"{self.name}: is a folder, not an audio file")
        if not self.path.is_file():
            raise LoadAudioError(f"{self.name}: is no regular file: copy what it gives to one")
        if not self.path.stat().st_size:
            raise LoadAudioError(f"{self.name}: the file is empty")
        with ExitStack() as stack:
            try:
                pieces = parts(stack.enter_context(self.path.open("rb")))
            except OSError as exc:
                raise LoadAudioError(f"{self.name}: cannot be read ({_reason(exc)})") from exc
            yield pieces

    @contextmanager
    def _container(self, piece: BinaryIO, pictures: Sequence[str] = ()) -> Iterator[Any]:
        piece.seek(0)
        try:
            container = open_audio(piece, self.path.name, pictures)
        except AV_ERRORS as exc:
            raise LoadAudioError(
                f"{self.name}: is no audio file that can be read ({_reason(exc)})"
            ) from exc
        with container:
            for stream in container.streams.audio:
                self._check(stream)
            yield container

    def _check(self, stream: Any) -> None:
        channels = getattr(stream, "channels", None) or 0
        if channels > MAX_CHANNELS:
            raise LoadAudioError(f"{self.name}: has {channels} channels, more than {MAX_CHANNELS}")


def _reason(exc: BaseException) -> str:
    """What FFmpeg or the system says, without the error number and the path."""
    return str(getattr(exc, "strerror", None) or exc)
