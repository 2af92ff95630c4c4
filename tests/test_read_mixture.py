from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from demucs_infer.audio import AudioFile, convert_audio
from demucs_infer.engine.options import SeparationOptions
from demucs_infer.errors import LoadAudioError
from demucs_infer.read.mixture import CHUNK, Decoder, Mixture, Moments

from .helpers import assert_close, noise


@pytest.mark.parametrize("offset", [0, 1000])
def test_moments_of_blocks_equal_those_of_the_whole(offset: float) -> None:
    wav = noise(2, 100_000).double() + offset
    moments = Moments()
    for block in wav.split(7777, dim=-1):
        moments.add(block)
    assert moments.count == 100_000
    assert moments.mean == pytest.approx(wav.mean().item(), rel=1e-9, abs=1e-12)
    assert moments.std == pytest.approx(wav.mean(0).std().item(), rel=1e-6)
    assert moments.peak == wav.abs().max()


def test_deviation_of_many_samples_is_accurate() -> None:
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


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "not finite"), (-np.inf, "not finite"), (-2e6, "louder")]
)
def test_implausible_samples_are_an_error(value: float, reason: str, tmp_path: Path) -> None:
    wav = np.zeros((1000, 2), np.float32)
    wav[5] = value
    soundfile.write(tmp_path / "a.wav", wav, 8000, subtype="FLOAT")
    with pytest.raises(LoadAudioError, match=rf"a\.wav: .*{reason}"):
        list(Decoder(AudioFile(tmp_path / "a.wav"), 8000, 2).chunks())


def test_track_is_not_read_beyond_the_maximum_duration(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(1, 100 * CHUNK)[0].numpy(), 8000)
    decoder = Decoder(AudioFile(tmp_path / "a.wav"), 8000, 2, SeparationOptions(max_duration=20))
    with pytest.raises(LoadAudioError, match=r"a\.wav: is longer than the limit of 20 s"):
        list(decoder.chunks())
    assert decoder.length < 20 * 8000 + 2 * CHUNK
