"""Files in, files out: through `Separator.separate_to_files` and the command line."""

from __future__ import annotations

import glob
import io
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from demucs_infer.api import Separator, TrackResult
from demucs_infer.demucs import Demucs
from demucs_infer.errors import OptionError
from demucs_infer.read.pcm import prevent_clip
from demucs_infer.storage import spool

from .helpers import (
    SOURCES,
    Command,
    assert_close,
    assert_one_line,
    environment,
    json_lines,
    noise,
    pair,
    run,
    save_package,
    separate,
    stems_of,
    write_track,
)

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="needs the signals of POSIX")
EXACT: dict[str, Any] = {"as_float": True, "clip": "none"}


def read(result: TrackResult) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(soundfile.read(stem.path, dtype="float32", always_2d=True)[0].T)
        for name, stem in result.stems.items()
    }


@pytest.mark.parametrize(
    ("model", "in_memory", "sound"),
    [
        ("tiny", 2**22, (1.2345, 48_000, 2)),
        ("tiny", 0, (1.2345, 22_050, 1)),
        ("pair", 0, (1.5001, 8000, 2)),
        ("pair", 2**22, (1e-3, 8000, 1)),
    ],
)
def test_streamed_stems_equal_those_in_memory(
    model: str, in_memory: int, sound: Any, repo: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(spool, "IN_MEMORY", in_memory)
    separator = Separator(model, repo, device="cpu", shifts=2, seed=3)
    track = write_track(tmp_path / "a.wav", *sound)
    _, stems = separator.separate_audio_file(track)
    result = separator.separate_to_files(track, tmp_path / "out", **EXACT)
    assert result.seconds == pytest.approx(sound[0], abs=1 / sound[1])
    written = read(result)
    assert list(written) == SOURCES
    for name, stem in stems.items():
        assert_close(written[name], stem, 1e-6)
        assert result.stems[name].peak == pytest.approx(stem.abs().max().item())


@pytest.mark.parametrize("clip", ["rescale", "rescale-all", "clamp", "tanh", "none", None])
def test_clip_modes_are_those_of_save_audio(
    separator: Separator, clip: str | None, tmp_path: Path
) -> None:
    track = write_track(tmp_path / "a.wav", gain=300)
    _, stems = separator.separate_audio_file(track)
    result = separator.separate_to_files(track, tmp_path / "out", as_float=True, clip=clip)
    peaks = {name: stem.abs().max().item() for name, stem in stems.items()}
    for name, stem in read(result).items():
        gain = result.stems[name].gain
        if clip == "rescale-all":  # one gain for all stems keeps their balance
            assert gain == pytest.approx(1 / (1.01 * max(peaks.values())))
            assert_close(stem, gain * stems[name], 1e-6)
        else:
            assert gain == pytest.approx(1 / (1.01 * peaks[name]) if clip == "rescale" else 1)
            assert_close(stem, prevent_clip(stems[name], clip), 3e-6)


@pytest.mark.parametrize("rate", [48_000, 22_050])
def test_stems_keep_the_rate_and_the_length_of_the_track(
    separator: Separator, rate: int, tmp_path: Path
) -> None:
    track = write_track(tmp_path / "a.wav", 1.2345, rate)
    result = separator.separate_to_files(track, tmp_path / "out", **EXACT, keep_rate=True)
    assert soundfile.info(result.stems["bass"].path).samplerate == rate
    stems, (_, model_rate) = read(result), separator.separate_audio_file(track)
    assert stems["bass"].shape[1] == int(1.2345 * rate)
    if rate == 48_000:
        # The file has six samples for each of the model's. The first of them is at its time.
        difference = (stems["bass"][:, ::6] - model_rate["bass"]).abs().mean()
        assert difference < 0.3 * stems["bass"].std()


def test_refused_options_write_nothing(separator: Separator, tmp_path: Path) -> None:
    track = write_track(tmp_path / "a.wav")
    for options in (
        {"format": "xyz"},
        {"format": "mp3", "as_float": True},
        {"clip": "loud"},
        {"two_stems": "voice"},
        {"two_stems": "bass", "other_method": "times"},
        {"filename": "{stem}.{nothing}"},
    ):
        with pytest.raises(OptionError):
            separator.separate_to_files(track, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_seed_fixes_the_shifts(fast_repo: Path, tmp_path: Path) -> None:
    track, offsets = write_track(tmp_path / "a.wav"), []
    for seed in (5, 5, 6, None):
        random.seed(5)
        separator = Separator("pair", fast_repo, device="cpu", shifts=2, seed=seed)
        offsets.append(separator.separate_to_files(track, tmp_path / "out").offsets)
    assert offsets[0] == offsets[1] == offsets[3] != offsets[2]
    assert len(offsets[0]) == 4
    assert all(0 <= offset <= 4000 for offset in offsets[0])


# --- the command line ---------------------------------------------------------------------------


def test_bad_tracks_are_reported_and_the_others_separated(command: Command, tmp_path: Path) -> None:
    for name in ("a", "b", "d"):
        write_track(tmp_path / "music" / f"{name}.wav")
    (tmp_path / "music" / "text.wav").write_text("words\n" * 999)
    (tmp_path / "empty.mp3").touch()
    (tmp_path / "folder").mkdir()
    result = command("music", "missing.wav", "empty.mp3", "folder", "--json")
    assert result.returncode == 1
    results = {line["input"]: line for line in json_lines(result)}
    reasons = {
        "missing.wav": "no such file",
        "empty.mp3": "empty",
        "folder": "folder",
        "music/text.wav": "audio",
    }
    assert results.keys() == {*reasons, *(f"music/{name}.wav" for name in "abd")}
    for name, reason in reasons.items():
        assert results[name]["error"].startswith(f"{name}: ")
        assert reason in results[name]["error"]
        assert sum(results[name]["error"] in line for line in result.stderr.splitlines()) == 1
    assert "7 tracks: 3 separated, 4 failed" in result.stderr
    assert len(stems_of(tmp_path / "separated")) == 12
    first = results["music/a.wav"]
    assert (first["model"], first["error"], first["skipped"]) == ("tiny", None, False)
    assert (first["seconds"], len(first["offsets"])) == (1, 1)
    assert first["elapsed"] > 0
    assert first["version"]
    for name in SOURCES:
        stem = first["stems"][name]
        wav, _ = soundfile.read(tmp_path / stem["path"])
        assert np.abs(wav).max() == pytest.approx(stem["peak"] * stem["gain"], abs=1e-4)


def test_skip_existing_resumes(command: Command, tmp_path: Path) -> None:
    tracks = [write_track(tmp_path / f"{name}.wav") for name in "abc"]
    command(*tracks[:2])
    (tmp_path / "separated/tiny/b/bass.wav").unlink()
    kept = (tmp_path / "separated/tiny/a/bass.wav").stat().st_mtime_ns
    result = command(".", "--skip-existing", "--json")  # stems are no tracks
    assert [line["skipped"] for line in json_lines(result)] == [True, False, False]
    assert "3 tracks: 2 separated, 1 already there" in result.stderr
    assert len(stems_of(tmp_path / "separated")) == 12
    assert (tmp_path / "separated/tiny/a/bass.wav").stat().st_mtime_ns == kept
    result = command(*tracks, "--skip-existing", "-q")
    assert (result.stdout, result.stderr) == ("", "")


def test_collisions_are_refused_before_the_work(command: Command, tmp_path: Path) -> None:
    for name in ("x/a.wav", "y/a.wav"):
        write_track(tmp_path / name)
    result = command("x", "y")
    assert result.returncode == 2
    assert_one_line(result, "{parent}")
    assert not (tmp_path / "separated").exists()
    options = ["--filename", "{parent}/{track}/{stem}.{ext}", "--stems", "bass"]
    assert command("x", "y", *options).returncode == 0
    assert stems_of(tmp_path / "separated/tiny") == {"x/a/bass.wav", "y/a/bass.wav"}


def test_pipes_carry_the_samples_of_the_files(
    command: Command, fast_repo: Path, tmp_path: Path
) -> None:
    track = write_track(tmp_path / "a.wav")
    options = ["--stems", "vocals", "--seed", 1, "--format"]
    for format in ("flac", "mp3", "wav"):
        assert command(*options, format, "a.wav").returncode == 0
    words = ["--repo", fast_repo, "-n", "tiny", "-d", "cpu", *options, "mp3", "-o", "-", "-"]
    process = subprocess.run(
        [sys.executable, "-m", "demucs_infer", *map(str, words)],
        input=track.read_bytes(),
        capture_output=True,
        cwd=tmp_path,
        env=environment(),
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.startswith(b"Separating -\n")
    piped = {"mp3": process.stdout}
    for format in ("flac", "wav"):
        result = command(*options, format, "-o", "-", "-", input=track.read_bytes())
        piped[format] = result.stdout.encode("utf-8", "surrogateescape")
    for format, content in piped.items():
        samples, rate = soundfile.read(io.BytesIO(content))
        assert rate == 8000
        written, _ = soundfile.read(tmp_path / f"separated/tiny/a/vocals.{format}")
        assert np.array_equal(samples, written)


def test_standard_input_that_cannot_be_decoded_fails(command: Command, tmp_path: Path) -> None:
    assert_one_line(command("-", input="words " * 999), "stdin: ", "audio")
    assert stems_of(tmp_path) == set()


# --- processes ----------------------------------------------------------------------------------


@pytest.mark.slow
@needs_posix
def test_killed_command_resumes_and_leaves_nothing_else(
    command: Command, fast_repo: Path, tmp_path: Path
) -> None:
    tracks = [write_track(tmp_path / f"{name}.wav", 4) for name in "abcd"]
    options = ["--seed", 1, "--skip-existing", *tracks]
    assert command(*options, "-o", "whole").returncode == 0
    words = ["--repo", fast_repo, "-n", "tiny", "-d", "cpu", *options, "-o", tmp_path / "out"]
    for kill_after in (1, 6):  # stems
        process = subprocess.Popen(
            [sys.executable, "-m", "demucs_infer", *map(str, words)],
            stderr=subprocess.DEVNULL,
            env={**environment(), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        # `Path.glob` fails if a folder disappears meanwhile.
        stems = f"{tmp_path}/out/tiny/*/*"
        while process.poll() is None and len(glob.glob(stems)) < kill_after:  # noqa: PTH207
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert command(*options, "-o", "out").returncode == 0
    assert stems_of(tmp_path / "out") == stems_of(tmp_path / "whole")
    for name in stems_of(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
@pytest.mark.parametrize("clip", ["none", "rescale"])
def test_track_that_does_not_fit_on_the_disk_leaves_room_for_the_next(
    clip: str, fast_repo: Path, tmp_path: Path
) -> None:
    (tmp_path / "disk").mkdir()
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    script = 'mount -t tmpfs -o size=3m tmpfs disk && "$@"; code=$?; find disk -type f; exit $code'
    allowed = (
        shutil.which("mount")
        and not subprocess.run(
            [*mount, "mount -t tmpfs tmpfs /tmp"], capture_output=True
        ).returncode
    )
    if not allowed:
        pytest.skip("needs the right to mount")
    write_track(tmp_path / "long.wav", 60)
    write_track(tmp_path / "short.wav", 2)
    options = ["--repo", str(fast_repo), "-n", "tiny", "-o", "disk", "--clip-mode", clip]
    command = [sys.executable, "-m", "demucs_infer", *options, "long.wav", "short.wav"]
    result = subprocess.run(
        [*mount, script, "sh", *command], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert re.search(r"WARNING: disk/tiny: .*\d+ MB free", result.stderr)
    assert re.search(r"error: [^ ]+: cannot be written (to )?\(No space left", result.stderr)
    assert "2 tracks: 1 separated, 1 failed" in result.stderr
    listed = [line for line in result.stdout.splitlines() if not line.startswith("Separat")]
    assert sorted(listed) == sorted(f"disk/tiny/short/{name}.wav" for name in SOURCES)


@pytest.mark.parametrize("options", [[], ["--player"]])
def test_warning_of_a_full_disk_counts_the_page(
    options: list[str], fast_repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracks = [tmp_path / "a.wav", tmp_path / "b.wav"]
    for track in tracks:
        write_track(track, 5)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    options = ["--repo", fast_repo, "-n", "tiny", "-o", tmp_path / "out", "--mp3", *options]
    assert ("2 MB free" in separate(*options, *tracks).stderr) == ("--player" in options)


PEAK = """
import sys
from demucs_infer.separate import command
command(sys.argv[1:])
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_hour_takes_the_memory_of_two_minutes(tmp_path: Path) -> None:
    """The stems have the right length, and the same music at the end."""
    options = {"sources": ["a", "b"], "audio_channels": 1, "channels": 4, "depth": 1}
    options |= {"samplerate": 8000, "segment": 40, "rewrite": False, "dconv_mode": 0}
    model, _ = pair(Demucs, resample=False, normalize=False, **options)
    save_package(tmp_path / "small.th", model)
    # The distance of the windows is the period, so that all windows are alike.
    period = noise(1, 30 * 8000)[0].numpy()
    peaks, ends = [], []
    for repetitions in (4, 120):
        with soundfile.SoundFile(tmp_path / "a.flac", "w", 8000, 1) as file:
            for _ in range(repetitions):
                file.write(period)
        command = ["--repo", ".", "-n", "small", "--shifts", 0, "--clip-mode", "none", "a.flac"]
        result = run("-c", PEAK, "-q", *command, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout) // 1000)  # megabytes
        with soundfile.SoundFile(tmp_path / "separated/small/a/b.wav") as file:
            assert file.frames == repetitions * 30 * 8000
            file.seek(-60 * 8000, soundfile.SEEK_END)
            ends.append(file.read())
    assert peaks[1] - peaks[0] < 60
    assert np.abs(ends[0]).max() > 0.01
    assert np.abs(ends[1] - ends[0]).max() < 1e-3
