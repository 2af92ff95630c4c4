"""Messages of the command line, and the standard streams and signals around it.

Standard error is for people: nothing fails if nobody reads it. Standard output is for programs: a
record that cannot be written there is an error, but all stems are still made.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

from ..errors import DemucsInferError, LoadAudioError
from ..log import NOTICE, bold, decoded, is_terminal, logger, printable, show_error, write
from ..storage.locations import location

# Signals that end the process as Ctrl-C does.
ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
GRACE = 5  # seconds after a signal in which others are ignored
MAX_NAMED = 1000  # failed tracks that are named at the end
TITLE = 30  # characters of a track's name beside its bar
CLEAR_LINE = "\r\033[K"


class Ended(SystemExit):
    """A signal ends the process after a clean-up. `code` is the exit status that shells expect."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


@contextlib.contextmanager
def streams_and_signals() -> Iterator[None]:
    """Run the block with usable standard streams. Raises `Ended` when a signal of `ENDING` comes.

    Ctrl-C raises `KeyboardInterrupt`. Further signals do not interrupt the clean-up.

    A closed standard stream becomes the null device. Otherwise the next file that is opened would
    get its number, and output of libraries would go into that file. Signals that are ignored
    (nohup) or that the caller handles keep their handlers.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    before, usual = {}, (signal.SIG_DFL, signal.default_int_handler)
    if threading.current_thread() is threading.main_thread():
        numbers = (*ENDING, signal.SIGINT)
        before = {n: old for n in numbers if (old := signal.getsignal(n)) in usual}
    ended = -math.inf

    def end(number: int, frame: object) -> None:
        nonlocal ended
        # Further signals do not interrupt the clean-up. Later ones may: an exception can get lost.
        if (now := time.monotonic()) > ended + GRACE:
            ended = now
            raise KeyboardInterrupt if number == signal.SIGINT else Ended(number)

    forgiving: Any = _Forgiving(sys.stderr)
    try:
        for number in before:
            signal.signal(number, end)
        with contextlib.redirect_stderr(forgiving):
            yield
    except Ended as exc:
        show_error("ended by", exc.name)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Forgiving:
    """A standard error that never fails, and that keeps messages and progress bars apart."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._bar = ""  # on the last line
        self._lock = threading.RLock()  # a signal may interrupt its holder

    def write(self, text: str) -> int:
        shown = text
        with self._lock, contextlib.suppress(OSError):
            if text.startswith("\r"):
                self._bar = text
            elif self._bar and len(text) > 1 and text.endswith("\n"):
                if is_terminal(self._stream):
                    # A message replaces the bar. Its owner draws it again below, unless it is
                    # complete.
                    shown = f"{CLEAR_LINE}{text}{self._bar if '100%|' in self._bar else ''}"
                else:
                    shown, self._bar = f"\n{text}", ""
            elif text.endswith("\n"):
                self._bar = ""
            write(shown, self._stream)
        return len(text)

    def flush(self) -> None:
        """Do nothing: `write` flushes."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def put(text: str, stream: Any) -> None:
    """Write `text` as a line to `stream`, which is standard output.

    Raises `DemucsInferError` if that fails, `BrokenPipeError` if the reader has gone.
    """
    try:
        write(printable(text, keep="\n\t") + "\n", stream)
    except BrokenPipeError as exc:
        raise BrokenPipeError("standard output: its reader has gone") from exc
    except OSError as exc:
        raise DemucsInferError(
            f"standard output: cannot be written to ({exc.strerror or exc})"
        ) from exc


def json_text(content: Any, indent: int | None = None) -> str:
    """Return `content` as JSON whose text is always encodable."""

    def encodable(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: encodable(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [encodable(item) for item in value]
        plain = value is None or isinstance(value, (bool, int, float))
        return value if plain else decoded(str(value))

    return json.dumps(encodable(content), indent=indent)


def standard_input() -> IO[bytes]:
    """Return the bytes of standard input. Raises `LoadAudioError` if it is closed."""
    if sys.stdin is None or sys.stdin.closed:
        raise LoadAudioError("standard input is closed: there is nothing to read")
    return sys.stdin.buffer


def clock(seconds: float) -> str:
    """Return a time as 4.2 s, 3:20 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _shown(name: str) -> str:
    """Return a path or URL for a message: without credentials and queries."""
    return str(location(name)) if "://" in name else name


