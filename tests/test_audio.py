from __future__ import annotations

import gzip
import io
import os
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
    convert_audio,
    convert_audio_channels,
    encode_mp3,
    f32_pcm,
    i16_pcm,
    prevent_clip,
    save_audio,
)
from demucs_infer.errors import (
    LoadAudioError,
    OptionError,
    SaveAudioError,
)
from demucs_infer.read.pcm import CLIP_MODES
from demucs_infer.write import formats
from demucs_infer.write.output import CLIP_MODE_NAMES

from .helpers import assert_close, noise

# container, codec, sample rate, layout; all that people bring
FORMATS = [
    ("wav", "pcm_s16le", 44100, "stereo"),
    ("wav", "pcm_u8", 8000, "mono"),
    ("wav", "pcm_s24le", 96000, "stereo"),
    ("wav", "pcm_f64le", 48000, "5.1"),
    ("wav", "pcm_s16le", 48000, "7.1"),
    ("flac", "flac", 44100, "5.1"),
    ("mp3", "mp3", 44100, "stereo"),
    ("m4a", "aac", 44100, "stereo"),
    ("m4a", "aac", 48000, "7.1"),
    ("ogg", "vorbis", 44100, "stereo"),
    ("opus", "libopus", 48000, "stereo"),
    ("webm", "libopus", 48000, "mono"),
    ("mp4", "aac", 22050, "stereo"),
    ("aiff", "pcm_s16be", 44100, "stereo"),
    ("mka", "alac", 44100, "stereo"),
]


def tone(rate: int, seconds: float, channels: int) -> np.ndarray:
    wave = 0.4 * np.sin(2 * np.pi * 440 / rate * np.arange(int(seconds * rate)))
    return np.repeat(wave.astype(np.float32)[:, None], channels, 1)


def encode(path: Path, codec: str, rate: int, layout: str, seconds: float = 1.0) -> int:
    """Write a tone and return the number of channels."""
    if codec == "vorbis":  # PyAV's wheel decodes it only
        soundfile.write(path, tone(rate, seconds, 2), rate, format="OGG", subtype="VORBIS")
        return 2
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.layout = layout
        channels = stream.layout.nb_channels
        samples = tone(rate, seconds, channels).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(samples, "flt", layout)
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return channels


@pytest.mark.parametrize(("suffix", "codec", "rate", "layout"), FORMATS, ids=str)
def test_formats_are_read(suffix: str, codec: str, rate: int, layout: str, tmp_path: Path) -> None:
    path = tmp_path / f"tone.{suffix}"
    channels = encode(path, codec, rate, layout)
    file = AudioFile(path)
    assert (file.channels(), file.samplerate(), len(file)) == (channels, rate, 1)
    assert file.duration == pytest.approx(1, abs=0.1)
    wav = file.read(streams=0)
    assert wav.dtype == torch.float32
    assert wav.shape[0] == channels
    assert wav.shape[1] == pytest.approx(rate, rel=0.1)
    # The AAC encoder of FFmpeg 9 overshoots with eight channels.
    assert wav.abs().amax(1).median() == pytest.approx(0.4, rel=0.5)
    assert file.read(streams=0, samplerate=44100, channels=2).shape[0] == 2


def test_the_sound_of_a_video(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=44100)
        for _ in range(25):
            container.mux(video.encode(av.VideoFrame(32, 32, "yuv420p")))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 88200), np.float32), "flt", "stereo")
        frame.sample_rate = 44100
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    assert AudioFile(path).read(streams=0).shape[0] == 2


