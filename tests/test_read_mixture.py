from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from demucs_infer.audio import AudioFile, convert_audio, save_audio
from demucs_infer.engine.options import SeparationOptions
from demucs_infer.errors import LoadAudioError, OptionError
from demucs_infer.read.mixture import CHUNK, Decoder, Mixture, Moments

from .helpers import assert_close, noise


@pytest.mark.parametrize("offset", [0, 1000])
def test_moments_are_those_of_the_whole(offset: float) -> None:
    wav = noise(2, 100_000).double() + offset
    moments = Moments()
    for block in wav.split(7777, dim=-1):
        moments.add(block)
    assert moments.count == 100_000
    assert moments.mean == pytest.approx(wav.mean().item(), rel=1e-9, abs=1e-12)
    assert moments.std == pytest.approx(wav.mean(0).std().item(), rel=1e-6)
    assert moments.peak == wav.abs().max()


def test_hours_of_samples_lose_nothing() -> None:
    moments, block = Moments(), torch.tensor([[0.5, 0.5002]])
    for _ in range(20_000):
        moments.add(block)
    assert moments.std == pytest.approx(0.0001, rel=1e-3)


def test_a_window_is_normalized_inside_and_zero_outside() -> None:
    wav = noise(2, 1000) + 0.5
    mixture = Mixture.of(wav)
    window = mixture.read(-10, 1020)
    assert window.shape == (1, 2, 1030)
    assert not window[..., :10].any()
    assert not window[..., 1010:].any()
    inside = window[0, :, 10:1010]
    assert inside.mean().abs() < 1e-6
    assert_close(mixture.restored(inside.clone()), wav, 1e-6)
    assert mixture.read(2000, 2010).shape == (1, 2, 10)


@pytest.mark.parametrize("channels", [1, 2, 6])
@pytest.mark.parametrize("rate", [8000, 11_025])
def test_decoding_equals_conversion_of_the_whole(channels: int, rate: int, tmp_path: Path) -> None:
    wav = noise(channels, 2 * CHUNK + 321)
    soundfile.write(tmp_path / "a.wav", wav.T.numpy(), rate, subtype="FLOAT")
    decoder = Decoder(AudioFile(tmp_path / "a.wav"), 8000, 2)
    blocks = list(decoder.chunks())
    assert_close(torch.cat(blocks, dim=-1), convert_audio(wav, rate, 8000, 2), 1e-6)
    assert (decoder.rate, decoder.length) == (rate, 2 * CHUNK + 321)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    wav = np.zeros((1000, 2), np.float32)
    wav[5] = np.inf
    soundfile.write(tmp_path / "a.wav", wav, 8000, subtype="FLOAT")
    with pytest.raises(LoadAudioError, match=r"a\.wav: has samples that are not finite"):
        list(Decoder(AudioFile(tmp_path / "a.wav"), 8000, 2).chunks())


@pytest.mark.parametrize("loud", [1e25, -2e6])
def test_values_that_no_music_has(loud: float, tmp_path: Path) -> None:
    wav = np.zeros((1000, 2), np.float32)
    wav[5] = loud
    soundfile.write(tmp_path / "a.wav", wav, 8000, subtype="FLOAT")
    with pytest.raises(LoadAudioError, match=r"a\.wav: has samples that are louder than 1e\+06"):
        list(Decoder(AudioFile(tmp_path / "a.wav"), 8000, 2).chunks())


def test_a_limit_ends_the_reading_when_it_is_passed(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1, 100 * CHUNK)[0].numpy(), 8000)
    decoder = Decoder(AudioFile(tmp_path / "a.wav"), 8000, 2, SeparationOptions(max_duration=20))
    with pytest.raises(LoadAudioError, match=r"a\.wav: is longer than 20 s, the limit here"):
        list(decoder.chunks())
    assert decoder.length < 20 * 8000 + 2 * CHUNK


def test_a_track_of_the_longest_duration_is_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1, 8000)[0].numpy(), 8000)
    decoder = Decoder(AudioFile(tmp_path / "a.wav"), 8000, 2, SeparationOptions(max_duration=1))
    assert torch.cat(list(decoder.chunks()), -1).shape == (2, 8000)


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_a_limit_that_is_none(seconds: float) -> None:
    with pytest.raises(OptionError, match="max_duration"):
        SeparationOptions(max_duration=seconds)


def test_strict_refuses_a_damaged_track(tmp_path: Path) -> None:
    path = tmp_path / "a.flac"
    save_audio(noise(2, 441_000), path, 44100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    decoder = Decoder(AudioFile(path), 44100, 2)
    list(decoder.chunks())
    assert decoder.damage.end_missing
    with pytest.raises(LoadAudioError, match=r"a\.flac: is .*cut off at the end"):
        list(Decoder(AudioFile(path), 44100, 2, SeparationOptions(strict=True)).chunks())
