"""The quality of the stems of songs that no training heard, through the command line.

The floors are a little below the figures of the demonstration, so that every fault between the file
and the stems shows: a shift, a gain, or stems or channels that are exchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from .helpers import separate
from .tools import synth

pytestmark = pytest.mark.slow
# Mean SDR in dB by the number of songs. The table in docs/models.md is that of 20.
FLOORS = {
    4: {"drums": 7.6, "bass": 8.85, "other": 8.5, "vocals": 8.92},
    20: {"drums": 7.35, "bass": 8.64, "other": 7.78, "vocals": 8.39},
}
SEEDS = range(int(os.environ.get("SONGS", 4)))  # see `training/train_demo.py`
FEW = 4  # songs for each comparison of options

Score = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def songs() -> list[dict[str, np.ndarray]]:
    with ProcessPoolExecutor(2) as executor:
        return list(executor.map(synth.song, SEEDS))


@pytest.fixture(scope="module")
def score(songs: list[dict[str, np.ndarray]], tmp_path_factory: pytest.TempPathFactory) -> Score:
    """Compute the SDR `[songs, sources]` of the first songs, for a file format and options."""

    def separated(count: int, *options: object, suffix: str = ".wav") -> np.ndarray:
        folder = tmp_path_factory.mktemp("songs")
        tracks = [folder / f"{index}{suffix}" for index in range(count)]
        for song, track in zip(songs, tracks):
            soundfile.write(track, sum(song.values()).T, synth.RATE)
        result = separate("-n", "demo", "--float32", "-o", folder, *options, *tracks)
        assert result.returncode == 0, result.stderr
        folders = [folder / "demo" / track.stem for track in tracks]
        return np.array(
            [
                [sdr(song[name], read(out / f"{name}.wav")) for name in synth.SOURCES]
                for song, out in zip(songs, folders)
            ]
        )

    return separated


@pytest.fixture(scope="module")
def usual(score: Score) -> np.ndarray:
    """The SDR of all songs with overlapping windows, and without random shifts."""
    return score(len(SEEDS), "--shifts", 0)


def read(path: Path) -> np.ndarray:
    return soundfile.read(path, dtype="float32")[0].T


def sdr(stem: np.ndarray, estimate: np.ndarray) -> float:
    """Return the signal-to-distortion ratio of a whole stem in dB."""
    return float(10 * np.log10(np.sum(stem**2) / np.sum((stem - estimate) ** 2)))


def test_stems_reach_their_quality(usual: np.ndarray) -> None:
    found = dict(zip(synth.SOURCES, usual.mean(axis=0).round(2).tolist()))
    print(found)
    assert all(found[name] >= floor for name, floor in FLOORS[len(SEEDS)].items()), found


# Bounds in dB of the mean change against the usual options.
@pytest.mark.parametrize(
    ("options", "suffix", "least", "most"),
    [
        (["--shifts", 0, "--overlap", 0], ".wav", -1.0, -0.05),
        (["--shifts", 2], ".wav", 0.0, 0.5),
        (["--shifts", 0], ".mp3", -1.0, 0.1),
        (["--shifts", 0, "--precision", "bfloat16"], ".wav", -0.05, 0.05),
    ],
    ids=["no overlap", "shifts", "MP3", "bfloat16"],
)
def test_options_change_the_quality_a_little(
    options: list, suffix: str, least: float, most: float, score: Score, usual: np.ndarray
) -> None:
    change = score(FEW, *options, suffix=suffix).mean() - usual[:FEW].mean()
    assert least <= change <= most
