"""The HTTP client for models, hubs, lists and tracks.

Servers are not trusted: the body of a redirect is never read, a timer ends transfers that are too
slow or too long, sizes are limited, and credentials go to the URL's own host only.

    URL ──Range──▶ TARGET.part ──SHA-256, fsync──▶ rename ──▶ TARGET
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from .. import __version__
from ..errors import DownloadError
from ..log import logger, printable

if TYPE_CHECKING:
    from requests import Response, Session

MAX_REDIRECTS = 10
BLOCK = 2**16  # bytes of a connection
READ_BLOCK = 2**20  # bytes of a file
TEMPORARY_STATUS = frozenset((408, 425, 429, 500, 502, 503, 504))
GAIN = 2**20  # bytes of progress after which failed attempts are counted from zero
LONGEST_WAIT = 60  # seconds between two attempts
LOCK_TIMEOUT = 3600  # seconds to wait for another process that downloads the same file
MAX_MODEL = 2**32  # bytes of a file of unknown size
NUMBER = "[0-9]{1,18}"  # of moderate size: Python refuses to read thousands of digits


@dataclass(frozen=True)
class Limits:
    """Limits of a transfer. Times are in seconds.

    A transfer ends if it brings less than `slowest` bytes per second on average over `span`, if no
    byte comes within `timeout`, and after `longest`. A download is tried `attempts` times, with
    pauses that begin at `backoff` and double.
    """

    slowest: float = 8000.0
    span: float = 30.0
    timeout: float = 20.0
    longest: float = 6 * 3600.0
    attempts: int = 5
    backoff: float = 1.0


LIMITS = Limits()


class HostError(DownloadError):
    """A host does not deliver a file."""

    temporary = False  # it may deliver the file later
    wait: float | None = None  # seconds that it asks to wait
    answered = True  # there is a server
    wrong = False  # the content is not that of the file
    status = 0

    def __init__(self, url: str, reason: str, **facts: Any) -> None:
        super().__init__(f"{redact(url)}: {reason}")
        self.reason = reason
        vars(self).update(facts)


def redact(url: str) -> str:
    """Return a URL of the web for a message: without user, password, query and fragment."""
    scheme, separator, rest = re.split("[?#]", url, maxsplit=1)[0].partition("://")
    host, slash, path = rest.partition("/")
    return scheme + separator + host.rpartition("@")[2] + slash + path


class _Watchdog:
    """Shuts connections down from a timer thread when a transfer exceeds its limits.

    Checks between blocks would not end a read that slow headers, chunk sizes or trailers prolong.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.received, self.reason = limits, 0, ""
        self._sockets: list[socket.socket] = []
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def add(self, connection: socket.socket) -> None:
        """Watch a connection, too."""
        # TLS takes the descriptor away from the socket: a duplicate still reaches the connection.
        self._sockets.append(connection.dup())
        if self.reason:
            self._shut_down()

    def stop(self) -> None:
        """End the timer."""
        self._done.set()
        for connection in self._sockets:
            connection.close()

    def _watch(self) -> None:
        limits, deadline = self.limits, time.monotonic() + self.limits.longest
        while not self.reason:
            before, pause = self.received, min(limits.span, deadline - time.monotonic())
            if self._done.wait(max(0.0, pause)):
                return
            gained = self.received - before
            if time.monotonic() >= deadline:
                self.reason = f"only {self.received} bytes came in {limits.longest:.0f} s"
            elif gained < limits.slowest * limits.span:
                self.reason = f"only {gained} bytes came in {limits.span:.0f} s"
        self._shut_down()

    def _shut_down(self) -> None:
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _session(watchdog: _Watchdog) -> Session:
    """Make a session whose connections are watched, without redirects and without ~/.netrc."""
    import requests
    from requests.adapters import HTTPAdapter

    def watched(pool: Any) -> Any:
        class Connection(pool.ConnectionCls):  # type: ignore[misc]
            def _new_conn(self) -> socket.socket:
                connection: socket.socket = super()._new_conn()
                watchdog.add(connection)
                return connection

        return type(pool.__name__, (pool,), {"ConnectionCls": Connection})

    def watching(manager: Any) -> Any:
        pools = manager.pool_classes_by_scheme
        manager.pool_classes_by_scheme = {scheme: watched(pool) for scheme, pool in pools.items()}
        return manager

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **options: Any) -> None:
            super().init_poolmanager(*args, **options)
            watching(self.poolmanager)

        def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
            return watching(super().proxy_manager_for(proxy, **options))

    class Session(requests.Session):
        def get_redirect_target(self, resp: Any) -> None:
            # requests would read and decompress the body of a redirect, whatever its options are.
            return None

    session = Session()
    session.auth = lambda request: request  # keeps requests from reading ~/.netrc
    # Lengths and ranges count the bytes of the file: it must not be compressed.
    headers = {"Accept-Encoding": "identity", "User-Agent": f"demucs-infer/{__version__}"}
    session.headers.update(headers)
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter())
    return session


