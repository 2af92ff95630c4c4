"""Writing audio: samples go into a file block by block.

FFmpeg's libraries (PyAV) encode every format but Ogg Vorbis, for which the wheels of PyAV have no
good encoder: libsndfile (soundfile, an extra) does that. Shapes: `[C, n]` samples between -1 and 1.
A file that is written appears under its name only when it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import av
import numpy as np
from torch import Tensor

from ..errors import MissingDependencyError, OptionError, SaveAudioError
from ..read.decode import reason
from ..read.packets import AV_ERRORS
from ..read.pcm import f32_pcm, i16_pcm, i24_pcm, prevent_clip
from ..read.tags import clean_tags
from ..resample import resample
from ..utils import appearing
from .formats import DEFAULT_BITS, LAYOUTS, Encoding

ClipMode = Literal["rescale", "rescale-all", "clamp", "tanh", "none"]
VORBIS_COMPRESSION = 0.2  # of libsndfile: quality 8 of 10, about 256 kbit/s
BLOCK = 2**16  # samples that one frame for an encoder has at most
SAMPLE_FORMATS = {0: "flt", 16: "s16", 24: "s32", 32: "flt"}  # FFmpeg's, of the frames, by depth
# Those of encoders that want a plane per channel.
PLANAR = {("libmp3lame", 0): "fltp", ("aac", 0): "fltp", ("alac", 16): "s16p", ("alac", 24): "s32p"}


def check_encoder(encoding: Encoding) -> None:
    """Raise, before any work is done, if the encoder is not there.

    `MissingDependencyError` without its package, `OptionError` if PyAV was built without it.
    """
    if encoding.codec == "vorbis":
        _soundfile()
        return
    try:
        av.Codec(encoding.codec, "w")
    except ValueError as exc:
        raise OptionError(
            f"this PyAV was built without {encoding.codec}, which {encoding.format.upper()} needs:"
            " install the one of PyPI, or choose another format"
        ) from exc


def _soundfile() -> Any:
    try:
        import soundfile
    except (ImportError, OSError) as exc:  # OSError: without its library
        raise MissingDependencyError("soundfile", "writing Ogg Vorbis") from exc
    return soundfile


class Encoder(Protocol):
    """Takes samples and writes a file."""

    def write(self, wav: Tensor) -> None:
        """Encode `wav` `[C, n]`."""

    def close(self) -> None:
        """Write what is left; the file is whole then."""


def encoder(
    file: IO[bytes],
    encoding: Encoding,
    samplerate: int,
    channels: int,
    tags: Mapping[str, str] | None = None,
) -> Encoder:
    """An encoder that writes to `file`, which is open for writing and can be sought.

    `samplerate` (hertz) is one that the format has; `tags` are title, artist and the like.
    Raises `SaveAudioError` for what the format cannot hold, and whatever FFmpeg or the system says.
    """
    if channels not in LAYOUTS or channels > encoding.kind.channels:
        raise SaveAudioError(f"{encoding.format.upper()}: cannot hold {channels} channels")
    kind = _VorbisEncoder if encoding.codec == "vorbis" else _FFmpegEncoder
    return kind(_Request(file, encoding, samplerate, channels, clean_tags(tags or {})))


@dataclass(frozen=True)
class _Request:
    """What `encoder` was asked for."""

    file: IO[bytes]
    encoding: Encoding
    samplerate: int
    channels: int
    tags: Mapping[str, str]


class _FFmpegEncoder:
    def __init__(self, request: _Request) -> None:
        self.encoding = encoding = request.encoding
        self.rate, self.layout = request.samplerate, LAYOUTS[request.channels]
        options = {key: text.format(rate=self.rate) for key, text in encoding.kind.options.items()}
        kind = encoding.kind.container
        self.container = av.open(request.file, "w", format=kind, options=options)
        self.container.metadata.update(request.tags)
        self.position = 0
        codec = {"compression_level": str(encoding.preset)} if encoding.format == "mp3" else {}
        stream: Any = self.container.add_stream(encoding.codec, rate=self.rate, options=codec)
        self.stream = stream
        stream.layout = self.layout
        if encoding.kind.bitrate:
            stream.bit_rate = 1000 * (encoding.bitrate or encoding.kind.bitrate)
        stream.format = PLANAR.get((encoding.codec, encoding.depth), SAMPLE_FORMATS[encoding.depth])

    def write(self, wav: Tensor) -> None:
        for block in wav.split(BLOCK, dim=-1):
            if not block.shape[-1]:
                continue
            samples = _quantized(block.t().reshape(1, -1), self.encoding.depth)
            frame = av.AudioFrame.from_ndarray(
                samples, SAMPLE_FORMATS[self.encoding.depth], self.layout
            )
            frame.sample_rate = self.rate
            frame.pts = self.position
            self.position += block.shape[-1]
            self.container.mux(self.stream.encode(frame))

    def close(self) -> None:
        self.container.mux(self.stream.encode(None))
        self.container.close()


def _quantized(samples: Tensor, depth: int) -> np.ndarray[Any, Any]:
    if depth == 16:
        return i16_pcm(samples).numpy()
    return (i24_pcm(samples) if depth == 24 else samples).numpy()


class _VorbisEncoder:
    # libsndfile's names of those tags that an Ogg file can have.
    TAGS = {
        name: name for name in "title artist album comment copyright date genre license".split()
    } | {"track": "tracknumber"}

    def __init__(self, request: _Request) -> None:
        self.target = _Kept(request.file)
        self.file = _soundfile().SoundFile(
            self.target,
            "w",
            request.samplerate,
            request.channels,
            format="OGG",
            subtype="VORBIS",
            compression_level=VORBIS_COMPRESSION,
        )
        for name, value in request.tags.items():
            if name in self.TAGS:
                setattr(self.file, self.TAGS[name], value)

    def write(self, wav: Tensor) -> None:
        for block in wav.split(BLOCK, dim=-1):
            self.file.write(block.t().numpy())
            self.target.check()

    def close(self) -> None:
        self.file.close()
        self.target.check()


class _Kept:
    """A file for libsndfile, which cannot pass on an exception: the first one is kept."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.seek, self.tell, self.read = file.seek, file.tell, file.read
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except BaseException as exc:  # a signal's, too
            self.error = self.error or exc
            return len(data)

    def check(self) -> None:
        """Raise what was kept."""
        if self.error is not None:
            raise self.error


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
    if not wav.shape[-1]:
        raise SaveAudioError(f"{path}: there are no samples to write")
    samplerate = _hertz(samplerate)
    rate = encoding.samplerate(samplerate)
    wav = resample(f32_pcm(wav.cpu()), samplerate, rate)
    with encoding_errors(path), appearing(path) as temporary, temporary.open("w+b") as file:
        sink = encoder(file, encoding, rate, wav.shape[0])
        sink.write(wav)
        sink.close()


def _hertz(samplerate: int) -> int:
    """`samplerate`, of whatever type whole numbers have. Raises `OptionError` for others."""
    try:
        number = index(samplerate)
    except TypeError:
        number = 0
    if number < 1:
        raise OptionError(f"samplerate={samplerate!r} is no whole number of hertz")
    return number


@contextmanager
def encoding_errors(path: object) -> Iterator[None]:
    """Raise `SaveAudioError` for what the system, FFmpeg or libsndfile objects to."""
    try:
        yield
    except (*AV_ERRORS, RuntimeError) as exc:
        raise SaveAudioError(f"{path}: cannot be written ({reason(exc)})") from exc
