"""Encode samples into files, block by block.

FFmpeg's libraries (PyAV) encode every format but Ogg Vorbis, for which the wheels of PyAV have no
good encoder: libsndfile (soundfile, an extra) does that. Shapes: `[C, n]` samples between -1 and 1.
A file appears under its name only when it is whole.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import index
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import av
from torch import Tensor

from ..errors import OptionError, SaveAudioError
from ..log import decoded
from ..read.decode import reason
from ..read.packets import AV_ERRORS
from ..read.pcm import f32_pcm, i16_pcm, i24_pcm, prevent_clip
from ..resample import resample
from ..tags import clean_tags
from ..utils import atomic_write
from .formats import ALL_FORMATS, DEFAULT_BITS, LAYOUTS, VORBIS, Format, find_format, soundfile

ClipMode = Literal["rescale", "rescale-all", "clamp", "tanh", "none"]
VORBIS_COMPRESSION = 0.2  # of libsndfile: quality 8 of 10, about 256 kbit/s
BLOCK = 2**16  # samples that one frame for an encoder has at most
# FFmpeg's sample format of frames, and the function that makes their samples, by depth.
SAMPLES: dict[int, tuple[str, Callable[[Tensor], Tensor]]] = {
    0: ("flt", f32_pcm),
    16: ("s16", i16_pcm),
    24: ("s32", i24_pcm),
    32: ("flt", f32_pcm),
}

Result = TypeVar("Result")


class _Sink:
    """A file for FFmpeg and libsndfile, whose part of it starts at `base`.

    Neither can pass on an exception: PyAV prints a traceback for every one but the first. So the
    first one is kept for `check`, and nothing more is written.
    """

    def __init__(self, file: IO[bytes], base: int) -> None:
        self.file, self.base = file, base
        self.error: BaseException | None = None

    def _guarded(self, call: Callable[[], Result], otherwise: Result) -> Result:
        if self.error is None:
            try:
                return call()
            except BaseException as exc:  # of a signal, too
                self.error = exc
        return otherwise

    def write(self, data: bytes) -> int:
        return self._guarded(lambda: self.file.write(data), len(data))

    def read(self, size: int) -> bytes:
        return self._guarded(lambda: self.file.read(size), b"")

    def tell(self) -> int:
        return self._guarded(self.file.tell, self.base) - self.base

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = self.base if whence == os.SEEK_SET else 0
        return self._guarded(lambda: self.file.seek(base + offset, whence), self.base) - self.base

    def check(self) -> None:
        """Raise the error that was kept."""
        if self.error is not None:
            raise self.error


class Encoder:
    """Encodes streams of sound that start together and are equally long into one file.

    Args:
        file: a file that is open for writing and reading, and can seek.
        format: the format, with its options.
        samplerate: a rate in hertz that the format has.
        channels: of each stream.
        titles: a name for each stream.
        tags: title, artist and the like.
        cover: the file of a picture.

    Raises `SaveAudioError` for channels that the format cannot hold, and errors of FFmpeg or the
    system.
    """

    def __init__(
        self,
        file: IO[bytes],
        format: Format,
        samplerate: int,
        channels: int,
        titles: Sequence[str] = ("",),
        tags: Mapping[str, str] | None = None,
        cover: bytes | None = None,
    ) -> None:
        format.check_channels(channels)
        self.file, self.format = file, format
        self.rate, self.channels = samplerate, channels
        self.position = 0
        titles = [decoded(title, "replace") for title in titles]
        self.metadata = format.metadata(clean_tags(tags or {}), cover, titles)
        file.write(self.metadata.head)
        self.sink = _Sink(file, len(self.metadata.head))
        self._open(titles)
        self.sink.check()

    def _open(self, titles: Sequence[str]) -> None:
        options = {key: text.format(rate=self.rate) for key, text in self.format.muxer.items()}
        options |= self.metadata.options
        self.container: Any = av.open(self.sink, "w", format=self.format.container, options=options)
        self.container.metadata.update(self.metadata.names)
        self._streams = [self._add_stream(title) for title in titles]
        self.metadata.attach(self.container)

    def _add_stream(self, title: str) -> Any:
        format = self.format
        options = {"compression_level": str(format.preset)} if format.has_preset else {}
        stream = self.container.add_stream(format.codec, rate=self.rate, options=options)
        stream.layout = LAYOUTS[self.channels]
        # Some encoders want a plane for each channel. PyAV converts frames to that.
        samples, _ = SAMPLES[format.depth]
        formats = stream.codec_context.codec.audio_formats
        stream.format = next(each.name for each in formats if each.packed.name == samples)
        if format.bitrate:
            stream.bit_rate = 1000 * format.bitrate
        if title:
            stream.metadata.update({"title": title, "handler_name": title})
        # Players play the first stream of sound and no other.
        stream.disposition = int(len(self.container.streams.audio) == 1)
        return stream

    def write(self, blocks: Sequence[Tensor]) -> None:
        """Encode a block `[C, n]` for each stream."""
        for parts in zip(*(block.split(BLOCK, dim=-1) for block in blocks)):
            if parts[0].shape[-1]:
                self._encode(parts)
                self.sink.check()
                self.position += parts[0].shape[-1]

    def _encode(self, blocks: Sequence[Tensor]) -> None:
        samples, converted = SAMPLES[self.format.depth]
        for stream, block in zip(self._streams, blocks):
            data = converted(block.t().reshape(1, -1)).numpy()
            frame = av.AudioFrame.from_ndarray(data, samples, LAYOUTS[self.channels])
            frame.sample_rate, frame.pts = self.rate, self.position
            self._mux(stream.encode(frame))

    def _mux(self, packets: Any) -> None:
        self.container.mux(packets)

    def close(self) -> None:
        """Flush the encoder, and complete the file."""
        self._finish()
        self.sink.check()
        self.metadata.finish(self.file)
        self.file.flush()

    def _finish(self) -> None:
        for stream in self._streams:
            self._mux(stream.encode(None))
        self._close()

    def _close(self) -> None:
        self.container.close()

    def abandon(self) -> None:
        """Write nothing more, and let FFmpeg close the file."""
        self.sink.error = self.sink.error or SaveAudioError("the file is abandoned")
        with contextlib.suppress(*AV_ERRORS, RuntimeError):
            self._close()


class _VorbisEncoder(Encoder):
    def _open(self, titles: Sequence[str]) -> None:
        options = {"format": "OGG", "subtype": "VORBIS", "compression_level": VORBIS_COMPRESSION}
        self._sound = soundfile().SoundFile(self.sink, "w", self.rate, self.channels, **options)
        self._sound.comment = self.metadata.names["comment"]

    def _encode(self, blocks: Sequence[Tensor]) -> None:
        (block,) = blocks
        self._sound.write(block.t().numpy())

    def _finish(self) -> None:
        self._close()

    def _close(self) -> None:
        self._sound.close()


def encoder(file: IO[bytes], format: Format, *arguments: Any, **options: Any) -> Encoder:
    """Return the encoder of a format, which takes the arguments of `Encoder`."""
    kind = _VorbisEncoder if format.codec == VORBIS else Encoder
    return kind(file, format, *arguments, **options)


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
    _write(wav, Path(path), samplerate, find_format("mp3", bitrate=bitrate, preset=quality))


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
        clip: the treatment of samples beyond ±1, see `prevent_clip`.
        bits_per_sample: 16 or 24, or 32 for float32 (WAV only).
        as_float: write WAV as float32.
        preset: of MP3, from 2 (best quality) to 7 (fastest).

    Raises `OptionError` for a format, depth or clip mode that cannot be had, `SaveAudioError` if
    the file cannot be written.
    """
    path = Path(path)
    name = path.suffix.lower()[1:]
    known = ALL_FORMATS.get(name)
    bits = 32 if as_float and known and 32 in known.codecs else bits_per_sample
    rate = bitrate if known and known.has_preset else None
    format = find_format(name, bits, rate, preset)
    format.check_encoder()
    _write(prevent_clip(wav.detach().float(), clip), path, samplerate, format)


def _write(wav: Tensor, path: Path, samplerate: int, format: Format) -> None:
    if not wav.shape[-1]:
        raise SaveAudioError(f"{path}: has no samples to write")
    try:
        hertz = index(samplerate)
    except TypeError:
        hertz = 0
    if hertz < 1:
        raise OptionError(f"samplerate={samplerate!r} is not a whole number of hertz")
    rate = format.samplerate(hertz)
    wav = resample(f32_pcm(wav.cpu()), hertz, rate)
    with encoding_errors(path), atomic_write(path) as temporary, temporary.open("w+b") as file:
        target = encoder(file, format, rate, wav.shape[0])
        target.write([wav])
        target.close()


@contextlib.contextmanager
def encoding_errors(path: object) -> Iterator[None]:
    """Turn errors of the system, FFmpeg and libsndfile into `SaveAudioError`."""
    try:
        yield
    except SaveAudioError:
        raise
    except (*AV_ERRORS, RuntimeError) as exc:
        raise SaveAudioError(f"{path}: cannot be written ({reason(exc)})") from exc
