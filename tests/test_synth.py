"""The songs that `synth` makes: the material of the quality tests and of the demonstration."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from .helpers import run
from .tools import synth

pytestmark = pytest.mark.slow
SECONDS = 8.0
SEEDS = (0, 1)
# Levels of the stems of song 0 in dB. The demonstration was trained on songs of this sound: who
# changes it trains the model again.
LEVELS = {"drums": -22.61, "bass": -22.86, "other": -23.64, "vocals": -22.23}


@pytest.fixture(scope="module")
def songs() -> dict[int, dict[str, np.ndarray]]:
    return {seed: synth.song(seed, SECONDS) for seed in SEEDS}


def decibels(stem: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(stem.astype(float) ** 2)))


def test_seed_fixes_the_song(songs):
    np.random.seed(1)  # the song must not depend on the global generator
    for name, stem in synth.song(SEEDS[0], SECONDS).items():
        np.testing.assert_array_equal(stem, songs[SEEDS[0]][name])
    assert {name: decibels(stem) for name, stem in songs[SEEDS[0]].items()} == pytest.approx(
        LEVELS, abs=0.01
    )


def test_the_command_writes_a_mix(songs, tmp_path: Path):
    command = ["tests.tools.synth", tmp_path / "a.wav", "--seed", SEEDS[1], "--seconds", SECONDS]
    assert run("-m", *command).returncode == 0
    written, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == synth.RATE
    np.testing.assert_allclose(written.T, sum(songs[SEEDS[1]].values()), atol=1e-4)
