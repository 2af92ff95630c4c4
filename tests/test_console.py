"""The command line and its streams and signals, in processes of its own."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import tqdm

from demucs_infer.errors import DemucsInferError
from demucs_infer.io.console import Ended, command, json_text, put, signals_raise

from .helpers import SOURCES, environment, noise, run, stems_of

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="needs the shell of POSIX")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
DEMO = [sys.executable, "-m", "demucs_infer", "-n", "demo"]


@pytest.fixture
def song(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.wav", noise(2, 8000).T.numpy(), 44_100)
    soundfile.write(tmp_path / "b.wav", noise(2, 8000, seed=1).T.numpy(), 44_100)
    return tmp_path


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run our command with the options and redirections in `line`."""
    return subprocess.run(
        ["sh", "-c", f"{shlex.join(DEMO)} {line}"],
        cwd=folder,
        env={**environment(), "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
    )


def errors_of(result: subprocess.CompletedProcess[str]) -> list[str]:
    usual = ("Separating", "Stems in", "2 tracks: ")
    lines = (line for line in result.stderr.splitlines() if line and "%|" not in line)
    return [line for line in lines if not line.startswith(usual)]


@needs_linux
@pytest.mark.parametrize(
    ("line", "status", "errors", "stems"),
    [
        ("a.wav 2>&-", 0, 0, 4),
        ("-q a.wav <&- >&- 2>&-", 0, 0, 4),
        ("a.wav 2>/dev/full", 0, 0, 4),
        ("--json a.wav b.wav >/dev/full", 1, 1, 8),
        ("--json a.wav b.wav >&-", 1, 1, 8),
        ("--stems bass -o - a.wav >/dev/full", 1, 1, 0),
        ("--stems bass -o - missing.wav >&-", 1, 1, 0),
        ("- <&-", 1, 1, 0),
        ("--from-file - <&-", 1, 1, 0),
        ("missing.wav 2>&-", 1, 0, 0),
        ("--list-models >/dev/full", 1, 1, 0),
        ("--list-models >&-", 1, 1, 0),
        ("--help >/dev/full", 1, 1, 0),
        ("--version >&-", 1, 1, 0),
        ("--version >/dev/full", 1, 1, 0),
        ("--help 2>&-", 0, 0, 0),
    ],
)
def test_streams_that_are_closed_or_full(
    line: str, status: int, errors: int, stems: int, song: Path
) -> None:
    result = shell(line, song)
    assert (result.returncode, len(errors_of(result))) == (status, errors), result.stderr
    assert len(stems_of(song / "separated")) == stems
    for error in errors_of(result):
        assert error.startswith("demucs-infer: error: standard ") or "No space left" in error


@needs_posix
def test_closed_standard_output_is_noticed_before_the_track_is_looked_for(song: Path) -> None:
    assert "standard output is closed" in shell("--stems bass -o - missing.wav >&-", song).stderr


@needs_posix
def test_a_reader_that_has_gone_loses_no_stem(song: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    options = ["--json", "a.wav", "b.wav"]
    result = subprocess.run(
        [*DEMO, *options], stdout=writer, stderr=subprocess.PIPE, cwd=song, env=environment()
    )
    os.close(writer)
    assert (result.returncode, result.stderr.count(b"error:")) == (1, 1)
    assert len(stems_of(song / "separated")) == 8


@needs_linux
def test_no_file_takes_the_number_of_a_closed_stream(song: Path) -> None:
    code = "import os; from demucs_infer.io.console import command\n"
    code += "with command(): print(os.open('b.wav', os.O_RDONLY))"
    line = f"exec {sys.executable} -c {shlex.quote(code)} <&- 2>&-"
    result = subprocess.run(["sh", "-c", line], cwd=song, capture_output=True, text=True)
    assert int(result.stdout) > 2


@needs_linux
@pytest.mark.parametrize("path", [None, "/dev/full"])
def test_what_libraries_write_stops_nothing(
    path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = path and open(path, "w")  # noqa: PTH123, SIM115
    monkeypatch.setattr(sys, "stderr", stream)
    with command():
        assert list(tqdm.tqdm(range(3), desc="bar")) == [0, 1, 2]
        print("text", file=sys.stderr, flush=True)
    assert sys.stderr is stream


# --- names --------------------------------------------------------------------------------------

NAMES = {
    b"caf\xe9.wav": r"caf\xe9.wav",
    "\N{MUSICAL NOTE}.wav".encode(): None,
    b"a\x1b[2J\nb.wav": r"a\x1b[2J\nb.wav",
}


@needs_linux
@pytest.mark.parametrize(
    "settings",
    [
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"PYTHONIOENCODING": "latin-1:strict"},
    ],
    ids=str,
)
def test_names_of_any_bytes(settings: dict[str, str], song: Path) -> None:
    """File names stay what they are; what is said of them can be read everywhere."""
    (song / "in").mkdir()
    for name in NAMES:
        Path(os.fsdecode(bytes(song / "in") + b"/" + name)).write_bytes(
            (song / "a.wav").read_bytes()
        )
    options: list[str | bytes] = [*DEMO, "--json", "--flac", "in", b"in/miss\xed\x1bng.wav"]
    env = {**environment(), **settings}
    result = subprocess.run(options, cwd=song, env=env, capture_output=True)
    assert result.returncode == 1
    folders = {os.fsencode(path.name) for path in (song / "separated/demo").iterdir()}
    assert folders == {name.removesuffix(b".wav") for name in NAMES}
    said = result.stderr.decode()
    assert not {char for char in said if ord(char) < 32} - {"\n", "\r"}
    for shown in (*filter(None, NAMES.values()), r"miss\xed\x1bng.wav: no such file"):
        assert shown in said
    for line in result.stdout.decode("ascii").splitlines():
        json_line = json.loads(line)
        (json_line["input"] + str(json_line["error"])).encode()
        assert "\x1b" not in line
    titles = {
        soundfile.SoundFile(os.fsencode(path)).title
        for path in (song / "separated/demo").glob("*/bass.flac")
    }
    assert titles == {"caf\ufffd (bass)", "\N{MUSICAL NOTE} (bass)", "a[2J\nb (bass)"}


def test_help_in_an_encoding_that_lacks_its_characters() -> None:
    for encoding in ("latin-1", "ascii"):
        env = {**environment(), "PYTHONIOENCODING": encoding}
        result = run("-m", "demucs_infer", "--help", env=env)
        assert (result.returncode, result.stderr) == (0, "")
        assert "--two-stems" in result.stdout


def test_json_that_every_program_can_read() -> None:
    content = {"a": ["caf\udce9", 1, None, True], "b": {"c": Path("x\udcff")}}
    expected = {"a": [r"caf\xe9", 1, None, True], "b": {"c": r"x\xff"}}
    assert json.loads(json_text(content)) == expected


def test_standard_output_that_cannot_be_written_to() -> None:
    with pytest.raises(DemucsInferError, match="standard output: cannot be written to"):
        put("text", None)


# --- signals ------------------------------------------------------------------------------------


@needs_posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.usefixtures("hang_ups")
def test_a_signal_ends_the_command_cleanly(name: str, tmp_path: Path) -> None:
    number = signal.Signals[name]
    for track in "ab":
        soundfile.write(tmp_path / f"{track}.wav", noise(1, 44_100 * 60).T.numpy(), 44_100)
    process = subprocess.Popen(
        [*DEMO, "a.wav", "b.wav"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline().startswith("Separated tracks will be stored in ")
    assert process.stdout.readline() == "Separating track a.wav\n"
    for _ in range(3):  # one comes from the shell, one from the terminal
        process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    said = [line for line in errors.splitlines() if line and "%|" not in line]
    assert said == [f"demucs-infer: error: ended by {number.name}"]
    assert stems_of(tmp_path / "separated") == set()
    assert not list((tmp_path / "separated/demo").iterdir())


@needs_posix
def test_signals_in_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Ended) as ended, command():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)  # while it clears up
    assert ended.value.code == 143
    assert capsys.readouterr().err == "demucs-infer: error: ended by SIGTERM\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    seen: list[int] = []
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        with signals_raise():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
    assert seen == [signal.SIGTERM]


# --- no folder for temporary files --------------------------------------------------------------


def test_without_a_temporary_folder(song: Path) -> None:
    code = "import sys, tempfile; tempfile._candidate_tempdir_list = lambda: []\n"
    code += "from demucs_infer.separate import main; main(sys.argv[1:])\n"
    code += "assert 'torch._dynamo' not in sys.modules"
    env = {**environment(), "TMPDIR": str(song / "none")}
    arguments = ["-q", "-n", "demo", "--format", "ogg", "a.wav"]
    result = run("-c", code, *arguments, cwd=song, env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert stems_of(song / "separated") == {f"demo/a/{name}.ogg" for name in SOURCES}
    result = run("-c", code, *arguments, "--stems", "bass", "-o", "-", cwd=song, env=env)
    assert result.returncode == 1
    assert "set TMPDIR" in result.stderr


def test_a_module_without_a_command() -> None:
    result = run("-m", "demucs_infer.api")
    assert (result.returncode, result.stdout) == (2, "")
    assert "run demucs-infer" in result.stderr
