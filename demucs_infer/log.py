"""The package's logger, and what the command line needs to speak on a terminal.

Names and tags come from strangers: a file's name must move no cursor. `printable` makes text
harmless, of what `say` writes, of what the logger is told, and of the package's exceptions.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from typing import Any, NoReturn

logger = logging.getLogger("demucs_infer")

# Control characters, separators of lines, marks that turn the direction of text, surrogates.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NO_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no byte
_RESET = "\033[0m"


class _Styled(str):
    """Text that is printable already, but for the control characters that style it."""


def decoded(text: str, errors: str = "backslashreplace") -> str:
    """`text` without surrogates, so that every program can take it.

    Those that stand for the bytes of a file name are read as UTF-8. What is no UTF-8 becomes
    `\\xe9` and the like, or with `errors="replace"` U+FFFD.
    """
    text = _NO_BYTES.sub("\ufffd", text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", errors)


def printable(text: object, keep: str = "") -> str:
    """`text` with its control characters escaped, but for those in `keep`."""

    def escaped(match: re.Match[str]) -> str:
        char = match[0]
        return char if char in keep else char.encode("unicode_escape").decode()

    return _CONTROL.sub(escaped, decoded(str(text)))


def bold(text: object) -> str:
    """`text`, printable, in bold where standard error is a terminal that shows it."""
    shows = is_terminal(sys.stderr) and "NO_COLOR" not in os.environ
    return _Styled(f"\033[1m{printable(text)}{_RESET}") if shows else printable(text)


def is_terminal(stream: Any) -> bool:
    """Tell whether `stream` is a terminal; an object with `write` alone is none."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def write(text: str, stream: Any) -> None:
    """Write `text` to `stream` at once, with what its encoding lacks escaped.

    Raises `OSError` if it is closed, full or gone. What it holds then is dropped: Python would
    try again when it exits, and exit with status 120.
    """
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        if stream is None:
            raise ValueError("closed")
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except ValueError as exc:
        raise OSError(str(exc)) from exc
    except OSError:
        _drop(stream)
        raise


def _drop(stream: Any) -> None:
    with contextlib.suppress(AttributeError, OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def say(*parts: object) -> None:
    """Write `parts` as one line on standard error; where nobody listens, nothing happens."""
    line = " ".join(part if isinstance(part, _Styled) else printable(part) for part in parts)
    with contextlib.suppress(OSError):
        write(f"{line}\n", sys.stderr)


def fatal(*messages: object, status: int = 1) -> NoReturn:
    """Print `messages` as one error on standard error and exit with `status`."""
    say("demucs-infer: error:", *messages)
    raise SystemExit(status)


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return True


logger.addFilter(_Printable())


class _Formatter(logging.Formatter):
    def formatException(self, ei: Any) -> str:
        return printable(super().formatException(ei), keep="\n")


class _Handler(logging.Handler):
    """Writes to what standard error is at that time, if anything."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            write(f"{self.format(record)}\n", sys.stderr)


def log_to_stderr(level: int) -> None:
    """Let the package's messages from `level` on appear on standard error, and nowhere else."""
    handler = _Handler()
    handler.setFormatter(_Formatter("demucs-infer: %(levelname)s: %(message)s"))
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(level)
