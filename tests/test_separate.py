"""Options of the command line, its messages, and the files that it makes of a track."""

from __future__ import annotations

import random
import re
import shlex
import sys
from pathlib import Path
from unittest import mock

import av
import demucs.separate
import numpy as np
import pytest
import soundfile

from demucs_infer.api import Separator
from demucs_infer.separate import get_parser, main
from demucs_infer.write.formats import FORMATS

from .helpers import (
    SOURCES,
    Command,
    assert_one_line,
    json_lines,
    limited_file_size,
    noise,
    separate,
    stems_of,
    write_track,
)

OPTIONS = (
    "--repo --name --sig --out --filename --device --shifts --overlap --no-split --segment"
    " --stems --two-stems --other-method --int24 --float32 --clip-mode --flac --mp3 --mp3-bitrate"
    " --mp3-preset --jobs --list-models --json --download --cache-dir --offline --verbose --version"
)


def test_no_track_is_wrong_usage_and_help_names_every_option() -> None:
    assert_one_line(separate(), "track")
    text = get_parser().format_help()
    for option in OPTIONS.split():
        assert re.search(rf"{option}\b", text), option


def test_help_fits_a_terminal_and_is_short_with_one_dash() -> None:
    long, short = separate("--help").stdout, separate("-h").stdout
    assert max(map(len, f"{long}{short}".splitlines())) <= 80
    assert len(re.findall(r"^  -", short, re.MULTILINE)) == 12
    assert "--two-stems" in short and "--cpus-per-worker" not in short


def test_tracks_and_folders_are_looked_for_before_the_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/notes.txt").touch()
    model = ["--offline", "--cache-dir", tmp_path, "-n", "htdemucs"]
    assert_one_line(separate(*model, "none.mp3", cwd=tmp_path), "none.mp3", "no such file")
    assert_one_line(separate(*model, "empty", cwd=tmp_path), "no audio files in empty", "1")
    both = separate(*model, "none.mp3", "empty", cwd=tmp_path)
    assert (both.returncode, both.stderr.count("error:")) == (1, 2)
    many = separate(*model, *(f"{number}.mp3" for number in range(1001)), cwd=tmp_path)
    assert many.stderr.endswith("    and 1 more, which are named above\n")
    (tmp_path / "file").touch()
    write_track(tmp_path / "a.wav")
    assert_one_line(separate(*model, "-o", "file", "a.wav", cwd=tmp_path), "file", "cannot be")
    for wrong in ("--two-stems voice", "--stems vocals,voice", "--format mka --stems mix=voice"):
        assert_one_line(separate(*model, *wrong.split(), "a.wav", cwd=tmp_path), "'voice'", "bass")
    for wrong, said in (("--twostems", "--two-stems?"), ("-mp3", "--mp3?"), ("--model", "l (see")):
        assert_one_line(separate(wrong, "a.wav", cwd=tmp_path), said)
    assert_one_line(separate("-n", "demo", "-d", "gpu", "a.wav", cwd=tmp_path), "'gpu'", "cpu")


@pytest.mark.parametrize("name", ["tiny", "pair"])
def test_stems_and_output_are_those_of_the_reference(
    name: str, repo: Path, track: Path, tmp_path: Path
) -> None:
    """The same samples, the same lines for programs, and as many bars, each from 0 to 100 %."""
    options = ["--repo", repo, "-n", name, "-d", "cpu", "--shifts", 2, "--float32", "track.wav"]
    results = []
    for folder, command in (("theirs", demucs.separate.main), ("ours", main)):
        random.seed(5)  # of the shifts
        results.append(separate(*options, "-o", folder, cwd=tmp_path, main=command))
        assert results[-1].returncode == 0, results[-1].stderr
    said = [
        # Programs do not look for the rest of the sentence about the number of models.
        re.sub(r"(of \d+ models\.).*", r"\1", result.stdout).replace("theirs", "ours")
        for result in results
    ]
    assert said[0] == said[1]
    for start in ("  0%|", "100%|"):
        assert count_bars(results[0].stderr, start) == count_bars(results[1].stderr, start) > 0
    stems = stems_of(tmp_path / "ours")
    assert stems == stems_of(tmp_path / "theirs") == {f"{name}/track/{x}.wav" for x in SOURCES}
    for stem in stems:
        expected, rate = soundfile.read(tmp_path / "theirs" / stem)
        actual, our_rate = soundfile.read(tmp_path / "ours" / stem)
        assert our_rate == rate == 8000
        assert np.abs(actual - expected).max() <= 1e-5


