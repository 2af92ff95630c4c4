"""Files in, files out: through `Separator.separate_to_files` and the command line."""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from demucs_infer.api import Output, Separator, TrackResult, save_audio
from demucs_infer.audio import AudioFile
from demucs_infer.demucs import Demucs
from demucs_infer.errors import LoadAudioError, OptionError, SaveAudioError
from demucs_infer.io import spool
from demucs_infer.io.formats import FORMATS
from demucs_infer.read.pcm import prevent_clip
from demucs_infer.separate import main

from .helpers import (
    SOURCES,
    assert_close,
    assert_one_line,
    environment,
    noise,
    pair,
    run,
    save_package,
    separate,
    stems_of,
)


def write_track(
    path: Path, seconds: float = 1.0, rate: int = 8000, channels: int = 2, gain: float = 1
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = gain * noise(channels, int(seconds * rate), seed=len(path.name))
    soundfile.write(path, wav.T.numpy(), rate, subtype="FLOAT")
    return path


@pytest.fixture(scope="module", params=["tiny", "pair"])
def separator(request: pytest.FixtureRequest, repo: Path) -> Separator:
    return Separator(request.param, repo, device="cpu", shifts=2, seed=3)


def read(result: TrackResult) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(soundfile.read(stem.path, dtype="float32", always_2d=True)[0].T)
        for name, stem in result.stems.items()
    }


@pytest.mark.parametrize(
    ("seconds", "rate", "channels"),
    [
        (3.0001, 8000, 2),
        (0.07, 48_000, 2),
        (2.3456, 48_000, 2),
        (2.3456, 22_050, 1),
        (1e-3, 8000, 1),
    ],
)
@pytest.mark.parametrize("in_memory", [0, 2**22])
def test_streamed_stems_are_those_in_memory(
    separator: Separator,
    seconds: float,
    rate: int,
    channels: int,
    in_memory: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spool, "IN_MEMORY", in_memory)
    track = write_track(tmp_path / "a.wav", seconds, rate, channels)
    _, stems = separator.separate_audio_file(track)
    result = separator.separate_to_files(track, tmp_path / "out", as_float=True, clip="none")
    assert result.seconds == pytest.approx(seconds, abs=1 / rate)
    written = read(result)
    assert list(written) == SOURCES
    for name, stem in stems.items():
        assert_close(written[name], stem, 1e-6)
        assert result.stems[name].peak == pytest.approx(stem.abs().max().item())


@pytest.mark.parametrize("gain", [1, 300])
@pytest.mark.parametrize("clip", ["rescale", "clamp", "tanh", "none", None])
def test_clip_modes_are_those_of_save_audio(
    separator: Separator, clip: str, gain: float, tmp_path: Path
) -> None:
    track = write_track(tmp_path / "a.wav", gain=gain)
    _, stems = separator.separate_audio_file(track)
    result = separator.separate_to_files(track, tmp_path / "out", as_float=True, clip=clip)
    for name, stem in read(result).items():
        assert_close(stem, prevent_clip(stems[name], clip), 3e-6)
        expected = prevent_clip(stems[name], "rescale").abs().max() / stems[name].abs().max()
        assert result.stems[name].gain == pytest.approx(expected if clip == "rescale" else 1)


def test_one_gain_for_all_stems_keeps_their_balance(separator: Separator, tmp_path: Path) -> None:
    track = write_track(tmp_path / "a.wav", gain=300)
    _, stems = separator.separate_audio_file(track)
    result = separator.separate_to_files(track, tmp_path, as_float=True, clip="rescale-all")
    (gain,) = {stem.gain for stem in result.stems.values()}
    loudest = max(stem.abs().max().item() for stem in stems.values())
    assert gain == pytest.approx(1 / (1.01 * loudest))
    for name, stem in read(result).items():
        assert_close(stem, gain * stems[name], 1e-6)


def test_every_format_is_written(repo: Path, tmp_path: Path) -> None:
    """What is in the files is tested with the encoders."""
    separator = Separator("tiny", repo, device="cpu", shifts=0, stems=["bass"])
    track = write_track(tmp_path / "a.wav", 2)
    for format in FORMATS:
        result = separator.separate_to_files(track, tmp_path / "out", format=format)
        file = AudioFile(result.stems["bass"].path)
        assert file.path.suffix == f".{format}"
        assert (file.channels(), file.samplerate()) == (2, 48_000 if format == "opus" else 8000)
        assert file.duration == pytest.approx(2, abs=0.01)


