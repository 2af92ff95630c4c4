"""A body over HTTP, for as long as patience lasts: what models and tracks have in common."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from requests import Response

RECEIVE_BLOCK = 2**16  # bytes of a connection


@dataclass(frozen=True)
class Patience:
    """How much to put up with; times are in seconds.

    An attempt fails that cannot connect or gets no byte within `timeout`, or gets fewer than
    `slowest` bytes per second over `span`. After `attempts` in a row that brought less than `gain`
    bytes the download fails. Before the second attempt there is a pause of `backoff`, before each
    further one twice the last, or what the server asks for; neither longer than `longest_wait`.
    """

    attempts: int = 5
    gain: int = 2**20
    backoff: float = 1.0
    longest_wait: float = 60.0
    timeout: float = 20.0
    slowest: float = 1000.0
    span: float = 30.0


class Broken(Exception):
    """An attempt failed in a way that another one may not; `wait` is what the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def shown(url: str) -> str:
    """The address without a name and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def innermost(exc: BaseException) -> BaseException:
    """What the operating system said, which HTTP clients wrap several times."""
    while inner := exc.__cause__ or exc.__context__:
        exc = inner
    return exc


def one_line(exc: BaseException) -> str:
    """An exception as one line."""
    text = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    return " ".join(text.split())


def status_line(response: Response) -> str:
    return f"the server answers {response.status_code} {response.reason or ''}".strip()


def received(response: Response, patience: Patience) -> Iterator[bytes]:
    """The body as it comes in, and not in blocks of one size: those hide how slow it comes."""
    from urllib3.exceptions import HTTPError

    start, count = time.monotonic(), 0
    try:
        while block := response.raw.read1(RECEIVE_BLOCK):
            yield block
            count += len(block)
            elapsed = time.monotonic() - start
            if elapsed >= patience.span:
                if count < patience.slowest * elapsed:
                    raise Broken(f"only {count} bytes came in {elapsed:.0f} s")
                start, count = time.monotonic(), 0
    except (HTTPError, OSError) as exc:
        raise Broken(f"the connection broke: {one_line(innermost(exc))}") from exc
