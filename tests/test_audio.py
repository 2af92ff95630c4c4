from __future__ import annotations

import gzip
import io
import os
import random
from pathlib import Path

import av
import demucs.audio
import numpy as np
import pytest
import soundfile
import torch

from demucs_infer.audio import (
    AudioFile,
    as_dtype_pcm,
    convert_audio_channels,
    encode_mp3,
    f32_pcm,
    i16_pcm,
    prevent_clip,
    save_audio,
)
from demucs_infer.errors import LoadAudioError, OptionError, SaveAudioError
from demucs_infer.separate import load_track
from demucs_infer.write import formats
from demucs_infer.write.output import CLIP_MODE_NAMES

from .helpers import assert_close, noise

NOISE = random.Random(1).randbytes(300_000)


def test_video_without_audio_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        container.mux(video.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(video.encode(None))
    for streams in (0, slice(None)):
        with pytest.raises(LoadAudioError, match="has no sound"):
            AudioFile(path).read(streams=streams)


def test_excerpts_are_read_by_time(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    wav = noise(2, 44100)
    save_audio(wav, path, 44100, as_float=True, clip="none")
    part = AudioFile(path).read(seek_time=0.25, duration=0.5)
    assert part.shape == (1, 2, 22050)
    assert torch.equal(part[0], wav[:, 11025:33075])
    with pytest.raises(LoadAudioError, match=r"ends after 1\.00 s"):
        AudioFile(path).read(seek_time=5, streams=0)
    with pytest.raises(LoadAudioError, match="no samples"):
        AudioFile(path).read(seek_time=0.5, duration=0, streams=0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.wav", None, "no such file"),
        ("empty.wav", b"", "the file is empty"),
        ("text.mp3", b"These are words, and no music.\n" * 50, "text.mp3"),
        ("header.wav", b"RIFF\x24\x00\x00\x00WAVEfmt ", "header.wav"),
        ("zeros.mp3", bytes(5000), "zeros.mp3"),
        *((name, NOISE, name) for name in ("a.mp3", "a.flac", "a.m4a", "a.ts")),
    ],
)
def test_files_without_audio_are_an_error(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoadAudioError, match=message) as caught:
        AudioFile(path).read(streams=0)
    assert "\n" not in str(caught.value)


def test_wav_files_of_no_samples_or_an_absurd_rate_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    for length, rate, message in (
        (0, 44_100, "no audio samples"),
        (10, 1, "1 Hz"),
        (10, 800_000, "800000 Hz"),
        (10, 2**31 - 1, f"{2**31 - 1} Hz"),
    ):
        soundfile.write(path, np.zeros((length, 2)), rate)
        with pytest.raises(LoadAudioError, match=message):
            AudioFile(path).read(streams=0, samplerate=44_100)


def test_file_objects_and_paths_of_bytes_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    save_audio(noise(2, 1000), path, 44100)
    expected = AudioFile(path).read()
    assert torch.equal(load_track(path, 2, 44100), expected[0])
    buffer = io.BytesIO(path.read_bytes())
    buffer.seek(100)
    (tmp_path / "a.gz").write_bytes(gzip.compress(path.read_bytes()))
    with path.open("rb") as file, gzip.open(tmp_path / "a.gz") as unpacked:
        for given in (buffer, file, unpacked, os.fsencode(path)):
            for _ in range(2):
                assert torch.equal(AudioFile(given).read(), expected)
        assert not file.closed


def test_unreadable_file_objects_are_an_error(tmp_path: Path) -> None:
    save_audio(noise(2, 44100), path := tmp_path / "a.wav", 44100)
    data = gzip.compress(path.read_bytes())
    (tmp_path / "cut.gz").write_bytes(data[: len(data) // 2])
    closed, (reader, writer) = io.BytesIO(b"RIFF"), os.pipe()
    closed.close()
    os.close(writer)
    with (
        path.open("r", encoding="latin-1") as text,
        os.fdopen(reader, "rb") as pipe,
        gzip.open(tmp_path / "cut.gz") as cut,
    ):
        for given in (closed, text, pipe, cut, io.BytesIO(), io.BytesIO(bytes(5000))):
            with pytest.raises(LoadAudioError) as caught:
                AudioFile(given).read()
            assert "\n" not in str(caught.value)


class Breaking(io.BytesIO):
    """A file whose first half can be read."""

    def read(self, size: int | None = -1) -> bytes:
        if self.tell() > len(self.getvalue()) // 2:
            raise RuntimeError("the server is gone")
        return super().read(size)


@pytest.mark.parametrize("format", ["wav", "flac", "mp3"])
def test_a_file_that_cannot_be_read_to_its_end_is_not_damaged_but_an_error(format: str) -> None:
    soundfile.write(content := io.BytesIO(), noise(2, 500_000).T.numpy(), 44100, format=format)
    with pytest.raises(LoadAudioError, match=r"cannot be read \(.*the server is gone\)"):
        AudioFile(Breaking(content.getvalue())).read()


def test_folders_and_pipes_are_not_opened(tmp_path: Path) -> None:
    with pytest.raises(LoadAudioError, match="is a folder"):
        AudioFile(tmp_path).read()
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(LoadAudioError, match="not a regular file"):
            AudioFile(tmp_path / "pipe").read()


def test_lossless_files_hold_the_samples_of_all_channels(tmp_path: Path) -> None:
    wav = noise(8, 100_001)
    for name, options, subtype, error in (
        ("a.WAV", {"as_float": True}, "FLOAT", 0),
        ("a.FLAC", {"bits_per_sample": 24}, "PCM_24", 2**-22),
    ):
        save_audio(wav, tmp_path / name, 48_000, **options)
        samples, rate = soundfile.read(tmp_path / name, dtype="float32")
        assert (rate, soundfile.info(tmp_path / name).subtype) == (48_000, subtype)
        assert np.abs(samples.T - wav.numpy()).max() <= error


def test_int16_is_converted_as_by_the_reference(tmp_path: Path) -> None:
    wav = torch.linspace(-1.5, 1.5, 3001)[None]
    assert torch.equal(i16_pcm(wav), demucs.audio.i16_pcm(wav))
    save_audio(wav, tmp_path / "a.wav", 44100, clip="none")
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert np.array_equal(samples, demucs.audio.i16_pcm(wav)[0].numpy())
    integers = torch.tensor([-32767, 0, 16384], dtype=torch.int16)
    assert torch.equal(f32_pcm(integers), demucs.audio.f32_pcm(integers))
    assert i16_pcm(integers) is integers
    assert as_dtype_pcm(integers, torch.float32).tolist() == pytest.approx([-1, 0, 0.5], abs=1e-4)
    assert as_dtype_pcm(torch.ones(1), torch.int16).tolist() == [32767]


@pytest.mark.parametrize("mode", CLIP_MODE_NAMES)
def test_clip_modes_equal_the_reference(mode: str) -> None:
    for gain in (0.1, 0.995, 3):
        wav = torch.linspace(-gain, gain, 101)[None]
        # The reference has no name for the same gain of all stems.
        expected = demucs.audio.prevent_clip(wav, mode.removesuffix("-all"))
        assert_close(prevent_clip(wav, mode), expected, 1e-7)
    with pytest.raises(OptionError, match="'loud'"):
        prevent_clip(torch.zeros(1, 1), "loud")


def test_channels_are_averaged_dropped_or_repeated() -> None:
    wav = torch.arange(6.0).view(3, 2)
    assert torch.equal(convert_audio_channels(wav, 2), wav[:2])
    assert torch.equal(convert_audio_channels(wav, 1), wav.mean(0, keepdim=True))
    assert torch.equal(convert_audio_channels(wav[:1], 2), wav[[0, 0]])
    with pytest.raises(OptionError, match="4 channels of 3"):
        convert_audio_channels(wav, 4)


def test_mp3_has_the_bit_rate_and_the_preset(tmp_path: Path) -> None:
    wav = noise(2, 44100)
    save_audio(wav, tmp_path / "a.mp3", 44100, bitrate=128, preset=7)
    encode_mp3(wav, tmp_path / "b.mp3", bitrate=320)
    assert AudioFile(tmp_path / "a.mp3").read(streams=0).shape[1] == pytest.approx(44100, abs=2500)
    assert (tmp_path / "a.mp3").stat().st_size < (tmp_path / "b.mp3").stat().st_size / 2
    with pytest.raises(OptionError, match="preset 9"):
        encode_mp3(wav, tmp_path / "c.mp3", quality=9)


def test_failed_writing_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    for name, message in (("a.xyz", "xyz"), ("a", "without suffix")):
        with pytest.raises(OptionError, match=message):
            save_audio(noise(2, 10), tmp_path / name, 44100)
    path = tmp_path / "a.wav"
    path.write_bytes(b"precious")
    with pytest.raises(SaveAudioError):
        save_audio(noise(9, 100), path, 44100)
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("format", formats.FORMATS)
def test_names_that_cannot_be_written_are_an_error(format: str, tmp_path: Path) -> None:
    taken = tmp_path / f"a.{format}"
    taken.mkdir()  # so that the atomic rename fails
    for path in (taken, tmp_path / "missing" / taken.name):
        with pytest.raises(SaveAudioError, match="cannot be written"):
            save_audio(noise(2, 10_000), path, 44100)
    assert list(tmp_path.iterdir()) == [taken]
