"""What messages look like, and where they go."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest

from demucs_infer.errors import LoadAudioError, SaveAudioError
from demucs_infer.log import bold, decoded, fatal, log_to_stderr, logger, printable, say, write

HOSTILE = "a\x1b[2Jb\nc\x9bd\u202ee\udce9"
HARMLESS = r"a\x1b[2Jb\nc\x9bd\u202ee\xe9"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HOSTILE, HARMLESS),
        ("naïve — 音 \u200d🎵\u3000", "naïve — 音 \u200d🎵\u3000"),
        ("back\\slash", "back\\slash"),
        ("\udcf0\udc9f\udc8e\udcb5", "🎵"),  # UTF-8 that the system's encoding was not
        ("\ud800", "\ufffd"),
        (7, "7"),
    ],
)
def test_printable(text: object, expected: str) -> None:
    assert printable(text) == expected
    assert printable(expected) == expected
    printable(text).encode()


def test_decoded_text_for_tags() -> None:
    assert decoded("caf\udce9 \udcc3\udca9", "replace") == "caf\ufffd é"


def test_say_and_exceptions_and_the_logger(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    say("Separating", bold(HOSTILE))
    for error in (LoadAudioError, SaveAudioError):
        assert str(error(HOSTILE)) == HARMLESS
    with pytest.raises(SystemExit, match="3"):
        fatal(HOSTILE, status=3)
    assert capsys.readouterr().err == f"Separating {HARMLESS}\ndemucs-infer: error: {HARMLESS}\n"
    logger.handlers[:], logger.propagate = [], True
    logger.warning("%s: damaged", HOSTILE)
    assert caplog.messages == [f"{HARMLESS}: damaged"]


def test_a_save_error_is_an_os_error() -> None:
    assert issubclass(SaveAudioError, OSError)


class WriteAndFlush:
    """What GUIs and loggers put in the place of standard error."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_a_standard_error_that_is_only_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", WriteAndFlush())
    before = logger.handlers[:], logger.propagate, logger.level
    log_to_stderr(logging.WARNING)
    try:
        raise LoadAudioError(HOSTILE)
    except LoadAudioError as exc:
        logger.warning("%s", "song", exc_info=exc)
    finally:
        logger.handlers[:], logger.propagate, logger.level = before
    say("text", bold("song"))
    first, *traceback, last = sys.stderr.text.splitlines()
    assert (first, last) == ("demucs-infer: WARNING: song", "text song")
    assert HARMLESS in traceback[-1]
    assert not any("\x1b" in line for line in traceback)


@pytest.mark.parametrize("stream", [None, open(__file__)])  # noqa: PTH123, SIM115
def test_a_standard_error_that_is_none(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    say("nobody listens", bold("x"))
    with pytest.raises(OSError, match="closed"):
        write("x", stream)
