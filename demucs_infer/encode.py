"""Writing audio: samples go into a file block by block.

FFmpeg's libraries (PyAV) encode every format but Ogg Vorbis, for which the wheels of PyAV have no
good encoder: libsndfile (soundfile, an extra) does that. Shapes: `[C, n]` samples between -1 and 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import av
import numpy as np
from torch import Tensor

from .errors import MissingDependencyError, OptionError, SaveAudioError
from .pcm import i16_pcm, i24_pcm

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
MP3_PRESETS = range(2, 8)  # of lame: 2 is the best quality, 7 the fastest
VORBIS_COMPRESSION = 0.2  # of libsndfile: quality 8 of 10, about 256 kbit/s
BLOCK = 2**16  # samples that one frame for an encoder has at most


@dataclass(frozen=True)
class Format:
    """A file format: FFmpeg's container, and its encoder for each number of bits.

    A format whose encoder has the key 0 is lossy. `rates` are the sample rates that it has
    (hertz; none: any), `bitrate` is its usual one in kbit/s, with the range that there is.
    """

    container: str
    codecs: Mapping[int, str]
    rates: tuple[int, ...] = ()
    bitrate: int = 0
    bitrates: tuple[int, int] = (0, 0)
    channels: int = len(LAYOUTS)
    options: Mapping[str, str] = field(default_factory=dict)  # of FFmpeg's muxer

    @property
    def is_lossy(self) -> bool:
        return 0 in self.codecs


BEYOND_4_GIB = {"rf64": "auto"}
EXACT_LENGTH = {"movie_timescale": "{rate}"}  # else it is rounded to milliseconds
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
AAC_RATES = (7350, *MP3_RATES, 64000, 88200, 96000)
FORMATS = {
    "wav": Format("wav", {16: "pcm_s16le", 24: "pcm_s24le", 32: "pcm_f32le"}, options=BEYOND_4_GIB),
    "flac": Format("flac", {16: "flac", 24: "flac"}),
    "mp3": Format("mp3", {0: "libmp3lame"}, MP3_RATES, 320, (8, 320), channels=2),
    "ogg": Format("ogg", {0: "vorbis"}),
    "opus": Format("ogg", {0: "libopus"}, (48000,), 192, (6, 510)),
    "m4a": Format("ipod", {0: "aac"}, AAC_RATES, 256, (8, 512), options=EXACT_LENGTH),
}
DEFAULT_BITS = 16
SAMPLE_FORMATS = {0: "flt", 16: "s16", 24: "s32", 32: "flt"}  # FFmpeg's, of the frames, by depth
PLANAR = {"libmp3lame": "fltp", "aac": "fltp"}  # encoders that want a plane per channel


@dataclass(frozen=True)
class Encoding:
    """How a file is encoded. Raises `OptionError` for what its format does not have.

    Args:
        format: a key of `FORMATS`.
        bits: 16, 24 or 32 (float32), for the lossless formats.
        bitrate: kbit/s, for MP3, M4A and Opus (default: the format's usual one).
        preset: of MP3, from 2 (best quality) to 7 (fastest).
    """

    format: str = "wav"
    bits: int = DEFAULT_BITS
    bitrate: int | None = None
    preset: int = 2

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise OptionError(
                f"cannot write {self.format or 'a file without suffix'!r}: use {', '.join(FORMATS)}"
            )
        kind, name = FORMATS[self.format], self.format.upper()
        if kind.is_lossy and self.bits != DEFAULT_BITS:
            raise OptionError(f"{name} has no {self.bits} bits: use wav or flac for that")
        if not kind.is_lossy and self.bits not in kind.codecs:
            has = " or ".join(map(str, kind.codecs))
            raise OptionError(f"{name} has {has} bits, not {self.bits}")
        low, high = kind.bitrates
        if self.bitrate is not None and kind.bitrate and not low <= self.bitrate <= high:
            raise OptionError(f"{name} has {low} to {high} kbit/s, not {self.bitrate}")
        if self.preset not in MP3_PRESETS:
            raise OptionError(
                f"MP3 preset {self.preset} is not within 2 (best quality) to 7 (fastest)"
            )

    @property
    def kind(self) -> Format:
        return FORMATS[self.format]

    @property
    def depth(self) -> int:
        """The bits of a sample, or 0 if the format is lossy."""
        return 0 if self.kind.is_lossy else self.bits

    @property
    def codec(self) -> str:
        """FFmpeg's name of the encoder."""
        return self.kind.codecs[self.depth]

    def samplerate(self, wanted: int) -> int:
        """The rate that a file gets for `wanted` hertz: the next one that the format has."""
        rates = self.kind.rates
        if not rates or wanted in rates:
            return wanted
        return min((rate for rate in rates if rate > wanted), default=max(rates))


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
        raise MissingDependencyError("soundfile", "writing Ogg Vorbis", "ogg") from exc
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
    return kind(_Request(file, encoding, samplerate, channels, tags or {}))


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
        stream.format = PLANAR.get(encoding.codec, SAMPLE_FORMATS[encoding.depth])

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
        self.error: Exception | None = None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except (OSError, ValueError) as exc:  # ValueError: closed, after an earlier error
            self.error = self.error or exc
            return len(data)

    def check(self) -> None:
        """Raise what was kept."""
        if self.error is not None:
            raise self.error
