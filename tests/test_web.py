"""Tracks over HTTP, from servers that do not mean well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from demucs_infer.errors import LoadAudioError
from demucs_infer.io import web as tracks
from demucs_infer.io.storage import local_copy
from demucs_infer.io.tracks import read_list
from demucs_infer.io.url import Url

from .web import (
    CONTENT,
    Answer,
    Handler,
    Web,
    breaks_at,
    endless,
    serving,
    stalls_at,
    status,
    trickle,
    without_length,
)


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    patience = replace(tracks.PATIENCE, timeout=0.5, span=0.2)
    monkeypatch.setattr(tracks, "PATIENCE", patience)
    monkeypatch.setattr(tracks, "LARGEST", 2 * len(CONTENT))
    with serving() as server:
        yield server


def slow_head(handler: Handler, content: bytes, start: int) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while not handler.web.gate.wait(0.05):
        handler.wfile.write(b"X-More: 1\r\n")


def to(location: str) -> Answer:
    return status(302, Location=location)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (trickle, "bytes came in"),
        (endless, "goes on after"),
        (slow_head, "no answer came"),
        (stalls_at(1000), "timed out"),
        (breaks_at(1000), "broke"),
        (status(404), "no such file"),
        (status(503), "503"),
        (to("file:///etc/passwd"), "file:"),
        (to("memory://secret"), "memory:"),
        (to("/again"), "redirects"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_given_up(answer: Answer, reason: str, web: Web, tmp_path: Path) -> None:
    web.always = answer
    with (
        pytest.raises(LoadAudioError, match=reason),
        local_copy(Url(f"{web.url}/a.wav"), tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_track_that_would_never_end(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes as fast as it must, and goes on."""
    web.always = trickle
    monkeypatch.setattr(tracks, "PATIENCE", replace(tracks.PATIENCE, slowest=0))
    monkeypatch.setattr(tracks, "LONGEST", 0.3)
    with pytest.raises(LoadAudioError, match="bytes came in"), local_copy(Url(f"{web.url}/a")):
        pass


def test_what_is_announced_as_too_long_is_not_begun(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracks, "LARGEST", 1000)
    with pytest.raises(LoadAudioError, match="may have 1000"), local_copy(Url(f"{web.url}/a.wav")):
        pass


@pytest.mark.parametrize("answer", [None, without_length])
def test_what_comes_is_whole(answer: Answer | None, web: Web, tmp_path: Path) -> None:
    web.always = answer
    with local_copy(Url(f"{web.url}/a%20b.wav?x=/#y"), tmp_path) as file:
        assert file.read_bytes() == CONTENT
    web.others["list.txt"] = b"a.wav\n"
    assert list(read_list(Url(f"{web.url}/list.txt"))) == [Path("a.wav")]
