"""File formats as objects: their encoders, depths, rates and tags, and how stems lie in a file.

No other module compares a format's name. Importing this needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import MissingDependencyError, OptionError
from .metadata import EVERY_COVER, Flac, Matroska, Metadata, Mp3, Mp4, Ogg, StemMp4, Wave
from .stems import Stem

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
CODECS = ("aac", "alac")  # of formats that let one choose
DEFAULT_BITS = 16
MIX = "mix"  # the first stream of a file of all stems
# FFmpeg's sample formats of frames by depth, and of encoders that want a plane for each channel.
SAMPLE_FORMATS = {0: "flt", 16: "s16", 24: "s32", 32: "flt"}
PLANAR = {("libmp3lame", 0): "fltp", ("aac", 0): "fltp", ("alac", 16): "s16p", ("alac", 24): "s32p"}


@dataclass(frozen=True)
class Format:
    """A file format: FFmpeg's container, and its encoder for each number of bits.

    A format whose encoder has the key 0 is lossy. `rates` are the sample rates that it has
    (hertz; none: any), `bitrate` is its usual one in kbit/s, `bitrates` are the least and most.
    `is_together` says that one file holds the mix and all stems, `has_picture` that a file holds
    the picture of a video and one stem.
    """

    container: str
    codecs: Mapping[int, str]
    rates: Sequence[int] = ()
    bitrate: int = 0
    bitrates: tuple[int, int] = (0, 0)
    channels: int = len(LAYOUTS)
    options: Mapping[str, str] = field(default_factory=dict)  # of FFmpeg's muxer
    variants: Mapping[str, Format] = field(default_factory=dict)  # by the name of another codec
    metadata: type[Metadata] = Metadata
    covers: Sequence[str] = EVERY_COVER  # media types
    has_preset: bool = False
    is_together: bool = False
    has_picture: bool = False

    def fits(self, container: Any) -> bool:
        """Return True if an open container of FFmpeg's is of this format, with a sample in it."""
        from av import Codec

        formats = [self, *self.variants.values()]
        encoders = {encoder for kind in formats for encoder in kind.codecs.values()}
        codecs = {Codec(encoder, "w").canonical_name for encoder in encoders}
        streams = container.streams.audio
        return (
            {"ipod": "mp4"}.get(self.container, self.container) in container.format.name.split(",")
            and len(streams) > self.is_together
            and all(stream.codec_context.codec.canonical_name in codecs for stream in streams)
            and any(True for _ in container.decode(audio=0))
        )

    @property
    def is_lossy(self) -> bool:
        """Return True if the encoder loses something."""
        return 0 in self.codecs

    def arranged(self, stems: Sequence[str]) -> list[Stem]:
        """Return the stems of a file in their order, as sums where it has no room for all."""
        return [Stem(name, (name,)) for name in stems]


class StemFile(Format):
    """The stem file of Native Instruments: the mix, then up to four stems."""

    MOST = 4
    STANDARD = ("drums", "bass", "other", "vocals")
    REST = ("guitar", "piano")  # these go to "other"

    def arranged(self, stems: Sequence[str]) -> list[Stem]:
        """Return four stems at most. Raises `OptionError` for more that are not a usual six."""
        if set(stems) == {*self.STANDARD, *self.REST}:
            rest = {"other": self.REST}
            return [Stem(name, (name, *rest.get(name, ()))) for name in self.STANDARD]
        if len(stems) > self.MOST:
            raise OptionError(
                f"stem.mp4 holds {self.MOST} stems, not {len(stems)}: choose with --stems, or"
                " write mka"
            )
        return super().arranged(self.STANDARD if set(stems) == {*self.STANDARD} else stems)


BEYOND_4_GIB = {"rf64": "auto"}
EXACT_LENGTH = {"movie_timescale": "{rate}"}  # else it is rounded to milliseconds
STEM_FILE = {**EXACT_LENGTH, "brand": "M4A "}
MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
AAC_RATES = (7350, *MP3_RATES, 64000, 88200, 96000)
VORBIS_RATES = range(1000, 192_001)  # beyond 200 kHz libsndfile 1.2 crashes the process
VORBIS = "vorbis"  # encoded by libsndfile: the wheels of PyAV have no good encoder
MP4_COVERS = tuple(Mp4.COVER_TYPES)


