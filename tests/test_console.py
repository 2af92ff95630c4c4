"""The streams, the signals and the names of a process that runs the command line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import soundfile
import tqdm

from demucs_infer.batch.console import Ended, streams_and_signals

from .helpers import SOURCES, Command, assert_one_line, environment, run, stems_of, write_track

needs_posix = pytest.mark.skipif(sys.platform == "win32", reason="needs the shell of POSIX")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
slow = pytest.mark.slow
MODULE = [sys.executable, "-m", "demucs_infer"]


@pytest.fixture
def words(fast_repo: Path) -> list[str]:
    """The command that separates with the model of `fast_repo`."""
    return [*MODULE, "--repo", str(fast_repo), "-n", "tiny", "-d", "cpu"]


@pytest.fixture
def song(tmp_path: Path) -> Path:
    """A folder with the tracks `a.wav` and `b.wav`."""
    for name in ("a.wav", "b.wav"):
        write_track(tmp_path / name, 0.5)
    return tmp_path


LINES = [
    ("a.wav 2>&-", 0, 0, 4),
    ("a.wav 2>/dev/full", 0, 0, 4),
    ("missing.wav 2>&-", 1, 0, 0),
    ("--json a.wav b.wav >&-", 1, 1, 8),
    ("--json a.wav b.wav >/dev/full", 1, 1, 8),
    ("--json a.wav b.wav >gone", 1, 1, 8),
    ("--stems bass -o - a.wav >/dev/full", 1, 1, 0),
    ("--stems bass -o - missing.wav >&-", 1, 1, 0),
    ("--version >/dev/full", 1, 1, 0),
    ("- <&-", 1, 1, 0),
    ("--from-file - <&-", 1, 1, 0),
]
PROCESSES = [
    ("-q a.wav <&- >&- 2>&-", 0, 0, 4),
    ("--list-models >&-", 1, 1, 0),
    ("--help 2>&-", 0, 0, 0),
]
STREAMS = {"<": "stdin", ">": "stdout", "2>": "stderr"}


@needs_linux
@pytest.mark.parametrize(("line", "status", "errors", "stems"), PROCESSES)
def test_process_with_closed_and_full_streams_loses_no_stem(
    line: str, status: int, errors: int, stems: int, words: list[str], song: Path
) -> None:
    result = subprocess.run(
        ["sh", "-c", f"{shlex.join(words)} {line}"],
        cwd=song,
        env={**environment(), "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
    )
    check_errors(result, status, errors)
    assert len(stems_of(song / "separated")) == stems


@needs_linux
@pytest.mark.parametrize(("line", "status", "errors", "stems"), LINES)
def test_closed_and_full_streams_lose_no_stem(
    line: str, status: int, errors: int, stems: int, command: Command, song: Path
) -> None:
    *options, redirection = line.split()
    sign, target = re.fullmatch(r"(2?[<>])(.*)", redirection).groups()
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as gone, open("/dev/full", "w") as full:  # noqa: PTH123
        stream = {"gone": gone, "/dev/full": full, "&-": None}[target]
        check_errors(command(*options, streams={STREAMS[sign]: stream}), status, errors)
        with contextlib.suppress(OSError):
            full.close()
    assert len(stems_of(song / "separated")) == stems


def check_errors(result: subprocess.CompletedProcess[str], status: int, count: int) -> None:
    """Assert that there are `count` lines of errors, which say which stream failed and why."""
    usual = ("Separating", "Stems in", "2 tracks: ")
    lines = (line for line in result.stderr.splitlines() if line and "%|" not in line)
    errors = [line for line in lines if not line.startswith(usual)]
    assert (result.returncode, len(errors)) == (status, count), result.stderr
    for error in errors:
        assert error.startswith("demucs-infer: error: ")
        assert re.search("standard|No space left", error)


@needs_linux
def test_no_file_takes_the_number_of_a_closed_stream(song: Path) -> None:
    code = "import os; from demucs_infer.batch.console import streams_and_signals\n"
    code += "with streams_and_signals(): print(os.open('b.wav', os.O_RDONLY))"
    line = f"exec {sys.executable} -c {shlex.quote(code)} <&- 2>&-"
    result = subprocess.run(["sh", "-c", line], cwd=song, capture_output=True, text=True)
    assert int(result.stdout) > 2


@needs_linux
@pytest.mark.parametrize("path", [None, "/dev/full"])
def test_libraries_may_write_to_a_closed_or_full_standard_error(
    path: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = path and open(path, "w")  # noqa: PTH123, SIM115
    monkeypatch.setattr(sys, "stderr", stream)
    with streams_and_signals():
        assert list(tqdm.tqdm(range(3), desc="bar")) == [0, 1, 2]
        print("text", file=sys.stderr, flush=True)
    assert sys.stderr is stream


# --- names --------------------------------------------------------------------------------------

NAMES = {
    b"caf\xe9.wav": r"caf\xe9.wav",
    b"caf\xe8.wav": r"caf\xe8.wav",  # another folder
    "\N{MUSICAL NOTE}.wav".encode(): None,
    b"a\x1b[2J\nb.wav": r"a\x1b[2J\nb.wav",
}


@needs_linux
@pytest.mark.parametrize(
    "settings",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        pytest.param({"PYTHONIOENCODING": "latin-1:strict"}, marks=slow),
    ],
    ids=str,
)
def test_names_of_any_bytes(settings: dict[str, str], words: list[str], song: Path) -> None:
    """File names stay as they are; messages about them can be read in every encoding."""
    (song / "in").mkdir()
    for name in NAMES:
        Path(os.fsdecode(bytes(song / "in") + b"/" + name)).write_bytes(
            (song / "a.wav").read_bytes()
        )
    options: list[str | bytes] = [*words, "--json", "--flac", "--player"]
    options += ["in", b"in/miss\xed\x1bng.wav"]
    env = {**environment(), **settings}
    result = subprocess.run(options, cwd=song, env=env, capture_output=True)
    assert result.returncode == 1
    folders = {os.fsencode(path.name) for path in (song / "separated/tiny").iterdir()}
    assert folders == {name.removesuffix(b".wav") for name in NAMES}
    said = result.stderr.decode()
    assert not {char for char in said if ord(char) < 32} - {"\n", "\r"}
    for shown in (*filter(None, NAMES.values()), r"miss\xed\x1bng.wav: no such file"):
        assert shown in said
    for line in result.stdout.decode("ascii").splitlines():
        json_line = json.loads(line)
        (json_line["input"] + str(json_line["error"])).encode()
        assert "\x1b" not in line
    for path in (song / "separated/tiny").glob("caf*/player.html"):
        assert "caf\ufffd" in path.read_text("utf-8")
    titles = {
        soundfile.SoundFile(os.fsencode(path)).title
        for path in (song / "separated/tiny").glob("*/bass.flac")
    }
    assert titles == {"caf\ufffd (bass)", "\N{MUSICAL NOTE} (bass)", "a[2J\nb (bass)"}


# --- signals ------------------------------------------------------------------------------------


def started(words: list[str], folder: Path) -> subprocess.Popen[str]:
    """Start a process that takes SIGINT even if this one ignores it."""
    return subprocess.Popen(
        words,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@needs_posix
@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGHUP", marks=slow)])
@pytest.mark.usefixtures("hang_ups")
def test_signal_ends_the_command_and_leaves_nothing(
    name: str, words: list[str], tmp_path: Path
) -> None:
    number = signal.Signals[name]
    for track in ("a.wav", "b.wav"):
        write_track(tmp_path / track, 300)
    process = started([*words, "a.wav", "b.wav"], tmp_path)
    assert process.stdout.readline().startswith("Separated tracks will be stored in ")
    assert process.stdout.readline() == "Separating track a.wav\n"
    for _ in range(3):  # one comes from the shell, one from the terminal
        process.send_signal(number)
    _, errors = process.communicate()
    assert process.returncode == 128 + number
    said = [line for line in errors.splitlines() if line and "%|" not in line]
    assert said == [f"demucs-infer: error: ended by {number.name}"]
    assert stems_of(tmp_path / "separated") == set()
    assert not list((tmp_path / "separated/tiny").iterdir())


@needs_posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_ends_a_command_whose_reader_is_blocked(
    name: str, words: list[str], tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo.wav")
    process = started([*words, "fifo.wav"], tmp_path)
    assert any("Separating" in line for line in process.stdout)
    process.send_signal(signal.Signals[name])
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.Signals[name]
    assert errors.endswith(("interrupted\n", "SIGTERM\n"))
    assert not list((tmp_path / "separated/tiny").iterdir())


@needs_posix
def test_terminal_of_80_columns_gets_one_line_for_a_track(words: list[str], song: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [*words, "--shifts", "2", "--player", "a.wav", "b.wav"],
        cwd=song,
        stdout=subprocess.DEVNULL,
        stderr=terminal,
    )
    os.close(terminal)
    drawn = b""
    with contextlib.suppress(OSError):  # The process has closed the terminal.
        while block := os.read(screen, 2**16):
            drawn += block
    os.close(screen)
    assert process.wait() == 0
    lines = drawn.decode().replace("\r\n", "\n").split("\n")
    bars = [re.split(r"\r(?:\x1b\[K)?", line)[-1] for line in lines if "%|" in line]
    finished = [line for line in bars if "100%|" in line]
    assert len(finished) == 2
    assert re.search(r"Encoding stems +\d+ %.* b\.wav", drawn.decode())
    assert all("| 0.5/0.5 [" in line and "seconds/s]" in line for line in finished)
    assert all(len(part) <= 80 for line in lines for part in line.split("\r"))


@needs_posix
def test_signals_in_a_program_end_the_command_and_keep_its_handlers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    seen: list[int] = []
    try:
        with pytest.raises(Ended) as ended, streams_and_signals():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGHUP)  # while it clears up
                signal.raise_signal(signal.SIGINT)
        assert ended.value.code == 143
        assert capsys.readouterr().err == "demucs-infer: error: ended by SIGTERM\n"
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
        with streams_and_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    assert seen == [signal.SIGTERM]


# --- no folder for temporary files --------------------------------------------------------------


def test_files_need_no_temporary_folder_and_pipes_say_that_they_do(
    command: Command, song: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [])
    result = command("-q", "--format", "ogg", "a.wav")
    assert (result.returncode, result.stderr) == (0, "")
    assert stems_of(song / "separated") == {f"tiny/a/{name}.ogg" for name in SOURCES}
    assert_one_line(command("--stems", "bass", "-o", "-", "a.wav"), "set TMPDIR")


@pytest.mark.slow
def test_module_without_a_command_names_the_command() -> None:
    result = run("-m", "demucs_infer.api")
    assert (result.returncode, result.stdout) == (2, "")
    assert "demucs-infer" in result.stderr
