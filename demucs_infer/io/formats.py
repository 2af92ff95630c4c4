"""What formats there are, and how a file in one of them is encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import OptionError

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


@dataclass(frozen=True)
class Format:
    """A file format: FFmpeg's container, and its encoder for each number of bits.

    A format whose encoder has the key 0 is lossy. `rates` are the sample rates that it has
    (hertz; none: any), `bitrate` is its usual one in kbit/s, with the range that there is.
    """

    container: str
    codecs: Mapping[int, str]
    rates: Sequence[int] = ()
    bitrate: int = 0
    bitrates: tuple[int, int] = (0, 0)
    channels: int = len(LAYOUTS)
    options: Mapping[str, str] = field(default_factory=dict)  # of FFmpeg's muxer
    variants: Mapping[str, Format] = field(default_factory=dict)  # by the name of another codec

    @property
    def is_lossy(self) -> bool:
        return 0 in self.codecs


BEYOND_4_GIB = {"rf64": "auto"}
EXACT_LENGTH = {"movie_timescale": "{rate}"}  # else it is rounded to milliseconds
STEM_FILE = {**EXACT_LENGTH, "brand": "M4A "}
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
AAC_RATES = (7350, *MP3_RATES, 64000, 88200, 96000)
_ALAC = {16: "alac", 24: "alac"}
VORBIS_RATES = range(1000, 192_001)  # beyond 200 kHz libsndfile 1.2 crashes the process
FORMATS = {
    "wav": Format("wav", {16: "pcm_s16le", 24: "pcm_s24le", 32: "pcm_f32le"}, options=BEYOND_4_GIB),
    "flac": Format("flac", {16: "flac", 24: "flac"}),
    "mp3": Format("mp3", {0: "libmp3lame"}, MP3_RATES, 320, (8, 320), channels=2),
    "ogg": Format("ogg", {0: "vorbis"}, VORBIS_RATES),
    "opus": Format("ogg", {0: "libopus"}, (48000,), 192, (6, 510)),
    "m4a": Format(
        "ipod",
        {0: "aac"},
        AAC_RATES,
        256,
        (8, 512),
        options=EXACT_LENGTH,
        variants={"alac": Format("ipod", _ALAC, options=EXACT_LENGTH)},
    ),
}
# Files of several streams: a picture and a stem, or all stems of a track.
CONTAINERS = {
    "mp4": Format("mp4", {0: "aac"}, AAC_RATES, 256, (8, 512), options=EXACT_LENGTH),
    "mka": Format("matroska", {16: "flac", 24: "flac"}),
    "stem.mp4": Format(
        "mp4",
        {0: "aac"},
        AAC_RATES,
        256,
        (8, 512),
        channels=2,
        options=STEM_FILE,
        variants={"alac": Format("mp4", _ALAC, channels=2, options=STEM_FILE)},
    ),
}
ALL_FORMATS = FORMATS | CONTAINERS
TOGETHER = ("mka", "stem.mp4")  # one file holds all stems
CODECS = ("aac", "alac")  # of formats that let one choose
DEFAULT_BITS = 16


@dataclass(frozen=True)
class Encoding:
    """How a file is encoded. Raises `OptionError` for what its format does not have.

    Args:
        format: a key of `ALL_FORMATS`.
        bits: 16, 24 or 32 (float32), for the lossless formats.
        bitrate: kbit/s, for MP3, M4A and Opus (default: the format's usual one).
        preset: of MP3, from 2 (best quality) to 7 (fastest).
        variant: another codec than the format's usual one: "alac", for M4A and stem.mp4.
    """

    format: str = "wav"
    bits: int = DEFAULT_BITS
    bitrate: int | None = None
    preset: int = 2
    variant: str | None = None

    def __post_init__(self) -> None:
        if self.format not in ALL_FORMATS:
            raise OptionError(
                f"cannot write {self.format or 'a file without suffix'!r}:"
                f" use {', '.join(ALL_FORMATS)}"
            )
        name = self.format.upper()
        usual = ALL_FORMATS[self.format]
        codecs = {*usual.variants, *usual.codecs.values()}
        if self.variant is not None and self.variant not in codecs:
            raise OptionError(f"{name} has no codec {self.variant!r}: {', '.join(sorted(codecs))}")
        kind = self.kind
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
        usual = ALL_FORMATS[self.format]
        return usual.variants.get(self.variant or "", usual)

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
