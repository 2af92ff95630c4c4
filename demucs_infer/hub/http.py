"""Requests over HTTP, and what answers and failures say in one line."""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from .. import __version__
from ..errors import DownloadError

if TYPE_CHECKING:
    from requests import Response

MOST_REDIRECTS = 5  # on one host
RECEIVE_BLOCK = 2**16  # bytes of a connection
TRANSIENT = frozenset((408, 425, 429, 500, 502, 503, 504))  # answers that may change soon


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


class HostError(DownloadError):
    """A host does not give a file, which another host may; `may_pass`: or the same one, later."""

    def __init__(self, message: str, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


class Broken(Exception):
    """An attempt failed in a way that another one may not; `wait` is what the server asks for.

    `connected` tells that there is a server.
    """

    def __init__(self, reason: str, wait: float | None = None, connected: bool = True) -> None:
        super().__init__(reason)
        self.wait = wait
        self.connected = connected


def shown(url: str) -> str:
    """Leave out of an address what a message must not tell: a user's name and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def ask(method: str, url: str, timeout: float, headers: Mapping[str, str], **how: Any) -> Response:
    """Send a request. Raises `Broken` without an answer, `HostError` where none can come."""
    import requests

    # As it is, since lengths and ranges count the bytes of the file.
    always = {"Accept-Encoding": "identity", "User-Agent": f"demucs-infer/{__version__}"}
    try:
        return requests.request(method, url, headers={**always, **headers}, timeout=timeout, **how)
    except (requests.RequestException, ValueError) as exc:
        cause = innermost(exc)
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = "REQUESTS_CA_BUNDLE can name a file of certificates"
            raise HostError(f"{shown(url)}: {one_line(cause)} ({hint})") from exc
        if isinstance(exc, (ValueError, requests.TooManyRedirects)):  # what is no address
            raise HostError(f"{shown(url)}: {one_line(exc)}") from exc
        connected = not isinstance(exc, requests.ConnectionError)
        raise Broken(one_line(cause), connected=connected) from exc


def head(url: str, timeout: float) -> Mapping[str, str]:
    """Ask once for the headers of an address, as they are before it leads to another host.

    Raises `HostError`.
    """
    try:
        for _ in range(MOST_REDIRECTS):
            response = ask("HEAD", url, timeout, {}, allow_redirects=False)
            target = response.headers.get("Location", "")
            other = urlsplit(target).netloc not in ("", urlsplit(url).netloc)
            if not response.is_redirect or other or "X-Linked-ETag" in response.headers:
                break
            url = urljoin(url, target)
    except Broken as exc:
        raise HostError(f"{shown(url)}: {exc}", may_pass=exc.connected) from exc
    if response.status_code >= 400:
        may_pass = response.status_code in TRANSIENT
        raise HostError(f"{shown(url)}: {status_line(response)}", may_pass=may_pass)
    return response.headers


def innermost(exc: BaseException) -> BaseException:
    """Find what the operating system said, which HTTP clients wrap several times."""
    while inner := exc.__cause__ or exc.__context__:
        exc = inner
    return exc


def one_line(exc: BaseException) -> str:
    """An exception as one line."""
    text = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    return " ".join(text.split())


def content_range(response: Response) -> tuple[int | None, int | None]:
    """Read where a part starts and how long the file is, as far as the server says."""
    text = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", text)
    if not found:
        return None, None
    start, last, total = found.groups()
    return int(start), int(last) + 1 if total == "*" else int(total)


def status_line(response: Response) -> str:
    return f"the server answers {response.status_code} {response.reason or ''}".strip()


def retry_after(response: Response) -> float | None:
    """Read the seconds that a server asks to wait, which it writes as such or as a date."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())


def received(response: Response, patience: Patience) -> Iterator[bytes]:
    """Yield the body as it comes in; blocks of one size would hide how slow it comes."""
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
