"""Encoders, whose files other programs read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from demucs_infer.errors import OptionError, SaveAudioError
from demucs_infer.write.encode import encoder
from demucs_infer.write.formats import FORMATS, find_format

from .helpers import noise

TAGS = {"title": "Täst", "artist": "A", "album": "B", "date": "2001", "genre": "Jazz", "track": "3"}


def write(path: Path, wav: torch.Tensor, rate: int, **options: Any) -> None:
    format = find_format(path.suffix[1:], **options)
    with path.open("w+b") as file:
        sink = encoder(file, format, rate, wav.shape[0], tags=TAGS)
        for block in wav.split(3333, dim=-1):
            sink.write([block])
        sink.close()


def read_back(path: Path) -> tuple[np.ndarray, int, str, dict[str, str]]:
    """Return samples `[T, C]`, rate, kind and tags as a decoder reads them that is not ours."""
    if path.suffix == ".m4a":
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            frames = [frame.to_ndarray().T for frame in container.decode(stream)]
            samples = np.concatenate(frames)[: stream.duration]
            samples = samples / 2**31 if samples.dtype == np.int32 else samples
            return samples, stream.rate, stream.codec_context.name, dict(container.metadata)
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    with soundfile.SoundFile(path) as file:
        names = {"tracknumber": "track"}
        tags = {names.get(name, name): text for name, text in file.copy_metadata().items()}
    return samples, rate, soundfile.info(path).subtype, tags


@pytest.mark.parametrize(
    ("format", "options", "kind", "error"),
    [
        ("wav", {}, "PCM_16", 2**-14),
        ("wav", {"bits": 24}, "PCM_24", 2**-22),
        ("wav", {"bits": 32}, "FLOAT", 0),
        ("flac", {}, "PCM_16", 2**-14),
        ("flac", {"bits": 24}, "PCM_24", 2**-22),
        ("mp3", {}, "MPEG_LAYER_III", 0.02),
        ("ogg", {}, "VORBIS", 0.02),
        ("opus", {}, "OPUS", 0.05),
        ("m4a", {}, "aac", 0.05),
        ("m4a", {"codec": "alac", "bits": 24}, "alac", 2**-22),
    ],
)
@pytest.mark.parametrize("channels", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_other_programs_read_samples_and_tags(
    format: str, options: dict[str, Any], kind: str, error: float, channels: int, tmp_path: Path
) -> None:
    rate = find_format(format).samplerate(44_100)
    assert rate == (48_000 if format == "opus" else 44_100)
    time = torch.arange(100_001) / rate
    wav = torch.stack([torch.sin(2 * torch.pi * hertz * time) for hertz in (440, 660)])
    wav = 0.4 * wav[:channels]
    write(tmp_path / f"a.{format}", wav, rate, **options)
    samples, their_rate, their_kind, tags = read_back(tmp_path / f"a.{format}")
    assert (their_rate, their_kind) == (rate, kind)
    assert samples.shape == (100_001, channels)
    assert np.abs(samples.T - wav.numpy())[:, 5000:-5000].max() <= error
    for name in ("title", "artist", "album"):
        assert tags.get(name) == TAGS[name]
    if format not in ("mp3", "wav"):  # libsndfile does not read their number of a track
        assert tags["track"].startswith("3")


def test_wav_beyond_4_gib_opens_in_other_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The larger header has reserved room, and is used when the size asks for it."""
    write(tmp_path / "small.wav", noise(1, 1000), 44_100)
    assert (tmp_path / "small.wav").read_bytes().startswith(b"RIFF")
    assert b"JUNK" in (tmp_path / "small.wav").read_bytes()[:64]
    monkeypatch.setitem(FORMATS["wav"].muxer, "rf64", "always")
    write(tmp_path / "large.wav", noise(2, 1000), 44_100)
    assert soundfile.info(tmp_path / "large.wav").format == "RF64"
    assert len(soundfile.read(tmp_path / "large.wav")[0]) == 1000


@pytest.mark.parametrize("format", ["mp3", "opus", "m4a"])
def test_bit_rate_decides_the_size(format: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{format}"
    for bitrate in (64, 256):
        write(path, noise(2, 240_000), 48_000, bitrate=bitrate)
        assert path.stat().st_size == pytest.approx(5 * bitrate * 125, rel=0.25)


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("xyz", {}, "xyz"),
        ("", {}, "suffix"),
        ("wav", {"bits": 20}, "20"),
        ("flac", {"bits": 32}, "16 or 24 bits, not 32"),
        ("stem.mp4", {"bits": 24}, "24"),
        ("wav", {"codec": "alac"}, "alac"),
        ("opus", {"bits": 32}, "32"),
        ("mp3", {"bitrate": 400}, "320"),
        ("mp3", {"preset": 9}, "9"),
    ],
)
def test_impossible_encodings_are_refused(format: str, options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        find_format(format, **options)


@pytest.mark.parametrize(("format", "channels"), [("wav", 9), ("mp3", 3)])
def test_too_many_channels_are_refused(format: str, channels: int, tmp_path: Path) -> None:
    with pytest.raises(SaveAudioError, match=f"{channels} channels"):
        write(tmp_path / f"a.{format}", noise(channels, 10), 44_100)


def test_formats_take_the_next_rate_that_they_have() -> None:
    for format, wanted, rate in [
        ("wav", 12_345, 12_345),
        ("mp3", 44_100, 44_100),
        ("mp3", 44_056, 44_100),
        ("mp3", 96_000, 48_000),
        ("opus", 8000, 48_000),
        ("m4a", 192_000, 96_000),
        ("ogg", 44_056, 44_056),
        ("ogg", 384_000, 192_000),
        ("flac", 768_000, 768_000),
    ]:
        assert find_format(format).samplerate(wanted) == rate, (format, wanted)


@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "ogg", "opus", "m4a"])
def test_the_first_error_of_a_file_is_raised(
    format: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """PyAV prints a traceback for each of a file's errors but the first."""

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > 20_000:
                raise OSError(28, "the disk is full")
            return super().write(data)

    sink = encoder(Full(), find_format(format), 48_000, 2)
    with pytest.raises(OSError, match="the disk is full"):
        for _ in range(20):
            sink.write([noise(2, 48_000)])
        sink.close()
    sink.abandon()
    del sink
    assert capfd.readouterr().err == ""
