"""Tracks over HTTP: read once, from front to back, for as long as patience lasts.

Redirects stay on http and https, as `requests` knows nothing else.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .. import __version__
from ..errors import LoadAudioError
from ..hub.http import Broken, Patience, innermost, one_line, received, shown, status_line

if TYPE_CHECKING:
    from requests import Response

# A track that comes more slowly than it is played, at 64 kbit/s, holds up those behind it.
PATIENCE = Patience(slowest=8000.0, span=30.0)
LONGEST = 3600.0  # seconds that a track may take
LARGEST = 2**33  # bytes of a track
LARGEST_LIST = 2**26  # bytes of a list of tracks


def fetch_track(url: str, file: Path) -> None:
    """Copy what is at `url` to the local `file`. Raises `LoadAudioError`, `OSError` of the file."""
    with file.open("wb") as target:
        for block in _blocks(url, LARGEST):
            target.write(block)


@contextlib.contextmanager
def open_track(url: str) -> Iterator[IO[bytes]]:
    """Read a list, which is not long, as a stream. Raises `LoadAudioError`."""
    yield io.BytesIO(b"".join(_blocks(url, LARGEST_LIST)))


def _blocks(url: str, limit: int) -> Iterator[bytes]:
    """The body of the answer, which is whole at the end."""
    begin, size = time.monotonic(), 0
    try:
        with _answer(url) as response:
            total = _length(response)
            if total is not None and total > limit:
                raise Broken(f"it has {total} bytes, and may have {limit}")
            for block in received(response, PATIENCE):
                size += len(block)
                if size > limit:
                    raise Broken(f"it goes on after {limit} bytes")
                if time.monotonic() - begin > LONGEST:
                    raise Broken(f"only {size} bytes came in {LONGEST:.0f} s")
                yield block
        if total is not None and size < total:
            raise Broken(f"the connection broke: {size} of {total} bytes came")
    except Broken as exc:
        raise LoadAudioError(f"{shown(url)}: cannot be read ({exc})") from exc


def _length(response: Response) -> int | None:
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and len(length) < 20 else None


def _answer(url: str) -> Response:
    """The answer to a request, when its head is there. Raises `Broken`, `LoadAudioError`."""
    import requests

    def ask() -> Response:
        headers = {"Accept-Encoding": "identity", "User-Agent": f"demucs-infer/{__version__}"}
        return requests.get(url, headers=headers, stream=True, timeout=PATIENCE.timeout)

    try:
        response = _within(PATIENCE.timeout + PATIENCE.span, ask)
    except (requests.RequestException, ValueError) as exc:
        raise Broken(one_line(innermost(exc))) from exc
    if response.status_code == 404:
        raise LoadAudioError(f"{shown(url)}: no such file")
    if response.status_code != 200:
        raise Broken(status_line(response))
    return response


def _within(seconds: float, ask: Callable[[], Response]) -> Response:
    """What `ask` returns; a head that comes byte by byte would never be too late for a socket."""
    answer: Future[Response] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except BaseException as exc:
            answer.set_exception(exc)

    threading.Thread(target=work, daemon=True).start()
    try:
        return answer.result(seconds)
    except FutureTimeoutError as exc:
        raise Broken(f"no answer came in {seconds:.0f} s") from exc
