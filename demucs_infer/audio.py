"""Reading, converting and writing audio files.

Shapes: `[C, T]` samples between -1 and 1, as float32. FFmpeg's libraries, which PyAV brings along,
decode files. A file that is written appears under its name only when it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import av
import torch
from av.audio.resampler import AudioResampler
from torch import Tensor

from .encode import DEFAULT_BITS, Encoding, check_encoder, encoder
from .errors import LoadAudioError, OptionError, SaveAudioError
from .log import logger
from .pcm import as_dtype_pcm, f32_pcm, i16_pcm, prevent_clip
from .resample import resample
from .utils import appearing

__all__ = [
    "AudioFile",
    "as_dtype_pcm",
    "convert_audio",
    "convert_audio_channels",
    "encode_mp3",
    "f32_pcm",
    "i16_pcm",
    "prevent_clip",
    "save_audio",
]

ClipMode = Literal["rescale", "rescale-all", "clamp", "tanh", "none"]

AV_ERRORS = (av.FFmpegError, OSError, ValueError)
# What an input's tags say of its file and not of its music.
FILE_TAGS = (
    "encoder encoded_by encoder_options tsse compatible_brands major_brand minor_version"
    " creation_time handler_name vendor_id language itunsmpb bps duration".split()
)
SAMPLE_RATES = range(1000, 1_000_001)  # hertz: others are damage, or would fill the disk
MAX_TAG, MAX_TAGS = 10_000, 100  # characters of one tag, and how many are kept


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
            duration = container.duration
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

    @property
    def tags(self) -> dict[str, str]:
        """Title, artist and what else the file says of its music, under FFmpeg's names."""
        with self._open() as container:
            streams: Mapping[str, str] = {}
            if container.streams.audio:
                streams = container.streams.audio[0].metadata  # where Ogg keeps them
            tags = {name.lower(): text for name, text in {**streams, **container.metadata}.items()}
        music = {name: text for name, text in tags.items() if _is_of_the_music(name, text)}
        return dict(list(music.items())[:MAX_TAGS])

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
        blocks, position = [], 0
        for block in self.blocks(stream):
            blocks.append(block[:, max(0, first - position) :])
            position += block.shape[-1]
            if last is not None and position >= last:
                break
        wav = torch.cat(blocks, dim=-1)[:, : None if last is None else last - first]
        if not wav.shape[-1]:
            raise LoadAudioError(f"{self.name}: there are no samples in this part of the file")
        return convert_audio(wav, rate, samplerate or rate, channels or wav.shape[0])

    def blocks(self, stream: int = 0) -> Iterator[Tensor]:
        """Decode an audio stream frame by frame, as float32 `[C, n]`."""
        decoded = 0
        with self._open() as container:
            if not 0 <= stream < len(container.streams.audio):
                raise LoadAudioError(f"{self.name}: there is no audio in this file")
            resampler = AudioResampler(format="flt")  # interleaved: PyAV crashes on 8 planes
            try:
                for frame in container.decode(container.streams.audio[stream]):
                    for converted in resampler.resample(frame):
                        decoded += converted.samples
                        samples = converted.to_ndarray().reshape(converted.samples, -1)
                        yield torch.from_numpy(samples.T.copy())
            except AV_ERRORS as exc:
                if not decoded:
                    raise LoadAudioError(
                        f"{self.name}: cannot be decoded ({_reason(exc)})"
                    ) from exc
                logger.warning(
                    "%s: is damaged or cut off after %.1f s (%s): the part before that is used",
                    self.name,
                    decoded / self.samplerate(stream),
                    _reason(exc),
                )
        if not decoded:
            raise LoadAudioError(f"{self.name}: there are no audio samples in this file")

    @contextmanager
    def _open(self) -> Iterator[Any]:
        if not self.path.exists():
            raise LoadAudioError(f"{self.name}: no such file")
        if self.path.is_dir():
            raise LoadAudioError(f"{self.name}: is a folder, not an audio file")
        if not self.path.stat().st_size:
            raise LoadAudioError(f"{self.name}: the file is empty")
        try:
            # "file:" keeps names such as "concat:a|b" or "http://…" from being taken for protocols.
            container = av.open(f"file:{self.path}", metadata_errors="replace")
        except AV_ERRORS as exc:
            raise LoadAudioError(
                f"{self.name}: is no audio file that can be read ({_reason(exc)})"
            ) from exc
        with container:
            yield container