@contextmanager
def request(
    url: str,
    limits: Limits,
    headers: Mapping[str, str] | None = None,
    method: str = "GET",
    stop_at: str = "",
) -> Iterator[Answer]:
    """Send a request, follow its redirects, and yield the answer.

    A redirect that has the header `stop_at` is not followed. Raises `HostError`.
    """
    watchdog = _Watchdog(limits)
    try:
        with _session(watchdog) as session, _silent_urllib3():
            with _failures(url, watchdog):
                response = _send(session, url, dict(headers or {}), method, stop_at, limits.timeout)
            with response:
                yield Answer(url, response, watchdog)
    finally:
        watchdog.stop()


@contextmanager
def _silent_urllib3() -> Iterator[None]:
    """Drop this thread's log records of urllib3, which contain URLs with their queries."""
    thread = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    loggers = [logging.getLogger(f"urllib3.{name}") for name in ("connection", "connectionpool")]
    for each in loggers:
        each.addFilter(is_of_others)
    try:
        yield
    finally:
        for each in loggers:
            each.removeFilter(is_of_others)


def _send(
    session: Session, url: str, headers: dict[str, str], method: str, stop_at: str, timeout: float
) -> Response:
    from requests.auth import _basic_auth_str

    parts = _parse(url, url)
    if parts.username or parts.password:
        user, password = (unquote(text or "") for text in (parts.username, parts.password))
        headers["Authorization"] = _basic_auth_str(user, password)
    for _ in range(MAX_REDIRECTS + 1):
        # The user and password that a redirect names are not used.
        plain = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        response = session.request(method, plain, headers=headers, timeout=timeout, stream=True)
        if not response.is_redirect or (stop_at and stop_at in response.headers):
            return response
        response.close()
        location = response.headers["Location"].encode("latin-1").decode("utf-8", "replace")
        parts = _parse(location, url, base=plain)
        if session.should_strip_auth(plain, parts.geturl()):
            headers.pop("Authorization", None)
    raise HostError(url, f"more than {MAX_REDIRECTS} redirects")


def _parse(location: str, url: str, base: str = "") -> SplitResult:
    """Parse `url`, or a redirect of it. Raises `HostError` unless it is an address of the web."""
    with suppress(ValueError):
        parts = urlsplit(urljoin(base, location))
        _ = parts.port
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts
    target = f"redirects to {redact(location)[:200]!r}, which " if base else ""
    raise HostError(url, f"{target}is not an http or https address")


@contextmanager
def _failures(url: str, watchdog: _Watchdog) -> Iterator[None]:
    """Turn exceptions of requests and urllib3, whose texts contain the URL, into `HostError`."""
    import requests
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (requests.RequestException, HTTPError, OSError, ValueError) as exc:
        cause: BaseException = exc
        while inner := cause.__cause__ or cause.__context__:
            cause = inner
        text = " ".join((getattr(cause, "strerror", None) or str(cause)).split())[:200]
        if watchdog.reason:
            raise HostError(url, watchdog.reason, temporary=True) from exc
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = "REQUESTS_CA_BUNDLE can name a file of certificates"
            raise HostError(url, f"{text} ({hint})") from exc
        if isinstance(exc, ValueError):
            raise HostError(url, "the address or the answer is not valid HTTP") from exc
        answered = not isinstance(exc, requests.ConnectionError)
        text = text or type(cause).__name__
        raise HostError(url, text, temporary=True, answered=answered) from exc


