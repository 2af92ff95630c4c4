from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from demucs_infer.api import Separator
from demucs_infer.io.console import Console
from demucs_infer.separate import main

from .helpers import SOURCES, noise

RATE = 8000


def command(repo: Path) -> list[str]:
    return ["-n", "tiny", "--repo", str(repo), "-d", "cpu", "--shifts", "0"]


def test_sums_of_stems_by_name(
    repo: Path, track: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one gain for all they add up to the sum of the sources."""
    arguments = [*command(repo), "--float32", "--clip-mode", "rescale-all", "--json"]
    arguments += ["--stems", "vocals,instrumental=drums+bass+other", "-o", str(tmp_path)]
    main([*arguments, str(track)])
    result = json.loads(capsys.readouterr().out)
    assert list(result["stems"]) == ["vocals", "instrumental"]
    gain = result["stems"]["vocals"]["gain"]
    parts = [soundfile.read(stem["path"], dtype="float32")[0] for stem in result["stems"].values()]
    sources = Separator("tiny", repo, device="cpu", shifts=0).separate_audio_file(track).stems
    whole = gain * sum(sources.values())
    assert np.abs(sum(parts) - whole.T.numpy()).max() < 1e-5


def test_sums_in_python(repo: Path, track: Path, tmp_path: Path) -> None:
    separator = Separator("tiny", repo, device="cpu", shifts=0, stems=["x=drums+bass", "vocals"])
    assert separator.stems == ["x", "vocals"]
    every = Separator("tiny", repo, device="cpu", shifts=0).separate_audio_file(track).stems
    stems = separator.separate_audio_file(track).stems
    assert (stems["x"] - every["drums"] - every["bass"]).abs().max() < 1e-6
    result = separator.separate_to_files(track, tmp_path, stems="all")
    assert list(result.stems) == SOURCES
    assert separator.stems == ["x", "vocals"]


DEPTHS = [
    ("wav", "PCM_16", "wav", "PCM_16"),
    ("wav", "PCM_24", "wav", "PCM_24"),
    ("wav", "FLOAT", "wav", "FLOAT"),
    ("wav", "DOUBLE", "wav", "FLOAT"),
    ("wav", "PCM_U8", "wav", "PCM_16"),
    ("flac", "PCM_24", "wav", "PCM_24"),
    ("wav", "FLOAT", "flac", "PCM_24"),
    ("mp3", "MPEG_LAYER_III", "wav", "PCM_16"),
    ("wav", "FLOAT", "ogg", "VORBIS"),
]


@pytest.mark.parametrize(("suffix", "kind", "format", "expected"), DEPTHS)
def test_depth_by_itself(
    suffix: str, kind: str, format: str, expected: str, repo: Path, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, noise(2, RATE).T.numpy(), RATE, subtype=kind)
    main([*command(repo), "--depth", "auto", "--format", format, "-o", str(tmp_path), str(path)])
    assert soundfile.info(tmp_path / f"tiny/a/vocals.{format}").subtype == expected


def test_depth_is_not_automatic_without_being_asked(
    repo: Path, track: Path, tmp_path: Path
) -> None:
    main([*command(repo), "-o", str(tmp_path), str(track)])
    assert soundfile.info(tmp_path / "tiny/track/vocals.wav").subtype == "PCM_16"


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ([], "tiny/track/"),
        (["--stems", "bass"], "tiny/track/bass.wav"),
        (["--format", "mka"], "tiny/track.mka"),
        (["--format", "mka", "--player"], "tiny/"),
    ],
)
def test_where_the_stems_are(
    options: list[str],
    where: str,
    repo: Path,
    track: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(track.parent)
    main([*command(repo), *options, track.name])
    error = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"Stems in separated/{re.escape(where)} \(\d+\.\d s\)", error[-1])
    main([*command(repo), "-q", *options, track.name])
    assert capsys.readouterr().err == ""


def test_the_title_of_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Console(1).announce("in/song.mp3") is None  # where programs read the bars
    monkeypatch.setattr("demucs_infer.io.console.is_terminal", lambda stream: True)

    def result(**other: Any) -> dict[str, Any]:
        plain = {"input": "a", "error": None, "skipped": False, "stems": {}, "player": None}
        return {**plain, "elapsed": 1.0, **other}

    assert Console(1).announce("in/song.mp3") == "song.mp3"
    console = Console(3)
    assert console.announce("in/a.mp3") == "a.mp3 (1 of 3)"
    console.report(result(error="a: no"))
    assert re.fullmatch(r"b.mp3 \(2 of 3, \d+\.\d s left\)", console.announce("s3://x/b.mp3"))


def test_bars_have_the_title(
    repo: Path, track: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    titles = []

    def bar(windows: Any, **options: Any) -> Any:
        titles.append(options.get("desc"))
        return windows

    monkeypatch.setattr("demucs_infer.apply.tqdm.tqdm", bar)
    separator = Separator("tiny", repo, device="cpu", shifts=0, progress=True)
    separator.separate_tensor(noise(2, RATE))
    from demucs_infer.io.batch import Batch
    from demucs_infer.io.output import Output
    from demucs_infer.io.tracks import plan_jobs

    output = Output(tmp_path)
    with output.workspace() as space:
        batch = Batch(separator, output, space, announce=lambda track: "the title")
        batch.run(plan_jobs([track], output, "tiny", separator.stems))
    assert titles == [None, "the title"]


def test_alac_in_m4a(repo: Path, track: Path, tmp_path: Path) -> None:
    options = ["--format", "m4a", "--codec", "alac", "--int24", "--clip-mode", "none"]
    main([*command(repo), *options, "-o", str(tmp_path), str(track)])
    stems = Separator("tiny", repo, device="cpu", shifts=0).separate_audio_file(track).stems
    with av.open(str(tmp_path / "tiny/track/bass.m4a")) as file:
        assert file.streams.audio[0].codec_context.name == "alac"
        frames = [torch.from_numpy(frame.to_ndarray()) for frame in file.decode(audio=0)]
    samples = torch.cat(frames, dim=-1) / 2**31
    assert (samples - stems["bass"]).abs().max() < 2**-21