def _is_of_the_music(name: str, text: str) -> bool:
    of_the_file = name in FILE_TAGS or name.startswith(("replaygain_", "id3v2_priv"))
    return not of_the_file and len(text) <= MAX_TAG


def _reason(exc: BaseException) -> str:
    """What FFmpeg or the system says, without the error number and the path."""
    return str(getattr(exc, "strerror", None) or exc)


def convert_audio_channels(wav: Tensor, channels: int = 2) -> Tensor:
    """Convert `wav` `[*, C, T]` to `[*, channels, T]`.

    One channel is repeated; more than are wanted are cut to the first ones, except that one
    channel is the mean of all. Raises `OptionError` if there are too few otherwise.
    """
    *_, present, _ = wav.shape
    if present == channels:
        return wav
    if channels == 1:
        return wav.mean(dim=-2, keepdim=True)
    if present == 1:
        return wav.expand(*wav.shape[:-2], channels, -1)
    if present > channels:
        return wav[..., :channels, :]
    raise OptionError(f"cannot make {channels} channels of {present}")


def convert_audio(wav: Tensor, from_samplerate: int, to_samplerate: int, channels: int) -> Tensor:
    """Convert `wav` `[*, C, T]` to `channels` channels at `to_samplerate` hertz."""
    return resample(convert_audio_channels(wav, channels), from_samplerate, to_samplerate)


def encode_mp3(
    wav: Tensor,
    path: str | os.PathLike[str],
    samplerate: int = 44100,
    bitrate: int = 320,
    quality: int = 2,
    verbose: bool = False,
) -> None:
    """Write `wav` `[C, T]` as MP3.

    `bitrate` is in kbit/s, `quality` lame's preset from 2 (best) to 7 (fastest). `verbose` is
    accepted, and changes nothing. Raises `SaveAudioError` if the file cannot be written.
    """
    _write(wav, Path(path), samplerate, Encoding("mp3", bitrate=bitrate, preset=quality))


def save_audio(
    wav: Tensor,
    path: str | os.PathLike[str],
    samplerate: int,
    bitrate: int = 320,
    clip: ClipMode | str | None = "rescale",
    bits_per_sample: int = DEFAULT_BITS,
    as_float: bool = False,
    preset: int = 2,
) -> None:
    """Write `wav` `[C, T]` as the suffix of `path` says: .wav, .flac, .mp3, .ogg, .opus or .m4a.

    Args:
        wav: samples, on any device.
        path: the file; it appears only when it is whole.
        samplerate: in hertz; converted to the next one that the format has (Opus: 48000).
        bitrate: of MP3, in kbit/s.
        clip: what happens to samples beyond ±1, see `prevent_clip`.
        bits_per_sample: 16 or 24, or 32 for float32 (WAV only).
        as_float: write WAV as float32.
        preset: of MP3, from 2 (best quality) to 7 (fastest).

    Raises `OptionError` for a format, depth or clip mode that cannot be had, `SaveAudioError` if
    the file cannot be written.
    """
    path = Path(path)
    name = path.suffix.lower()[1:]
    encoding = Encoding(
        name,
        bits=32 if as_float and name == "wav" else bits_per_sample,
        bitrate=bitrate if name == "mp3" else None,
        preset=preset,
    )
    check_encoder(encoding)
    _write(prevent_clip(wav.detach().float(), clip), path, samplerate, encoding)


def _write(wav: Tensor, path: Path, samplerate: int, encoding: Encoding) -> None:
    rate = encoding.samplerate(samplerate)
    wav = resample(f32_pcm(wav.cpu()), samplerate, rate)
    with encoding_errors(path), appearing(path) as temporary, temporary.open("w+b") as file:
        sink = encoder(file, encoding, rate, wav.shape[0])
        sink.write(wav)
        sink.close()


@contextmanager
def encoding_errors(path: object) -> Iterator[None]:
    """Raise `SaveAudioError` for what the system, FFmpeg or libsndfile objects to."""
    try:
        yield
    except (*AV_ERRORS, RuntimeError) as exc:
        raise SaveAudioError(f"{path}: cannot be written ({_reason(exc)})") from exc