def test_a_video_without_audio_has_no_sound(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=25)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        container.mux(video.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(video.encode(None))
    for read in (lambda f: f.read(streams=0), lambda f: f.read()):
        with pytest.raises(LoadAudioError, match="has no sound"):
            read(AudioFile(path))


def test_parts_of_a_file(tmp_path: Path) -> None:
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


def test_a_file_that_breaks_off_is_read_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.flac"
    save_audio(noise(2, 441_000), path, 44100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    wav = AudioFile(path).read(streams=0)
    assert 100_000 < wav.shape[1] < 300_000
    assert "cut off at the end" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.wav", None, "no such file"),
        ("empty.wav", b"", "the file is empty"),
        ("text.mp3", b"These are words, and no music.\n" * 50, "text.mp3"),
        ("header.wav", b"RIFF\x24\x00\x00\x00WAVEfmt ", "header.wav"),
        ("zeros.mp3", bytes(5000), "zeros.mp3"),
    ],
)
def test_files_that_are_no_audio(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LoadAudioError, match=message) as caught:
        AudioFile(path).read(streams=0)
    assert "\n" not in str(caught.value)


def test_a_wav_without_samples(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "none.wav", np.zeros((0, 2)), 44100)
    with pytest.raises(LoadAudioError, match="no audio samples"):
        AudioFile(tmp_path / "none.wav").read(streams=0)


def test_file_objects_and_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    save_audio(noise(2, 1000), path, 44100)
    expected = AudioFile(path).read()
    buffer = io.BytesIO(path.read_bytes())
    buffer.seek(100)
    with path.open("rb") as file, gzip.open(tmp_path / "a.gz", "w+") as packed:
        packed.write(path.read_bytes())
        packed.close()
        with gzip.open(tmp_path / "a.gz") as unpacked:
            for given in (buffer, file, unpacked, os.fsencode(path)):
                assert torch.equal(AudioFile(given).read(), expected)
                assert torch.equal(AudioFile(given).read(), expected)  # again
        assert not file.closed


