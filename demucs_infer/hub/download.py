"""Fetch one file over HTTP, so that what bears its final name is whole.

    address ──Range──▶ TARGET.part ──SHA-256, fsync──▶ rename ──▶ TARGET

What is there of `TARGET.part` is kept when a connection or the process breaks, and only the rest is
asked for the next time. The digest alone decides what is right: no ETag is compared (two hosts of
one file may disagree on it), and a mirror need not be trusted.
"""

from __future__ import annotations

import os
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from .. import __version__
from ..errors import DownloadError
from ..log import logger, printable

if TYPE_CHECKING:
    from requests import Response

READ_BLOCK = 2**20  # bytes of a file
RECEIVE_BLOCK = 2**16  # bytes of a connection
MARGIN = 2**20  # bytes that a file may have more than its rounded size, and a quarter of it
LARGEST = 2**32  # bytes of a file of unknown size
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


PATIENCE = Patience()


@dataclass(frozen=True)
class _Job:
    """What is to be fetched. `size` is in bytes, rounded, and None where it is not known."""

    url: str
    target: Path
    sha256: str
    size: int | None
    patience: Patience

    @property
    def part(self) -> Path:
        return _beside(self.target, ".part")

    @property
    def limit(self) -> int:
        return LARGEST if self.size is None else self.size + self.size // 4 + MARGIN


