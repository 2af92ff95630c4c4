"""The command line, in processes of its own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from demucs_infer.io.formats import FORMATS
from demucs_infer.separate import get_parser, load_track, main

from .helpers import SOURCES, assert_one_line, noise, run, separate, stems_of

OPTIONS = (
    "--repo --name --sig --out --filename --device --shifts --overlap --no-split --segment"
    " --stems --two-stems --other-method --int24 --float32 --clip-mode --flac --mp3 --mp3-bitrate"
    " --mp3-preset --jobs --list-models --json --download --cache-dir --offline --verbose --version"
)


def test_help_names_every_option() -> None:
    text = get_parser().format_help()
    for option in OPTIONS.split():
        assert re.search(rf"{option}\b", text), option


def test_float_stems_equal_those_of_the_reference(repo: Path, track: Path, tmp_path: Path) -> None:
    options = ["--repo", repo, "-n", "tiny", "--float32", "--shifts", 0, "-d", "cpu", track]
    theirs = run("-m", "demucs.separate", *options, "-o", tmp_path / "theirs")
    assert theirs.returncode == 0, theirs.stderr
    ours = separate(*options, "-o", tmp_path / "ours")
    assert ours.returncode == 0, ours.stderr
    assert stems_of(tmp_path / "ours") == stems_of(tmp_path / "theirs")
    for name in stems_of(tmp_path / "ours"):
        expected, rate = soundfile.read(tmp_path / "theirs" / name)
        actual, our_rate = soundfile.read(tmp_path / "ours" / name)
        assert our_rate == rate == 8000
        assert np.abs(actual - expected).max() <= 1e-5


@pytest.mark.parametrize("name", ["tiny", "pair"])
def test_a_piped_command_says_what_the_reference_says(
    name: str, repo: Path, track: Path, tmp_path: Path
) -> None:
    """The same lines for programs, and as many bars, each from 0 to 100 %."""
    options = ["--repo", repo, "-n", name, "-d", "cpu", "--shifts", 2, "track.wav"]
    theirs = run("-m", "demucs.separate", *options, cwd=tmp_path)
    ours = separate(*options, cwd=tmp_path)
    # The rest of the first sentence is not what programs look for.
    said = [
        re.sub(r"(of \d+ models\.).*", r"\1", output) for output in (ours.stdout, theirs.stdout)
    ]
    assert said[0] == said[1]
    assert ours.returncode == theirs.returncode == 0
    for start in ("  0%|", "100%|"):
        assert bars(ours.stderr, start) == bars(theirs.stderr, start) > 0
    quiet = separate("-q", *options, cwd=tmp_path)
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def bars(text: str, start: str) -> int:
    """The number of bars that were drawn at `start`; a bar may be drawn again at its end."""
    lines = [line for line in re.split("[\r\n]+", text) if "%|" in line]
    pairs = zip(["", *lines], lines)
    return sum(b.startswith(start) and not a.startswith(start) for a, b in pairs)


def test_default_place(repo: Path, track: Path, tmp_path: Path) -> None:
    result = separate("-q", "--repo", repo, "-n", "tiny", "track.wav", cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert stems_of(tmp_path / "separated") == {f"tiny/track/{name}.wav" for name in SOURCES}


@pytest.mark.parametrize(
    ("options", "suffix", "subtype"),
    [
        ([], "wav", "PCM_16"),
        (["--int24"], "wav", "PCM_24"),
        (["--float32"], "wav", "FLOAT"),
        (["--flac"], "flac", "PCM_16"),
        (["--flac", "--int24"], "flac", "PCM_24"),
        (["--mp3", "--mp3-bitrate", "64", "--mp3-preset", "7"], "mp3", "MPEG_LAYER_III"),
    ],
    ids=str,
)
def test_formats(options: list, suffix: str, subtype: str, repo: Path, track: Path) -> None:
    out = track.parent / "out"
    main(["--repo", str(repo), "-n", "tiny", "-o", str(out), *options, str(track)])
    info = soundfile.info(out / "tiny" / "track" / f"bass.{suffix}")
    assert (info.subtype, info.channels, info.samplerate) == (subtype, 2, 8000)
    assert info.duration == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize(
    ("method", "other"), [("add", "no_vocals"), ("minus", "minus_vocals"), ("none", None)]
)
def test_two_stems(method: str, other: str | None, repo: Path, track: Path) -> None:
    options = ["--repo", str(repo), "--shifts", "0", "--float32", "--clip-mode", "none", str(track)]
    two, every = track.parent / "two", track.parent / "all"
    main(["-n", "tiny", "-o", str(every), *options])
    main(
        ["-s", "tiny", "-o", str(two), "--two-stems", "vocals", "--other-method", method, *options]
    )
    assert {path.stem for path in two.rglob("*.wav")} == {"vocals", other} - {None}
    stems = {path.stem: soundfile.read(path)[0] for path in every.rglob("*.wav")}
    mixture = load_track(track, 2, 8000).T.numpy()
    rest = {"add": sum(stems[n] for n in SOURCES[:3]), "minus": mixture - stems["vocals"]}
    if other:
        written, _ = soundfile.read(two / "tiny" / "track" / f"{other}.wav")
        assert np.abs(written - rest[method]).max() < 1e-6


def test_only_some_stems(repo: Path, track: Path) -> None:
    out = track.parent / "out"
    main(["--repo", str(repo), "-n", "pair", "-o", str(out), "--stems", "vocals,bass", str(track)])
    assert stems_of(out) == {"pair/track/vocals.wav", "pair/track/bass.wav"}


def test_other_options_of_demucs(repo: Path, track: Path) -> None:
    out = track.parent / "out"
    options = "-d cpu --shifts 2 --overlap 0.5 --segment 0.4 -j 2 --clip-mode clamp -v"
    name = ["--filename", "{stem} of {track}.{trackext}.{ext}"]
    main(["--repo", str(repo), "-n", "pair", "-o", str(out), *options.split(), *name, str(track)])
    assert stems_of(out) == {f"pair/{stem} of track.wav.wav" for stem in SOURCES}


def test_a_track_in_one_window(repo: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(2, 3000).T.numpy(), 8000)
    options = ["--repo", repo, "-n", "tiny", "--no-split", "--shifts", 0]
    result = separate(*options, "a.wav", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_names(repo: Path, track: Path, tmp_path: Path) -> None:
    for name in ("a.b c.wav", "{stem}.wav", "ünï — 音.wav", "no suffix", ".hidden", "100%.wav"):
        path = tmp_path / "in" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(track.read_bytes())
    tracks = [str(path) for path in sorted((tmp_path / "in").iterdir())]
    main(["--repo", str(repo), "-n", "tiny", "-o", str(tmp_path / "out"), *tracks])
    folders = {path.name for path in (tmp_path / "out" / "tiny").iterdir()}
    assert folders == {"a.b c", "{stem}", "ünï — 音", "no suffix", ".hidden", "100%"}


def test_a_track_that_starts_with_a_dash(repo: Path, track: Path, tmp_path: Path) -> None:
    track.rename(tmp_path / "-x.wav")
    result = separate("--repo", repo, "-n", "tiny", "--", "-x.wav", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_list_models(repo: Path) -> None:
    assert "htdemucs_ft" in separate("--list-models").stdout.split()
    assert {"tiny", "pair"} <= set(separate("--list-models", "--repo", repo).stdout.split())


def test_one_bad_track_does_not_stop_the_others(repo: Path, track: Path, tmp_path: Path) -> None:
    options = ["--repo", repo, "-n", "tiny", "-o", tmp_path / "out"]
    result = separate(*options, tmp_path / "missing.wav", track)
    assert result.returncode == 1
    assert "missing.wav: no such file" in result.stderr
    assert len(stems_of(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ["no such file"]),
        (lambda path: path.mkdir(), ["is a folder"]),
        (lambda path: path.write_bytes(b""), ["the file is empty"]),
        (lambda path: path.write_text("words\n" * 999), ["no audio file"]),
    ],
    ids=["missing", "folder", "empty", "text"],
)
def test_bad_tracks(make, words: list, repo: Path, tmp_path: Path) -> None:
    make(tmp_path / "bad.mp3")
    options = ["--repo", repo, "-n", "tiny", "-o", tmp_path / "out"]
    result = separate(*options, tmp_path / "bad.mp3")
    assert_one_line(result, "bad.mp3", *words)
    assert stems_of(tmp_path / "out") == set()


def test_a_truncated_track_is_separated_with_a_warning(repo: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.flac"
    soundfile.write(path, noise(2, 80_000).T.numpy(), 8000)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = separate("--repo", repo, "-n", "tiny", "-o", tmp_path / "out", path)
    assert result.returncode == 0
    assert "WARNING" in result.stderr
    assert len(stems_of(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (["-n", "tinny"], 1, ["tinny", "tiny"]),
        (["-n", "tiny", "--two-stems", "voice"], 2, ["voice", "vocals"]),
        (["-n", "tiny", "--stems", "vocals,voice"], 2, ["'voice'", "vocals"]),
        (["-n", "tiny", "--segment", "7"], 2, ["7", "0.5 s"]),
        (["-n", "tiny", "--overlap", "1"], 2, ["--overlap", "'1'"]),
        (["-n", "tiny", "--shifts", "-1"], 2, ["--shifts", "'-1'"]),
        (["-n", "tiny", "--shifts", "many"], 2, ["--shifts", "'many'"]),
        (["-n", "tiny", "--mp3", "--flac"], 2, ["--flac"]),
        (["-n", "tiny", "--mp3", "--float32"], 2, ["float32"]),
        (["-n", "tiny", "--mp3-preset", "9"], 2, ["--mp3-preset"]),
        (["-n", "tiny", "--filename", "{track}.{ext}"], 2, ["{stem}"]),
        (["-n", "tiny", "--filename", "{song}/{stem}.{ext}"], 2, ["{song}"]),
        (["-n", "tiny", "--filename", "../../{stem}.{ext}"], 2, ["outside"]),
        (["-n", "tiny", "--no-split"], 1, ["longer"]),
        (["-n", "tiny", "-d", "cuda:77"], 2, ["cuda:77"]),
        (["-n", "tiny", "--nonsense"], 2, ["--nonsense"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_wrong_usage(options: list, status: int, words: list, repo: Path, track: Path) -> None:
    out = track.parent / "out"
    result = separate("--repo", repo, "-o", out, *options, track)
    assert_one_line(result, *words)
    assert result.returncode == status
    assert stems_of(out) == set()


def test_no_track() -> None:
    assert_one_line(separate(), "no track")


def test_a_model_that_is_no_checkpoint(track: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.th").write_text("no weights")
    assert_one_line(separate("--repo", tmp_path, "-n", "bad", track), "bad.th")
    assert_one_line(separate("--repo", tmp_path / "none", "-n", "bad", track), "none")


def test_an_output_folder_that_cannot_be_written(repo: Path, track: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    options = ["--repo", repo, "-n", "tiny", "-o", tmp_path / "file"]
    assert_one_line(separate(*options, track), "cannot be written")


def test_a_missing_encoder_is_said_before_the_work(repo: Path, track: Path) -> None:
    code = "import sys; sys.modules['soundfile'] = None;"
    code += "from demucs_infer.separate import main; main(sys.argv[1:])"
    result = run("-c", code, "--repo", repo, "-n", "nothing", "--format", "ogg", track)
    assert_one_line(result, "pip install soundfile")


@pytest.mark.skipif(sys.platform == "win32", reason="needs the limits of POSIX")
@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_leaves_no_half_stem(format: str, repo: Path, track: Path) -> None:
    out = track.parent / "out"
    code = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000));"
    code += "from demucs_infer.separate import main; main(sys.argv[1:])"
    result = run("-c", code, "--repo", repo, "-n", "tiny", "-o", out, "--format", format, track)
    assert_one_line(result, "cannot be written")
    assert stems_of(out) == set()


def test_tracks_that_are_damaged_or_too_long_may_be_refused(repo: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", noise(2, 24_000).T.numpy(), 8000)
    cut = (tmp_path / "long.wav").read_bytes()[:50_000]
    (tmp_path / "cut.wav").write_bytes(cut)
    model = ["--repo", repo, "-n", "tiny", "-o", tmp_path / "out", "--json"]
    result = separate(*model, "--max-duration", 2, "--strict", tmp_path / "long.wav")
    assert result.returncode == 1
    assert "is longer than 2 s" in json.loads(result.stdout)["error"]
    result = separate(*model, "--strict", tmp_path / "cut.wav", tmp_path / "long.wav")
    assert result.returncode == 1
    damaged, whole = map(json.loads, result.stdout.splitlines())
    assert "cut off" in damaged["error"]
    assert whole["error"] is None
    result = separate(*model, tmp_path / "cut.wav")
    assert result.returncode == 0
    assert json.loads(result.stdout)["damaged"]["end_missing"]