def _aac_or_alac(kind: type[Format], container: str, **options: Any) -> Format:
    aac = kind(
        container, {0: "aac"}, AAC_RATES, 256, (8, 512), options=EXACT_LENGTH, covers=MP4_COVERS
    )
    aac = replace(aac, **{"metadata": Mp4, **options})
    alac = replace(aac, codecs={16: "alac", 24: "alac"}, rates=(), bitrate=0, bitrates=(0, 0))
    return replace(aac, variants={"alac": alac})


FORMATS = {
    "wav": Format(
        "wav",
        {16: "pcm_s16le", 24: "pcm_s24le", 32: "pcm_f32le"},
        options=BEYOND_4_GIB,
        metadata=Wave,
        covers=(),
    ),
    "flac": Format("flac", {16: "flac", 24: "flac"}, metadata=Flac),
    "mp3": Format(
        "mp3", {0: "libmp3lame"}, MP3_RATES, 320, (8, 320), 2, metadata=Mp3, has_preset=True
    ),
    "ogg": Format("ogg", {0: VORBIS}, VORBIS_RATES, metadata=Ogg),
    "opus": Format("ogg", {0: "libopus"}, (48000,), 192, (6, 510), metadata=Ogg),
    "m4a": _aac_or_alac(Format, "ipod"),
}
# Files of several streams: a picture and a stem, or all stems of a track.
CONTAINERS = {
    "mp4": replace(_aac_or_alac(Format, "mp4", covers=(), has_picture=True), variants={}),
    "mka": Format("matroska", {16: "flac", 24: "flac"}, metadata=Matroska, is_together=True),
    "stem.mp4": _aac_or_alac(
        StemFile, "mp4", channels=2, options=STEM_FILE, metadata=StemMp4, is_together=True
    ),
}
ALL_FORMATS = FORMATS | CONTAINERS


@dataclass(frozen=True)
class Encoding:
    """A format with the options of a file. Raises `OptionError` for what the format does not have.

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
        """The format itself."""
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

    @property
    def codec_options(self) -> dict[str, str]:
        """Options of FFmpeg's encoder."""
        return {"compression_level": str(self.preset)} if self.kind.has_preset else {}

    @property
    def bits_per_second(self) -> int | None:
        """The bit rate of a lossy format, if it is constant."""
        return 1000 * (self.bitrate or self.kind.bitrate) or None

    @property
    def frame_format(self) -> str:
        """FFmpeg's name of the samples in a frame."""
        return SAMPLE_FORMATS[self.depth]

    @property
    def encoder_format(self) -> str:
        """FFmpeg's name of the samples that the encoder takes."""
        return PLANAR.get((self.codec, self.depth), self.frame_format)

    def samplerate(self, wanted: int) -> int:
        """Return the rate that a file gets for `wanted` hertz: the next one that the format has."""
        rates = self.kind.rates
        if not rates or wanted in rates:
            return wanted
        return min((rate for rate in rates if rate > wanted), default=max(rates))

    def for_depth(self, bits: int) -> Encoding:
        """Return the encoding with as many of `bits` (32: float) as a lossless format has."""
        fits = [depth for depth in self.kind.codecs if 0 < depth <= bits]
        return replace(self, bits=max(fits)) if fits else self

    def check_encoder(self) -> None:
        """Raise an error, before any work is done, if the encoder is not there.

        `MissingDependencyError` without its package, `OptionError` if PyAV was built without it.
        """
        if self.codec == VORBIS:
            soundfile()
            return
        import av

        try:
            av.Codec(self.codec, "w")
        except ValueError as exc:
            raise OptionError(
                f"this PyAV was built without {self.codec}, which {self.format.upper()} needs:"
                " install the one of PyPI, or choose another format"
            ) from exc


def soundfile() -> Any:
    """Return the module `soundfile`. Raises `MissingDependencyError` if it is not there."""
    try:
        import soundfile as module
    except (ImportError, OSError) as exc:  # OSError: without its library
        raise MissingDependencyError("soundfile", "writing Ogg Vorbis") from exc
    return module
