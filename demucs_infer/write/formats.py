"""File formats as objects: their encoders, depths, rates and tags, and how stems lie in a file.

No other module compares a format's name. Importing this needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import MissingDependencyError, OptionError, SaveAudioError
from .metadata import EVERY_COVER, Flac, Matroska, Metadata, Mov, Mp3, Mp4, Ogg, StemMp4, Wave
from .stems import Stem

LAYOUTS = dict(enumerate("mono stereo 2.1 4.0 5.0 5.1 6.1 7.1".split(), 1))  # by channels
MP3_PRESETS = range(2, 8)  # of lame: 2 is the best quality, 7 the fastest
CODECS = ("aac", "alac")  # of formats with a choice
DEFAULT_BITS = 16
COMPRESSED = 0.4  # of the samples' size: FLAC files of 8 stems took 0.40 to 0.56
MIX = "mix"  # the first stream of a file of all stems
VORBIS = "vorbis"  # encoded by libsndfile: the wheels of PyAV have no good encoder


@dataclass(frozen=True)
class Format:
    """A file format, and the options of a file in it.

    `find_format` returns the format of a name with options.

    Args:
        name: the suffix of its files.
        container: FFmpeg's muxer.
        codecs: FFmpeg's encoder for each number of bits (32: float); 0 is for a lossy encoder.
        metadata: the writer of tags and covers.
        rates: the sample rates in hertz that it has (none: any).
        bitrates: the range in kbit/s of a lossy format.
        most_channels: of a stream.
        muxer: options of FFmpeg's muxer.
        variants: the same format with another codec, by the codec's name.
        covers: media types of covers that it holds.
        has_preset: True if the encoder has presets of quality.
        is_together: True if one file holds the mix and all stems.
        subtitles: the codec of text, in files of the picture of a video and one stem.
        has_edits: True if a file can hide the pictures before its start.
        bits: 16, 24 or 32 (float32), if lossless.
        bitrate: kbit/s of a stream, if lossy.
        preset: from 2 (best quality) to 7 (fastest).
    """

    name: str
    container: str
    codecs: Mapping[int, str]
    metadata: type[Metadata]
    rates: Sequence[int] = ()
    bitrates: range = range(0)
    most_channels: int = len(LAYOUTS)
    muxer: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, Format] = field(default_factory=dict)
    covers: Sequence[str] = EVERY_COVER
    has_preset: bool = False
    is_together: bool = False
    subtitles: str = ""
    has_edits: bool = False
    bits: int = DEFAULT_BITS
    bitrate: int = 0
    preset: int = MP3_PRESETS[0]

    @property
    def is_lossy(self) -> bool:
        """True if the encoder is lossy."""
        return 0 in self.codecs

    @property
    def is_video(self) -> bool:
        """True if a file holds the picture of a video and one stem."""
        return bool(self.subtitles)

    @property
    def depth(self) -> int:
        """The bits of a sample, or 0 if the format is lossy."""
        return 0 if self.is_lossy else self.bits

    @property
    def codec(self) -> str:
        """FFmpeg's name of the encoder."""
        return self.codecs[self.depth]

    def samplerate(self, wanted: int) -> int:
        """Return the rate of a file for `wanted` hertz: the next one that the format has."""
        if not self.rates or wanted in self.rates:
            return wanted
        return min((rate for rate in self.rates if rate > wanted), default=max(self.rates))

    def for_depth(self, bits: int) -> Format:
        """Return the format with as many of `bits` (32: float) as it has, if it is lossless."""
        fits = [depth for depth in self.codecs if 0 < depth <= bits]
        return replace(self, bits=max(fits)) if fits else self

    def bytes_per_second(self, samplerate: int, channels: int) -> float:
        """Return the usual size of a second of a stem, 0 for unknown."""
        share = 1 if self.codec.startswith("pcm") else COMPRESSED
        return self.bitrate * 125 + samplerate * channels * self.depth / 8 * share

    def arranged(self, stems: Sequence[str]) -> list[Stem]:
        """Return the stems of a file in their order, as sums where it cannot hold all."""
        return [Stem(name, (name,)) for name in stems]

    def check_channels(self, channels: int) -> None:
        """Raise `SaveAudioError` if a stream cannot have as many channels."""
        if not 1 <= channels <= self.most_channels:
            raise SaveAudioError(f"{self.name.upper()}: cannot hold {channels} channels")

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
                f"{self.name.upper()} needs {self.codec}, which this PyAV was built without:"
                " install the one of PyPI, or choose another format"
            ) from exc

    def fits(self, container: Any) -> bool:
        """Return True if an open container of FFmpeg's is of this format, with a sample in it."""
        from av import Codec

        formats = [self, *self.variants.values()]
        encoders = {encoder for each in formats for encoder in each.codecs.values()}
        codecs = {Codec(encoder, "w").id for encoder in encoders}
        streams = container.streams.audio
        return (
            {"ipod": "mp4"}.get(self.container, self.container) in container.format.name.split(",")
            and len(streams) > self.is_together
            and all(stream.codec_context.codec.id in codecs for stream in streams)
            and any(True for _ in container.decode(audio=0))
        )


