from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from demucs_infer.api import Separator
from demucs_infer.engine.options import SeparationOptions
from demucs_infer.errors import LoadAudioError, OptionError
from demucs_infer.fields import parse_time
from demucs_infer.separate import main

from .helpers import Command, json_lines

RATE = 44_100


def test_times_have_hours_minutes_and_fractions() -> None:
    for text, seconds in {
        "90": 90,
        "1:30": 90,
        "1:02:03.5": 3723.5,
        ".5": 0.5,
        "100:00": 6000,
    }.items():
        assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1:75", "1:60:00", "a", "1:", ":5", "1h", "nan", "1e3"])
def test_invalid_times_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError):
        parse_time(text)
    with pytest.raises(SystemExit) as caught:
        main([f"--start={text}", "song.wav"])
    assert caught.value.code == 2
    assert f"{text!r} is not a time" in capsys.readouterr().err


def test_excerpts_are_counted_in_samples() -> None:
    assert SeparationOptions(start=1.23456).excerpt(RATE) == (54444, None)
    assert SeparationOptions(duration=0.3).excerpt(RATE) == (0, 13230)
    assert SeparationOptions(start=0.5, duration=0.7).excerpt(RATE) == (22050, 52920)


@pytest.mark.parametrize(
    "option", [{"start": -1}, {"start": math.nan}, {"duration": 0}, {"max_duration": math.nan}]
)
def test_invalid_limits_are_refused(
    option: dict[str, Any], separator: Separator, track: Path
) -> None:
    with pytest.raises(OptionError, match=next(iter(option))):
        SeparationOptions(**option)
    with pytest.raises(OptionError):
        separator.separate_audio_file(track, **option)


def test_stems_of_an_excerpt_equal_those_of_a_cut_file(
    separator: Separator, fast_repo: Path, track: Path, tmp_path: Path, command: Command
) -> None:
    wav, rate = soundfile.read(track, dtype="float32", always_2d=True)
    cut = tmp_path / "cut.wav"
    soundfile.write(cut, wav[24_000:72_000], rate, subtype="FLOAT")
    expected = separator.separate_audio_file(cut).stems
    stems = separator.separate_audio_file(track, start=0.5, duration=1).stems
    assert all(torch.equal(stems[name], expected[name]) for name in expected)
    assert separator.options.start is None
    options = ["--shifts", 0, "--float32", "--clip-mode", "none", "--start", "0:00.5"]
    (result,) = json_lines(command(*options, "--duration", 1, "--json", "-o", tmp_path, track))
    assert result["seconds"] == 1
    for name, stem in result["stems"].items():
        samples, _ = soundfile.read(stem["path"], dtype="float32")
        assert (torch.from_numpy(samples.T) - expected[name]).abs().max() < 1e-6
    late = Separator("tiny", fast_repo, device="cpu", start=5)
    with pytest.raises(LoadAudioError, match="ends after 2"):
        late.separate_audio_file(track)