@pytest.mark.parametrize("rate", [48_000, 22_050, 96_000, 8000])
def test_the_rate_of_the_track(repo: Path, rate: int, tmp_path: Path) -> None:
    """Same rate, same length, same place."""
    separator = Separator("tiny", repo, device="cpu", shifts=0)
    track = write_track(tmp_path / "a.wav", 1.2345, rate)
    options: dict[str, Any] = {"as_float": True, "clip": "none", "keep_rate": True}
    result = separator.separate_to_files(track, tmp_path / "out", **options)
    assert soundfile.info(result.stems["bass"].path).samplerate == rate
    stems, (_, model_rate) = read(result), separator.separate_audio_file(track)
    assert stems["bass"].shape[1] == int(1.2345 * rate)
    if rate == 48_000:  # six samples for one: the first of them
        assert (stems["bass"][:, ::6] - model_rate["bass"]).abs().mean() < 0.3 * stems["bass"].std()


def test_tags_travel(repo: Path, tmp_path: Path) -> None:
    track = tmp_path / "a.flac"
    with soundfile.SoundFile(track, "w", 8000, 2) as file:
        file.title, file.artist, file.album, file.date = "Söng", "Me", "Us", "1999"
        file.write(noise(2, 8000).T.numpy())
    separator = Separator("tiny", repo, device="cpu", shifts=0, stems=["bass"])
    for format in ("wav", "flac", "ogg", "opus"):
        result = separator.separate_to_files(track, tmp_path / "out", format=format)
        with soundfile.SoundFile(result.stems["bass"].path) as file:
            found = file.title, file.artist, file.album, file.date
        assert found == ("Söng (bass)", "Me", "Us", "1999")
    for format in ("mp3", "m4a"):
        result = separator.separate_to_files(track, tmp_path / "out", format=format)
        with av.open(str(result.stems["bass"].path)) as container:
            tags = container.metadata
        assert (tags["title"], tags["artist"], tags["album"]) == ("Söng (bass)", "Me", "Us")
    untitled = write_track(tmp_path / "My song.wav")
    result = separator.separate_to_files(untitled, tmp_path / "out")
    with soundfile.SoundFile(result.stems["bass"].path) as file:
        assert file.title == "My song (bass)"


@pytest.mark.parametrize("method", ["add", "minus", "none"])
def test_two_stems(repo: Path, method: str, tmp_path: Path) -> None:
    separator = Separator("tiny", repo, device="cpu", shifts=0)
    track = write_track(tmp_path / "a.wav", 2)
    origin, stems = separator.separate_audio_file(track)
    options: dict[str, Any] = {"two_stems": "vocals", "other_method": method}
    result = separator.separate_to_files(
        track, tmp_path / "out", as_float=True, clip="none", **options
    )
    expected = {
        "add": {"no_vocals": stems["drums"] + stems["bass"] + stems["other"]},
        "minus": {"minus_vocals": origin - stems["vocals"]},
        "none": {},
    }[method]
    written = read(result)
    assert list(written) == ["vocals", *expected]
    for name, stem in {"vocals": stems["vocals"], **expected}.items():
        assert_close(written[name], stem, 1e-6)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"format": "xyz"}, OptionError),
        ({"format": "mp3", "as_float": True}, OptionError),
        ({"clip": "loud"}, OptionError),
        ({"two_stems": "voice"}, OptionError),
        ({"two_stems": "bass", "other_method": "times"}, OptionError),
        ({"filename": "{stem}.{nothing}"}, OptionError),
    ],
    ids=str,
)
def test_options_that_are_refused(
    separator: Separator, options: dict, error: type[Exception], tmp_path: Path
) -> None:
    track = write_track(tmp_path / "a.wav")
    with pytest.raises(error):
        separator.separate_to_files(track, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_goes_wrong_is_raised_and_leaves_nothing(separator: Separator, tmp_path: Path) -> None:
    with pytest.raises(LoadAudioError, match="no such file"):
        separator.separate_to_files(tmp_path / "none.wav", tmp_path / "out")
    (tmp_path / "out" / "a" / "drums.wav").mkdir(parents=True)
    with pytest.raises(SaveAudioError, match=r"drums\.wav: cannot be written"):
        separator.separate_to_files(write_track(tmp_path / "a.wav"), tmp_path / "out")
    assert stems_of(tmp_path / "out") == set()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]


def test_a_seed_fixes_the_shifts(repo: Path, tmp_path: Path) -> None:
    track, stems = write_track(tmp_path / "a.wav"), []
    for seed in (5, 5, 6, None):
        random.seed(5)
        separator = Separator("pair", repo, device="cpu", shifts=2, seed=seed)
        stems.append(separator.separate_to_files(track, tmp_path / "out").offsets)
    assert stems[0] == stems[1] == stems[3] != stems[2]
    assert len(stems[0]) == 4
    assert all(0 <= offset <= 4000 for offset in stems[0])