class StemFile(Format):
    """The stem file of Native Instruments: the mix, then up to four stems."""

    MOST = 4
    STANDARD = ("drums", "bass", "other", "vocals")
    REST = ("guitar", "piano")  # They are added to "other".

    def arranged(self, stems: Sequence[str]) -> list[Stem]:
        """Return four stems at most. Raises `OptionError` for more that are not the usual six."""
        if set(stems) == {*self.STANDARD, *self.REST}:
            rest = {"other": self.REST}
            return [Stem(name, (name, *rest.get(name, ()))) for name in self.STANDARD]
        if len(stems) > self.MOST:
            raise OptionError(
                f"{self.name} holds {self.MOST} stems, not {len(stems)}: choose with --stems, or"
                " write mka"
            )
        return super().arranged(self.STANDARD if set(stems) == {*self.STANDARD} else stems)


MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
AAC_RATES = (7350, *MP3_RATES, 64000, 88200, 96000)
VORBIS_RATES = range(1000, 192_001)  # Beyond 200 kHz libsndfile 1.2 crashes the process.
WAV_CODECS = {16: "pcm_s16le", 24: "pcm_s24le", 32: "pcm_f32le"}
FLAC_CODECS = {16: "flac", 24: "flac"}
BEYOND_4_GIB = {"rf64": "auto"}
EXACT_LENGTH = {"movie_timescale": "{rate}"}  # FFmpeg rounds lengths to milliseconds otherwise.
AAC: dict[str, Any] = {
    "codecs": {0: "aac"},
    "rates": AAC_RATES,
    "bitrates": range(8, 513),
    "bitrate": 256,
    "muxer": EXACT_LENGTH,
}
VIDEO: dict[str, Any] = {
    **AAC,
    "covers": tuple(Mp4.COVER_TYPES),
    "subtitles": "mov_text",
    "has_edits": True,
}
ALAC: dict[str, Any] = {"codecs": {16: "alac", 24: "alac"}, "rates": (), "bitrate": 0}
M4A = Format("m4a", "ipod", metadata=Mp4, covers=tuple(Mp4.COVER_TYPES), **AAC)
STEM_MP4 = StemFile(
    "stem.mp4",
    "mp4",
    metadata=StemMp4,
    most_channels=2,
    covers=M4A.covers,
    is_together=True,
    **{**AAC, "muxer": {**EXACT_LENGTH, "brand": "M4A "}},
)
_FORMATS = [
    Format("wav", "wav", WAV_CODECS, Wave, muxer=BEYOND_4_GIB, covers=()),
    Format("flac", "flac", FLAC_CODECS, Flac),
    Format(
        "mp3",
        "mp3",
        {0: "libmp3lame"},
        Mp3,
        MP3_RATES,
        range(8, 321),
        2,
        bitrate=320,
        has_preset=True,
    ),
    Format("ogg", "ogg", {0: VORBIS}, Ogg, VORBIS_RATES),
    Format("opus", "ogg", {0: "libopus"}, Ogg, (48000,), range(6, 511), bitrate=192),
    replace(M4A, variants={"alac": replace(M4A, **ALAC)}),
]
# Files of several streams: a picture and a stem, or all stems of a track.
_CONTAINERS = [
    Format("mp4", "mp4", metadata=Mp4, **VIDEO),
    Format("mov", "mov", metadata=Mov, **VIDEO),
    Format("mkv", "matroska", metadata=Matroska, **{**AAC, "muxer": {}}, subtitles="subrip"),
    Format("mka", "matroska", FLAC_CODECS, Matroska, is_together=True),
    replace(STEM_MP4, variants={"alac": replace(STEM_MP4, **ALAC)}),
]
FORMATS = {each.name: each for each in _FORMATS}
ALL_FORMATS = FORMATS | {each.name: each for each in _CONTAINERS}


def find_format(
    name: str = "wav",
    bits: int = DEFAULT_BITS,
    bitrate: int | None = None,
    preset: int = MP3_PRESETS[0],
    codec: str | None = None,
) -> Format:
    """Return the format `name` with options. Raises `OptionError` for those that it does not have.

    `codec` is another codec than its usual one: "alac", for m4a and stem.mp4.
    """
    if name not in ALL_FORMATS:
        raise OptionError(
            f"cannot write {name or 'a file without suffix'!r}: use {', '.join(ALL_FORMATS)}"
        )
    found, title = ALL_FORMATS[name], name.upper()
    codecs = {*found.variants, *found.codecs.values()}
    if codec is not None and codec not in codecs:
        raise OptionError(f"{title} has no codec {codec!r}: {', '.join(sorted(codecs))}")
    found = found.variants.get(codec or "", found)
    if found.is_lossy and bits != DEFAULT_BITS:
        raise OptionError(f"{title} has no {bits} bits: use wav or flac for that")
    if not found.is_lossy and bits not in found.codecs:
        has = " or ".join(map(str, found.codecs))
        raise OptionError(f"{title} has {has} bits, not {bits}")
    if bitrate is not None and found.bitrate and bitrate not in found.bitrates:
        low, high = found.bitrates[0], found.bitrates[-1]
        raise OptionError(f"{title} has {low} to {high} kbit/s, not {bitrate}")
    if preset not in MP3_PRESETS:
        raise OptionError(f"MP3 preset {preset} is not within 2 (best quality) to 7 (fastest)")
    rate = found.bitrate and (bitrate or found.bitrate)
    return replace(found, bits=bits, bitrate=rate, preset=preset)


def soundfile() -> Any:
    """Return the module `soundfile`. Raises `MissingDependencyError` if it is not there."""
    try:
        import soundfile as module
    except (ImportError, OSError) as exc:  # OSError: without its library
        raise MissingDependencyError("soundfile", "writing Ogg Vorbis") from exc
    return module
