"""What the command line tells its user, and the standard streams that it does so by.

Standard error is for people: nothing is lost if nobody listens. Standard output is for programs:
what cannot be written there is an error, and the stems are made all the same.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from ..errors import DemucsInferError, LoadAudioError, SaveAudioError
from ..log import bold, decoded, is_terminal, printable, say, write

# Ends that others bring about, as Ctrl-C does.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Ended(SystemExit):
    """A signal ends the process; what is under way is cleared up. `code` is as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def command() -> Iterator[None]:
    """The surroundings of a command: standard streams that are there, signals that end it cleanly.

    Raises `Ended` when one of `ENDING` comes.
    """
    _fill_descriptors()
    forgiving: Any = _Forgiving(sys.stderr)
    with contextlib.redirect_stderr(forgiving):
        try:
            with signals_raise():
                yield
        except Ended as exc:
            say("demucs-infer: error: ended by", exc.name)
            raise


class _Forgiving:
    """Standard error as libraries want it: what cannot be written is lost, and nothing else."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._in_bar = False

    def write(self, text: str) -> int:
        whole = text.endswith("\n")
        # A message gets a line of its own; the bar goes on below.
        start = "\n" if self._in_bar and whole and text[0] not in "\r\n" else ""
        self._in_bar = text.startswith("\r") or (self._in_bar and not whole)
        with contextlib.suppress(OSError):
            write(start + text, self._stream)
        return len(text)

    def flush(self) -> None:
        """Do nothing: all is written at once."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _fill_descriptors() -> None:
    """Open the null device where a standard stream is closed.

    Else the next file would get its number, and what libraries write there would go into the file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Raise `Ended` in the main thread when a signal of `ENDING` comes while the block runs.

    Signals that are ignored (nohup), or that the caller handles, are left alone.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: old for n in ENDING if (old := signal.getsignal(n)) is signal.SIG_DFL}

    def end(number: int, frame: object) -> None:
        for each in before:  # the clearing up is not interrupted
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def signals_kept() -> Iterator[None]:
    """Leave the signals of `ENDING` as they are after the block, in which others handle them."""
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        yield
    except SystemExit as exc:  # what their handlers make of a signal
        if exc.code in ENDING:
            raise Ended(int(exc.code or 0)) from exc
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, handler)


def put(text: str, stream: Any) -> None:
    """Write `text` and the end of a line to `stream`, which is standard output.

    Raises `DemucsInferError` if that cannot be done, `BrokenPipeError` if the reader has gone.
    """
    try:
        write(printable(text, keep="\n\t") + "\n", stream)
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise DemucsInferError(
            f"standard output: cannot be written to ({exc.strerror or exc})"
        ) from exc


def json_text(content: Any, indent: int | None = None) -> str:
    """`content` as JSON that every program can read: its text is encodable."""
    return json.dumps(_encodable(content), indent=indent)


def _encodable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _encodable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encodable(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return decoded(str(value))


def standard_input() -> IO[bytes]:
    """The bytes of standard input. Raises `LoadAudioError` if it is closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise LoadAudioError("standard input is closed: there is nothing to read")
    return sys.stdin.buffer


@contextlib.contextmanager
def standard_output() -> Iterator[IO[bytes]]:
    """Standard output, for bytes, unbuffered, so that what cannot be written fails at once.

    Raises `SaveAudioError` if it is closed.
    """
    check_standard_output()
    sys.stdout.flush()
    try:
        copy = os.dup(sys.stdout.fileno())
    except (AttributeError, OSError):  # an object with a buffer
        yield sys.stdout.buffer
        return
    with open(copy, "wb") as file:  # noqa: PTH123
        yield file


def check_standard_output() -> None:
    """Raise `SaveAudioError` if standard output is closed."""
    if sys.stdout is None or sys.stdout.closed:
        raise SaveAudioError("standard output is closed: nothing can be written to it")


def _common(paths: Sequence[str]) -> str:
    """The one file, or the innermost folder that all are in."""
    if len(set(paths)) == 1:
        return paths[0]
    parts = [re.split(r"(?<=[/\\])", path)[:-1] for path in paths]
    shared = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts))
    return "".join(names[0] for names in shared)


