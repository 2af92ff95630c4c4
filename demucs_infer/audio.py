"""Reading, converting and writing audio.

Shapes: `[C, T]` samples between -1 and 1, as float32. Files go through PyAV (FFmpeg's libraries in
a wheel), and MP3 is written by lameenc. A file that is written appears under its name only when
it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import av
import numpy as np
import torch
from av.audio.resampler import AudioResampler
from julius.resample import resample_frac
from torch import Tensor

from .errors import LoadAudioError, MissingDependencyError, OptionError, SaveAudioError
from .log import logger
from .utils import appearing

ClipMode = Literal["rescale", "clamp", "tanh", "none"]

CLAMP_LIMIT = 0.99
RESCALE_MARGIN = 1.01
I16_MAX = 2**15 - 1
I24_MAX = 2**23 - 1
LAYOUTS = {
    1: "mono",
    2: "stereo",
    3: "2.1",
    4: "4.0",
    5: "5.0",
    6: "5.1",
    7: "6.1",
    8: "7.1",
}
WRITE_BLOCK = 2**16  # samples that one encoded frame has at most
MP3_PRESETS = range(2, 8)  # of lame: 2 is the best quality, 7 the fastest
AV_ERRORS = (av.FFmpegError, OSError, ValueError)


class AudioFile:
    """The audio streams of a file.

    Raises `LoadAudioError` if it cannot be read or has no audio, when that is first noticed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

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
            raise LoadAudioError(f"{self.path}: there is no audio stream {stream}")
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
            raise LoadAudioError(f"{self.path}: there is no audio in this file")
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
            raise LoadAudioError(f"{self.path}: there are no samples in this part of the file")
        return convert_audio(wav, rate, samplerate or rate, channels or wav.shape[0])

    def blocks(self, stream: int = 0) -> Iterator[Tensor]:
        """Decode an audio stream frame by frame, as float32 `[C, n]`."""
        decoded = 0
        with self._open() as container:
            if not 0 <= stream < len(container.streams.audio):
                raise LoadAudioError(f"{self.path}: there is no audio in this file")
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
                        f"{self.path}: cannot be decoded ({_reason(exc)})"
                    ) from exc
                logger.warning(
                    "%s: is damaged or cut off after %.1f s (%s): the part before that is used",
                    self.path,
                    decoded / self.samplerate(stream),
                    _reason(exc),
                )
        if not decoded:
            raise LoadAudioError(f"{self.path}: there are no audio samples in this file")

    @contextmanager
    def _open(self) -> Iterator[Any]:
        if not self.path.exists():
            raise LoadAudioError(f"{self.path}: no such file")
        if self.path.is_dir():
            raise LoadAudioError(f"{self.path}: is a folder, not an audio file")
        if not self.path.stat().st_size:
            raise LoadAudioError(f"{self.path}: the file is empty")
        try:
            # "file:" keeps names such as "concat:a|b" or "http://…" from being taken for protocols.
            container = av.open(f"file:{self.path}", metadata_errors="replace")
        except AV_ERRORS as exc:
            raise LoadAudioError(
                f"{self.path}: is no audio file that can be read ({_reason(exc)})"
            ) from exc
        with container:
            yield container


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
    wav = convert_audio_channels(wav, channels)
    return resample_frac(wav, int(from_samplerate), int(to_samplerate))


def i16_pcm(wav: Tensor) -> Tensor:
    """`wav` as int16: clipped to ±1, times 2^15 - 1, truncated. Integers are left alone."""
    return (wav.clamp(-1, 1) * I16_MAX).short() if wav.is_floating_point() else wav


def f32_pcm(wav: Tensor) -> Tensor:
    """`wav` as floating point between -1 and 1, from int16. Floats are left alone."""
    return wav if wav.is_floating_point() else wav.float() / I16_MAX


