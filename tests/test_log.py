"""Messages are harmless and readable, and go to whatever stands for standard error."""

from __future__ import annotations

import logging
import sys

import pytest

from demucs_infer.errors import LoadAudioError, SaveAudioError
from demucs_infer.log import (
    NOTICE,
    bold,
    fatal,
    log_to_stderr,
    logger,
    printable,
    show_error,
    write,
)

from .helpers import WriteAndFlush

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
def test_printable_text_has_no_control_characters(text: object, expected: str) -> None:
    assert printable(text) == expected
    assert printable(expected) == expected
    printable(text).encode()


def test_messages_errors_and_the_log_are_harmless(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log_to_stderr(NOTICE)
    logger.log(NOTICE, "Separating %s", bold(HOSTILE))
    for error in (LoadAudioError, SaveAudioError):
        assert str(error(HOSTILE)) == HARMLESS
    with pytest.raises(SystemExit, match="3"):
        fatal(HOSTILE, status=3)
    assert capsys.readouterr().err == f"Separating {HARMLESS}\ndemucs-infer: error: {HARMLESS}\n"
    logger.handlers[:], logger.propagate = [], True
    logger.warning("%s: damaged", HOSTILE)
    assert caplog.messages == [f"{HARMLESS}: damaged"]


def test_standard_error_may_be_an_object_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", WriteAndFlush())
    log_to_stderr(logging.WARNING)
    try:
        raise LoadAudioError(HOSTILE)
    except LoadAudioError as exc:
        logger.warning("%s", "song", exc_info=exc)
    show_error("text", bold("song"))
    first, *traceback, last = sys.stderr.text.splitlines()
    assert (first, last) == ("demucs-infer: WARNING: song", "demucs-infer: error: text song")
    assert HARMLESS in traceback[-1]
    assert not any("\x1b" in line for line in traceback)


@pytest.mark.parametrize("stream", ["none", "closed"])
def test_missing_standard_error_loses_messages_only(
    stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = None
    if stream == "closed":
        file = open(__file__)  # noqa: PTH123, SIM115
        file.close()
    monkeypatch.setattr(sys, "stderr", file)
    show_error("nobody listens", bold("x"))
    with pytest.raises(OSError, match="closed"):
        write("x", file)