# --- the command line ---------------------------------------------------------------------------


@pytest.fixture
def command(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the command line with the tiny model in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *options: main(["--repo", str(repo), "-n", "tiny", *map(str, options)])


def test_damage_is_reported(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_track(tmp_path / "a.wav", 2)
    (tmp_path / "b.wav").write_bytes(whole.read_bytes()[: -4 * 2 * 8000])
    command("a.wav", "b.wav", "--json")
    output = capsys.readouterr()
    a, b = (json.loads(line) for line in output.out.splitlines())
    assert (a["damaged"], a["seconds"]) == (None, 2)
    assert b["damaged"] == {"places": 0, "seconds": 1.0, "end_missing": True}
    assert (b["seconds"], b["error"]) == (1, None)
    assert output.err.count("b.wav: is cut off at the end, 1.00 s of sound lost") == 1


def test_a_folder_a_bad_file_and_a_summary(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b", "d"):
        write_track(tmp_path / "music" / f"{name}.wav")
    (tmp_path / "music" / "c.wav").write_text("no music")
    with pytest.raises(SystemExit) as caught:
        command("music", "--json")
    assert caught.value.code == 1
    output = capsys.readouterr()
    results = {Path(r["input"]).name: r for r in map(json.loads, output.out.splitlines())}
    assert sorted(results) == ["a.wav", "b.wav", "c.wav", "d.wav"]
    assert "no audio file" in results["c.wav"]["error"]
    assert "4 tracks: 3 separated, 1 failed" in output.err
    assert len(stems_of(tmp_path / "separated")) == 12
    first = results["a.wav"]
    assert (first["model"], first["error"], first["skipped"]) == ("tiny", None, False)
    assert first["seconds"] == 1
    assert first["elapsed"] > 0
    assert len(first["offsets"]) == 1
    assert first["version"]
    for name in SOURCES:
        stem = first["stems"][name]
        wav, _ = soundfile.read(stem["path"])
        assert np.abs(wav).max() == pytest.approx(stem["peak"] * stem["gain"], abs=1e-4)


def test_stems_in_the_folder_are_no_tracks_the_second_time(
    command: Callable[..., None], tmp_path: Path
) -> None:
    write_track(tmp_path / "a.wav")
    command(".")
    before = stems_of(tmp_path)
    command(".")
    assert stems_of(tmp_path) == before


def test_skip_existing_resumes(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracks = [write_track(tmp_path / f"{name}.wav") for name in "abc"]
    command(*tracks[:2])
    (tmp_path / "separated/tiny/b/bass.wav").unlink()
    kept = (tmp_path / "separated/tiny/a/bass.wav").stat().st_mtime_ns
    capsys.readouterr()
    command(*tracks, "--skip-existing", "--json")
    output = capsys.readouterr()
    results = [json.loads(line) for line in output.out.splitlines()]
    assert [result["skipped"] for result in results] == [True, False, False]
    assert "3 tracks: 2 separated, 1 already there" in output.err
    assert len(stems_of(tmp_path / "separated")) == 12
    assert (tmp_path / "separated/tiny/a/bass.wav").stat().st_mtime_ns == kept
    command(*tracks, "--skip-existing", "-q")
    assert capsys.readouterr() == ("", "")


def test_collisions_are_refused_before_the_work(repo: Path, tmp_path: Path) -> None:
    for name in ("x/a.wav", "y/a.wav"):
        write_track(tmp_path / name)
    result = separate("--repo", repo, "-n", "tiny", "x", "y", cwd=tmp_path)
    assert result.returncode == 2
    assert_one_line(result, "would both become", "{parent}")
    assert not (tmp_path / "separated").exists()
    options = ["--filename", "{parent}/{track}/{stem}.{ext}", "--stems", "bass"]
    assert separate("--repo", repo, "-n", "tiny", "x", "y", *options, cwd=tmp_path).returncode == 0
    stems = {"tiny/x/a/bass.wav", "tiny/y/a/bass.wav"}
    assert stems_of(tmp_path / "separated") == stems


@pytest.mark.parametrize("format", ["wav", "flac", "mp3"])
def test_pipes(format: str, repo: Path, tmp_path: Path) -> None:
    track = write_track(tmp_path / "a.wav")
    options = ["--repo", repo, "-n", "tiny", "--stems", "vocals", "--seed", 1, "--format", format]
    command = [sys.executable, "-m", "demucs_infer", *map(str, options), "-o", "-", "-"]
    result = subprocess.run(
        command, input=track.read_bytes(), capture_output=True, cwd=tmp_path, env=environment()
    )
    assert result.returncode == 0, result.stderr
    assert separate(*options, track, cwd=tmp_path).returncode == 0
    piped, rate = soundfile.read(io.BytesIO(result.stdout))
    written, _ = soundfile.read(tmp_path / f"separated/tiny/a/vocals.{format}")
    assert rate == 8000
    assert np.array_equal(piped, written)
    assert result.stderr.startswith(b"Separating -\n")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-o", "-"], ["one stem, not 4"]),
        (["-o", "-", "--stems", "bass", "--json"], ["--json"]),
        (["-o", "-", "--stems", "bass", "a.wav"], ["one track"]),
        (["--format", "mp3", "--int24"], ["24"]),
        (["--format", "mp3", "--bitrate", "500"], ["320"]),
        (["--format", "opus", "--float32"], ["float32"]),
        (["--filename", "{track}.{ext}"], ["{stem}"]),
        (["--filename", "{x}"], ["{x}"]),
        (["--seed", "x"], ["--seed"]),
        (["-o", "."], ["would replace"]),
    ],
    ids=str,
)
def test_wrong_usage(options: list, words: list, repo: Path, tmp_path: Path) -> None:
    write_track(tmp_path / "a.wav")
    write_track(tmp_path / "tiny/bass/bass.wav")
    track = tmp_path / "tiny/bass/bass.wav"
    result = separate("--repo", repo, "-n", "tiny", track, *options, cwd=tmp_path)
    assert_one_line(result, *words)
    assert result.returncode == 2
    assert stems_of(tmp_path) == {"a.wav", "tiny/bass/bass.wav"}


def test_standard_input_that_is_no_audio(repo: Path, tmp_path: Path) -> None:
    result = separate("--repo", repo, "-n", "tiny", "-", cwd=tmp_path, input="words " * 999)
    assert_one_line(result, "stdin: is no audio file")
    assert stems_of(tmp_path) == set()


needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="needs the signals of POSIX")


@needs_posix
def test_interrupted(repo: Path, tmp_path: Path) -> None:
    tracks = [write_track(tmp_path / f"{name}.wav", 60) for name in "ab"]
    process = subprocess.Popen(
        [sys.executable, "-m", "demucs_infer", "--json", "--repo", repo, "-n", "tiny", *tracks],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr.readline().startswith("Separating")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "interrupted" in errors
    assert stems_of(tmp_path / "separated") == set()
    assert not list((tmp_path / "separated/tiny").glob(".*"))


@pytest.mark.slow
@needs_posix
def test_killed_at_any_time_and_resumed(repo: Path, tmp_path: Path) -> None:
    """The result equals an undisturbed run, and nothing else is left."""
    tracks = [write_track(tmp_path / f"{name}.wav", 4) for name in "abcd"]
    options = ["--repo", repo, "-n", "tiny", "--seed", 1, "--skip-existing", *tracks]
    assert separate(*options, "-o", tmp_path / "whole").returncode == 0
    command = [sys.executable, "-m", "demucs_infer", *map(str, options), "-o", tmp_path / "out"]
    for kill_after in (1, 2, 6, 11):  # stems
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment())
        while process.poll() is None and len(list(tmp_path.glob("out/tiny/*/*"))) < kill_after:
            time.sleep(0.001)
        process.kill()
        process.wait()
    assert separate(*options, "-o", tmp_path / "out").returncode == 0
    assert stems_of(tmp_path / "out") == stems_of(tmp_path / "whole")
    for name in stems_of(tmp_path / "whole"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="needs tmpfs")
@pytest.mark.parametrize("clip", ["rescale", "none"])
def test_a_full_disk(clip: str, repo: Path, tmp_path: Path) -> None:
    """The track that does not fit fails and leaves nothing; the next one is tried, and fits."""
    (tmp_path / "disk").mkdir()
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    script = 'mount -t tmpfs -o size=3m tmpfs disk && "$@"; code=$?; find disk -type f; exit $code'
    if subprocess.run([*mount, "true"], capture_output=True).returncode or not shutil.which(
        "mount"
    ):
        pytest.skip("needs the right to mount")
    write_track(tmp_path / "long.wav", 60)
    write_track(tmp_path / "short.wav", 2)
    options = ["--repo", str(repo), "-n", "tiny", "-o", "disk", "--clip-mode", clip]
    result = subprocess.run(
        [
            *mount,
            script,
            "sh",
            sys.executable,
            "-m",
            "demucs_infer",
            *options,
            "long.wav",
            "short.wav",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "long/" in result.stderr or "no room" in result.stderr
    assert "2 tracks: 1 separated, 1 failed" in result.stderr
    listed = [line for line in result.stdout.splitlines() if not line.startswith("Separat")]
    assert sorted(listed) == sorted(f"disk/tiny/short/{name}.wav" for name in SOURCES)


PEAK = """
import sys
from demucs_infer.separate import main
main(sys.argv[1:])
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def peak_memory(*options: object, **kwargs: Any) -> int:
    """The command's peak of resident memory, in megabytes."""
    result = run("-c", PEAK, "-q", *options, **kwargs)
    assert result.returncode == 0, result.stderr
    return int(result.stdout) // 1000


reads_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.slow
@reads_proc
def test_memory_does_not_grow_with_the_track(repo: Path, tmp_path: Path) -> None:
    """Samples of eight minutes would be 150 MB: the mixture and four stems."""
    options = ["--repo", repo, "-n", "tiny", "--shifts", 0, "--overlap", 0]
    tracks = [write_track(tmp_path / f"{minutes}.wav", 60 * minutes) for minutes in (1, 8)]
    peaks = [peak_memory(*options, track, cwd=tmp_path) for track in tracks]
    assert peaks[1] - peaks[0] < 60
    assert soundfile.info(tmp_path / "separated/tiny/8/bass.wav").frames == 8 * 60 * 8000


@pytest.mark.slow
@reads_proc
def test_six_hours(tmp_path: Path) -> None:
    """The same memory as for two minutes, the right length, and the same music at the end."""
    options = {"sources": ["a", "b"], "audio_channels": 1, "channels": 4, "depth": 1}
    options |= {"samplerate": 8000, "segment": 40, "rewrite": False, "dconv_mode": 0}
    model, _ = pair(Demucs, resample=False, normalize=False, **options)
    save_package(tmp_path / "small.th", model)
    period = noise(1, 30 * 8000)[0].numpy()  # the windows' distance, so that all are alike
    peaks, ends = [], []
    for repetitions in (4, 720):
        with soundfile.SoundFile(tmp_path / "a.flac", "w", 8000, 1) as file:
            for _ in range(repetitions):
                file.write(period)
        command = ["--repo", ".", "-n", "small", "--shifts", 0, "--clip-mode", "none", "a.flac"]
        peaks.append(peak_memory(*command, cwd=tmp_path))
        with soundfile.SoundFile(tmp_path / "separated/small/a/b.wav") as file:
            assert file.frames == repetitions * 30 * 8000
            file.seek(-60 * 8000, soundfile.SEEK_END)
            ends.append(file.read())
    assert peaks[1] - peaks[0] < 60
    assert np.abs(ends[0]).max() > 0.01
    assert np.abs(ends[1] - ends[0]).max() < 1e-3


def test_what_a_separator_takes(repo: Path) -> None:
    separator = Separator("tiny", repo, device="cpu", shifts=0)
    wav = noise(2, 5000)
    _, expected = separator.separate_tensor(wav)
    integers = (wav * 32767).short()
    forms: dict[str, Any] = {
        "float64": wav.double(),
        "numpy": wav.numpy(),
        "numpy, by columns": np.asfortranarray(wav.numpy().astype(">f8")),
        "backwards and back": wav.flip(1).numpy()[:, ::-1],
        "not contiguous": wav.t().contiguous().t(),
        "int16": integers,
        "int32": integers.int() * 65_538,
    }
    for form, samples in forms.items():
        before = samples.copy() if isinstance(samples, np.ndarray) else samples.clone()
        origin, stems = separator.separate_tensor(samples)
        assert origin.dtype == stems["bass"].dtype == torch.float32
        assert_close(stems["bass"], expected["bass"], 3e-3 if "int" in form else 1e-6)
        assert (before == samples).all(), form
    mono = separator.separate_tensor(wav[0])
    assert torch.equal(mono.stems["bass"], separator.separate_tensor(wav[:1]).stems["bass"])
    assert mono.origin.shape == (2, 5000)


def test_an_output_serves_several_tracks(repo: Path, tmp_path: Path) -> None:
    separator = Separator("tiny", repo, device="cpu", shifts=0)
    output = Output(tmp_path / "out", "{parent}-{track}-{stem}.{ext}", format="flac")
    for name in ("x/a.wav", "y/a.wav"):
        separator.separate_to_files(write_track(tmp_path / name), output)
    expected = {f"{parent}-a-{stem}.flac" for parent in "xy" for stem in SOURCES}
    assert stems_of(tmp_path / "out") == expected
    save_audio(noise(2, 100), tmp_path / "b.wav", 8000, clip="rescale-all")