def _clock(seconds: float) -> str:
    """A time for people: 4.2 s, 3:20 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Console:
    """Tells the user what happens to `count` tracks: on standard error, and as JSON if wanted."""

    def __init__(
        self, count: int, *, quiet: bool = False, json: bool = False, pipe: bool = False
    ) -> None:
        self.count, self.quiet, self.json = count, quiet, json
        self.talks = not (quiet or json or pipe)  # on standard output, as the reference does
        self.output = sys.stdout  # others may stand for it while Ray runs
        self.failed: list[str] = []
        self.done = self.skipped = 0
        self.unwritten: Exception | None = None
        self._begin = time.monotonic()
        self._begun = 0

    def introduce(self, models: int | None, folder: object) -> None:
        """Say how many models a bag has (`None`: no bag), and where stems go."""
        if models is not None:
            self._tell(f"Selected model is a bag of {models} models. Each draws a bar per shift.")
        self._tell(f"Separated tracks will be stored in {folder}")

    def announce(self, track: object) -> str | None:
        """Say that `track` is begun, and give a title for its progress bar on a terminal."""
        if self.talks:
            self._tell(f"Separating track {track}")
        elif not self.quiet:
            say("Separating", bold(track))
        self._begun = max(self._begun, self.done) + 1
        if not is_terminal(sys.stderr):  # programs read the bars, as they are in the reference
            return None
        name = printable(re.split(r"[/\\]", str(track))[-1])
        return name if self.count == 1 else f"{name} ({self._begun} of {self.count}{self._left})"

    @property
    def _left(self) -> str:
        """The time that the rest of the list will take, from that of what is done."""
        separated = self.done - self.skipped
        if separated < 1:
            return ""
        seconds = (time.monotonic() - self._begin) / separated * (self.count - self.done)
        return f", {_clock(seconds)} left"

    def _tell(self, line: str) -> None:
        """Write what programs look for on standard output; where nobody reads, nothing is lost."""
        if self.talks:
            with contextlib.suppress(OSError):
                write(printable(line) + "\n", self.output)

    def report(self, result: Mapping[str, Any]) -> None:
        """Take what `TrackResult.as_json` gives."""
        self.done += 1
        if result["error"] is not None:
            self.failed.append(result["input"])
            say("demucs-infer: error:", result["error"])
        self.skipped += result["skipped"]
        self._say_where(result)
        if self.json and self.unwritten is None:
            self._put(json_text(result))

    def _say_where(self, result: Mapping[str, Any]) -> None:
        """Say where the stems of a track are, and how long it took."""
        paths = [stem["path"] for stem in result["stems"].values()]
        paths += filter(None, [result["player"]])
        if self.quiet or result["skipped"] or result["error"] is not None or "-" in paths:
            return
        say("Stems in", bold(_common(paths)), f"({_clock(result['elapsed'])})")

    def _put(self, line: str) -> None:
        try:
            put(line, self.output)
        except (DemucsInferError, BrokenPipeError) as exc:
            self.unwritten = exc
            say("demucs-infer: error:", exc)

    def report_progress(self, result: Mapping[str, Any]) -> None:
        """The same for tracks that are separated elsewhere, where nothing announces them."""
        self.report(result)
        if not self.quiet and result["error"] is None and not result["skipped"]:
            say("Separated", bold(result["input"]), f"({self.done} of {self.count})")

    @property
    def failures(self) -> int:
        """The number of things that went wrong."""
        return len(self.failed) + (self.unwritten is not None)

    def sum_up(self) -> None:
        """Say how many tracks there were, and again which failed: it may have been hours ago."""
        if self.quiet or self.count == 1:
            return
        failed = len(self.failed)
        parts = {
            "separated": self.count - failed - self.skipped,
            "already there": self.skipped,
            "failed": failed,
        }
        text = ", ".join(f"{number} {what}" for what, number in parts.items() if number)
        say(f"{self.count} tracks: {text}")
        for track in self.failed:
            say("    failed:", track)
