"""The HTTP client for models, hubs, lists and tracks.

Servers are not trusted: the body of a redirect is never read, a timer ends transfers that are too
slow or too long, sizes are limited, and credentials go to the URL's own host only.

    URL ──Range──▶ TARGET.part ──SHA-256, fsync──▶ rename ──▶ TARGET
"""

from __future__ import annotations

import logging
import os
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from http.client import BadStatusLine, UnknownProtocol, responses
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote, urljoin, urlsplit

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
    """A host does not deliver a file. `summary` names the host and the reason, but no URL."""

    temporary = False  # it may deliver the file later
    wait: float | None = None  # seconds that it asks to wait
    answered = True  # there is a server
    wrong = False  # the content is not that of the file
    status = 0

    def __init__(self, url: str, reason: str, **facts: Any) -> None:
        vars(self).update(facts)
        self.reason, shown = reason, redact(url)
        host = shown.partition("://")[2].partition("/")[0]
        self.summary, text = f"{host}: {reason}", f"{shown}: {reason}"
        if not self.answered:
            self.summary = f"No connection to {host} ({reason})"
            text = f"{self.summary}. Check the network and the proxy settings: {shown}"
        super().__init__(text)


def redact(url: str, *, has_query: bool = True) -> str:
    """Return a URL for a message: without user, password, query and fragment.

    Without `has_query`, question marks and the like are parts of its names.
    """
    scheme, separator, rest = url.partition("://")
    host = re.split("[/?#]", rest, maxsplit=1)[0].rpartition("@")[2]
    # A password should have no / ? #. If it has one, its start looks like a wrong port.
    if not re.fullmatch(r"(\[.*\]|[^:]*)(:[0-9]+)?", host):
        rest = rest.rpartition("@")[2]
    if has_query:
        rest = re.split("[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    path = re.sub("://[^/]*@", "://", path)
    return scheme + separator + host.rpartition("@")[2] + slash + path


class Transfer:
    """A request, and its response: the status, headers, and the body as a stream.

    A timer thread shuts the connections down when a limit is exceeded. Checks between blocks would
    not end a read that slow headers, chunk sizes or trailers prolong.
    """

    response: Response

    def __init__(self, url: str, limits: Limits) -> None:
        self.url, self.limits = url, limits
        self._received, self._exceeded = 0, ""
        self._sockets: list[socket.socket] = []
        self._done = threading.Event()

    def watch(self, connection: socket.socket) -> socket.socket:
        """Let the timer shut a connection down, too. Raises `OSError` if the time is over."""
        # TLS takes the descriptor away from the socket: a duplicate still reaches the connection.
        self._sockets.append(connection.dup())
        if self._exceeded:
            raise OSError(self._exceeded)
        return connection

    def limited(self, options: Iterable[Any]) -> Iterable[Any]:
        """Return the options of a socket, which raise `OSError` once the time is over.

        They are read before each attempt to connect. A host may have thousands of addresses, each
        of which can take until the timeout.
        """
        transfer = self

        class Options(list[Any]):
            def __iter__(self) -> Iterator[Any]:
                if transfer._exceeded:
                    raise OSError(transfer._exceeded)
                return super().__iter__()

        return Options(options)

    def run_timer(self) -> None:
        """Wait for the end of the transfer, or shut it down when a limit is exceeded."""
        limits, deadline = self.limits, time.monotonic() + self.limits.longest
        while not self._exceeded:
            before, left = self._received, deadline - time.monotonic()
            if self._done.wait(max(0.0, min(limits.span, left))):
                return
            gained = self._received - before
            if left <= limits.span:
                self._exceeded = f"only {self._received} bytes came in {limits.longest:.0f} s"
            elif gained < limits.slowest * limits.span:
                self._exceeded = f"only {gained} bytes came in {limits.span:.0f} s"
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the timer."""
        self._done.set()
        for connection in self._sockets:
            connection.close()

    def send(self, session: Session, method: str, headers: dict[str, str], stop_at: str) -> None:
        """Send the request, and follow redirects without reading their bodies."""
        import requests

        options: Any = {"timeout": self.limits.timeout, "stream": True}
        with self.failures():
            url, parts = self.url, urlsplit(self.url)
            user, password = (unquote(text or "") for text in (parts.username, parts.password))
            auth = (user, password) if user or password else None
            for _ in range(MAX_REDIRECTS + 1):
                response = session.request(method, url, headers=headers, auth=auth, **options)
                if not response.is_redirect or (stop_at and stop_at in response.headers):
                    self.response = response
                    return
                response.close()
                location = response.headers["Location"].encode("latin-1").decode(errors="replace")
                # For requests a backslash ends the host, for urljoin it does not. `prepare` makes
                # the URL that is requested.
                url = requests.Request(method, urljoin(url, location)).prepare().url or ""
                if session.should_strip_auth(response.url, url):
                    headers.pop("Authorization", None)
                    auth = None
        raise HostError(self.url, f"more than {MAX_REDIRECTS} redirects")

    @contextmanager
    def failures(self) -> Iterator[None]:
        """Turn exceptions of requests into `HostError`, whose cause does not contain the URL."""
        import requests
        from urllib3.exceptions import HTTPError

        try:
            yield
        except (requests.RequestException, HTTPError, OSError, ValueError) as exc:
            cause: BaseException = exc
            while inner := cause.__cause__ or cause.__context__:
                cause = inner
            text = " ".join((getattr(cause, "strerror", None) or str(cause)).split())[:200]
            facts: dict[str, Any] = {}
            shown: BaseException | None = cause
            if self._exceeded:
                text, facts = self._exceeded, {"temporary": True}
            elif isinstance(cause, ssl.SSLCertVerificationError):
                text += " (REQUESTS_CA_BUNDLE can name a file of certificates)"
            else:
                # These exceptions quote the URL, or the server, which may repeat it.
                kinds = (ValueError, BadStatusLine, UnknownProtocol)
                quotes = isinstance(cause, kinds) and not isinstance(cause, ConnectionError)
                if quotes or isinstance(exc, ValueError):
                    text, shown = "the address or the answer is not valid HTTP", None
                answered = shown is None or not isinstance(exc, requests.ConnectionError)
                facts = {"temporary": not isinstance(exc, ValueError), "answered": answered}
            raise HostError(self.url, text or type(cause).__name__, **facts) from shown

    def header(self, name: str) -> str:
        """Return a header, or "" if there is none."""
        return self.response.headers.get(name, "").strip()

    def number(self, header: str = "Content-Length") -> int | None:
        """Return the number in a header, or None if there is none of moderate size."""
        text = self.header(header)
        return int(text) if re.fullmatch(NUMBER, text) else None

    def check(self) -> None:
        """Raise `HostError` for a status that is an error."""
        from urllib3.exceptions import InvalidHeader
        from urllib3.util import Retry

        status, wait = self.response.status_code, None
        if status in (200, 206):
            return
        if (temporary := status in TEMPORARY_STATUS) and len(self.header("Retry-After")) < 40:
            with suppress(InvalidHeader, ValueError, TypeError, OverflowError):
                wait = Retry().get_retry_after(self.response.raw)
        reason = f"the server answers {status} {responses.get(status, '')}".strip()
        raise HostError(self.url, reason, temporary=temporary, wait=wait, status=status)

    def blocks(self, most: int, start: int = 0, total: int | None = None) -> Iterator[bytes]:
        """Yield the body, which begins at byte `start` of a file of `total` bytes.

        Raises `HostError` for a file of more than `most` bytes, and for a body that breaks off.
        """
        if total is not None and total > most:
            raise HostError(self.url, f"has {total} bytes, over the limit of {most}", wrong=True)
        count, limit = start, most if total is None else total
        while True:
            with self.failures():
                block: bytes = self.response.raw.read1(BLOCK)
                self._received += len(block)
                if not block and self._exceeded:
                    raise OSError(self._exceeded)
            if not block:
                break
            count += len(block)
            if count > limit:
                raise HostError(self.url, f"goes on after the expected {limit} bytes", wrong=True)
            yield block
        if total is not None and count < total:
            reason = f"the connection broke: {count} of {total} bytes came"
            raise HostError(self.url, reason, temporary=True)


@contextmanager
def request(
    url: str,
    limits: Limits,
    headers: Mapping[str, str] | None = None,
    method: str = "GET",
    stop_at: str = "",
) -> Iterator[Transfer]:
    """Send a request, follow its redirects, and yield the answer.

    A redirect that has the header `stop_at` is not followed. Raises `HostError`.
    """
    thread, transfer = threading.get_ident(), Transfer(url, limits)

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    with ExitStack() as stack:
        # The records of urllib3 contain URLs with their queries.
        for name in ("urllib3.connection", "urllib3.connectionpool"):
            logging.getLogger(name).addFilter(is_of_others)
            stack.callback(logging.getLogger(name).removeFilter, is_of_others)
        stack.callback(transfer.close)
        threading.Thread(target=transfer.run_timer, daemon=True).start()
        session = stack.enter_context(_session(transfer))
        transfer.send(session, method, dict(headers or {}), stop_at)
        stack.enter_context(transfer.response)
        yield transfer


def _session(transfer: Transfer) -> Session:
    """Make a session whose connections are watched, without redirects and without ~/.netrc."""
    import requests
    from requests.adapters import HTTPAdapter

    class Adapter(HTTPAdapter):
        def get_connection_with_tls_context(self, *args: Any, **options: Any) -> Any:
            pool: Any = super().get_connection_with_tls_context(*args, **options)

            class Connection(type(pool).ConnectionCls):  # type: ignore[misc]
                socket_options: Any

                def _new_conn(self) -> socket.socket:
                    self.socket_options = transfer.limited(self.socket_options or ())
                    return transfer.watch(super()._new_conn())

            pool.ConnectionCls = Connection
            return pool

    session = requests.Session()
    # With this, requests neither reads ~/.netrc nor takes credentials from the URL of a redirect.
    session.auth = lambda request: request
    # requests would read and decompress the body of a redirect, whatever its options are.
    session.get_redirect_target = lambda resp: None  # type: ignore[method-assign]
    # Lengths and ranges count the bytes of the file: it must not be compressed.
    headers = {"Accept-Encoding": "identity", "User-Agent": f"demucs-infer/{__version__}"}
    session.headers.update(headers)
    for scheme in ("http://", "https://"):
        session.mount(scheme, Adapter())
    return session


def read(url: str, most: int, limits: Limits = LIMITS) -> Iterator[bytes]:
    """Yield the content of `url`, of at most `most` bytes, in one attempt. Raises `HostError`."""
    with request(url, limits) as transfer:
        transfer.check()
        yield from transfer.blocks(most, total=transfer.number())


@contextmanager
def _file_lock(target: Path) -> Iterator[None]:
    """Hold the lock of `target`. Raises `DownloadError` if another process keeps it too long."""
    from filelock import FileLock, Timeout

    lock = FileLock(f"{target}.lock", thread_local=False)
    try:
        with suppress(Timeout):
            lock.acquire(timeout=0)
        if not lock.is_locked:
            logger.warning("%s: waiting for another process that downloads it", target.name)
            lock.acquire(timeout=LOCK_TIMEOUT)
    except Timeout as exc:
        reason = f"another process has not downloaded it in {LOCK_TIMEOUT} s"
        raise DownloadError(f"{target}: {reason}: try again when that has ended") from exc
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

    Of several processes one downloads and the others wait. The bytes of an attempt that broke stay
    in `TARGET.part`, and only the rest is requested. The content is verified by `sha256`, in hex or
    its leading digits, or else by `length`. It may have `most` bytes (default: `length`, or
    `MAX_MODEL`). `headers` are for the URL's own host.
    """

    url: str
    target: Path
    sha256: str = ""
    length: int | None = None
    most: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    limits: Limits | None = None

    def run(self) -> None:
        """Download the file, unless it is there. A wrong one is renamed to `TARGET.corrupt`.

        Raises `HostError` for failures of the server or the network, else `DownloadError`.
        """
        if not self.sha256 and self.length is None:
            raise HostError(self.url, "is not downloaded, as its SHA-256 is not known")
        part = self.target.with_name(f"{self.target.name}.part")
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            with _file_lock(self.target):
                if self.target.exists():
                    if not self.target.is_file():
                        # A named pipe or a device could be read without end.
                        raise OSError("something else has this name")
                    with self.target.open("rb") as file:
                        difference = self._difference(file)
                    if not difference:
                        return
                    aside = self.target.with_name(f"{self.target.name}.corrupt")
                    self.target.replace(aside)
                    text = "%s: %s. It is moved to %s, and downloaded again"
                    logger.warning(text, self.target, difference, aside.name)
                self._fetch(part, self.limits or LIMITS)
        except OSError as exc:
            # A full disk should not stay full.
            with suppress(OSError):
                part.unlink()
            reason = exc.strerror or exc
            raise DownloadError(f"{self.target}: cannot be written ({reason})") from exc

    def _difference(self, file: IO[bytes]) -> str:
        """Describe how a file differs from the expected one. Return "" if it does not."""
        if not self.sha256:
            size = file.seek(0, os.SEEK_END)
            text = f"it has {size} bytes and should have {self.length}"
            return "" if size == self.length else text
        digest = sha256()
        file.seek(0)
        while block := file.read(READ_BLOCK):
            digest.update(block)
        right = digest.hexdigest().startswith(self.sha256.lower())
        return "" if right else f"its SHA-256 is {digest.hexdigest()} and should be {self.sha256}"

    def _fetch(self, part: Path, limits: Limits) -> None:
        """Repeat attempts that break, with pauses, as long as `limits` allow."""
        from urllib3.util import Retry

        fresh = Retry(limits.attempts - 1, backoff_factor=limits.backoff, backoff_max=LONGEST_WAIT)
        retry, reached = fresh, _size(part)
        while True:
            try:
                self._attempt(part, limits)
                part.replace(self.target)
                return
            except HostError as exc:
                if not exc.temporary or limits.attempts == 1:
                    raise
                if _size(part) - reached >= GAIN:
                    retry, reached = fresh, _size(part)
                asks = (exc.wait or 0) > LONGEST_WAIT
                if asks or not retry.total:
                    end = f"asks to wait {exc.wait} s" if asks else f"tried {limits.attempts} times"
                    facts = {"temporary": not asks, "answered": exc.answered}
                    raise HostError(self.url, f"{exc.reason}, {end}", **facts) from exc
                retry = retry.increment("GET", error=exc)
                wait = retry.get_backoff_time() if exc.wait is None else exc.wait
                logger.warning("%s, next attempt in %.0f s", exc.summary, wait)
                time.sleep(wait)
            finally:
                if not _size(part):
                    part.unlink(missing_ok=True)

    def _attempt(self, part: Path, limits: Limits) -> None:
        """Request the rest of the part once, and verify the whole."""
        with open(part, "a+b", opener=_without_links) as file:
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
                    # The bytes of an earlier attempt may be at fault.
                    exc.temporary |= start > 0
                raise

    def _receive(self, file: IO[bytes], start: int, limits: Limits) -> int | None:
        """Append an answer to the part, which has `start` bytes. Return the file's length."""
        from tqdm import tqdm

        headers = {**self.headers, **({"Range": f"bytes={start}-"} if start else {})}
        with request(self.url, limits, headers) as answer:
            status, first, total = answer.response.status_code, 0, answer.number()
            if status == 206:
                pattern = rf"bytes {start}-[0-9]+/({NUMBER}|\*)"
                span = re.fullmatch(pattern, answer.header("Content-Range"))
                first, status = start, status if span else 416
                rest = None if total is None else start + total
                total = rest if span is None or span[1] == "*" else int(span[1])
            if status == 416:
                reason = "the server has other ranges of the file than those asked for"
                raise HostError(self.url, reason, wrong=True)
            answer.check()
            file.truncate(first)
            name, options = printable(self.target.name), {"unit": "B", "unit_scale": True}
            # The bar is shown if standard error is a terminal.
            with tqdm(desc=name, initial=first, total=total, disable=None, **options) as bar:
                for block in answer.blocks(self.most or self.length or MAX_MODEL, first, total):
                    file.write(block)
                    # A process that is killed keeps the bytes that have come.
                    file.flush()
                    bar.update(len(block))
        return total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _without_links(path: str, flags: int) -> int:
    """Open a file. Raises `OSError` for a link, which another user may have made."""
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)
    if os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise OSError("it has a second name")
    return descriptor
