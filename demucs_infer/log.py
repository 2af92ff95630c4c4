"""The package's logger, and text that is safe to show on a terminal.

Names of files and tags are not trusted: they must not move the cursor. The logger's filter and
the package's exceptions pass them through `printable`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import sys
import textwrap
from typing import Any, NoReturn

logger = logging.getLogger("demucs_infer")
NOTICE = 25  # level of progress messages, which appear without a prefix unless the user wants quiet

# Control characters, line separators, marks that change the direction of text, surrogates.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_NO_BYTES = re.compile("[\ud800-\udc7f\udd00-\udfff]")  # surrogates that stand for no byte


class _Styled(str):
    """Printable text with control characters that style it."""


def decoded(text: str, errors: str = "backslashreplace") -> str:
    r"""Return `text` without surrogates, so that every program can encode it.

    Surrogates that stand for bytes of a file name are read as UTF-8. Bytes that are not UTF-8
    become `\xe9` and the like, or U+FFFD with `errors="replace"`.
    """
    text = _NO_BYTES.sub("\ufffd", text)
    return text.encode("utf-8", "surrogateescape").decode("utf-8", errors)


def printable(text: object, keep: str = "") -> str:
    """Return `text` with its control characters escaped, except those in `keep`."""
    # Fast path: most texts have nothing to escape.
    if isinstance(text, _Styled) or (isinstance(text, str) and text.isprintable()):
        return text
    return _CONTROL.sub(
        lambda match: match[0] if match[0] in keep else ascii(match[0])[1:-1], decoded(str(text))
    )


def bold(text: object) -> str:
    """Return `text`, printable, and in bold if standard error is a terminal with colours."""
    shows = is_terminal(sys.stderr) and "NO_COLOR" not in os.environ
    return _Styled(f"\033[1m{printable(text)}\033[0m") if shows else printable(text)


def is_terminal(stream: Any) -> bool:
    """Return True if `stream` is a terminal. Objects that have only `write` are not."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def write(text: str, stream: Any) -> None:
    """Write `text` to `stream` and flush it, with escapes for characters that its encoding lacks.

    Raises `OSError` if the stream is closed, full or gone.
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
        # Drop the stream's buffer. Python would flush it again at exit, and exit with 120.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        raise


class _Printable(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(
                arg if isinstance(arg, (int, float)) else printable(arg) for arg in record.args
            )
        record.msg = printable(record.msg)
        return True


class _Handler(logging.Handler):
    """Writes records to the current standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        trace = ""
        if record.exc_info:
            trace = logging.Formatter().formatException(record.exc_info)
            trace = "\n" + printable(trace, keep="\n")
        _show(record.levelno, record.getMessage(), trace)


def _show(level: int, text: str, trace: str = "") -> None:
    """Write a message to the current standard error. Nothing fails if nobody can read it."""
    if level != NOTICE:
        name = "error" if level == logging.ERROR else logging.getLevelName(level)
        text = f"demucs-infer: {name}: {text}"
        if is_terminal(sys.stderr):
            width = shutil.get_terminal_size().columns
            text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    with contextlib.suppress(OSError):
        write(f"{text}{trace}\n", sys.stderr)


logger.addFilter(_Printable())
_handler = _Handler()


def log_to_stderr(level: int) -> None:
    """Show the package's messages from `level` on standard error, and nowhere else."""
    logger.handlers[:] = [_handler]
    logger.propagate = False
    logger.setLevel(level)


def show_error(*messages: object) -> None:
    """Write `messages` as one error on standard error, with or without `log_to_stderr`."""
    _show(logging.ERROR, " ".join(map(printable, messages)))


def fatal(*messages: object, status: int = 1) -> NoReturn:
    """Write `messages` as one error on standard error and exit with `status`."""
    show_error(*messages)
    raise SystemExit(status)