class Answer:
    """The head of a response, and its body as a stream."""

    def __init__(self, url: str, response: Response, watchdog: _Watchdog) -> None:
        self.url, self.status, self.headers = url, response.status_code, response.headers
        self._response, self._watchdog = response, watchdog

    def number(self, header: str = "Content-Length") -> int | None:
        """Return the number in a header, or None if there is none of moderate size."""
        text = self.headers.get(header, "").strip()
        return int(text) if re.fullmatch(NUMBER, text) else None

    def check(self) -> None:
        """Raise `HostError` for a status that is an error."""
        if self.status in (200, 206):
            return
        reason = f"the server answers {self.status} {self._response.reason or ''}".strip()[:200]
        temporary = self.status in TEMPORARY_STATUS
        wait = self._retry_after() if temporary else None
        raise HostError(self.url, reason, temporary=temporary, wait=wait, status=self.status)

    def _retry_after(self) -> float | None:
        from urllib3.exceptions import InvalidHeader
        from urllib3.util import Retry

        text = self.headers.get("Retry-After", "")
        with suppress(InvalidHeader, ValueError, TypeError, OverflowError):
            return Retry().parse_retry_after(text if len(text) < 40 else "")
        return None

    def blocks(self, most: int, start: int = 0, total: int | None = None) -> Iterator[bytes]:
        """Yield the body, which begins at byte `start` of a file of `total` bytes.

        Raises `HostError` for a file of more than `most` bytes, and for a body that breaks off.
        """
        if total is not None and total > most:
            raise HostError(self.url, f"has {total} bytes, and may have {most}", wrong=True)
        count, limit = start, most if total is None else total
        while block := self._read():
            count += len(block)
            if count > limit:
                raise HostError(self.url, f"goes on after the expected {limit} bytes", wrong=True)
            yield block
        if total is not None and count < total:
            reason = f"the connection broke: {count} of {total} bytes came"
            raise HostError(self.url, reason, temporary=True)

    def _read(self) -> bytes:
        with _failures(self.url, self._watchdog):
            block: bytes = self._response.raw.read1(BLOCK)
            self._watchdog.received += len(block)
            if not block and self._watchdog.reason:
                raise OSError
        return block


def read(url: str, most: int, limits: Limits = LIMITS) -> Iterator[bytes]:
    """Yield the content of `url`, of at most `most` bytes, in one attempt. Raises `HostError`."""
    with request(url, limits) as answer:
        answer.check()
        yield from answer.blocks(most, total=answer.number())


def file_digest(file: IO[bytes]) -> tuple[str, int]:
    """Return the SHA-256 of an open file, in hex, and its length."""
    digest, size = sha256(), 0
    file.seek(0)
    while block := file.read(READ_BLOCK):
        digest.update(block)
        size += len(block)
    return digest.hexdigest(), size


