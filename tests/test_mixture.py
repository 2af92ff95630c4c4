from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from demucs_infer.audio import AudioFile, convert_audio
from demucs_infer.errors import LoadAudioError
from demucs_infer.io.mixture import BLOCK, Decoder, Mixture, Moments

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
    wav = noise(channels, 2 * BLOCK + 321)
    soundfile.write(tmp_path / "a.wav", wav.T.numpy(), rate, subtype="FLOAT")
    decoder = Decoder(AudioFile(tmp_path / "a.wav"), 8000, 2)
    blocks = list(decoder.blocks())
    assert_close(torch.cat(blocks, dim=-1), convert_audio(wav, rate, 8000, 2), 1e-6)
    assert (decoder.rate, decoder.length) == (rate, 2 * BLOCK + 321)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    wav = np.zeros((1000, 2), np.float32)
    wav[5] = np.inf
    soundfile.write(tmp_path / "a.wav", wav, 8000, subtype="FLOAT")
    with pytest.raises(LoadAudioError, match=r"a\.wav: has samples that are not finite"):
        list(Decoder(AudioFile(tmp_path / "a.wav"), 8000, 2).blocks())
