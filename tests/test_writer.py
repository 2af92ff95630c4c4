"""Sums of stems, depth and codec of the files, and the messages about them."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from demucs_infer.api import Separator
from demucs_infer.separate import main

from .helpers import SOURCES, Command, json_lines, noise, write_track

RATE = 8000


def test_stems_may_be_sums_of_sources(
    command: Command, fast_repo: Path, separator: Separator, track: Path, tmp_path: Path
) -> None:
    sources = separator.separate_audio_file(track).stems
    options = ["--shifts", 0, "--float32", "--clip-mode", "rescale-all", "--json"]
    sums = "vocals,instrumental=drums+bass+other"
    (result,) = json_lines(command(*options, "--stems", sums, track))
    assert list(result["stems"]) == ["vocals", "instrumental"]
    paths = [tmp_path / stem["path"] for stem in result["stems"].values()]
    parts = [soundfile.read(path, dtype="float32")[0] for path in paths]
    whole = result["stems"]["vocals"]["gain"] * sum(sources.values())
    assert np.abs(sum(parts) - whole.T.numpy()).max() < 1e-5
    stems = ["x=drums+bass", "vocals"]
    other = Separator("tiny", fast_repo, device="cpu", shifts=0, stems=stems)
    mixed = other.separate_audio_file(track).stems
    assert (mixed["x"] - sources["drums"] - sources["bass"]).abs().max() < 1e-6
    assert list(other.separate_to_files(track, tmp_path, stems="all").stems) == SOURCES
    assert other.stems == ["x", "vocals"]  # options of a call change no other


def test_automatic_depth_is_that_of_the_track(command: Command, tmp_path: Path) -> None:
    expected = {
        "int16.wav": ("PCM_16", "PCM_16"),
        "int24.wav": ("PCM_24", "PCM_24"),
        "float.wav": ("FLOAT", "FLOAT"),
        "double.wav": ("DOUBLE", "FLOAT"),
        "int8.wav": ("PCM_U8", "PCM_16"),
        "lossless.flac": ("PCM_24", "PCM_24"),
        "lossy.mp3": ("MPEG_LAYER_III", "PCM_16"),
    }
    for name, (given, _) in expected.items():
        soundfile.write(tmp_path / name, noise(2, RATE).T.numpy(), RATE, subtype=given)
    options = ["--stems", "bass", "--filename", "{track}.{ext}"]

    def depth(path: str) -> str:
        return soundfile.info(tmp_path / "separated/tiny" / path).subtype

    assert command(*options, "--depth", "auto", *expected).returncode == 0
    for name, (_, written) in expected.items():
        assert depth(f"{Path(name).stem}.wav") == written
    for format, written in {"flac": "PCM_24", "ogg": "VORBIS"}.items():
        assert command(*options, "--depth", "auto", "--format", format, "float.wav").returncode == 0
        assert depth(f"float.{format}") == written
    assert command(*options, "float.wav").returncode == 0
    assert depth("float.wav") == "PCM_16"


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ("", "tiny/track/"),
        ("--stems bass", "tiny/track/bass.wav"),
        ("--format mka", "tiny/track.mka"),
        ("--format mka --player", "tiny/"),
    ],
)
def test_last_line_names_the_file_or_the_folder_of_the_stems(
    options: str, where: str, command: Command, track: Path
) -> None:
    last = command(*options.split(), track).stderr.splitlines()[-1]
    assert re.search(rf" separated/{re.escape(where)} \(\d+\.\d s\)$", last)
    assert command("-q", *options.split(), track).stderr == ""


def test_bars_on_a_terminal_have_a_title(
    fast_repo: Path, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracks = [str(write_track(tmp_path / f"{name}.wav")) for name in "abc"]
    options = ["--repo", str(fast_repo), "-n", "tiny", "-o", str(tmp_path / "out")]

    def titles(*names: str) -> list[str]:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal := io.StringIO())
            patch.setattr(terminal, "isatty", lambda: True)
            main([*options, *names])
        return re.findall(r"(?:^|[\r\n])([^\r\n]+?): +0%\|", terminal.getvalue())

    assert titles(tracks[0]) == ["a.wav"]
    first, _, last = titles(*tracks)
    assert first == "a.wav (1 of 3)"
    # The first track is written by now, which tells how long the last one will take.
    assert re.fullmatch(r"c\.wav \(3 of 3, \d+\.\d s left\)", last)
    assert titles("none.wav", tracks[0]) == ["a.wav (2 of 2)"]
    # Programs read the bars of a pipe, which have no title in the reference.
    assert not re.search(r": +0%\|", command(tracks[0]).stderr)