@contextmanager
def _file_lock(target: Path) -> Iterator[None]:
    """Hold the lock of `target`. Raises `DownloadError` if another process keeps it too long."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{target}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: waiting for another process that downloads it", target.name)
        try:
            lock.acquire(timeout=LOCK_TIMEOUT)
        except Timeout as exc:
            raise DownloadError(
                f"{target}: another process has not downloaded it in {LOCK_TIMEOUT} s: try again"
                " when that has ended"
            ) from exc
    try:
        yield
    finally:
        # A process that waits notices that the file is gone, and makes another. Windows refuses
        # to remove a file in use, and removes it on release.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


@dataclass(frozen=True)
class Download:
    """The download of a file that is renamed to `target` once it is whole and right.

    Of several processes one downloads and the others wait. What came before a connection or the
    process broke stays in `TARGET.part`, and only the rest is requested. The content is verified by
    `sha256`, in hex or its leading digits, or else by `length`. It may have `most` bytes (default:
    `length`, or `MAX_MODEL`). `headers` are for the URL's own host.
    """

    url: str
    target: Path
    sha256: str = ""
    length: int | None = None
    most: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    limits: Limits | None = None

    @property
    def part(self) -> Path:
        """The file that grows while the content arrives."""
        return self.target.with_name(f"{self.target.name}.part")

    def run(self) -> None:
        """Download the file, unless it is there. A wrong one is renamed to `TARGET.corrupt`.

        Raises `HostError` for failures of the server or the network, else `DownloadError`.
        """
        if not self.sha256 and self.length is None:
            raise HostError(self.url, "is not downloaded, as its SHA-256 is not known")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            with _file_lock(self.target):
                if not self._is_there():
                    self._fetch(self.limits or LIMITS)
        except OSError as exc:
            # A full disk should not stay full.
            with suppress(OSError):
                self.part.unlink()
            reason = exc.strerror or exc
            raise DownloadError(f"{self.target}: cannot be written ({reason})") from exc

    def _difference(self, file: IO[bytes]) -> str:
        """Describe how a file differs from the expected one. Return "" if it does not."""
        digest, size = file_digest(file)
        if self.sha256:
            right = digest.startswith(self.sha256.lower())
            return "" if right else f"its SHA-256 is {digest} and should be {self.sha256}"
        return "" if size == self.length else f"it has {size} bytes and should have {self.length}"

    def _is_there(self) -> bool:
        if not self.target.exists():
            return False
        with self.target.open("rb") as file:
            difference = self._difference(file)
        if difference:
            aside = self.target.with_name(f"{self.target.name}.corrupt")
            self.target.replace(aside)
            text = "%s: %s. It is moved to %s, and downloaded again"
            logger.warning(text, self.target, difference, aside.name)
        return not difference

    def _fetch(self, limits: Limits) -> None:
        """Repeat attempts that break, with pauses, as long as `limits` allow."""
        from urllib3.util import Retry

        fresh = Retry(limits.attempts - 1, backoff_factor=limits.backoff, backoff_max=LONGEST_WAIT)
        retry, reached = fresh, self._part_size()
        while True:
            try:
                self._attempt(limits)
                self.part.replace(self.target)
                return
            except HostError as exc:
                size = self._part_size()
                retry = fresh if size - reached >= GAIN else retry
                reached = max(reached, size)
                if not exc.temporary or limits.attempts == 1:
                    raise
                if not retry.total or (exc.wait or 0) > LONGEST_WAIT:
                    asks = f"asks to wait {exc.wait:.0f} s" if retry.total else ""
                    reason = f"{exc.reason} ({asks or f'tried {limits.attempts} times'})"
                    answered = exc.answered and not asks
                    raise HostError(self.url, reason, temporary=answered) from exc
                retry = retry.increment("GET", error=exc)
                wait = retry.get_backoff_time() if exc.wait is None else exc.wait
                text = "%s: %s: next attempt in %.0f s"
                logger.warning(text, self.target.name, exc.reason, wait)
                time.sleep(wait)

    def _part_size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self, limits: Limits) -> None:
        """Request once what the part lacks, and verify the whole."""
        with _open_part(self.part) as file:
            start = file.seek(0, os.SEEK_END)
            try:
                if not start or self._difference(file):
                    total = self._receive(file, start, limits)
                    if difference := self._difference(file):
                        # A body without a length may have broken off.
                        raise HostError(self.url, difference, wrong=True, temporary=total is None)
                os.fsync(file.fileno())
            except HostError as exc:
                if exc.wrong:
                    file.truncate(0)
                    # What came in an earlier attempt may be at fault.
                    exc.temporary |= start > 0
                raise

    def _receive(self, file: IO[bytes], start: int, limits: Limits) -> int | None:
        """Append an answer to the part, which has `start` bytes. Return the file's length."""
        from tqdm import tqdm

        headers = {**self.headers, **({"Range": f"bytes={start}-"} if start else {})}
        with request(self.url, limits, headers) as answer:
            first, total = 0, answer.number()
            if answer.status == 206:
                text = answer.headers.get("Content-Range", "").strip()
                span = re.fullmatch(rf"bytes ({NUMBER})-({NUMBER})/({NUMBER}|\*)", text)
                first = int(span[1]) if span else -1
                total = (int(span[2]) + 1 if span[3] == "*" else int(span[3])) if span else None
            if first not in (0, start) or answer.status == 416:
                file.truncate(0)
                reason = "the server has other ranges of the file than those asked for"
                raise HostError(self.url, reason, temporary=start > 0)
            answer.check()
            file.truncate(first)
            name, options = printable(self.target.name), {"unit": "B", "unit_scale": True}
            # The bar is shown if standard error is a terminal.
            with tqdm(desc=name, initial=first, total=total, disable=None, **options) as bar:
                for block in answer.blocks(self.most or self.length or MAX_MODEL, first, total):
                    file.write(block)
                    # A process that is killed keeps what has come.
                    file.flush()
                    bar.update(len(block))
        return total


@contextmanager
def _open_part(path: Path) -> Iterator[IO[bytes]]:
    """Open the part of a download, which is removed if it is empty at the end.

    Raises `OSError` if it is a link, which another user may have made.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, f"{path.name} is a symbolic link")
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "a+b") as file:
            yield file
    finally:
        if not path.stat().st_size:
            path.unlink()
