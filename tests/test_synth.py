"""The songs that `synth` makes: the material of the quality tests and of the demonstration."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import soundfile

from .helpers import run
from .tools import synth

pytestmark = pytest.mark.slow
SECONDS = 8.0
SEEDS = (0, 1, 2, 3)
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


def test_stems_have_similar_levels_and_no_clicks(songs):
    for stems in songs.values():
        mix = sum(stems.values())
        assert tuple(stems) == synth.SOURCES
        assert 0.5 <= np.abs(mix).max() < 1
        for name, stem in stems.items():
            assert (stem.shape, stem.dtype) == ((2, int(SECONDS * synth.RATE)), np.float32)
            assert np.isfinite(stem).all()
            assert not stem[:, [0, -1]].any()
            assert abs(decibels(stem) - decibels(mix)) < 20, name
            assert abs(decibels(stem[0]) - decibels(stem[1])) < 12, name
            assert abs(stem.mean()) < 0.01 * stem.std(), name


def test_songs_and_stems_differ(songs):
    mixes = [sum(stems.values()) for stems in songs.values()]
    for parts in (mixes, *(list(stems.values()) for stems in songs.values())):
        for a, b in itertools.combinations(parts, 2):
            assert abs(np.corrcoef(a.mean(0), b.mean(0))[0, 1]) < 0.2


def test_every_source_plays_in_each_song_and_rests_in_some():
    plans = [synth.make_plan(np.random.default_rng(seed), 20) for seed in range(50)]
    for source in synth.SOURCES:
        assert all(plan.playing(source) for plan in plans)
        assert any(len(plan.playing(source)) < plan.bars for plan in plans)
    assert len({plan.step for plan in plans}) == len(plans)


@pytest.mark.parametrize("hz", [55.0, 330.0])
def test_notes_are_in_tune_and_do_not_click(hz):
    for timbre in {**synth.TIMBRES, **synth.BASSES}.values():
        sound = synth.note(timbre, hz, 0.5, np.random.default_rng(0))
        assert np.abs(sound[:, [0, -1]]).max() < 0.01 * np.abs(sound).max()
        spectrum = np.abs(np.fft.rfft(sound[0], 8 * sound.shape[1]))
        found = np.fft.rfftfreq(8 * sound.shape[1], 1 / synth.RATE)[np.argmax(spectrum)]
        harmonic = max(1, round(found / hz))
        assert harmonic <= 3
        assert abs(1200 * np.log2(found / (harmonic * hz))) < 25


def test_the_command_writes_a_mix(songs, tmp_path: Path):
    command = ["tests.tools.synth", tmp_path / "a.wav", "--seed", SEEDS[1], "--seconds", SECONDS]
    assert run("-m", *command).returncode == 0
    written, rate = soundfile.read(tmp_path / "a.wav")
    assert rate == synth.RATE
    np.testing.assert_allclose(written.T, sum(songs[SEEDS[1]].values()), atol=1e-4)