def count_bars(text: str, start: str) -> int:
    """Count the bars that were drawn at `start`. A bar may be drawn again at its end."""
    lines = [line for line in re.split("[\r\n]+", text) if "%|" in line]
    pairs = zip(["", *lines], lines)
    return sum(b.startswith(start) and not a.startswith(start) for a, b in pairs)


def test_quiet_command_prints_nothing_and_writes_to_the_default_folder(
    command: Command, track: Path, tmp_path: Path
) -> None:
    result = command("-q", "track.wav")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert stems_of(tmp_path / "separated") == {f"tiny/track/{name}.wav" for name in SOURCES}


def test_options_of_demucs_choose_the_format(command: Command, track: Path, tmp_path: Path) -> None:
    for options, suffix, subtype in (
        ("", "wav", "PCM_16"),
        ("--int24", "wav", "PCM_24"),
        ("--float32", "wav", "FLOAT"),
        ("--flac --int24", "flac", "PCM_24"),
        ("--mp3 --mp3-bitrate 64 --mp3-preset 7", "mp3", "MPEG_LAYER_III"),
    ):
        assert command("--stems", "bass", *options.split(), track).returncode == 0
        info = soundfile.info(tmp_path / f"separated/tiny/track/bass.{suffix}")
        assert (info.subtype, info.channels, info.samplerate) == (subtype, 2, 8000)
        assert info.duration == pytest.approx(2, abs=0.2)


def test_two_stems_are_a_source_and_the_rest(
    fast_repo: Path, separator: Separator, track: Path, tmp_path: Path
) -> None:
    mixture, stems = separator.separate_audio_file(track)
    rests = {
        "add": {"no_vocals": sum(stems[name] for name in SOURCES[:3])},
        "minus": {"minus_vocals": mixture - stems["vocals"]},
        "none": {},
    }
    options = ["--repo", fast_repo, "-s", "tiny", "-d", "cpu", "--shifts", 0]
    options += ["--float32", "--clip-mode", "none", track]
    for method, rest in rests.items():
        two = ["--two-stems", "vocals", "--other-method", method, "-o", method]
        assert separate(*options, *two, cwd=tmp_path).returncode == 0
        paths = {path.stem: path for path in (tmp_path / method).rglob("*.wav")}
        expected = {"vocals": stems["vocals"], **rest}
        assert paths.keys() == expected.keys()
        for name, stem in expected.items():
            assert np.abs(soundfile.read(paths[name])[0] - stem.T.numpy()).max() < 1e-6


def test_options_of_demucs_work_together(command: Command, track: Path, tmp_path: Path) -> None:
    options = "-n pair --shifts 2 --overlap 0.5 --segment 0.4 -j 2 --clip-mode clamp -v"
    name = ["--filename", "{stem} of {track}.{trackext}.{ext}", "--stems", "vocals,bass"]
    result = command(*options.split(), *name, track)
    assert result.returncode == 0, result.stderr
    names = {f"pair/{stem} of track.wav.wav" for stem in ("vocals", "bass")}
    assert stems_of(tmp_path / "separated") == names


def test_transformer_takes_no_window_longer_than_its_own(
    command: Command, repo: Path, tmp_path: Path
) -> None:
    write_track(tmp_path / "short.wav", 0.4)
    write_track(tmp_path / "long.wav", 1)
    assert command("--no-split", "--shifts", 0, "--repo", repo, "short.wav").returncode == 0
    assert command("--no-split", "long.wav").returncode == 0  # another family
    assert_one_line(command("--no-split", "--repo", repo, "long.wav"), "longer")
    result = command("--segment", 7, "--repo", repo, "long.wav")
    assert_one_line(result, "7", "0.5 s")
    assert result.returncode == 2