def as_dtype_pcm(wav: Tensor, dtype: torch.dtype) -> Tensor:
    """`wav` as `f32_pcm` or `i16_pcm`, whichever `dtype` is."""
    return f32_pcm(wav) if dtype.is_floating_point else i16_pcm(wav)


def _rescale(wav: Tensor) -> Tensor:
    return wav / max(RESCALE_MARGIN * wav.abs().max().item(), 1) if wav.numel() else wav


CLIP_MODES: dict[str, Callable[[Tensor], Tensor]] = {
    "rescale": _rescale,
    "clamp": lambda wav: wav.clamp(-CLAMP_LIMIT, CLAMP_LIMIT),
    "tanh": torch.tanh,
    "none": lambda wav: wav,
}


def prevent_clip(wav: Tensor, mode: str | None = "rescale") -> Tensor:
    """Bring `wav` into the range of ±1.

    `rescale` divides the whole by what its peak exceeds 0.99 by, `clamp` cuts at ±0.99, `tanh`
    bends, and `none` (or `None`) does nothing.
    """
    if mode not in CLIP_MODES and mode is not None:
        raise OptionError(f"clip mode {mode!r} is unknown: choose among {', '.join(CLIP_MODES)}")
    return CLIP_MODES[mode or "none"](wav)


def check_encoder(suffix: str) -> None:
    """Raise, before any work is done, if files with this `suffix` cannot be written here.

    Raises `OptionError` for an unknown format, `MissingDependencyError` without its encoder.
    """
    if suffix.lower() not in WRITERS:
        raise OptionError(
            f"cannot write {suffix or 'a file without suffix'}: use {', '.join(WRITERS)}"
        )
    if suffix.lower() == ".mp3":
        _lameenc()


def _lameenc() -> Any:
    try:
        import lameenc
    except ImportError as exc:
        raise MissingDependencyError("lameenc", "writing MP3", "mp3") from exc
    return lameenc


def encode_mp3(
    wav: Tensor,
    path: str | os.PathLike[str],
    samplerate: int = 44100,
    bitrate: int = 320,
    quality: int = 2,
    verbose: bool = False,
) -> None:
    """Write `wav` `[C, T]` as MP3.

    `bitrate` is in kbit/s, `quality` lame's preset from 2 (best) to 7 (fastest).
    Raises `MissingDependencyError` without lameenc, `SaveAudioError` if the file cannot be written.
    """
    if quality not in MP3_PRESETS:
        raise OptionError(f"MP3 preset {quality} is not within 2 (best quality) to 7 (fastest)")
    encoder = _lameenc().Encoder()
    encoder.set_bit_rate(bitrate)
    encoder.set_in_sample_rate(samplerate)
    encoder.set_channels(wav.shape[0])
    encoder.set_quality(quality)
    if not verbose:
        encoder.silence()
    pcm = i16_pcm(wav).cpu().numpy().T
    try:
        with _appearing(Path(path)) as file:
            for start in range(0, len(pcm), WRITE_BLOCK):
                file.write(encoder.encode(pcm[start : start + WRITE_BLOCK].tobytes()))
            file.write(encoder.flush())
    except RuntimeError as exc:  # lame refuses a rate or a bit rate
        raise SaveAudioError(f"{path}: cannot be encoded as MP3 ({exc})") from exc


def save_audio(
    wav: Tensor,
    path: str | os.PathLike[str],
    samplerate: int,
    bitrate: int = 320,
    clip: ClipMode | str | None = "rescale",
    bits_per_sample: int = 16,
    as_float: bool = False,
    preset: int = 2,
) -> None:
    """Write `wav` `[C, T]` as the suffix of `path` says: .wav, .flac or .mp3.

    Args:
        wav: samples, on any device.
        path: the file; it appears only when it is whole.
        samplerate: in hertz.
        bitrate: of MP3, in kbit/s.
        clip: what happens to samples beyond ±1, see `prevent_clip`.
        bits_per_sample: 16 or 24, or 32 for float32 (WAV only).
        as_float: write WAV as float32.
        preset: of MP3, from 2 (best quality) to 7 (fastest).

    Raises `OptionError` for a format, depth or clip mode that cannot be had, `SaveAudioError` if
    the file cannot be written.
    """
    path = Path(path)
    check_encoder(path.suffix)
    wav = prevent_clip(wav.detach().float().cpu(), clip)
    WRITERS[path.suffix.lower()](wav, path, samplerate, bitrate, bits_per_sample, as_float, preset)