class Console:
    """Reports the progress of tracks on standard error, and as JSON if `json` is set.

    Set `count` to their number before the first one is announced. `pipe` says that a stem goes to
    standard output, which then has no lines for programs. `errors` are those of tracks that exist,
    and of standard output.
    """

    def __init__(self, *, quiet: bool = False, json: bool = False, pipe: bool = False) -> None:
        self.quiet, self.json = quiet, json
        self.talks = not (quiet or json or pipe)  # on standard output, as the reference does
        self.output = sys.stdout  # Ray redirects `sys.stdout`.
        self.failed: list[str] = []
        self.errors: list[Exception] = []
        self.count = self.done = self.skipped = self._begun = 0
        self.unwritten = False
        self._begin = time.monotonic()

    def introduce(self, models: int | None, folder: object) -> None:
        """Name the folder of the stems, and the number of models of a bag (None for no bag)."""
        if models is not None:
            self._tell(f"Selected model is a bag of {models} models. Each draws a bar per shift.")
        self._tell(f"Separated tracks will be stored in {folder}")

    def _tell(self, line: str) -> None:
        """Write a line that programs look for. Nothing fails if nobody reads it."""
        with contextlib.suppress(DemucsInferError, BrokenPipeError):
            if self.talks:
                put(printable(line), self.output)

    def announce(self, track: object) -> str | None:
        """Announce that `track` begins. Returns a title for its bar if that is on a terminal."""
        self._tell(f"Separating track {track}")
        if not self.talks:
            logger.log(NOTICE, "Separating %s", bold(track))
        self._begun = max(self._begun, self.done) + 1
        # Programs read the bars as the reference draws them.
        if self.quiet or not is_terminal(sys.stderr):
            return None
        name = printable(re.split(r"[/\\]", str(track))[-1])
        name = name if len(name) <= TITLE else f"{name[: TITLE - 1]}…"
        if self.count == 1:
            return name
        left, separated = "", self.done - self.skipped - len(self.failed)
        if separated:
            spent = time.monotonic() - self._begin
            left = f", {clock(spent / separated * (self.count - self.done))} left"
        return f"{name} ({self._begun} of {self.count}{left})"

    def report(
        self, result: Mapping[str, Any], error: Exception | None = None, *, elsewhere: bool = False
    ) -> None:
        """Take the result of a track, as `TrackResult.as_json` gives it, and an error to raise.

        A track that was separated `elsewhere` has not been announced, and its error is only text.
        """
        self.done += 1
        self.skipped += result["skipped"]
        self.errors += [error] if error is not None else []
        if result["error"] is not None:
            self.errors += [DemucsInferError(result["error"])] if elsewhere else []
            self.failed.append(_shown(result["input"]))
            # A list may name a million missing files: log records would take a third more time.
            show_error(result["error"])
        elif not result["skipped"]:
            paths = [stem["path"] for stem in result["stems"].values()]
            paths = list(map(_shown, [*paths, *filter(None, [result["player"]])]))
            if "-" not in paths:
                # The one file, or the innermost folder that holds all files.
                common = os.path.commonprefix(paths)  # noqa: RUF071
                place = common if len({*paths}) == 1 else re.sub(r"[^/\\]*$", "", common)
                logger.log(NOTICE, "Stems in %s (%s)", bold(place), clock(result["elapsed"]))
            if elsewhere:
                name = bold(_shown(result["input"]))
                logger.log(NOTICE, "Separated %s (%d of %d)", name, self.done, self.count)
        if self.json and not self.unwritten:
            try:
                put(json_text(result), self.output)
            except (DemucsInferError, BrokenPipeError) as exc:
                self.unwritten = True
                self.errors.append(exc)
                logger.error("%s", exc)

    def sum_up(self) -> None:
        """Count the tracks, and name those that failed, perhaps hours ago."""
        if self.count == 1:
            return
        failed = len(self.failed)
        separated = self.count - failed - self.skipped
        parts = {"separated": separated, "already there": self.skipped, "failed": failed}
        text = ", ".join(f"{number} {state}" for state, number in parts.items() if number)
        logger.log(NOTICE, "%d tracks: %s", self.count, text)
        for track in self.failed[:MAX_NAMED]:
            logger.log(NOTICE, "    failed: %s", track)
        if failed > MAX_NAMED:
            logger.log(NOTICE, "    and %d more, which are named above", failed - MAX_NAMED)