def test_folders_are_named_like_the_tracks(command: Command, track: Path, tmp_path: Path) -> None:
    names = "a.b c.wav|{stem}.wav|ünï — 音.wav|no suffix|.hidden|100%.wav|-x.wav|...wav".split("|")
    for name in names:
        (tmp_path / name).write_bytes(track.read_bytes())
    assert command("--stems", "bass", "--", *names).returncode == 0
    folders = {path.name for path in (tmp_path / "separated/tiny").iterdir()}
    assert folders == {name.removesuffix(".wav") for name in names[:-1]} | {"...wav"}


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        ("-n tinny", 1, ["tinny", "tiny"]),
        ("--repo none", 1, ["none"]),
        ("--repo . -n bad", 1, ["bad.th"]),
        ("--two-stems voice", 2, ["voice", "vocals"]),
        ("--overlap 1", 2, ["--overlap", "'1'"]),
        ("--shifts many", 2, ["--shifts", "'many'"]),
        ("-d cuda:77", 2, ["cuda:77"]),
        ("--nonsense", 2, ["--nonsense"]),
        ("--mp3 --flac", 2, ["--flac"]),
        ("--mp3 --float32", 2, ["float32"]),
        ("--format stem.mp4 --stems all,x=drums+bass", 2, ["4 stems", "5"]),
        ("--format stem.mp4 --clip-mode tanh", 2, ["rescale-all"]),
        ("--format mka --filename {track}-{stem}.{ext}", 2, ["{stem}"]),
        ("--format mka --stems mix=drums", 2, ["'mix'"]),
        ("--filename ../../{stem}.{ext}", 2, ["outside"]),
        ("--filename {track}.{ext} --stems bass -o .", 2, ["replace"]),
        ("-o ''", 2, ["--out", "an empty name is not a file"]),
        ("-o -", 2, ["one stem, not 4"]),
        ("-o - --stems bass other.wav", 2, ["one track, not 2"]),
        ("--ray -o -", 2, ["--ray", "standard output"]),
        ("- --ray", 2, ["--ray", "standard input"]),
        ("-o - --stems bass --json", 2, ["--json"]),
        ("-o - --stems bass --player", 2, ["standard output"]),
    ],
)
def test_wrong_usage_is_one_line_and_changes_nothing(
    options: str, status: int, words: list[str], command: Command, tmp_path: Path
) -> None:
    for name in ("tiny/a.wav", "other.wav"):
        write_track(tmp_path / name)
    (tmp_path / "bad.th").write_text("no weights")
    result = command("tiny/a.wav", *shlex.split(options))
    assert_one_line(result, *words)
    assert result.returncode == status
    assert stems_of(tmp_path) == {"tiny/a.wav", "other.wav", "bad.th"}


def test_missing_encoder_is_reported_before_the_work(
    command: Command, track: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    result = command("-n", "nothing", "--format", "ogg", track)
    assert_one_line(result, "pip install soundfile")
    monkeypatch.setattr(av, "Codec", mock.Mock(side_effect=ValueError))
    result = command("-n", "nothing", "--format", "opus", track)
    assert_one_line(result, "libopus", "install the one of PyPI")


@pytest.mark.parametrize("format", [*FORMATS, "mka", "stem.mp4"])
def test_full_disk_leaves_no_partial_stem(
    format: str, command: Command, track: Path, tmp_path: Path
) -> None:
    with limited_file_size(2000):
        result = command("--format", format, track)
    assert_one_line(result, "cannot be written")
    assert stems_of(tmp_path / "separated") == set()


def test_damaged_tracks_are_separated_with_a_warning_or_refused_by_strict(
    command: Command, tmp_path: Path
) -> None:
    whole = write_track(tmp_path / "whole.wav", 3)
    (tmp_path / "cut.wav").write_bytes(whole.read_bytes()[: -4 * 2 * 8000])
    soundfile.write(tmp_path / "a.flac", noise(2, 80_000).T.numpy(), 8000)
    flac = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(flac[: len(flac) // 2])
    result = command("--json", "whole.wav", "cut.wav", "half.flac")
    first, second, third = json_lines(result)
    assert result.returncode == 0
    assert (first["damaged"], first["seconds"]) == (None, 3)
    assert second["damaged"] == {"places": 0, "seconds": 1.0, "end_missing": True}
    assert (second["seconds"], second["error"]) == (2, None)
    assert third["damaged"]["end_missing"]
    warnings = [line for line in result.stderr.splitlines() if "WARNING" in line]
    assert ["cut.wav" in line for line in warnings].count(True) == 1
    assert "1.00 s" in warnings[0]
    assert len(stems_of(tmp_path / "separated")) == 12
    result = command("--json", "--strict", "cut.wav", "whole.wav")
    damaged, fine = json_lines(result)
    assert (result.returncode, fine["error"]) == (1, None)
    assert "cut" in damaged["error"]


def test_tracks_longer_than_the_maximum_are_refused(command: Command, tmp_path: Path) -> None:
    write_track(tmp_path / "long.wav", 3)
    assert_one_line(command("--max-duration", 2, "long.wav"), "long.wav", "2 s")
    assert command("--max-duration", 3, "long.wav").returncode == 0