def _save_wav(
    wav: Tensor, path: Path, samplerate: int, bitrate: int, bits: int, as_float: bool, preset: int
) -> None:
    codec = "pcm_f32le" if as_float else _choose(bits, WAV_CODECS, "WAV")
    _encode_lossless(wav, path, samplerate, "wav", codec)


def _save_flac(
    wav: Tensor, path: Path, samplerate: int, bitrate: int, bits: int, as_float: bool, preset: int
) -> None:
    _encode_lossless(wav, path, samplerate, "flac", _choose(bits, FLAC_CODECS, "FLAC"))


def _save_mp3(
    wav: Tensor, path: Path, samplerate: int, bitrate: int, bits: int, as_float: bool, preset: int
) -> None:
    encode_mp3(wav, path, samplerate, bitrate, preset)


WAV_CODECS = {16: "pcm_s16le", 24: "pcm_s24le", 32: "pcm_f32le"}
FLAC_CODECS = {16: "flac_s16", 24: "flac_s32"}
WRITERS = {".wav": _save_wav, ".flac": _save_flac, ".mp3": _save_mp3}


def _choose(bits: int, codecs: dict[int, str], name: str) -> str:
    if bits not in codecs:
        raise OptionError(f"{name} has {' or '.join(map(str, codecs))} bits, not {bits}")
    return codecs[bits]


def _quantized(wav: Tensor, codec: str) -> tuple[np.ndarray[Any, Any], str]:
    """Interleaved samples `[1, T C]` for `codec`, and PyAV's name of their format."""
    interleaved = wav.t().reshape(1, -1)
    if codec == "pcm_f32le":
        return interleaved.numpy(), "flt"
    if codec.endswith("s16") or codec == "pcm_s16le":
        return i16_pcm(interleaved).numpy(), "s16"
    # FFmpeg takes 24 bits as the upper ones of 32.
    return ((interleaved.clamp(-1, 1).double() * I24_MAX).int() * 256).numpy(), "s32"


def _encode_lossless(wav: Tensor, path: Path, samplerate: int, format: str, codec: str) -> None:
    """Encode `wav` with PyAV; `codec` is FFmpeg's, with the sample format where it has several."""
    channels = wav.shape[0]
    if channels not in LAYOUTS:
        raise SaveAudioError(f"{path}: cannot write {channels} channels")
    options = {"rf64": "auto"} if format == "wav" else {}
    with _appearing(path) as file, av.open(file, "w", format=format, options=options) as container:
        name = "flac" if format == "flac" else codec
        stream: Any = container.add_stream(name, rate=samplerate)
        stream.layout = LAYOUTS[channels]
        stream.format = _quantized(wav[:, :0], codec)[1]
        for start in range(0, wav.shape[-1], WRITE_BLOCK):
            samples, sample_format = _quantized(wav[:, start : start + WRITE_BLOCK], codec)
            frame = av.AudioFrame.from_ndarray(samples, sample_format, LAYOUTS[channels])
            frame.sample_rate = samplerate
            frame.pts = start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@contextmanager
def _appearing(path: Path) -> Iterator[IO[bytes]]:
    """`appearing`, opened. Raises `SaveAudioError` for what the system or FFmpeg objects to."""
    try:
        with appearing(path) as temporary, temporary.open("w+b") as file:
            yield file
    except AV_ERRORS as exc:
        raise SaveAudioError(f"{path}: cannot be written ({_reason(exc)})") from exc