class _Broken(Exception):
    """An attempt failed in a way that another one may not; `wait` is what the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class _WrongContent(Exception):
    """The content is wrong, and so it is at the server if it came `whole`, in one known length."""

    def __init__(self, reason: str, whole: bool) -> None:
        super().__init__(reason)
        self.whole = whole


def fetch(
    url: str,
    target: Path,
    sha256: str,
    *,
    size: int | None = None,
    patience: Patience | None = None,
) -> None:
    """Fetch `url` as the file `target`, unless that is there with the right digest.

    Of several processes one fetches and the others wait. A file with another digest is renamed to
    `TARGET.corrupt`.

    Args:
        url: an http or https address; proxies, certificates and passwords are those of `requests`.
        target: the file; its folder is made.
        sha256: the file's digest in hex (or its leading digits, if no more are known).
        size: of the file in bytes, roughly, to stop a body without an end.
        patience: times and numbers to give up at (default: `PATIENCE`).

    Raises `DownloadError`.
    """
    if not sha256:
        raise DownloadError(f"{shown(url)}: has no known SHA-256 to check what would come")
    job = _Job(url, target, sha256.lower(), size, patience or PATIENCE)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            if not _is_there(job):
                _download(job)
    except OSError as exc:
        raise DownloadError(f"{target}: cannot be written ({exc.strerror or exc})") from exc


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hex. Raises `OSError`."""
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def shown(url: str) -> str:
    """The address without a name and password."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, waiting for another process that does."""
    from filelock import FileLock, Timeout

    lock = FileLock(_beside(target, ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("%s: waiting for another process that fetches it", target.name)
        lock.acquire()
    try:
        yield
    finally:
        # One that waits sees that the file is gone, and makes another. Windows has it in use, but
        # removes it on release.
        with suppress(OSError):
            Path(lock.lock_file).unlink()
        lock.release()


def _is_there(job: _Job) -> bool:
    """Whether the target is there and right; if it is wrong it is moved aside."""
    if not job.target.exists():
        return False
    actual = file_digest(job.target)
    if actual.startswith(job.sha256):
        return True
    aside = _beside(job.target, ".corrupt")
    job.target.replace(aside)
    logger.warning(
        "%s: its SHA-256 is %s and should be %s: moved to %s, and fetched anew",
        *(job.target, actual, job.sha256, aside.name),
    )
    return False


def _download(job: _Job) -> None:
    try:
        _fill_part(job)
        job.part.replace(job.target)
        _sync_folder(job.target.parent)
    except OSError:  # a full disk, above all, should not stay full
        with suppress(OSError):
            job.part.unlink()
        raise


def _fill_part(job: _Job) -> None:
    """Fetch the part until its digest is right, from scratch if an older half may be at fault."""
    for second in (False, True):
        try:
            _persist(job)
            return
        except _WrongContent as exc:
            job.part.unlink(missing_ok=True)
            if second or exc.whole:
                raise DownloadError(f"{shown(job.url)}: {exc}") from exc
            logger.warning("%s: %s: fetching it from the start", job.target.name, exc)


def _persist(job: _Job) -> None:
    """Repeat attempts that break, as long as `job.patience` lasts."""
    failures, reached = 0, _size(job.part)
    while True:
        try:
            _attempt(job)
            return
        except _Broken as exc:
            gained = _size(job.part) - reached >= job.patience.gain
            failures = 1 if gained else failures + 1
            reached = max(reached, _size(job.part))
            wait = _pause(job, exc, failures)
        time.sleep(wait)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _pause(job: _Job, broken: _Broken, failures: int) -> float:
    """The seconds to wait before the next attempt. Raises `DownloadError` for none."""
    patience = job.patience
    if failures >= patience.attempts:
        raise DownloadError(f"{shown(job.url)}: {broken} (tried {failures} times)") from broken
    if broken.wait is not None and broken.wait > patience.longest_wait:
        raise DownloadError(
            f"{shown(job.url)}: {broken}, and asks to wait {broken.wait:.0f} s"
        ) from broken
    doubled = patience.backoff * 2 ** (failures - 1)
    wait = min(doubled if broken.wait is None else broken.wait, patience.longest_wait)
    logger.warning("%s: %s: trying again in %.0f s", job.target.name, broken, wait)
    return wait


class _Part:
    """The file that a download grows in, with the digest of what it has."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._path = path
        self._digest = sha256()
        self._file = path.open("a+b")
        self._file.seek(0)
        while block := self._file.read(READ_BLOCK):
            self._digest.update(block)
            self.size += len(block)

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if not self.size:
            self._path.unlink()

    def write(self, block: bytes) -> None:
        self._file.write(block)
        self._file.flush()  # so that a killed process has it
        self._digest.update(block)
        self.size += len(block)

    def restart(self) -> None:
        self._file.truncate(0)
        self._digest, self.size = sha256(), 0

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()


def _attempt(job: _Job) -> None:
    """Ask once for what the part lacks, and check the whole."""
    with _Part(job.part) as part:
        if not part.digest.startswith(job.sha256):
            whole = _receive(job, part)
            if not part.digest.startswith(job.sha256):
                raise _WrongContent(
                    f"the SHA-256 of what came is {part.digest} and should be {job.sha256}", whole
                )
        part.sync()


def _receive(job: _Job, part: _Part) -> bool:
    """Append the body of an answer; returns whether all of the file came with it, as announced."""
    with _answer(job, part.size) as response:
        total = _place(response, part)
        whole = not part.size
        if total is not None and total > job.limit:
            raise _WrongContent(f"it has {total} bytes, and may have {job.limit}", whole)
        limit = job.limit if total is None else total
        with _progress_bar(job.target.name, part.size, total) as bar:
            for block in _blocks(response, job.patience):
                if part.size + len(block) > limit:
                    raise _WrongContent(f"it goes on after the expected {limit} bytes", whole)
                part.write(block)
                bar.update(len(block))
    if total is not None and part.size < total:
        raise _Broken(f"{part.size} of {total} bytes came")
    return whole and total is not None


def _progress_bar(name: str, start: int, total: int | None) -> Any:
    """A bar on standard error, if that is a terminal."""
    from tqdm import tqdm

    name = printable(name)
    return tqdm(desc=name, initial=start, total=total, unit="B", unit_scale=True, disable=None)


def _answer(job: _Job, start: int) -> Response:
    """Ask for the file from the byte `start` on."""
    import requests

    # As it is, since lengths and ranges count the bytes of the file.
    headers = {"Accept-Encoding": "identity", "User-Agent": f"demucs-infer/{__version__}"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return requests.get(job.url, headers=headers, stream=True, timeout=job.patience.timeout)
    except (requests.RequestException, ValueError) as exc:
        cause = _innermost(exc)
        if isinstance(cause, ssl.SSLCertVerificationError):
            hint = "REQUESTS_CA_BUNDLE can name a file of certificates"
            raise DownloadError(f"{shown(job.url)}: {_text(cause)} ({hint})") from exc
        if isinstance(exc, (ValueError, requests.TooManyRedirects)):  # what is no address
            raise DownloadError(f"{shown(job.url)}: {_text(exc)}") from exc
        raise _Broken(_text(cause)) from exc


def _innermost(exc: BaseException) -> BaseException:
    """What the operating system said, which HTTP clients wrap several times."""
    while inner := exc.__cause__ or exc.__context__:
        exc = inner
    return exc


def _text(exc: BaseException) -> str:
    """An exception as one line."""
    text = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    return " ".join(text.split())


def _place(response: Response, part: _Part) -> int | None:
    """Check the status and make `part` end where the body starts; returns the file's length."""
    status = response.status_code
    if status == 206:
        start, total = _content_range(response)
        if start == part.size:
            return total
    if status in (206, 416) and part.size:  # another range, or none since the file is shorter
        part.restart()
        raise _Broken("the server has other parts of the file than those asked for")
    if status in TRANSIENT:
        raise _Broken(_status_line(response), _retry_after(response))
    if status != 200:
        raise DownloadError(f"{shown(response.url)}: {_status_line(response)}")
    part.restart()
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _content_range(response: Response) -> tuple[int | None, int | None]:
    """Where a part starts, and how long the file is, as far as the server says."""
    text = response.headers.get("Content-Range", "")
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", text)
    if not found:
        return None, None
    start, last, total = found.groups()
    return int(start), int(last) + 1 if total == "*" else int(total)


def _status_line(response: Response) -> str:
    return f"the server answers {response.status_code} {response.reason or ''}".strip()


def _retry_after(response: Response) -> float | None:
    """The seconds that a server asks to wait, which it writes as such or as a date."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())


def _blocks(response: Response, patience: Patience) -> Iterator[bytes]:
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
                    raise _Broken(f"only {count} bytes came in {elapsed:.0f} s")
                start, count = time.monotonic(), 0
    except (HTTPError, OSError) as exc:
        raise _Broken(f"the connection broke: {_text(_innermost(exc))}") from exc


def _sync_folder(folder: Path) -> None:
    """Make a rename last, where folders can be opened."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