def test_file_objects_that_cannot_be_read(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("rate", [1, 800_000, 2**31 - 1])
def test_a_rate_that_is_none_of_music(rate: int, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((10, 2)), rate)
    with pytest.raises(LoadAudioError, match=f"{rate} Hz"):
        AudioFile(tmp_path / "a.wav").read(streams=0, samplerate=44_100)


def test_a_folder_is_no_audio_file(tmp_path: Path) -> None:
    with pytest.raises(LoadAudioError, match="is a folder"):
        AudioFile(tmp_path).read()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(LoadAudioError, match="not a regular file"):
        AudioFile(tmp_path / "pipe").read()


def test_names_that_look_like_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_audio(noise(1, 100), Path("concat:x.wav"), 44100)
    assert AudioFile("concat:x.wav").read(streams=0).shape == (1, 100)


@pytest.mark.parametrize(
    ("name", "options", "subtype", "error"),
    [
        ("a.wav", {}, "PCM_16", 2**-14),
        ("a.wav", {"bits_per_sample": 24}, "PCM_24", 2**-22),
        ("a.wav", {"bits_per_sample": 32}, "FLOAT", 0),
        ("a.wav", {"as_float": True}, "FLOAT", 0),
        ("a.flac", {}, "PCM_16", 2**-14),
        ("a.FLAC", {"bits_per_sample": 24}, "PCM_24", 2**-22),
    ],
)
@pytest.mark.parametrize("channels", [1, 2, 6, 8])
def test_lossless_files_hold_what_was_written(
    name: str, options: dict, subtype: str, error: float, channels: int, tmp_path: Path
) -> None:
    wav = noise(channels, 100_001).clamp(-1, 1)
    save_audio(wav, tmp_path / name, 48000, **options)
    samples, rate = soundfile.read(tmp_path / name, dtype="float32", always_2d=True)
    assert (rate, soundfile.info(tmp_path / name).subtype) == (48000, subtype)
    assert samples.shape == (100_001, channels)
    assert np.abs(samples.T - wav.numpy()).max() <= error
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_int16_is_truncated_as_in_the_reference(tmp_path: Path) -> None:
    wav = torch.linspace(-1.5, 1.5, 3001)[None]
    assert torch.equal(i16_pcm(wav), demucs.audio.i16_pcm(wav))
    save_audio(wav, tmp_path / "a.wav", 44100, clip="none")
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert np.array_equal(samples, demucs.audio.i16_pcm(wav)[0].numpy())


def test_pcm_conversions() -> None:
    integers = torch.tensor([-32767, 0, 16384], dtype=torch.int16)
    assert torch.equal(f32_pcm(integers), demucs.audio.f32_pcm(integers))
    assert i16_pcm(integers) is integers
    assert as_dtype_pcm(integers, torch.float32).tolist() == pytest.approx([-1, 0, 0.5], abs=1e-4)
    assert as_dtype_pcm(torch.ones(1), torch.int16).tolist() == [32767]


@pytest.mark.parametrize("mode", ["rescale", "clamp", "tanh", "none"])
@pytest.mark.parametrize("gain", [0.1, 0.995, 3])
def test_clip_modes_equal_the_reference(mode: str, gain: float) -> None:
    wav = torch.linspace(-gain, gain, 101)[None]
    assert_close(prevent_clip(wav, mode), demucs.audio.prevent_clip(wav, mode), 1e-7)


def test_the_clip_modes_are_those_of_the_command_line() -> None:
    assert tuple(CLIP_MODES) == CLIP_MODE_NAMES


def test_unknown_clip_mode() -> None:
    with pytest.raises(OptionError, match="'loud'"):
        prevent_clip(torch.zeros(1, 1), "loud")


def test_channels() -> None:
    wav = torch.arange(6.0).view(3, 2)
    assert torch.equal(convert_audio_channels(wav, 2), wav[:2])
    assert torch.equal(convert_audio_channels(wav, 1), wav.mean(0, keepdim=True))
    assert torch.equal(convert_audio_channels(wav[:1], 2), wav[[0, 0]])
    with pytest.raises(OptionError, match="4 channels of 3"):
        convert_audio_channels(wav, 4)


def test_resampling_equals_the_reference() -> None:
    wav = noise(1, 5000)
    theirs = demucs.audio.convert_audio(wav, 48000, 44100, 2)
    assert_close(convert_audio(wav, 48000, 44100, 2), theirs, 1e-6)


def test_mp3(tmp_path: Path) -> None:
    wav = noise(2, 44100)
    save_audio(wav, tmp_path / "a.mp3", 44100, bitrate=128, preset=7)
    encode_mp3(wav, tmp_path / "b.mp3", bitrate=320)
    assert AudioFile(tmp_path / "a.mp3").read(streams=0).shape[1] == pytest.approx(44100, abs=2500)
    assert (tmp_path / "a.mp3").stat().st_size < (tmp_path / "b.mp3").stat().st_size / 2
    with pytest.raises(OptionError, match="preset 9"):
        encode_mp3(wav, tmp_path / "c.mp3", quality=9)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.xyz", {}, "xyz"),
        ("a", {}, "without suffix"),
        ("a.wav", {"bits_per_sample": 20}, "20"),
        ("a.flac", {"bits_per_sample": 32}, "32"),
    ],
)
def test_formats_that_cannot_be_written(
    name: str, options: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        save_audio(noise(2, 10), tmp_path / name, 44100, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [f"a.{name}" for name in formats.FORMATS])
def test_what_cannot_be_written_leaves_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()  # the name is taken: the last step fails
    with pytest.raises(SaveAudioError, match="cannot be written"):
        save_audio(noise(2, 10_000), tmp_path / name, 44100)
    assert list(tmp_path.iterdir()) == [tmp_path / name]
    with pytest.raises(SaveAudioError, match="cannot be written"):
        save_audio(noise(2, 100), tmp_path / "no folder" / name, 44100)


def test_an_existing_file_survives_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(b"precious")
    with pytest.raises(SaveAudioError):
        save_audio(noise(9, 100), path, 44100)
    assert path.read_bytes() == b"precious"
